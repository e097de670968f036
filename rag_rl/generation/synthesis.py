"""Queries for passages that nobody has asked for: what each shall be like, who writes it, and what is kept.

A passage is given a bucket of lengths, a style and, for claims, whether it supports or refutes it, by weights of its
task (Reinforced-IR, arXiv 2502.11562). All of it depends on the seed and on the passage alone, and so does the choice
of passages: neither the order of the corpus nor a stop in between changes it.
"""

from __future__ import annotations

import hashlib
import heapq
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rag_rl.errors import ConfigError, DataError
from rag_rl.prompts import render, render_passages
from rag_rl.prompts.tasks import RetrievalTask, bucket_bounds
from rag_rl.text import ANSWER_MARKER, answer_tokens, extract_answer, split_thinking
from rag_rl.types import Generation, Generator, Passage, Prompt

KEPT = "kept"
PROBLEMS = {
    "failed": "the request failed for itself alone; it is made again when the task is started again",
    "empty": "the reply holds no query",
    "no_answer": "the reply holds no answer",
    "answer_not_in_passage": "the answer does not stand in the passage",
    "answer_in_query": "the query gives its answer away",
    "irrelevant": "the check says that the passage does not serve the query",
    "not_confirmed": "a reader of the passage answers the query otherwise",
    "unreadable_check": "the check's reply is neither 0 nor 1",
    "duplicate": "another passage has the same query",
}
_LABEL = re.compile(r"^(?:\W*(?:search )?(?:question|query|claim|argument|title)\s*:[\s*_]*)+", re.IGNORECASE)
_QUOTES = {'"': '"', "'": "'", "“": "”", "«": "»", "`": "`"}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# English words that nobody types into a search box.
_FUNCTION_WORDS = frozenset(
    "a an and are as at be been being by can could did do does for from had has have how i if in into is it its of on "
    "one or our shall should so some such than that the their them there these they this those to was we were what "
    "when where which who whom whose why will with would you your".split()
)
_VERDICT = re.compile(r"(?<!\d)[01](?!\d)")


@dataclass(frozen=True, slots=True)
class Unit:
    """One query that shall be written.

    Attributes:
        passage: for which.
        number: of the passage's queries, from 0.
    """

    passage: Passage
    number: int = 0

    @property
    def key(self) -> tuple[str, int, int]:
        """Tells it from all others: document, chunk and number."""
        return self.passage.doc_id, self.passage.chunk, self.number


@dataclass(frozen=True, slots=True)
class Wish:
    """What a query shall be like.

    Attributes:
        length: a bucket of words.
        style: in a word.
        supported: of a claim, whether the passage supports it, else refutes it; None for all but claims.
    """

    length: str
    style: str
    supported: bool | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """What was written.

    Attributes:
        query: the query; may be empty where there is a problem.
        answer: its answer, where one was asked for.
        problem: a key of ``PROBLEMS``; "" for none.
    """

    query: str
    answer: str | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Synthetic:
    """A unit after its last attempt.

    Attributes:
        unit: which.
        wish: what it should be like.
        draft: what was written.
        attempts: how many it took, from 1.
    """

    unit: Unit
    wish: Wish
    draft: Draft
    attempts: int

    @property
    def outcome(self) -> str:
        """``KEPT``, or the problem."""
        return self.draft.problem or KEPT


class QueryWriter(Protocol):
    """Passages in, drafts out."""

    def write(self, passages: Sequence[Passage], wishes: Sequence[Wish], *, seed: int) -> list[Draft]:
        """Returns one draft a passage."""
        ...


class QueryCheck(Protocol):
    """Drafts in, problems out."""

    def problems(self, passages: Sequence[Passage], drafts: Sequence[Draft]) -> list[str]:
        """Returns a key of ``PROBLEMS`` for each draft, "" for none."""
        ...


def choose_passages(passages: Iterable[Passage], count: int | None, *, seed: int) -> tuple[list[Passage], int]:
    """Chooses passages at random in one pass; of equal texts the first is looked at.

    Args:
        passages: may be a stream; a hash of each is kept, and the chosen ones.
        count: how many; None for all.
        seed: of the choice.

    Returns:
        The chosen ones in an order that the seed gives, and how many were left out because their text came before.

    Raises:
        ConfigError: ``count`` is below 1.
        DataError: there is no passage.
    """
    if count is not None and count < 1:
        raise ConfigError(f"passages to write queries for must be at least 1, got {count}")
    seen: set[int] = set()
    repeated = 0

    def fresh() -> Iterable[tuple[int, int, Passage]]:
        nonlocal repeated
        for place, passage in enumerate(passages):
            text = int.from_bytes(hashlib.blake2b(passage.contents.encode(), digest_size=8).digest(), "big")
            if text in seen:
                repeated += 1
                continue
            seen.add(text)
            # The place breaks no tie that a test could see; it keeps passages from being compared.
            yield _number(seed, passage.doc_id, passage.chunk, "choice"), place, passage

    chosen = sorted(fresh()) if count is None else heapq.nsmallest(count, fresh())
    if not chosen:
        raise DataError("the corpus holds no passage to write a query for")
    return [passage for _, _, passage in chosen], repeated


def draw_wish(task: RetrievalTask, unit: Unit, *, seed: int) -> Wish:
    """Draws what a query shall be like.

    Args:
        task: with the weights.
        unit: the query.
        seed: of the draw.

    Returns:
        The same for the same arguments, whatever else is drawn.
    """
    draw = random.Random(_number(seed, *map(str, unit.key), "wish"))
    length, style = (
        draw.choices(list(weights), weights=list(weights.values()))[0] for weights in (task.lengths, task.styles)
    )
    return Wish(length, style, draw.random() < 0.5 if task.claims else None)


def synthesize(
    units: Sequence[Unit],
    writer: QueryWriter,
    checks: Sequence[QueryCheck],
    task: RetrievalTask,
    *,
    attempts: int = 2,
    seed: int = 0,
) -> list[Synthetic]:
    """Writes queries and checks them; what does not pass is written again.

    Args:
        units: B queries to write.
        writer: who writes.
        checks: each sees what passed the ones before.
        task: what queries are.
        attempts: most attempts at a query, at least 1.
        seed: of wishes and sampling.

    Returns:
        B results, with the last draft of each.

    Raises:
        ConfigError: ``attempts`` is below 1.
        BackendError: as writer and checks raise it.
    """
    if attempts < 1:
        raise ConfigError(f"attempts must be at least 1, got {attempts}")
    wishes = [draw_wish(task, unit, seed=seed) for unit in units]
    found: list[Synthetic | None] = [None] * len(units)
    pending = list(range(len(units)))
    for attempt in range(1, attempts + 1):
        if not pending:
            break
        passages = [units[i].passage for i in pending]
        of_call = _number(seed, *map(str, units[pending[0]].key), str(attempt)) % 2**31
        drafts = writer.write(passages, [wishes[i] for i in pending], seed=of_call)
        for check in checks:
            open_ = [place for place, draft in enumerate(drafts) if not draft.problem]
            if not open_:
                break
            told = check.problems([passages[place] for place in open_], [drafts[place] for place in open_])
            for place, problem in zip(open_, told, strict=True):
                drafts[place] = Draft(drafts[place].query, drafts[place].answer, problem)
        for i, draft in zip(pending, drafts, strict=True):
            found[i] = Synthetic(units[i], wishes[i], draft, attempt)
        pending = [i for i, draft in zip(pending, drafts, strict=True) if draft.problem]
    return [one for one in found if one is not None]


class GeneratorWriter:
    """A language model that writes queries.

    Args:
        generator: any.
        task: what queries and passages are.
        prompt: name or path of a prompt with ``$passage`` and, if it likes, ``$task``, ``$query_type``,
            ``$passage_type``, ``$length``, ``$style``, ``$claim`` and ``$examples``.
        with_answers: whether an answer is asked for; it stands behind the marker, and must stand in the passage.
        answer_marker: as above.
        temperature: of the sampling; 0 writes the same query at every attempt.
        top_p: share of the probability mass that is sampled from.
        max_new_tokens: budget of a reply.
        max_passage_chars: passages are cut to so many characters.

    Raises:
        ConfigError: no such prompt, or it does not fit.
    """

    def __init__(
        self,
        generator: Generator,
        task: RetrievalTask,
        *,
        prompt: str = "synthesize_query",
        with_answers: bool = False,
        answer_marker: str = ANSWER_MARKER,
        temperature: float = 0.5,
        top_p: float = 1.0,
        max_new_tokens: int = 128,
        max_passage_chars: int = 8000,
    ) -> None:
        self.generator, self.task, self.prompt = generator, task, prompt
        self.with_answers, self.answer_marker = with_answers, answer_marker
        self.temperature, self.top_p, self.max_new_tokens = temperature, top_p, max_new_tokens
        self.max_passage_chars = max_passage_chars
        probe = "\u2603"  # in no prompt
        if probe not in _rendered(self._fields(Passage("", probe), Wish("<5", "plain")), prompt):
            raise ConfigError(f"prompt {prompt!r} has no $passage: without it the model sees nothing")

    def write(self, passages: Sequence[Passage], wishes: Sequence[Wish], *, seed: int) -> list[Draft]:
        """Asks for one query a passage, in one call.

        Args:
            passages: B passages.
            wishes: B wishes.
            seed: of the sampling, where the generator heeds one.

        Returns:
            B drafts.

        Raises:
            BackendError: as the generator raises it.
        """
        prompts: list[Prompt] = [
            [{"role": "user", "content": _rendered(self._fields(passage, wish), self.prompt)}]
            for passage, wish in zip(passages, wishes, strict=True)
        ]
        replies = self.generator.generate(
            prompts,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )
        return [self._draft(row, passage, wish) for row, passage, wish in zip(replies, passages, wishes, strict=True)]

    def _fields(self, passage: Passage, wish: Wish) -> dict[str, str]:
        claim = "" if wish.supported is None else f"\n- The passage {'supports' if wish.supported else 'refutes'} it."
        examples = "".join(f"\n- {one}" for one in self.task.examples)
        return {
            "task": self.task.instruction,
            "query_type": self.task.query_type,
            "passage_type": self.task.passage_type,
            "length": length_in_words(wish.length),
            "style": wish.style,
            "claim": claim,
            "examples": f"\n\nExamples of what is looked for, about other passages:{examples}" if examples else "",
            "passage": passage.contents[: self.max_passage_chars],
        }

    def _draft(self, row: Sequence[Generation], passage: Passage, wish: Wish) -> Draft:
        if not row or row[0].finish_reason == "error":
            return Draft("", problem="failed")
        draft = parse_draft(row[0].text, with_answer=self.with_answers, answer_marker=self.answer_marker)
        if draft.problem or draft.answer is None:
            return draft
        problem = ""
        if not holds(passage.contents, draft.answer):
            problem = "answer_not_in_passage"
        elif wish.supported is None and holds(draft.query, draft.answer):
            problem = "answer_in_query"
        return Draft(draft.query, draft.answer, problem)


def content_words(query: str) -> str:
    """What somebody types who looks for the same: the words that carry the meaning, in their order. English only.

    Args:
        query: a question or a sentence.

    Returns:
        Its words without function words and punctuation around them; the query itself where nothing would be left.

    Example:
        >>> content_words("Which river does Tamsaham lie on?")
        'river Tamsaham lie'
    """
    words = [word.strip(".,:;?!\"'()") for word in query.split()]
    return " ".join(word for word in words if word and word.lower() not in _FUNCTION_WORDS) or query


class SentenceWriter:
    """Takes a sentence of the passage for its query, cut to the bucket of lengths; there is no model.

    The inverse cloze task (Lee et al. 2019, arXiv 1906.00300). Who trains on such queries should take the sentence out
    of the passage now and then; they keep their "duplicate" words, and are easy.
    """

    def write(self, passages: Sequence[Passage], wishes: Sequence[Wish], *, seed: int) -> list[Draft]:
        """Chooses one sentence a passage.

        Args:
            passages: B passages.
            wishes: B wishes; the style is not heeded.
            seed: of the choice.

        Returns:
            B drafts without answers.
        """
        return [self._draft(passage, wish, seed) for passage, wish in zip(passages, wishes, strict=True)]

    def _draft(self, passage: Passage, wish: Wish, seed: int) -> Draft:
        low, high = bucket_bounds(wish.length)
        sentences = [words for text in _SENTENCE_END.split(passage.text) if (words := text.split())]
        long = [words for words in sentences if len(words) >= low] or sentences
        if not long:
            return Draft("", problem="empty")
        draw = random.Random(_number(seed, passage.doc_id, passage.chunk, "sentence"))
        words = draw.choice(long)
        return Draft(" ".join(words if high is None else words[: high - 1]))


class RelevanceCheck:
    """Asks a language model whether the passage serves the query, 1 or 0 (the published quality control).

    The published code keeps whatever reply holds the character 1; here the reply's last 0 or 1 that stands for itself
    counts, and a reply without one is a problem of its own.

    Args:
        generator: any.
        task: what queries and passages are.
        prompt: name or path of a prompt with ``$query`` and ``$passage``.
        max_new_tokens: budget of a reply.
        max_passage_chars: passages are cut to so many characters.

    Raises:
        ConfigError: no such prompt, or it does not fit.
    """

    def __init__(
        self,
        generator: Generator,
        task: RetrievalTask,
        *,
        prompt: str = "check_query",
        max_new_tokens: int = 16,
        max_passage_chars: int = 8000,
    ) -> None:
        self.generator, self.task, self.prompt = generator, task, prompt
        self.max_new_tokens, self.max_passage_chars = max_new_tokens, max_passage_chars
        self._prompt(Passage("", "-"), "-")

    def problems(self, passages: Sequence[Passage], drafts: Sequence[Draft]) -> list[str]:
        """Asks about all drafts in one call.

        Args:
            passages: B passages.
            drafts: B drafts.

        Returns:
            B problems: "", ``irrelevant``, ``unreadable_check`` or ``failed``.

        Raises:
            BackendError: as the generator raises it.
        """
        prompts: list[Prompt] = [
            [{"role": "user", "content": self._prompt(passage, draft.query)}]
            for passage, draft in zip(passages, drafts, strict=True)
        ]
        replies = self.generator.generate(prompts, max_new_tokens=self.max_new_tokens, temperature=0.0)
        found = []
        for row in replies:
            if not row or row[0].finish_reason == "error":
                found.append("failed")
                continue
            verdicts = _VERDICT.findall(split_thinking(row[0].text)[1] or "")
            found.append("unreadable_check" if not verdicts else "" if verdicts[-1] == "1" else "irrelevant")
        return found

    def _prompt(self, passage: Passage, query: str) -> str:
        fields = {
            "task": self.task.instruction,
            "query_type": self.task.query_type,
            "passage_type": self.task.passage_type,
            "query": query,
            "passage": passage.contents[: self.max_passage_chars],
        }
        return _rendered(fields, self.prompt)


class AnswerCheck:
    """Lets a reader answer the query from the passage: the written answer must be in its own (Alberti et al. 2019).

    Args:
        generator: the reader.
        prompt: name or path of a prompt with ``$question`` and ``$passages``.
        answer_marker: what stands before the answer in its reply.
        max_new_tokens: budget of a reply.

    Raises:
        ConfigError: no such prompt, or it does not fit.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        prompt: str = "answer",
        answer_marker: str = ANSWER_MARKER,
        max_new_tokens: int = 128,
    ) -> None:
        self.generator, self.prompt = generator, prompt
        self.answer_marker, self.max_new_tokens = answer_marker, max_new_tokens
        _rendered({"question": "-", "passages": "-"}, prompt)

    def problems(self, passages: Sequence[Passage], drafts: Sequence[Draft]) -> list[str]:
        """Lets all queries be answered in one call.

        Args:
            passages: B passages.
            drafts: B drafts with answers.

        Returns:
            B problems: "", ``not_confirmed`` or ``failed``.

        Raises:
            BackendError: as the generator raises it.
        """
        prompts: list[Prompt] = []
        for passage, draft in zip(passages, drafts, strict=True):
            fields = {"question": draft.query, "passages": render_passages([passage])}
            prompts.append([{"role": "user", "content": _rendered(fields, self.prompt)}])
        replies = self.generator.generate(prompts, max_new_tokens=self.max_new_tokens, temperature=0.0)
        found = []
        for row, draft in zip(replies, drafts, strict=True):
            if not row or row[0].finish_reason == "error":
                found.append("failed")
                continue
            said = extract_answer(row[0].text, marker=self.answer_marker)
            confirmed = said is not None and draft.answer is not None and holds(said, draft.answer)
            found.append("" if confirmed else "not_confirmed")
        return found


def parse_draft(reply: str, *, with_answer: bool, answer_marker: str = ANSWER_MARKER) -> Draft:
    r"""Reads a query, and perhaps its answer, from a reply.

    Thinking, a label ("Question:") and quotation marks around the query are taken off. What stands behind the last
    marker, on its line, is the answer; of the text before it, the last line that does not end in a colon ("Here is a
    question:") is the query.

    Args:
        reply: of the model.
        with_answer: whether there must be an answer; else one is cut off and forgotten.
        answer_marker: what stands before it.

    Returns:
        A draft; its problem is ``empty``, ``no_answer`` or "".

    Example:
        >>> parse_draft('Question: "Who rules Elmton?"\nAnswer: Mira', with_answer=True)
        Draft(query='Who rules Elmton?', answer='Mira', problem='')
    """
    _, said = split_thinking(reply)
    before, marker, after = (said or "").rpartition(answer_marker)
    asked = before if marker else (said or "")
    lines = [line for line in (_bare(line) for line in asked.splitlines()) if line and not line.endswith(":")]
    query = lines[-1] if lines else ""
    answer = after.strip().splitlines()[0].strip() if marker and after.strip() else ""
    if not any(character.isalnum() for character in query):
        return Draft("", problem="empty")
    if not with_answer:
        return Draft(query)
    return Draft(query, answer or None, "" if answer_tokens(answer) else "no_answer")


def holds(text: str, answer: str) -> bool:
    """Tells whether an answer stands in a text, word for word after normalisation.

    Args:
        text: any.
        answer: to look for.

    Returns:
        Whether its tokens stand there one after the other; False for an answer without tokens.

    Example:
        >>> holds("Mira, the miller, rules Elmton.", "a miller"), holds("Mirabel rules.", "Mira")
        (True, False)
    """
    words, wanted = answer_tokens(text), answer_tokens(answer)
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def length_in_words(bucket: str) -> str:
    """Says a bucket of lengths in words.

    Args:
        bucket: as in a task.

    Returns:
        What stands before "words".

    Example:
        >>> length_in_words("<5"), length_in_words("5-10"), length_in_words(">=15")
        ('fewer than 5', '5 to 9', '15 or more')
    """
    low, high = bucket_bounds(bucket)
    if high is None:
        return f"{low} or more"
    return f"fewer than {high}" if bucket.startswith("<") else f"{low} to {high - 1}"


def in_bucket(query: str, bucket: str) -> bool:
    """Tells whether a query has the length that was wished for.

    Args:
        query: any.
        bucket: as in a task.

    Returns:
        Whether its number of words lies in the bucket.
    """
    low, high = bucket_bounds(bucket)
    return low <= len(query.split()) and (high is None or len(query.split()) < high)


def _bare(line: str) -> str:
    line = _LABEL.sub("", line.strip()).strip(" \t*_")
    while len(line) > 1 and _QUOTES.get(line[0]) == line[-1]:
        line = line[1:-1].strip()
    return line


def _rendered(fields: Mapping[str, str], prompt: str) -> str:
    try:
        return render(prompt, **fields)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error


def _number(seed: int, *parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr((seed, parts)).encode(), digest_size=8).digest(), "big")
