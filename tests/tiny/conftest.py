"""One tokenizer for all tests of the tiny parts, and a reader of passages that knows every phrasing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from rag_rl.tiny.world import RELATIONS

Fact = tuple[str, str, str]
"""Name of the relation, subject and value."""

SENTENCES = [
    (relation.name, re.compile(re.escape(phrasing).replace(r"\{s\}", "(?P<s>.+)").replace(r"\{v\}", "(?P<v>.+)")))
    for relation in RELATIONS
    for phrasing in reversed(relation.phrasings)  # "The craft of X is that of a Y" before the open "X works as a Y"
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from rag_rl.tiny.tokenizer import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def facts_of() -> Callable[[str], list[Fact]]:
    """Reads a passage sentence by sentence; a sentence in no known phrasing is an error."""

    def read(text: str) -> list[Fact]:
        facts = []
        for sentence in re.findall(r"[^.]+\.", text):
            matches = [(name, m["s"], m["v"]) for name, p in SENTENCES if (m := p.fullmatch(sentence.strip()))]
            whole = [fact for fact in matches if " " not in fact[1] and " " not in fact[2]]
            assert len(whole) == 1, f"{sentence!r} reads as {matches}"
            facts += whole
        return facts

    return read
