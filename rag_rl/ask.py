"""Answers from a finished run, opened from its folder, or from an assembly of finished parts, named in a file.

Example:
    ::

        from rag_rl.ask import open_run
        rag = open_run("runs/demo")
        print(rag.ask("Who rules Elmton?").answer)
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from rag_rl.config.arguments import (
    DataArguments,
    GeneratorArguments,
    ReasonerArguments,
    RetrieverArguments,
    RewardArguments,
)
from rag_rl.config.parsing import fill
from rag_rl.errors import BackendError, ConfigError, RunFolderError
from rag_rl.text import normalize_answer
from rag_rl.types import Hit, Question

if TYPE_CHECKING:
    from rag_rl.evaluation import Answered, Assembly, ReasoningAssembly
    from rag_rl.evaluation.measuring import SearchOnly

NEEDS_GOLD = frozenset({"em", "f1", "contains_em", "citation", "judged", "constant"})


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back to one question.

    Attributes:
        answer: the answer, None where the model gave none, or where nobody answers.
        text: everything that the model wrote; of a reasoner its steps, without the documents between them.
        hits: the passages that it read, in that order, with the retriever's scores.
        scores: rewards of this answer that need no gold answer, and ``agreement``, the share of candidates with the
            same answer; empty unless several candidates were drawn.
    """

    answer: str | None
    text: str
    hits: tuple[Hit, ...]
    scores: Mapping[str, float]


class Answerer:
    """An assembly, ready to answer.

    Args:
        assembly: with a generator or a reasoner, or one that only searches.
        judge: named values of the rewards that need no gold answer, for columns of completions.
        weights: weight of each of these rewards.
    """

    def __init__(
        self,
        assembly: Assembly | ReasoningAssembly | SearchOnly,
        judge: Callable[..., Mapping[str, Any]] | None,
        weights: Mapping[str, float],
    ) -> None:
        self.assembly = assembly
        self.judge = judge
        self.weights = weights

    def ask(self, question: str, *, best_of: int = 1, seed: int = 0) -> Reply:
        """Answers one question.

        Args:
            question: any text.
            best_of: candidates to draw. With more than one, the best by the run's rewards that need no gold answer is
                returned; among equals the one that most candidates agree with.
            seed: of the drawing.

        Returns:
            Answer, text, passages and scores.

        Raises:
            ConfigError: the question is empty, ``best_of`` below 1, or above it where nobody answers.
            BackendError: the generator gave no answer.
        """
        if not question.strip():
            raise ConfigError("the question is empty")
        if best_of < 1:
            raise ConfigError(f"best_of must be at least 1, got {best_of}")
        asked = [Question("asked", question.strip(), ("",))]
        if best_of == 1:
            drawn = self.assembly.answer(asked)[0]
        elif not hasattr(self.assembly, "generator"):
            raise ConfigError("best_of chooses among answers, and this assembly only searches")
        else:
            drawn = cast("Assembly", self.assembly).answer(asked, temperature=1.0, n=best_of, seed=seed)[0]
        candidates = [one for one in drawn if one.failure is None]
        if not candidates:
            raise BackendError(str(drawn[0].failure))
        return _reply(candidates[0], {}) if best_of == 1 else self._best(candidates)

    def _best(self, candidates: list[Answered]) -> Reply:
        same = Counter(normalize_answer(c.answer or "") for c in candidates)
        scores: list[dict[str, float]] = [{} for _ in candidates]
        if self.judge is not None:
            named = self.judge(
                completions=[c.generation.text for c in candidates],
                completion_ids=[list(c.generation.token_ids or ()) for c in candidates],
                question=[c.asked.question.question for c in candidates],
                passages=[[hit.passage.contents for hit in c.asked.shown] for c in candidates],
                answers=[list(c.asked.question.answers) for c in candidates],
            )
            for name, values in named.items():
                for score, value in zip(scores, values, strict=True):
                    if value is not None:
                        score[name] = value
        for candidate, score in zip(candidates, scores, strict=True):
            score["agreement"] = same[normalize_answer(candidate.answer or "")] / len(candidates)

        def rank(i: int) -> tuple[bool, float, float]:
            reward = sum(self.weights.get(name, 0.0) * value for name, value in scores[i].items())
            return candidates[i].answer is not None, reward, scores[i]["agreement"]

        best = max(range(len(candidates)), key=rank)
        return _reply(candidates[best], scores[best])


def open_run(folder: str | Path, *, device: str | None = None, **changed: Any) -> Answerer:
    """Opens the folder of a finished run of a generator or a reasoner.

    Args:
        folder: the run folder.
        device: where the model goes; None for the best there is.
        **changed: settings of the run to change for asking, for example ``retriever_top_k=10``.

    Returns:
        Something to ask.

    Raises:
        RunFolderError: the folder holds no finished run of a generator or a reasoner.
        ConfigError: there is no setting of that name.
        RetrievalIndexError: the run's index is damaged; a missing one is built again from the corpus.
    """
    folder = Path(folder)
    recorded = read_settings(folder)
    if unknown := sorted(changed.keys() - recorded.keys()):
        raise ConfigError(f"{folder} has no setting {unknown[0]!r}: resolved_config.yaml lists them all")
    settings = {**recorded, **changed}
    if "reasoner_layout" in settings:
        return Answerer(_open_reasoner(folder, settings, device), None, {})
    if "generator_prompt" not in settings:
        raise RunFolderError(f"{folder} is a run of {settings.get('recipe')}, which trains no generator")
    return Answerer(
        _open_generator(folder, settings, device), *_gold_free_rewards(settings, fill(GeneratorArguments, settings))
    )


def open_assembly(config: str | Path, *, argv: Sequence[str] = ()) -> Answerer:
    """Opens an assembly of finished parts, as ``recipes/evaluate_rag.py`` evaluates it.

    Args:
        config: path of a YAML file, or in a source checkout the name of a config of ``evaluate_rag``.
        argv: further flags, for example ``["--retriever_top_k", "10"]``.

    Returns:
        Something to ask.

    Raises:
        ConfigError: a key, a type, a value or a file is wrong, or parts that do not go together.
        RunFolderError: the folder of a part holds no finished run of such a part.
        DataError: a model or the corpus is missing or bad.
    """
    from rag_rl.config.assemblies import open_assembly as build

    return Answerer(cast("Any", build(config, argv=argv)), None, {})


def _open_reasoner(folder: Path, settings: Mapping[str, Any], device: str | None) -> ReasoningAssembly:
    from rag_rl.config.parts import build_step_setup
    from rag_rl.evaluation.reasoning import ReasoningAssembly

    reasoner_args = fill(ReasonerArguments, settings)
    setup = build_step_setup(reasoner_args, fill(RetrieverArguments, settings), fill(DataArguments, settings))
    return ReasoningAssembly(setup).reloaded(folder, device=device, batch_size=reasoner_args.reasoner_eval_batch_size)


def _open_generator(folder: Path, settings: Mapping[str, Any], device: str | None) -> Assembly:
    from rag_rl.config.parts import build_retriever
    from rag_rl.evaluation.assembly import Assembly
    from rag_rl.generation.transformers_generator import TransformersGenerator

    generator_args = fill(GeneratorArguments, settings)
    retriever_args = fill(RetrieverArguments, settings)
    generator = TransformersGenerator.from_pretrained(
        str(folder), device=device, generator_type=generator_args.generator_type
    )
    budget = int(settings["max_completion_length"])
    limits = [generator_args.generator_max_prompt_tokens, generator.prompt_limit(budget)]
    return Assembly(
        retriever=build_retriever(retriever_args, fill(DataArguments, settings)),
        generator=generator,
        prompt=_kept_prompt(folder, generator_args.generator_prompt),
        answer_marker=generator_args.generator_answer_marker,
        top_k=retriever_args.retriever_top_k,
        order=generator_args.generator_passage_order,
        max_new_tokens=budget,
        max_prompt_tokens=min((limit for limit in limits if limit is not None), default=None),
        count_tokens=generator.prompt_tokens,
        generator_type=generator_args.generator_type,
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads what a run was made with.

    Args:
        folder: the run folder.

    Returns:
        Every setting by name.

    Raises:
        RunFolderError: no run is there, or it is not finished.
    """
    recorded = folder / "resolved_config.yaml"
    if not recorded.is_file():
        raise RunFolderError(f"{folder} holds no run (there is no resolved_config.yaml in it)")
    if not (folder / "metrics.json").is_file():
        raise RunFolderError(f"{folder} holds an unfinished run: go on with --resume_from_checkpoint true")
    settings: dict[str, Any] = yaml.safe_load(recorded.read_text(encoding="utf-8"))
    return settings


def _reply(answered: Answered, scores: Mapping[str, float]) -> Reply:
    return Reply(answered.answer, answered.generation.text, answered.asked.shown, scores)


def _kept_prompt(folder: Path, name: str) -> str:
    kept = folder / "prompts" / f"{Path(name).stem}.txt"
    return str(kept) if kept.is_file() else name


def _gold_free_rewards(
    settings: Mapping[str, Any], generator_args: GeneratorArguments
) -> tuple[Callable[..., Mapping[str, Any]] | None, dict[str, float]]:
    """The run's rewards that can score an answer to a new question, with their weights."""
    from types import SimpleNamespace

    from rag_rl.config.parts import build_rewards, default_weights

    names = settings["reward_names"]
    weights = settings.get("reward_weights") or default_weights(names)
    kept = {
        name: weight for name, weight in zip(names, weights, strict=True) if name not in NEEDS_GOLD and ":" not in name
    }
    if not kept:
        return None, {}
    args = dataclasses.replace(fill(RewardArguments, settings), reward_names=list(kept), reward_required=[])
    training = SimpleNamespace(reward_weights=None, max_completion_length=settings["max_completion_length"])
    return build_rewards(args, generator_args, training).score, kept
