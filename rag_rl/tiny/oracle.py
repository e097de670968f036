"""A judge for the tiny world that is always right: the same code path as a language model, without one.

It reads what an LLM judge would read, the fields of the case and nothing else, and decides by the wording of the tiny
world (``rag_rl.tiny.world``), whose every sentence says one fact. No world has to be given to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TypeAlias

from rag_rl.errors import ConfigError
from rag_rl.metrics import contains_match, exact_match
from rag_rl.text import answer_tokens
from rag_rl.tiny.world import KINDS, NOUNS, REGIONS, RELATIONS, Relation, names
from rag_rl.types import JudgeCase, Verdict

Hop: TypeAlias = tuple[str, str]
"""A fact that is asked for: name of the relation, subject."""

Facts: TypeAlias = dict[Hop, str]
"""Values by hop."""

_DOCUMENTS = re.compile(r"The retrieval documents:(.*?)(?=\n(?:Step \d+:|The \w+ \w+:)|\Z)", re.DOTALL)
_QUERIES = re.compile(r"The retrieval query:([^\n]*)")
_NEED = re.compile(r"I need (.+)\.")
_SENTENCE = re.compile(r"[^.]*\.|[^.]+$")
# Either makes an answer that holds the right name a wrong or an open one.
_DOUBTS = frozenset("no not never neither nor nobody nothing or either unless unknown isnt cannot".split())


class OracleJudge:
    """The exact verdict on cases of the tiny world, by the name of a rubric of ``rag_rl.judges``.

    ====================  ==========================================================================================
    answer_correctness,   1 where the answer names an accepted answer, bare or in a sentence, and no other value of
    tiny_judge            the world except those in the question and, with passages, those on the way to the answer;
                          without a word of doubt ("not", "or")
    document_relevance    share of the facts asked for by the query that a passage of the case states
    query_rationality     1 where the query asks for one fact on the way to the answer, its subject is known from the
                          question or from documents, and no earlier step has asked for it and found it
    reasoning_coherence   1 where every sentence of the analysis is a fact that stands in the documents of earlier
                          steps, or names a fact that is still to be asked for as above; and the last fact of the
                          question is there where nothing is asked for
    ====================  ==========================================================================================

    The last three read ``meta``: ``analysis``, ``query`` and ``history``, the earlier steps in the R3 grammar, whose
    documents follow "The retrieval documents:" and whose queries follow "The retrieval query:".

    Args:
        rubric: one of the names above.

    Raises:
        ConfigError: another rubric, which is not exactly known here.

    Example:
        >>> import asyncio
        >>> judge = OracleJudge("answer_correctness")
        >>> case = JudgeCase("What is Elmdaton known for?", "It is tin, I am sure.", gold=("tin",))
        >>> asyncio.run(judge.judge([case]))[0].score
        1.0
    """

    def __init__(self, rubric: str = "answer_correctness") -> None:
        if rubric not in _RUBRICS:
            raise ConfigError(f"the oracle knows the rubrics {', '.join(sorted(_RUBRICS))}, not {rubric!r}")
        self.rubric = rubric

    async def judge(self, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """Judges cases.

        Args:
            cases: B cases of the tiny world.

        Returns:
            B verdicts, each with a score.

        Raises:
            ConfigError: a case lacks a field that the rubric reads.
        """
        return [_RUBRICS[self.rubric](case) for case in cases]


def read_question(text: str) -> tuple[Hop, ...] | None:
    """Reads a question or a query of the tiny world.

    Args:
        text: in one of the world's wordings.

    Returns:
        Its hops, first hop first; the subject of a later hop is "" as long as the hop before it is unknown. None where
        this is no such question.

    Example:
        >>> read_question("What is the home of Lorholin known for?")
        (('home', 'Lorholin'), ('goods', ''))
    """
    return _hops(text.strip(), _ASKED)


def read_facts(text: str) -> Facts:
    """Reads the facts that a text states.

    Args:
        text: with sentences of the world's wording, and perhaps others, which are passed over.

    Returns:
        Values by relation and subject.

    Example:
        >>> read_facts("[1] Elmdaton lies on the Kelsabeck. Well. The pride of Elmdaton is tin.")
        {('river', 'Elmdaton'): 'Kelsabeck', ('goods', 'Elmdaton'): 'tin'}
    """
    return {
        (relation, match["s"]): match["v"]
        for sentence in _SENTENCE.findall(text)
        for relation, pattern in _STATED
        if (match := pattern.search(sentence))
    }


def _patterns(wordings: Iterable[tuple[Relation, str]], ending: str = "") -> list[tuple[str, re.Pattern[str]]]:
    return [
        (
            relation.name,
            re.compile(
                re.escape(wording).replace(r"\{s\}", r"(?P<s>[^.?]+?)").replace(r"\{v\}", r"(?P<v>\w+)") + ending,
            ),
        )
        for relation, wording in wordings
    ]


_ASKED = _patterns((r, wording) for r in RELATIONS for wording in r.questions)
_NAMED = _patterns((r, r.noun) for r in RELATIONS)
_STATED = [
    (name, re.compile(pattern.pattern.replace("[^.?]+?", r"\w+")))
    for name, pattern in _patterns(((r, wording) for r in RELATIONS for wording in r.phrasings), ending="$")
]


def _hops(text: str, patterns: Sequence[tuple[str, re.Pattern[str]]]) -> tuple[Hop, ...] | None:
    for relation, pattern in patterns:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        subject = match["s"]
        if re.fullmatch(r"\w+", subject):
            return ((relation, subject),)
        earlier = _hops(subject, _NAMED)
        if earlier is not None:
            return (*earlier, (relation, ""))
    return None


def _resolved(hops: Sequence[Hop], facts: Facts) -> list[tuple[Hop, str]]:
    """The hops with their subjects and values, up to the first whose value is unknown ("") and with it."""
    found: list[tuple[Hop, str]] = []
    subject = ""
    for relation, given in hops:
        hop = (relation, given or subject)
        subject = facts.get(hop, "")
        found.append((hop, subject))
        if not subject:
            break
    return found


@cache
def _all_values() -> frozenset[str]:
    """Every name and every noun of every world, in lower case."""
    entities = (name for kind in KINDS for region in REGIONS for name in names(kind, region))
    return frozenset(value.lower() for value in (*entities, *(noun for nouns in NOUNS.values() for noun in nouns)))


def _correctness(case: JudgeCase) -> Verdict:
    if not case.gold:
        raise ConfigError(f"the oracle needs the field gold; the case about {case.question!r:.80} has none")
    if exact_match(case.answer, case.gold):
        return Verdict(1.0, "an accepted answer")
    said = answer_tokens(case.answer)
    if not contains_match(case.answer, case.gold):
        return Verdict(0.0, "no accepted answer in it")
    doubts = _DOUBTS.intersection(said)
    if doubts:
        return Verdict(0.0, f"left open by {min(doubts)!r}")
    hops = read_question(case.question) or ()
    on_the_way = [value for _, value in _resolved(hops, read_facts("\n".join(case.passages)))]
    allowed = {token for text in (case.question, *case.gold, *on_the_way) for token in answer_tokens(text)}
    rivals = [token for token in said if token in _all_values() and token not in allowed]
    if rivals:
        return Verdict(0.0, f"also names {rivals[0]!r}")
    return Verdict(1.0, "an accepted answer in other words")


def _relevance(case: JudgeCase) -> Verdict:
    query = _field(case, "query")
    hops = read_question(query)
    if hops is None:
        return Verdict(0.0, "the query asks for nothing that this world knows")
    found = [value for _, value in _resolved(hops, read_facts("\n".join(case.passages))) if value]
    return Verdict(len(found) / len(hops), f"{len(found)} of {len(hops)} facts found")


def _rationality(case: JudgeCase) -> Verdict:
    hops = read_question(_field(case, "query"))
    if hops is None or len(hops) != 1:
        return Verdict(0.0, "the query does not ask for one fact")
    if hops[0] not in _open_hops(case):
        return Verdict(0.0, "the query is not about a fact that is missing and can be asked for")
    return Verdict(1.0, "asks for a missing fact")


def _coherence(case: JudgeCase) -> Verdict:
    analysis, documents = _field(case, "analysis"), _documents(case)
    open_hops = _open_hops(case)
    stated: Facts = {}
    needs = 0
    for sentence in (found.strip() for found in _SENTENCE.findall(analysis) if found.strip()):
        facts, need = read_facts(sentence), _NEED.fullmatch(sentence)
        if need is not None:
            needs += 1
            named = _hops(need[1], _NAMED)
            if named is None or len(named) != 1 or named[0] not in open_hops:
                return Verdict(0.0, f"not needed: {sentence!r:.80}")
        elif not facts or any(documents.get(hop) != value for hop, value in facts.items()):
            return Verdict(0.0, f"in no document: {sentence!r:.80}")
        stated.update(facts)
    hops = read_question(case.question) or ()
    chain = _resolved(hops, documents)
    complete = len(chain) == len(hops) and bool(chain) and chain[-1][0] in stated
    if needs or complete:
        return Verdict(1.0, "follows from the documents")
    return Verdict(0.0, "neither says what is missing nor states the last fact")


_RUBRICS: dict[str, Callable[[JudgeCase], Verdict]] = {
    "answer_correctness": _correctness,
    "document_relevance": _relevance,
    "query_rationality": _rationality,
    "reasoning_coherence": _coherence,
    "tiny_judge": _correctness,
}


def _open_hops(case: JudgeCase) -> set[Hop]:
    """Facts on the way to the answer that can be asked for: subject known, not yet asked for with success."""
    documents = _documents(case)
    asked = {hop for query in _QUERIES.findall(_field(case, "history")) for hop in read_question(query) or ()}
    chain = _resolved(read_question(case.question) or (), documents)
    return {hop for hop, value in chain if not (value and hop in asked)}


def _documents(case: JudgeCase) -> Facts:
    return read_facts("\n".join(_DOCUMENTS.findall(_field(case, "history"))))


def _field(case: JudgeCase, name: str) -> str:
    value = case.meta.get(name)
    if not isinstance(value, str):
        raise ConfigError(f"the oracle needs the field meta[{name!r}]; the case about {case.question!r:.80} has none")
    return value
