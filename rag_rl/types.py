"""The values that travel between the parts of rag-rl, and the protocol that each part speaks.

Everything here is plain data or a ``typing.Protocol``: no torch, no faiss, no network. A part is whatever has the
right methods; nothing has to inherit from anything. All protocols are batch-first and give one result per input, in
input order.

Shape letters, used through the whole project: B prompts (or queries), G group, K candidates, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[np.float32]
    IntArray: TypeAlias = npt.NDArray[np.int64]
else:
    Array = IntArray = Any

Message: TypeAlias = dict[str, str]
"""One chat turn: ``{"role": "user", "content": "..."}``."""

Prompt: TypeAlias = "str | list[Message]"
"""What a generator is given: plain text, or chat turns that its own template renders."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a corpus: a whole document, or one chunk of it.

    Attributes:
        doc_id: unique in its corpus; for a chunk the document's own id, so that gold document ids match it.
        text: what the reader sees, without the title.
        title: may be empty.
        chunk: number of the chunk in its document, from 0.
    """

    doc_id: str
    text: str
    title: str = ""
    chunk: int = 0

    @property
    def contents(self) -> str:
        """Title and text in one string: what is embedded and what a reader is shown."""
        return f"{self.title}\n{self.text}" if self.title else self.text


# Not frozen: a frozen dataclass sets each field through object.__setattr__, four times slower, and a search of 256
# queries makes thousands of these. Treat it as immutable all the same.
@dataclass(slots=True)
class Hit:
    """One passage that a search returned.

    Attributes:
        passage: the passage itself.
        score: the retriever's own score, higher is better; comparable within one search only.
        rank: position in the returned list, from 1.
    """

    passage: Passage
    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class Query:
    """A search request that carries its history, for retrievers that read it (HARR, arXiv 2602.03645, section 4.2).

    Attributes:
        text: the query itself; all that a history-unaware retriever reads.
        question: the user's original question, when the query is one hop of it.
        history: earlier hops, oldest first, as (sub-query, what was learned).
    """

    text: str
    question: str = ""
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the answers that count as right.

    Attributes:
        qid: unique in its set.
        question: the text.
        answers: every accepted answer (aliases); scores take the maximum over them.
        gold_doc_ids: documents that hold the evidence; empty where unknown.
        hops: how many documents must be combined; None where unknown.
        meta: anything else the data carries (type, decomposition, ...), never read by the core.
    """

    qid: str
    question: str
    answers: tuple[str, ...]
    gold_doc_ids: tuple[str, ...] = ()
    hops: int | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Generation:
    """One sampled continuation of a prompt.

    Attributes:
        text: the decoded continuation, without the prompt and without stop strings; after an error, its reason.
        token_ids: its T token ids where the backend tells them (so that nothing is tokenised twice), else None.
        finish_reason: ``"stop"`` (end token or stop string), ``"length"`` (ran into the budget) or ``"error"``: there
            is no continuation, since this request failed for itself alone. It has no score, which is not 0.
        prompt_tokens: length of the prompt in tokens, 0 where the backend does not tell.
    """

    text: str
    token_ids: tuple[int, ...] | None = None
    finish_reason: str = "stop"
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class JudgeCase:
    """What a judge is asked to score; each rubric says which fields it reads.

    Attributes:
        question: the user's question.
        answer: the text under judgement.
        gold: accepted answers, where the rubric compares with them.
        passages: what the answer was written from.
        meta: further fields of a rubric (an analysis, a query, ...).
    """

    question: str
    answer: str
    gold: tuple[str, ...] = ()
    passages: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's score.

    Attributes:
        score: in [0, 1]; None means that no verdict could be read, which is not 0.
        reason: the judge's own words, or why there is no score.
    """

    score: float | None
    reason: str = ""


@runtime_checkable
class Retriever(Protocol):
    """Text in, hits out."""

    def search(
        self,
        queries: Sequence[str | Query],
        *,
        top_k: int,
        exclude: Sequence[Collection[str]] | None = None,
    ) -> list[list[Hit]]:
        """Returns up to ``top_k`` hits a query, best first, without the ``exclude``-d doc ids of that query."""
        ...


@runtime_checkable
class DenseIndex(Protocol):
    """What training a retriever and mixing query vectors need: vectors, not texts."""

    def encode_queries(self, queries: Sequence[str | Query]) -> Array:
        """Returns (B, D) float32 query vectors, prompted and normalised as the index was built."""
        ...

    def search_vectors(self, vectors: Array, *, top_k: int) -> tuple[Array, IntArray]:
        """Returns scores (B, K) and rows (B, K) of the document matrix, best first."""
        ...

    def vectors(self, rows: IntArray) -> Array:
        """Returns the document vectors of ``rows``: (B, K) rows give (B, K, D) in one gather."""
        ...


@runtime_checkable
class Generator(Protocol):
    """Prompts in, continuations out."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[list[Generation]]:
        """Returns ``n`` continuations a prompt; ``temperature`` 0 is greedy."""
        ...


@runtime_checkable
class Judge(Protocol):
    """Cases in, verdicts out."""

    async def judge(self, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """Returns one verdict a case; a dead backend raises, an unreadable reply is a verdict without a score."""
        ...


class Reward(Protocol):
    """TRL's reward function: keyword arguments only, one value or None a completion (None: cannot be scored)."""

    __name__: str

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """Returns one value per completion."""
        ...
