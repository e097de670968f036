"""Chains in files, and as training examples.

One chain a line::

    {"qid": "q1", "question": "Which river is the home of Falbert on?", "answers": ["Mirbrook"], "state": "correct",
     "attempt": 1, "steps": [
      {"analysis": "I need the home of Falbert.", "query": "Where does Falbert live?",
       "documents": [{"doc_id": "d1", "title": "Falbert", "text": "Falbert lives in Elmton."}]},
      {"analysis": "Falbert lives in Elmton.", "answer": "Mirbrook"}]}

- ``state``: "correct" and "incorrect" (the last step answers), "fail" (it searches: no answer within the budget) or
  "invalid" (it could not be parsed, and is ``{"text": what was written, "problem": why}``).
- ``attempt``: which attempt at the question it was, from 1. May be missing; so may ``gold_doc_ids``, ``title`` and
  ``chunk`` of a document, and ``scores`` of a step (name -> value in [0, 1] or null).
- Steps are numbered by their order. A question may have several lines: failed attempts, then a correct one.

Scores of hits and token ids are not kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from rag_rl.errors import BackendError, DataError, bad_rows
from rag_rl.reasoning.step_environment import StepRecord, StepTrajectory
from rag_rl.reasoning.step_prompts import StepPrompts
from rag_rl.reasoning.step_rewards import END_STATES
from rag_rl.reasoning.steps import Step, render_step
from rag_rl.types import Hit, Message, Passage, Prompt, Question

_KIND = {"correct": "answer", "incorrect": "answer", "fail": "query", "invalid": "text"}


def read_trajectories(path: str | Path, *, cut_end: bool = False) -> list[StepTrajectory]:
    """Reads chains; see the module for the form.

    Args:
        path: a JSONL file.
        cut_end: whether a last line without its end is passed over, as a killed run leaves it, and a missing file is
            empty.

    Returns:
        The chains in the file's order.

    Raises:
        DataError: the file is missing or has bad rows; names line, step and trouble of the first five and counts the
            others.
    """
    file = Path(path)
    try:
        raw = file.read_bytes()
    except FileNotFoundError as error:
        if cut_end:
            return []
        raise DataError(f"{file}: no such file; recipes/build_trajectories.py makes one") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if cut_end and not _is_whole(lines[-1]):
        lines.pop()
    found, bad = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(trajectory_of(json.loads(line.decode("utf-8"))))
        except UnicodeDecodeError as error:
            bad.append((number, f"is not UTF-8 ({error.reason} at byte {error.start + 1}): save the file as UTF-8"))
        except json.JSONDecodeError as error:
            bad.append((number, f"is not JSON: {error.msg} at character {error.pos + 1}"))
        except RecursionError:
            bad.append((number, "is not JSON: nested too deeply"))
        except ValueError as error:
            bad.append((number, str(error)))
    if bad:
        raise bad_rows(str(file), bad)
    return found


def write_trajectories(path: str | Path, trajectories: Iterable[StepTrajectory]) -> int:
    """Writes chains; the file appears whole or not at all.

    Args:
        path: the file; its folder is made, an existing file is replaced at the very end.
        trajectories: finished ones, not dropped.

    Returns:
        How many were written.

    Raises:
        DataError: one of them has no end state.
        BackendError: the disk refuses.
    """
    target = Path(path)
    lines = [_line(trajectory) for trajectory in trajectories]
    half = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with half.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, target)
    except OSError as error:
        raise BackendError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            half.unlink()
    return len(lines)


def append_trajectories(path: str | Path, trajectories: Iterable[StepTrajectory]) -> int:
    """Appends chains; a last line without its end, as a killed run leaves it, is taken away first.

    Args:
        path: the file; made with its folder where it is missing.
        trajectories: finished ones, not dropped.

    Returns:
        How many were written; they are on the disk when this returns.

    Raises:
        DataError: one of them has no end state.
        BackendError: the disk refuses.
    """
    target = Path(path)
    lines = [_line(trajectory) for trajectory in trajectories]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a+b") as file:
            _end_last_line(file)
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BackendError(f"{target}: cannot be written: {error.strerror or error}") from error
    return len(lines)


def trajectory_row(trajectory: StepTrajectory) -> dict[str, Any]:
    """Makes the row of a chain.

    Args:
        trajectory: a finished one, not dropped.

    Returns:
        Values that JSON can hold.

    Raises:
        DataError: it has no end state.
    """
    question = trajectory.question
    if trajectory.state is None:
        why = "was dropped" if trajectory.failure is not None else "has no end state"
        raise DataError(f"the chain about {question.qid!r} {why}: only finished and judged ones are kept")
    row: dict[str, Any] = {"qid": question.qid, "question": question.question, "answers": list(question.answers)}
    if question.gold_doc_ids:
        row["gold_doc_ids"] = list(question.gold_doc_ids)
    row["state"] = trajectory.state
    if trajectory.attempt is not None:
        row["attempt"] = trajectory.attempt
    row["steps"] = [_step_row(record) for record in trajectory.steps]
    return row


def trajectory_of(row: Any) -> StepTrajectory:
    """Reads the row of a chain.

    Args:
        row: one JSON value.

    Returns:
        The chain.

    Raises:
        ValueError: something is wrong with it; names the step and the field.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"must be an object {{...}}, got {_shown(row)}")
    question = Question(
        _text(row, "qid"), _text(row, "question"), _texts(row, "answers"), _texts(row, "gold_doc_ids", required=False)
    )
    state, attempt, steps = row.get("state"), row.get("attempt"), row.get("steps")
    if state not in END_STATES:
        raise ValueError(f"field 'state' must be one of {', '.join(END_STATES)}, got {_shown(state)}")
    if attempt is not None and (isinstance(attempt, bool) or not isinstance(attempt, int) or attempt < 1):
        raise ValueError(f"field 'attempt' must be a whole number from 1, got {_shown(attempt)}")
    if not isinstance(steps, list) or not steps:
        raise ValueError(f"field 'steps' must be a list of steps, got {_shown(steps)}")
    records = []
    for number, given in enumerate(steps, start=1):
        try:
            records.append(_record(number, given, _KIND[state] if number == len(steps) else "query", state))
        except ValueError as error:
            raise ValueError(f"step {number}: {error}") from error
    return StepTrajectory(question, records, state, attempt=attempt)


def sft_examples(
    trajectories: Sequence[StepTrajectory],
    *,
    prompts: StepPrompts | None = None,
    states: Collection[str] = ("correct",),
) -> list[dict[str, Any]]:
    """Turns chains into examples for supervised fine-tuning: one a step (arXiv 2505.23794, section 3).

    Args:
        trajectories: any.
        prompts: as the model will be asked later: chat or plain text, and within which budget. None for chat turns
            without a bound.
        states: end states of the chains that are taken.

    Returns:
        ``prompt`` and ``completion`` of each valid step, in the form of TRL: chat turns, or two texts that follow on
        each other; and ``left_out``, how many documents the prompt had no room for.

    Raises:
        DataError: a question alone does not fit into a prompt.
    """
    chosen = [trajectory for trajectory in trajectories if trajectory.state in states]
    steps = [(t, record, record.step) for t in chosen for record in t.steps if record.step is not None]
    made = (prompts or StepPrompts()).make([t.before(record.number).chain for t, record, _ in steps])
    return [
        {"prompt": one.prompt, "completion": _reply(render_step(step), one.prompt), "left_out": one.left_out}
        for one, (_, _, step) in zip(made, steps, strict=True)
    ]


def dpo_pairs(trajectories: Sequence[StepTrajectory], *, prompts: StepPrompts | None = None) -> list[dict[str, Any]]:
    """Turns correct chains and failed ones about the same questions into preference pairs.

    Two chains are compared where they part: at the first step that differs after the same steps and the same
    documents. An invalid step is rejected as it was written. The same pair is given once.

    Args:
        trajectories: any; questions without a correct chain, or without another one, give no pairs.
        prompts: as in ``sft_examples``.

    Returns:
        ``prompt``, ``chosen`` and ``rejected`` in the form of TRL.

    Raises:
        DataError: a question alone does not fit into a prompt.
    """
    by_question: dict[str, list[StepTrajectory]] = {}
    for trajectory in trajectories:
        if trajectory.state is not None:
            by_question.setdefault(trajectory.question.qid, []).append(trajectory)
    pairs = []
    for chains in by_question.values():
        right = [chain for chain in chains if chain.state == "correct"]
        wrong = [chain for chain in chains if chain.state != "correct"]
        pairs += [pair for good in right for bad in wrong if (pair := _parting(good, bad)) is not None]
    made = (prompts or StepPrompts()).make([before.chain for before, _, _ in pairs])
    found: dict[str, dict[str, Any]] = {}
    for one, (_, chosen, rejected) in zip(made, pairs, strict=True):
        row = {"prompt": one.prompt, "chosen": _reply(chosen, one.prompt), "rejected": _reply(rejected, one.prompt)}
        found.setdefault(json.dumps(row), row)
    return list(found.values())


def _parting(good: StepTrajectory, bad: StepTrajectory) -> tuple[StepTrajectory, str, str] | None:
    """Where two chains part: the chain up to there, and the step of each."""
    for ours, theirs in zip(good.steps, bad.steps, strict=False):
        if ours.step != theirs.step:
            rejected = render_step(theirs.step) if theirs.step is not None else theirs.text
            return (good.before(ours.number), render_step(ours.step), rejected) if ours.step is not None else None
        if ours.passages != theirs.passages:
            return None
    return None


def _reply(text: str, prompt: Prompt) -> str | list[Message]:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _line(trajectory: StepTrajectory) -> bytes:
    text = json.dumps(trajectory_row(trajectory), ensure_ascii=False)
    # A service can send half a character, which UTF-8 has no form for: JSON's own escape keeps it.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _end_last_line(file: BinaryIO) -> None:
    """Leaves a file with whole lines only: the last one is ended where it is a whole row, else taken away."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    begin, last = 0, b""
    for line in file:
        begin, last = begin + len(last), line
    if _is_whole(last):
        file.write(b"\n")
    else:
        file.truncate(begin)


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _step_row(record: StepRecord) -> dict[str, Any]:
    if record.step is None:
        return {"text": record.text, "problem": record.problem}
    row: dict[str, Any] = {"analysis": record.step.analysis}
    if record.step.query is None:
        row["answer"] = record.step.answer
    else:
        row["query"] = record.step.query
        row["documents"] = [_document(passage) for passage in record.passages]
    if record.scores:
        row["scores"] = record.scores
    return row


def _document(passage: Passage) -> dict[str, Any]:
    row: dict[str, Any] = {"doc_id": passage.doc_id}
    if passage.title:
        row["title"] = passage.title
    row["text"] = passage.text
    if passage.chunk:
        row["chunk"] = passage.chunk
    return row


def _record(number: int, given: Any, kind: str, state: str) -> StepRecord:
    if not isinstance(given, Mapping):
        raise ValueError(f"must be an object {{...}}, got {_shown(given)}")
    kinds = [name for name in ("query", "answer", "text") if name in given]
    if kinds != [kind]:
        where = "the last step" if kind != "query" or state == "fail" else "a step before the last"
        raise ValueError(
            f"{where} of a chain with state {state!r} must have the field {kind!r} and none of "
            f"{', '.join(repr(name) for name in ('query', 'answer', 'text') if name != kind)}; "
            f"it has {', '.join(map(repr, kinds)) or 'none of them'}"
        )
    scores = _scores(given)
    if kind == "text":
        problem = _text(given, "problem", required=False)
        return StepRecord(number, _text(given, "text", may_be_empty=True), None, problem, scores=scores)
    step = Step(number, _text(given, "analysis"), **{kind: _text(given, kind)})
    hits = [Hit(passage, 1.0 / rank, rank) for rank, passage in enumerate(_documents(given, kind), start=1)]
    return StepRecord(number, render_step(step), step, hits=hits, scores=scores)


def _documents(given: Mapping[str, Any], kind: str) -> list[Passage]:
    if kind != "query":
        if given.get("documents"):
            raise ValueError("field 'documents' belongs to a step with a query")
        return []
    documents = given.get("documents")
    if not isinstance(documents, list):
        raise ValueError(f"field 'documents' must be a list of documents, got {_shown(documents)}")
    passages = []
    for place, document in enumerate(documents, start=1):
        if not isinstance(document, Mapping):
            raise ValueError(f"document {place}: must be an object {{...}}, got {_shown(document)}")
        chunk = document.get("chunk", 0)
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 0:
            raise ValueError(f"document {place}: field 'chunk' must be a whole number from 0, got {_shown(chunk)}")
        try:
            title = _text(document, "title", required=False)
            passages.append(Passage(_text(document, "doc_id"), _text(document, "text"), title, chunk))
        except ValueError as error:
            raise ValueError(f"document {place}: {error}") from error
    return passages


def _scores(given: Mapping[str, Any]) -> dict[str, float | None]:
    scores = given.get("scores")
    if scores is None:
        return {}
    if not isinstance(scores, Mapping):
        raise ValueError(f"field 'scores' must be an object of numbers, got {_shown(scores)}")
    for name, score in scores.items():
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if score is not None and not (number and 0.0 <= score <= 1.0):
            raise ValueError(f"score {name!r} must be a number in [0, 1] or null, got {_shown(score)}")
    return dict(scores)


def _text(row: Mapping[str, Any], name: str, *, required: bool = True, may_be_empty: bool = False) -> str:
    value = row.get(name)
    if value is None and not required:
        return ""
    if name not in row:
        raise ValueError(f"field {name!r} is missing")
    if name in ("qid", "doc_id") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} must be text, got {_shown(value)}")
    if required and not may_be_empty and not value.strip():
        raise ValueError(f"field {name!r} is empty")
    return value


def _texts(row: Mapping[str, Any], name: str, *, required: bool = True) -> tuple[str, ...]:
    values = row.get(name)
    if values is None and not required:
        return ()
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"field {name!r} must be a list of texts, got {_shown(values)}")
    if required and not values:
        raise ValueError(f"field {name!r} is empty: an end state cannot be judged without answers")
    return tuple(values)


def _shown(value: Any, most: int = 40) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= most else f"{text[:most]}..."
