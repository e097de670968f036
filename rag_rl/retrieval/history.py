"""State text: what a history-aware query encoder reads in place of the bare sub-query (HARR, arXiv 2602.03645).

One text of three labelled fields: the original question, the hops so far, and the current sub-query last. Departure
from the authors' code, which cuts a long text on the right and so loses the current query: here the oldest hops give
way first, then the end of the question, and the query never. The hops are written as text, not as JSON with a status.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from string import Template
from typing import Any, TypeAlias

from rag_rl.errors import ConfigError
from rag_rl.prompts import load_prompt, placeholders, require_placeholders
from rag_rl.retrieval.encoder import Encoder, query_text
from rag_rl.types import Array, Query

CountTokens: TypeAlias = Callable[[Sequence[str]], Sequence[int]]
"""Length of each text in tokens, with whatever the encoder puts around it; ``token_counter`` makes one."""

_FIELDS = ("question", "history", "query")


def render_state(
    query: str | Query,
    *,
    count_tokens: CountTokens | None = None,
    max_tokens: int | None = None,
    history: bool = True,
    template: str = "state",
) -> str:
    """Writes one query with its history; see ``render_states``, which counts the tokens of many in few calls.

    Args:
        query: as in ``render_states``.
        count_tokens: as there.
        max_tokens: as there.
        history: as there.
        template: as there.

    Returns:
        The state text.

    Raises:
        ConfigError: as there.

    Example:
        >>> first = ("Where does Falbert live?", "Elmton")
        >>> print(render_state(Query("Which river is it?", "Which river is the home of Falbert on?", (first,))))
        Question: Which river is the home of Falbert on?
        History: Where does Falbert live? Elmton
        Query: Which river is it?
    """
    return render_states(
        [query], count_tokens=count_tokens, max_tokens=max_tokens, history=history, template=template
    )[0]


def render_states(
    queries: Sequence[str | Query],
    *,
    count_tokens: CountTokens | None = None,
    max_tokens: int | None = None,
    history: bool = True,
    template: str = "state",
) -> list[str]:
    """Writes queries with their histories (HARR section 4.2: the state, question and hops so far with the sub-query).

    A query that carries neither question nor hops is its bare text, as is plain text. Where a state is too long, its
    oldest hops are left out, then words from the end of the question; a query that is too long by itself is returned
    bare and whole. All states are counted in one call, and those that are too long in about
    ``log2(words of the question + hops)`` further calls, all of them at a time.

    Args:
        queries: B queries.
        count_tokens: length of texts in tokens; needed with ``max_tokens``.
        max_tokens: longest state in tokens, >= 1; None for no bound.
        history: False gives every query's bare text: what an encoder reads that knows no history.
        template: name or path of a prompt with ``$query`` and, if it likes, ``$question`` and ``$history``. A line
            whose fields are all empty is left out.

    Returns:
        B texts.

    Raises:
        ConfigError: ``max_tokens`` is below 1 or has no ``count_tokens``, or the template does not fit.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"the longest state must have at least 1 token, got max_tokens {max_tokens}")
    if max_tokens is not None and count_tokens is None:
        raise ConfigError("max_tokens needs count_tokens: rag_rl.retrieval.history.token_counter makes one")
    lines = _template_lines(template)
    texts = [query_text(query) for query in queries]
    if not history:
        return texts
    stateful = {i: q for i, q in enumerate(queries) if isinstance(q, Query) and (q.question or q.history)}
    for i, query in stateful.items():
        texts[i] = _filled(lines, query, _size(query))
    if max_tokens is not None and count_tokens is not None and stateful:
        counts = count_tokens([texts[i] for i in stateful])
        long = {i: q for (i, q), count in zip(stateful.items(), counts, strict=True) if count > max_tokens}
        for i, text in zip(long, _shortened(lines, list(long.values()), count_tokens, max_tokens), strict=True):
            texts[i] = text
    return texts


def token_counter(tokenizer: Any, *, prompt: str = "") -> CountTokens:
    """Makes the function that counts what an encoder reads.

    Args:
        tokenizer: of transformers.
        prompt: what the encoder puts before each query.

    Returns:
        Length in tokens of the prompt with each text, special tokens included.
    """

    def count(texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        # verbose: the warning that a text is longer than the model takes is what the count is for.
        return [len(ids) for ids in tokenizer([prompt + text for text in texts], verbose=False)["input_ids"]]

    return count


class HistoryEncoder:
    """An encoder whose queries are read with their histories; documents and fingerprint stay as they are.

    So it opens the index that the encoder itself has made, and a ``DenseRetriever`` around it becomes history-aware.
    Plain text and queries without a history give the encoder's own vectors.

    Args:
        encoder: embeds the state text.
        enabled: False reads the bare sub-query, for the comparison without history.
        max_tokens: longest state in tokens; None for the encoder's own length, where it is a ``SentenceEncoder``.
        count_tokens: length of texts in tokens; None for the tokenizer of a ``SentenceEncoder``.
        template: name or path of the state's template, as in ``render_states``.

    Raises:
        ConfigError: ``max_tokens`` is out of range, or an encoder without a tokenizer needs ``count_tokens`` with it;
            or the template does not fit.
    """

    def __init__(
        self,
        encoder: Encoder,
        enabled: bool = True,
        *,
        max_tokens: int | None = None,
        count_tokens: CountTokens | None = None,
        template: str = "state",
    ) -> None:
        tokenizer = getattr(getattr(encoder, "model", None), "tokenizer", None)
        if count_tokens is None and tokenizer is not None:
            count_tokens = token_counter(tokenizer, prompt=getattr(encoder, "query_prompt", ""))
        longest: int | None = getattr(encoder, "max_length", None)
        if max_tokens is not None and longest is not None and max_tokens > longest:
            raise ConfigError(f"max_tokens must be at most {longest}, the encoder's own length, got {max_tokens}")
        if max_tokens is None and count_tokens is not None:
            max_tokens = longest
        render_states([], count_tokens=count_tokens, max_tokens=max_tokens, template=template)  # checks them
        self.encoder, self.enabled = encoder, enabled
        self.max_tokens, self.count_tokens, self.template = max_tokens, count_tokens, template

    @property
    def dimension(self) -> int:
        """Width D of a vector."""
        return self.encoder.dimension

    @property
    def fingerprint(self) -> str:
        """The encoder's own: document vectors and those of plain queries are the same."""
        return self.encoder.fingerprint

    @property
    def query_fingerprint(self) -> str:
        """Changes whenever the vectors of queries with a history would; ``DenseRetriever`` has it in its own."""
        parts = [self.encoder.fingerprint, self.enabled, load_prompt(self.template), self.max_tokens]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def settings(self) -> Mapping[str, Any]:
        """The encoder's own."""
        settings: Mapping[str, Any] = getattr(self.encoder, "settings", {})
        return settings

    def states(self, queries: Sequence[str | Query]) -> list[str]:
        """What the encoder reads of queries.

        Args:
            queries: B queries.

        Returns:
            B state texts.
        """
        return render_states(
            queries,
            count_tokens=self.count_tokens,
            max_tokens=self.max_tokens,
            history=self.enabled,
            template=self.template,
        )

    def encode_queries(self, queries: Sequence[str | Query]) -> Array:
        """Vectors of the queries' states.

        Args:
            queries: B queries.

        Returns:
            (B, D) float32.
        """
        return self.encoder.encode_queries(self.states(queries))

    def encode_documents(self, texts: Sequence[str]) -> Array:
        """The encoder's own document vectors.

        Args:
            texts: B texts.

        Returns:
            (B, D) float32.
        """
        return self.encoder.encode_documents(texts)


def _template_lines(name: str) -> list[tuple[Template, list[str]]]:
    try:
        require_placeholders(name, ["query"])
        text = load_prompt(name)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    try:
        Template(text).substitute(dict.fromkeys(_FIELDS, ""))
    except KeyError as error:
        known = ", ".join(f"${field}" for field in _FIELDS)
        raise ConfigError(f"prompt {name!r} asks for ${error.args[0]}, but a state has only {known}") from error
    except ValueError as error:
        raise ConfigError(f"prompt {name!r}: {error}; write $$ for a dollar sign") from error
    return [(Template(line), placeholders(line)) for line in text.split("\n")]


def _size(query: Query) -> int:
    """In how many steps a state can be cut down: its hops, then the words of its question."""
    return len(query.question.split()) + len(query.history)


def _filled(lines: Sequence[tuple[Template, list[str]]], query: Query, size: int) -> str:
    """The state with the first ``size`` words of the question and, beyond those, the newest hops."""
    question = query.question
    hops = size - len(question.split())
    if hops < 0:
        question, hops = " ".join(question.split()[:size]), 0
    kept = query.history[len(query.history) - hops :]
    values = {"question": question, "history": "; ".join(_told(*hop) for hop in kept), "query": query.text}
    written = [
        template.substitute(values) for template, fields in lines if not fields or any(values[f] for f in fields)
    ]
    return "\n".join(written)


def _told(asked: str, learnt: str) -> str:
    return f"{asked}{'' if asked.endswith(('?', '.', '!', ':')) else ':'} {learnt}"


def _shortened(
    lines: Sequence[tuple[Template, list[str]]], queries: Sequence[Query], count_tokens: CountTokens, limit: int
) -> list[str]:
    """The largest states that fit, by one bisection over all queries at a time."""
    low, high = [0] * len(queries), [max(0, _size(query) - 1) for query in queries]
    while pending := [i for i in range(len(queries)) if low[i] < high[i]]:
        middle = {i: (low[i] + high[i] + 1) // 2 for i in pending}
        counts = count_tokens([_filled(lines, queries[i], middle[i]) for i in pending])
        for i, count in zip(pending, counts, strict=True):
            if count <= limit:
                low[i] = middle[i]
            else:
                high[i] = middle[i] - 1
    texts = [_filled(lines, query, size) for query, size in zip(queries, low, strict=True)]
    if barest := [i for i, size in enumerate(low) if size == 0]:  # taken to fit above, and never counted
        for i, count in zip(barest, count_tokens([texts[i] for i in barest]), strict=True):
            if count > limit:
                texts[i] = queries[i].text
    return texts
