"""A chain of steps as one sequence of tokens, for GRPO over whole chains.

In the layout "chat" (``rag_rl.reasoning.StepPrompts``) a chain is a conversation, and a conversation a sequence: the
question's turn is the prompt; then come, in turn, the tokens that the model sampled for a step and the tokens that the
chat template puts between the turns, the step's documents among them. Sampled tokens are never tokenised again.

A sequence cannot lose what it has shown. Where the budget runs short it is the newest documents that give way, lowest
ranked first, not the oldest as in a prompt that is made anew for each step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rag_rl.errors import ConfigError
from rag_rl.reasoning import (
    Failure,
    Finish,
    Observation,
    Search,
    StepRecord,
    StepTrajectory,
    Trajectory,
    decide_by,
    read_record,
    render_chain,
    render_documents,
)
from rag_rl.reasoning.step_prompts import LEFT_OUT
from rag_rl.reasoning.steps import NO_DOCUMENTS
from rag_rl.types import Hit, Passage

Continue: TypeAlias = Callable[[Sequence[Sequence[int]]], "list[Continuation]"]
"""Continues B rows of token ids; must be called with none as well, where the calls of several processes are
collective."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model sampled after a row of token ids.

    Attributes:
        ids: T token ids, at least one; the end token included where there is one.
        log_probs: (T,) of the ids when they were sampled; None where the engine does not tell.
    """

    ids: Sequence[int]
    log_probs: Sequence[float] | None = None


@dataclass(slots=True)
class ChainTokens:
    """A finished chain in tokens.

    Attributes:
        prompt_ids: the question's turn and the generation prompt.
        completion_ids: T token ids of everything after it; at least one.
        steps: (T,) number of the step that sampled the token, from 1; 0 for a token that was injected.
        log_probs: (T,) as sampled, 0.0 for injected tokens; None where the engine does not tell.
    """

    prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    log_probs: list[float] | None = None


class ChatTurns:
    """The token ids that a chat template puts around the model's own turns.

    They are cut out of a rendered conversation with the same turns, so that they are what the template gives whatever
    it adds, and depend on nothing that was sampled.

    Args:
        tokenizer: of transformers, with a chat template.
        end_ids: tokens that end a turn of the model.
        options: further arguments of the template (``chat_template_kwargs``).

    Attributes:
        end: the token by which the template ends a turn of the model.
        rewrites: whether the template shows an earlier turn of the model otherwise than it was generated (as templates
            of thinking models do); a sequence then differs from the conversation rendered anew.

    Raises:
        ConfigError: there is no chat template, or it ends no turn with one of the end tokens.
    """

    def __init__(self, tokenizer: Any, *, end_ids: Collection[int], options: dict[str, Any] | None = None) -> None:
        if not tokenizer.chat_template:
            raise ConfigError("the tokenizer has no chat template, and a chain is a conversation: take a chat model")
        self.tokenizer, self.end_ids, self.options = tokenizer, frozenset(end_ids), dict(options or {})
        asked = {"role": "user", "content": "q"}
        said = {"role": "assistant", "content": "s"}
        # With a turn after it: some templates write the last turn of the model differently from earlier ones.
        (shown,) = self._render([[asked, said, asked]])
        (prompt,) = self._render([[asked]])
        before = sum(token in self.end_ids for token in prompt)
        ends = [place for place, token in enumerate(shown) if token in self.end_ids]
        if len(ends) < before + 2:
            raise ConfigError("the chat template does not end the model's turns with an end token of the model")
        self.end, self._ends = shown[ends[before]], before + 1
        self.rewrites = shown[: len(prompt)] != prompt

    def first(self, questions: Sequence[str]) -> list[list[int]]:
        """The prompts of questions.

        Args:
            questions: B questions.

        Returns:
            B lists of token ids, each up to the point where the model begins.
        """
        return self._render([[{"role": "user", "content": render_chain(q, (), ())}] for q in questions])

    def between(self, texts: Sequence[str]) -> list[list[int]]:
        """What stands between two turns of the model.

        Args:
            texts: B contents of the user turn between them.

        Returns:
            B lists of token ids: from behind the end token of the earlier turn to where the model begins again.
        """
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "s"}]
        found = []
        for ids in self._render([[*turns, {"role": "user", "content": text}] for text in texts]):
            ends = (place for place, token in enumerate(ids) if token in self.end_ids)
            found.append(ids[[next(ends) for _ in range(self._ends)][-1] + 1 :])
        return found

    def _render(self, conversations: list[list[dict[str, str]]]) -> list[list[int]]:
        if not conversations:
            return []
        rows = self.tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=False, **self.options
        )
        return [list(ids) for ids in rows]


class ChainWriter:
    """Writes chains in tokens, as a ``Reader`` of the rollout loop: one call for the next step of all running chains.

    The note of each decision is a ``StepRecord`` with the whole row of token ids before the step, so that a row of the
    next step begins with it.

    Args:
        turns: what stands between steps.
        go_on: samples a step after a row.
        max_step_tokens: the most tokens of a step, >= 1.
        max_tokens: the most tokens of a chain behind its prompt. A chain that has no room for another whole step, even
            without its documents, ends there and has failed.

    Attributes:
        log_probs: of the steps sampled so far, by ``id`` of their record, where the engine tells them.
    """

    def __init__(self, turns: ChatTurns, go_on: Continue, *, max_step_tokens: int, max_tokens: int) -> None:
        self.turns, self.go_on = turns, go_on
        self.max_step_tokens, self.max_tokens = max_step_tokens, max_tokens
        self.log_probs: dict[int, Sequence[float]] = {}

    def decide(self, trajectories: Sequence[Trajectory]) -> list[Search | Finish | Failure]:
        """Writes the next step of each trajectory.

        Args:
            trajectories: B trajectories whose hops hold the records of their steps.

        Returns:
            B decisions; ``Finish(None)`` for a chain without room.
        """
        rows = self._rows(trajectories)
        written = iter(self.go_on([row for row, _ in filter(None, rows)]))
        decided: list[Search | Finish | Failure] = []
        for trajectory, found in zip(trajectories, rows, strict=True):
            if found is None:
                decided.append(Finish(None))
                continue
            row, left_out = found
            step = next(written)
            text = self.turns.tokenizer.decode(step.ids, skip_special_tokens=True)
            record = read_record(len(trajectory.hops) + 1, text)
            record.prompt_ids, record.completion_ids = tuple(row), tuple(step.ids)
            record.finish_reason = "stop" if step.ids[-1] in self.turns.end_ids else "length"
            record.left_out = left_out
            if step.log_probs is not None:
                self.log_probs[id(record)] = step.log_probs
            decided.append(decide_by(trajectory, record))
        return decided

    def observe(
        self, trajectories: Sequence[Trajectory], searches: Sequence[Search], hits: Sequence[Sequence[Hit]]
    ) -> list[Observation | Failure]:
        """Tells nothing: the documents themselves go into the sequence.

        Args:
            trajectories: B trajectories.
            searches: their searches.
            hits: what was found.

        Returns:
            B empty observations.
        """
        del searches, hits
        return [Observation("", "ambiguous")] * len(trajectories)

    def answer(self, trajectories: Sequence[Trajectory]) -> list[str | Failure | None]:
        """Gives no answer: a chain that has none within its budget has failed.

        Args:
            trajectories: B trajectories.

        Returns:
            B times None.
        """
        return [None] * len(trajectories)

    def sequence(self, trajectory: StepTrajectory) -> ChainTokens:
        """Puts a finished chain together.

        Args:
            trajectory: played by this writer.

        Returns:
            Its tokens. A chain that was dropped before its first step holds one injected end token, since TRL takes no
            empty completions.
        """
        if not trajectory.steps:
            (prompt,) = self.turns.first([trajectory.question.question])
            return ChainTokens(prompt, [self.turns.end], [0], [0.0] if self.log_probs else None)
        made = ChainTokens(list(trajectory.steps[0].prompt_ids or ()))
        known: list[float] = []
        for record in trajectory.steps:
            sampled = record.completion_ids or ()
            injected = (record.prompt_ids or ())[len(made.prompt_ids) + len(made.completion_ids) :]
            made.completion_ids += [*injected, *sampled]
            made.steps += [0] * len(injected) + [record.number] * len(sampled)
            known += [0.0] * len(injected) + list(self.log_probs.get(id(record), ()))
        if len(known) == len(made.completion_ids):
            made.log_probs = known
        return made

    def _rows(self, trajectories: Sequence[Trajectory]) -> list[tuple[list[int], int] | None]:
        """What each chain goes on from, and how many documents it has no room for; None for no room at all."""
        new = [trajectory for trajectory in trajectories if not trajectory.hops]
        prompts = iter(self.turns.first([trajectory.question.question for trajectory in new]))
        running = [trajectory for trajectory in trajectories if trajectory.hops]
        shown = [[hit.passage for hit in trajectory.hops[-1].hits] for trajectory in running]
        injected = iter(self.turns.between([render_documents(passages) for passages in shown]))
        passages = iter(shown)
        return [
            self._row(trajectory, next(injected), next(passages)) if trajectory.hops else (next(prompts), 0)
            for trajectory in trajectories
        ]

    def _row(
        self, trajectory: Trajectory, injected: list[int], passages: list[Passage]
    ) -> tuple[list[int], int] | None:
        first: StepRecord = trajectory.hops[0].note
        last: StepRecord = trajectory.hops[-1].note
        row = [*(last.prompt_ids or ()), *(last.completion_ids or ())]
        if row[-1] not in self.turns.end_ids:  # it ran into its budget: its turn is ended for it
            row.append(self.turns.end)
        room = self.max_tokens - (len(row) - len(first.prompt_ids or ())) - self.max_step_tokens
        kept = len(passages)
        while len(injected) > room and kept:
            kept -= 1
            text = render_documents(passages[:kept], empty=NO_DOCUMENTS if kept else LEFT_OUT)
            (injected,) = self.turns.between([text])
        return (row + injected, len(passages) - kept) if len(injected) <= room else None


def repeated_ngrams(ids: Sequence[int], n: int = 4) -> float | None:
    """Measures how much a text repeats itself.

    Args:
        ids: T token ids.
        n: length of the runs that are compared, >= 1.

    Returns:
        Share of the n-grams that stood there before, in [0, 1); None for fewer than n tokens.

    Example:
        >>> repeated_ngrams([1, 2, 3, 1, 2, 3], n=2)
        0.4
    """
    runs = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else None
