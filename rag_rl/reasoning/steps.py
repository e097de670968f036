r"""The grammar of reasoning steps (R3-RAG, arXiv 2505.23794): parse and render, inverse to each other.

A chain is plain text, one label a line::

    The question: Which river is the home of Falbert on?
    Step 1:
    The problem analysis: I need the home of Falbert.
    The retrieval query: Where does Falbert live?
    The retrieval documents: [1] Falbert lives in Elmton. [2] ...
    Step 2:
    The problem analysis: Falbert lives in Elmton. I need the river of Elmton.
    ...
    Step 3:
    The problem analysis: Elmton lies on the Mirbrook.
    The final answer: Mirbrook

A step is an analysis and exactly one of query and final answer. The model writes one step at a time; the environment
appends the documents. What goes back into the context is the parsed step, rendered anew, so that nothing else that
was written enters it.

Tolerant in: text around the step, Markdown around labels, line breaks within the analysis and labels that follow the
action are read over. Strict out: a ``Step`` holds single lines that read back as they are.

Departures from the authors' parser, each on purpose: a query keeps its "?" (it still ends there where more follows),
an answer keeps its last letters (theirs strips every "n" and backslash), query and answer end with their line, and
documents stand on one line, so that a document that says "Step 2:" begins no step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rag_rl.text import split_thinking
from rag_rl.types import Passage

QUESTION_LABEL = "The question:"
ANALYSIS_LABEL = "The problem analysis:"
QUERY_LABEL = "The retrieval query:"
DOCUMENTS_LABEL = "The retrieval documents:"
ANSWER_LABEL = "The final answer:"

NO_DOCUMENTS = "(none)"
"""Stands for the documents of a search that found nothing."""

# Labels may stand anywhere in a line, a step's number only at the beginning of one. Every repetition is bounded or
# runs over one kind of character, so that no text takes more than linear time.
_ANY_LABEL = r"\*{0,3}The[ \t]+(?i:problem[ \t]+analysis|retrieval[ \t]+(?:query|documents)|final[ \t]+answer)[ \t]*"
_LABEL = re.compile(rf"{_ANY_LABEL}\*{{0,3}}:\*{{0,3}}")
_HEADER = re.compile(
    rf"^[ \t#*]{{0,8}}Step[ \t]+([0-9]{{1,6}})[ \t]*\*{{0,3}}:\*{{0,3}}[ \t]*(?=$|{_ANY_LABEL})", re.MULTILINE
)
# A thinking tag can be left over where one stood inside another ("<th<think></think>ink>").
_STOP = re.compile(rf"{_LABEL.pattern}|###|</?think>")
_SECOND_QUESTION = re.compile(r"\?\s")
# What small models and services leave at the ends of a line: a line break spelt out, and Markdown.
_LITTER = (" ", "\\n", "**")


@dataclass(frozen=True, slots=True)
class Step:
    """One step: an analysis, and a query or the final answer.

    Attributes:
        number: from 1.
        analysis: one line.
        query: one line that asks one question; None in a step that answers.
        answer: one line; None in a step that searches.

    Raises:
        ValueError: it would not read back as it is: a part is missing, both actions are there, or a part holds a line
            break, a label or something else at which the parser stops.
    """

    number: int
    analysis: str
    query: str | None = None
    answer: str | None = None

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ValueError(f"a step's number must be at least 1, got {self.number}")
        if (self.query is None) == (self.answer is None):
            raise ValueError("a step has either a query or a final answer")
        for name in ("analysis", "query", "answer"):
            given = getattr(self, name)
            if given is None:
                continue
            if not given:
                raise ValueError(f"the {name} is empty")
            read = _action(given, name) if name != "analysis" else _analysis(given)
            if _sound(read) != given:
                raise ValueError(f"the {name} would be read as {read!r:.80}, it is {given!r:.80}")


@dataclass(frozen=True, slots=True)
class ParsedStep:
    """What was read in a model's text.

    Attributes:
        step: the step; None where the text holds no valid one.
        problem: why there is none; empty where there is one.
        strict: whether the text is the step and nothing else, so that nothing had to be read over.
    """

    step: Step | None
    problem: str = ""
    strict: bool = False


def parse_step(text: str, number: int | None = None, *, renumber: bool = False) -> ParsedStep:
    r"""Reads one step in what a model wrote; no text makes it raise.

    A thinking part is split off first. The analysis begins after the first analysis label, and ends before the next
    label or "###". Of query and final answer the one whose label comes first counts, up to the end of its line. The
    line "Step 2:" of another step ends a step.

    Args:
        text: a whole completion.
        number: which step it must be; its line "Step {number}:" must be there exactly once. None takes any.
        renumber: whether the step is given ``number`` whatever its own says, and needs none: for teachers that write
            in their own words.

    Returns:
        The step, or what is wrong.

    Raises:
        ValueError: ``renumber`` without a number.

    Example:
        >>> parse_step("Step 1:\nThe problem analysis: I need the home.\nThe retrieval query: Where is it?\nHm.").step
        Step(number=1, analysis='I need the home.', query='Where is it?', answer=None)
        >>> parse_step("Step 1:\nThe final answer: Mirbrook").problem
        "no 'The problem analysis:'"
    """
    if renumber and number is None:
        raise ValueError("renumber=True needs the number")
    _, said = split_thinking(text)
    if said is None:
        return ParsedStep(None, "the thinking part was never closed")
    said = _sound(said).replace("\r\n", "\n").replace("\r", "\n")
    labels = [(_name(match.group()), match.start(), match.end()) for match in _LABEL.finditer(said)]
    place = next((i for i, (name, *_) in enumerate(labels) if name == "analysis"), None)
    if place is None:
        return ParsedStep(None, f"no '{ANALYSIS_LABEL}'")
    begin = labels[place][1]
    headers = [(int(match.group(1)), match.start()) for match in _HEADER.finditer(said)]
    own = next((found for found, start in reversed(headers) if start <= begin), None)
    if renumber:
        own = number
    problem = "" if renumber else _wrong_number(own, number, [found for found, _ in headers])
    if problem or own is None:
        return ParsedStep(None, problem or "no line 'Step N:'")
    if own < 1:
        return ParsedStep(None, "steps are numbered from 1, this is 'Step 0:'")

    end = next((start for _, start in headers if start > begin), len(said))
    within = [label for label in labels[place:] if label[1] < end]
    ends = [start for _, start, _ in within[1:]] + [end]
    parts = [(name, said[after:stop]) for (name, _, after), stop in zip(within, ends, strict=True)]
    analysis = _analysis(parts[0][1])
    if not analysis:
        return ParsedStep(None, "the analysis is empty")
    action = next(((name, found) for name, found in parts if name in ("query", "answer")), None)
    if action is None:
        return ParsedStep(None, f"neither '{QUERY_LABEL}' nor '{ANSWER_LABEL}' after the analysis")
    name, value = action[0], _action(action[1], action[0])
    if not value:
        return ParsedStep(None, f"the {'retrieval query' if name == 'query' else 'final answer'} is empty")
    step = Step(own, analysis, **{name: value})
    lines = [" ".join(line.split()) for line in said.strip().split("\n")]
    return ParsedStep(step, strict=lines == render_step(step).split("\n"))


def render_step(step: Step) -> str:
    r"""Writes a step: the inverse of ``parse_step``.

    Args:
        step: any.

    Returns:
        Three lines.

    Example:
        >>> render_step(Step(2, "Elmton lies on the Mirbrook.", answer="Mirbrook"))
        'Step 2:\nThe problem analysis: Elmton lies on the Mirbrook.\nThe final answer: Mirbrook'
    """
    action = f"{ANSWER_LABEL} {step.answer}" if step.query is None else f"{QUERY_LABEL} {step.query}"
    return f"Step {step.number}:\n{ANALYSIS_LABEL} {step.analysis}\n{action}"


def render_documents(passages: Sequence[Passage], *, empty: str = NO_DOCUMENTS) -> str:
    """Writes what a search found, in one line.

    Args:
        passages: in reading order.
        empty: what stands there for none.

    Returns:
        The line, passages numbered from 1.

    Example:
        >>> render_documents([Passage("d1", "It lies on the Mirbrook.", title="Elmton"), Passage("d2", "Nothing.")])
        'The retrieval documents: [1] Elmton It lies on the Mirbrook. [2] Nothing.'
    """
    shown = " ".join(f"[{i}] {' '.join(passage.contents.split())}" for i, passage in enumerate(passages, start=1))
    return f"{DOCUMENTS_LABEL} {shown or empty}"


def render_steps(steps: Sequence[Step], documents: Sequence[Sequence[Passage]]) -> str:
    """Writes steps with what their searches found.

    Args:
        steps: oldest first.
        documents: the passages of each; of a step that answers none are shown.

    Returns:
        The steps, each followed by its documents; empty for no steps.
    """
    lines = []
    for step, passages in zip(steps, documents, strict=True):
        lines.append(render_step(step))
        if step.query is not None:
            lines.append(render_documents(passages))
    return "\n".join(lines)


def render_chain(question: str, steps: Sequence[Step], documents: Sequence[Sequence[Passage]]) -> str:
    r"""Writes a chain: what the model sees before its next step.

    Args:
        question: of the user.
        steps: so far, oldest first.
        documents: the passages of each, as in ``render_steps``.

    Returns:
        The question's line and the steps.

    Example:
        >>> render_chain("Where does Falbert live?", [], [])
        'The question: Where does Falbert live?'
    """
    head = f"{QUESTION_LABEL} {' '.join(question.split())}"
    return f"{head}\n{render_steps(steps, documents)}" if steps else head


def has_step_format(text: str, number: int) -> bool:
    r"""Tells whether a model's text is exactly a step that bears the right number.

    Args:
        text: a whole completion; a thinking part is split off first.
        number: which step it must be.

    Returns:
        Whether it parses strictly: nothing around it, each label once and in its place.

    Example:
        >>> has_step_format("Step 1:\nThe problem analysis: a\nThe final answer: b", 1)
        True
        >>> has_step_format("Sure!\nStep 1:\nThe problem analysis: a\nThe final answer: b", 1)
        False
    """
    return parse_step(text, number).strict


def format_adherence(texts: Sequence[str]) -> float | None:
    r"""Measures how well a chain keeps the form.

    Args:
        texts: what the model wrote, step by step from the first.

    Returns:
        Steps that parse strictly and bear the right number, as a share of all; None for no steps.

    Example:
        >>> format_adherence(["no step", "Step 2:\nThe problem analysis: a\nThe final answer: b"])
        0.5
    """
    if not texts:
        return None
    return sum(has_step_format(text, number) for number, text in enumerate(texts, start=1)) / len(texts)


def _name(label: str) -> str:
    lowered = label.lower()
    return next(name for name in ("analysis", "query", "documents", "answer") if name in lowered)


def _wrong_number(own: int | None, number: int | None, all_numbers: Sequence[int]) -> str:
    if number is None:
        return ""
    if own is None:
        return f"no line 'Step {number}:'"
    if own != number:
        return f"is step {own}, expected step {number}"
    return f"the line 'Step {number}:' stands there more than once" if all_numbers.count(number) > 1 else ""


def _analysis(text: str) -> str:
    """The analysis at the beginning of a text, in one line."""
    # Joined before the cut: what a line break tears apart may be a label in one line.
    return _trimmed(_cut(" ".join(text.split())))


def _action(text: str, name: str) -> str:
    """The query or answer at the beginning of a text."""
    line = next((line for line in text.split("\n") if line.strip()), "")
    line = _trimmed(_cut(" ".join(line.split())))
    second = _SECOND_QUESTION.search(line) if name == "query" else None
    return line[: second.start() + 1] if second else line


def _cut(line: str) -> str:
    stop = _STOP.search(line)
    return line[: stop.start()] if stop else line


def _trimmed(text: str) -> str:
    """A line without litter at its ends."""
    start, end = 0, len(text)
    while found := next((mark for mark in _LITTER if text.startswith(mark, start, end)), None):
        start += len(found)
    while found := next((mark for mark in _LITTER if text.endswith(mark, start, end)), None):
        end -= len(found)
    return text[start:end]


def _sound(text: str) -> str:
    """A text without halves of characters, which JSON of a service can bring and no tokenizer takes."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
