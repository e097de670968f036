"""Rubrics: what a language model is asked to judge, and how its reply becomes a score.

A rubric is a prompt file and a few settings. The contract of the file:

- **Placeholders** are the fields of ``JudgeCase``: ``$question``, ``$answer``, ``$gold``, ``$passages``, and any other
  name for a field of ``meta`` (``$analysis``, ``$query``, ``$history``, ...). What a file names, every case must have.
  ``$pass_mark`` is the score from which on a case passes. ``$answers``, in place of ``$answer``, makes the prompt a
  comparison: all answers to one question, each between tags of its own.
- **The code.** Where the file holds ``$code``, every text stands between tags that bear this code
  (``<answer kqzvbtrw>``), and the reply must repeat it: ``{"code": "...", "score": ...}``. The code is drawn from a
  hash of the case until no text of the case holds it, so that the same case always gives the same prompt (a cache can
  know it), no text can close its own tag, and no JSON that was copied from a text can pass for a verdict. Texts go in
  as they are; nothing is escaped or removed. A file without ``$code`` is filled plainly, for models too small to copy
  a code, and is easier to fool.
- **The reply** is a JSON object with ``score`` (a comparison: ``ranks``) and perhaps ``reason``. Text, a code fence or
  a thinking part around it does no harm.

What no code can prevent is that a text *persuades* the judge. That is the model's affair; the agreement with exact
match, in a run's report, tells whether it happens.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from rag_rl.errors import ConfigError
from rag_rl.judges.llm import Rubric
from rag_rl.judges.parsing import json_objects, to_number
from rag_rl.prompts import load_prompt, placeholders
from rag_rl.types import JudgeCase, Prompt, Verdict

# Part of every version: raise it when texts are laid out or replies are read in another way.
_CONTRACT = 1
_CODE_LETTERS = "bcdfghjkmnpqrstvwxz"  # neither vowels nor digits: no word, no number, and easy to copy
_CODE_LENGTH = 8
_OF_A_CASE = ("question", "answer", "answers", "gold", "passages")
_MAY_BE_EMPTY = ("answer", "answers", "passages", "history")
_OURS = ("code", "pass_mark")
_LONGEST_REASON = 500  # characters


class ScoreRubric:
    """One case a prompt, one score a reply.

    What counts in a reply: thinking that it begins with is split off; of the objects at top level that have a score
    and the prompt's code, the last one. If that one cannot be read or is out of range, the reply is unreadable,
    whatever stood before. Where the prompt holds no code, an object with the same score as one in the judged texts is
    taken for a copy and does not count.

    Args:
        name: for messages and logs.
        prompt: name or path of a prompt file; see the module.
        scale: lowest and highest score that the prompt asks for; scores are brought to [0, 1] from it. Nothing outside
            of it is read: 8 is no score between 0 and 1.
        graded: whether scores between the ends count; otherwise only the ends do.
        pass_mark: score in [0, 1] from which on a case passes.

    Attributes:
        text: of the prompt file.
        version: hash of the prompt file's text and these settings.

    Raises:
        ConfigError: no such file, a placeholder that cannot be filled, or a setting out of range.
    """

    def __init__(
        self,
        name: str,
        *,
        prompt: str,
        scale: tuple[float, float] = (0.0, 1.0),
        graded: bool = True,
        pass_mark: float = 0.5,
    ) -> None:
        self.name = name
        self.scale = (float(scale[0]), float(scale[1]))
        self.graded = graded
        self.pass_mark = pass_mark
        if not self.scale[0] < self.scale[1]:
            raise ConfigError(f"rubric {name!r}: the scale must rise, got {scale[0]} to {scale[1]}")
        if not 0.0 <= pass_mark <= 1.0:
            raise ConfigError(f"rubric {name!r}: the pass mark must lie in [0, 1], got {pass_mark}")
        self._template = _Template(name, prompt)
        if "answers" in self._template.fields:
            raise ConfigError(f"rubric {name!r}: prompt {prompt!r} compares $answers; it cannot score one alone")
        self.text = self._template.text
        self.version = self._template.version(self.scale, graded, pass_mark)

    def group(self, cases: Sequence[JudgeCase]) -> list[list[int]]:
        """Puts each case alone.

        Args:
            cases: B cases.

        Returns:
            B lists of one position.
        """
        return [[i] for i in range(len(cases))]

    def prompt(self, cases: Sequence[JudgeCase]) -> Prompt:
        """Fills the prompt for a case.

        Args:
            cases: one case.

        Returns:
            One user turn.

        Raises:
            ConfigError: the case lacks a field that the prompt names.
        """
        (case,) = cases
        return self._template.filled(self._template.texts(case), f"{self.pass_mark:g}")

    def parse(self, reply: str, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """Reads the score out of a reply.

        Args:
            reply: of the model.
            cases: the case that it was asked about.

        Returns:
            One verdict.

        Raises:
            ValueError: there is no verdict in the reply; says why.
            ConfigError: the case lacks a field that the prompt names.
        """
        (case,) = cases
        found, before = self._template.verdict(reply, "score", self._template.texts(case))
        low, high = self.scale
        if isinstance(found["score"], bool) and self.scale != (0.0, 1.0):
            raise ValueError(f"score is {found['score']}, expected a number from {low:g} to {high:g}")
        try:
            score = to_number(found["score"])
        except ValueError as error:
            raise ValueError(f"score: {error}") from error
        if not low <= score <= high:
            raise ValueError(f"score {score:g} lies outside {low:g} to {high:g}")
        if not self.graded and score not in self.scale:
            raise ValueError(f"score is {score:g}, expected {low:g} or {high:g}")
        return [Verdict((score - low) / (high - low), _reason(found, before))]


class ComparisonRubric:
    """All answers to one question in one prompt, ranked by the reply.

    An answer's score is the share of the other answers that it beats, ties counting half: (G - rank) / (G - 1) where
    no rank is shared, 0.5 where all are. So the mean score of a group is 0.5 whatever the answers are worth, and the
    scores say nothing across questions. Equal answers are shown once and share a rank. A case that is alone scores
    0.5.

    A group is what stands in one call of the judge. Under TRL this is what one process generated:
    ``per_device_train_batch_size * steps_per_generation`` must be a multiple of ``num_generations``, or groups are
    ranked in parts.

    Args:
        name: for messages and logs.
        prompt: name or path of a prompt file with ``$answers``; see the module.

    Attributes:
        text: of the prompt file.
        version: hash of the prompt file's text.

    Raises:
        ConfigError: no such file, no ``$answers`` in it, or a placeholder that cannot be filled.
    """

    def __init__(self, name: str = "comparison", *, prompt: str = "judge_comparison") -> None:
        self.name = name
        self._template = _Template(name, prompt)
        if "answers" not in self._template.fields or "answer" in self._template.fields:
            raise ConfigError(f"rubric {name!r}: prompt {prompt!r} must hold $answers, and no $answer")
        self.text = self._template.text
        self.version = self._template.version("comparison")

    def group(self, cases: Sequence[JudgeCase]) -> list[list[int]]:
        """Puts the cases together that differ in nothing but the answer.

        Args:
            cases: B cases.

        Returns:
            Groups in the order in which they begin.

        Raises:
            ConfigError: a case lacks a field that the prompt names.
        """
        groups: dict[str, list[int]] = {}
        for i, case in enumerate(cases):
            shared = {name: value for name, value in self._template.texts(case).items() if name != "answers"}
            groups.setdefault(repr(shared), []).append(i)
        return list(groups.values())

    def prompt(self, cases: Sequence[JudgeCase]) -> Prompt:
        """Fills the prompt for a group.

        Args:
            cases: G cases of one question.

        Returns:
            One user turn.

        Raises:
            ConfigError: a case lacks a field that the prompt names.
        """
        return self._template.filled(self._texts(cases), "0.5")

    def parse(self, reply: str, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """Reads the ranks out of a reply.

        Args:
            reply: of the model.
            cases: the G cases that it was asked about.

        Returns:
            G verdicts.

        Raises:
            ValueError: the reply does not rank every answer; says why.
            ConfigError: a case lacks a field that the prompt names.
        """
        texts = self._texts(cases)
        found, before = self._template.verdict(reply, "ranks", texts)
        labels = {answer: str(i) for i, answer in enumerate(texts["answers"], start=1)}
        ranks = found["ranks"]
        if not isinstance(ranks, Mapping) or {str(key) for key in ranks} != set(labels.values()):
            raise ValueError(f"ranks are {ranks!r:.80}, expected one for each of the answers 1 to {len(labels)}")
        places = {}
        for label, rank in ranks.items():
            try:
                places[label] = to_number(rank)
            except ValueError as error:
                raise ValueError(f"rank of answer {label}: {error}") from error
            if isinstance(rank, bool) or places[label] not in range(1, len(labels) + 1):
                raise ValueError(f"rank of answer {label} is {rank!r:.40}, expected 1 to {len(labels)}")
        reason = _reason(found, before)
        own = [places[labels[case.answer.strip()]] for case in cases]
        return [Verdict(_win_rate(place, own), reason) for place in own]

    def _texts(self, cases: Sequence[JudgeCase]) -> dict[str, tuple[str, ...]]:
        texts = self._template.texts(cases[0])
        texts["answers"] = tuple(dict.fromkeys(case.answer.strip() for case in cases))
        return texts


def rubric_names() -> list[str]:
    """Names of the rubrics that come with the package.

    Returns:
        Sorted names.

    Example:
        >>> rubric_names()[:3]
        ['accuracy', 'answer_correctness', 'comparison']
    """
    return sorted([*_SETTINGS, "comparison"])


def load_rubric(
    name_or_path: str,
    *,
    scale: tuple[float, float] | None = None,
    graded: bool | None = None,
    pass_mark: float | None = None,
) -> Rubric:
    """Makes a rubric from a name, or from a prompt file of the user's own.

    ====================  =======================================  ===============  =========
    name                  fields of a case                         score            pass mark
    ====================  =======================================  ===============  =========
    accuracy              question, gold, answer                   0 to 1           0.5
    answer_correctness    question, gold, answer                   0 or 1           0.5
    comparison            question, gold, answer                   share beaten     0.5
    consistency           question, passages, answer               0 to 1           0.5
    document_relevance    question, analysis, query, passages      0 to 1           0.6
    query_rationality     question, history, analysis, query       0 to 1           0.5
    reasoning_coherence   question, history, analysis              0 to 1           0.5
    style                 question, answer                         0 to 1           0.5
    tiny_judge            question, gold, answer                   0 or 1, no code  0.5
    ====================  =======================================  ===============  =========

    ``analysis``, ``query`` and ``history`` (the earlier steps as the reasoner saw them; "" before the first) are
    fields of ``meta``. A search that found nothing has no relevance to judge: it is 0 without asking.

    Args:
        name_or_path: one of ``rubric_names()``, or the path of a prompt file; see the module for what it must hold.
        scale: lowest and highest score that the prompt asks for; by default the rubric's own, 0 to 1 for a file.
        graded: whether scores between the ends count; by default the rubric's own, True for a file.
        pass_mark: score in [0, 1] from which on a case passes; by default the rubric's own, 0.5 for a file.

    Returns:
        A rubric; one of a file is named after the file, without folder and ending.

    Raises:
        ConfigError: neither a name nor a file, or settings that do not fit.
    """
    given = {"scale": scale, "graded": graded, "pass_mark": pass_mark}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    compares = name_or_path == "comparison"
    if not compares and name_or_path not in _SETTINGS:
        if not Path(name_or_path).is_file():
            raise ConfigError(
                f"judge_rubric {name_or_path!r} is neither one of {', '.join(rubric_names())} nor a file"
            )
        compares = "answers" in _Template(name_or_path, name_or_path).fields
    packaged = name_or_path in rubric_names()
    name = name_or_path if packaged else Path(name_or_path).stem
    if compares:
        if changed:
            raise ConfigError(
                f"judge_rubric {name_or_path!r} ranks answers: {', '.join(changed)} has no meaning there"
            )
        return ComparisonRubric(name, prompt="judge_comparison" if packaged else name_or_path)
    settings = {"prompt": name_or_path, **(_SETTINGS[name] if packaged else {}), **changed}
    return ScoreRubric(name, **settings)


_SETTINGS: dict[str, dict[str, Any]] = {
    "accuracy": {"prompt": "judge_accuracy"},
    "answer_correctness": {"prompt": "judge_answer_correctness", "graded": False},
    "consistency": {"prompt": "judge_consistency"},
    # The pass mark of R3-RAG (arXiv 2505.23794).
    "document_relevance": {"prompt": "judge_document_relevance", "pass_mark": 0.6},
    "query_rationality": {"prompt": "judge_query_rationality"},
    "reasoning_coherence": {"prompt": "judge_reasoning_coherence"},
    "style": {"prompt": "judge_style"},
    "tiny_judge": {"prompt": "tiny_judge", "graded": False},
}


class _Template:
    """A prompt file: which fields it names, how they are laid out, and which object of a reply is its verdict."""

    def __init__(self, rubric: str, prompt: str) -> None:
        self.rubric = rubric
        try:
            self.text = load_prompt(prompt)
        except (FileNotFoundError, UnicodeDecodeError) as error:
            raise ConfigError(f"rubric {rubric!r}: {error}") from error
        names = placeholders(self.text)
        try:
            Template(self.text).substitute(dict.fromkeys(names, ""))
        except ValueError as error:
            raise ConfigError(
                f"rubric {rubric!r}: prompt {prompt!r} has a stray $: write $$ for a dollar sign"
            ) from error
        self.fields = tuple(name for name in names if name not in _OURS)
        self.coded = "code" in names
        if not self.fields:
            raise ConfigError(f"rubric {rubric!r}: prompt {prompt!r} has no placeholder for anything to judge")

    def version(self, *settings: object) -> str:
        key = repr((_CONTRACT, self.text, settings))
        return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def texts(self, case: JudgeCase) -> dict[str, tuple[str, ...]]:
        """What a case has for each field of the prompt."""
        found: dict[str, tuple[str, ...]] = {}
        for name in self.fields:
            match name:
                case "question" | "answer":
                    texts = (getattr(case, name),)
                case "answers":
                    texts = (case.answer.strip(),)
                case "gold" | "passages":
                    texts = tuple(getattr(case, name))
                case _:
                    texts = (case.meta.get(name),)
            empty = not texts or (texts[0] == "" and name not in _MAY_BE_EMPTY)
            if empty or not all(isinstance(text, str) for text in texts):
                where = name if name in _OF_A_CASE else f"meta[{name!r}]"
                raise ConfigError(
                    f"rubric {self.rubric!r} needs the field {where} of every case; the case about "
                    f"{case.question!r:.80} has {'none' if empty or texts == (None,) else repr(texts)[:80]}"
                )
            found[name] = texts
        return found

    def filled(self, texts: Mapping[str, tuple[str, ...]], pass_mark: str) -> Prompt:
        code = self._code(texts)
        shown = {name: self._layout(name, values, code) for name, values in texts.items()}
        content = Template(self.text).substitute(shown, code=code, pass_mark=pass_mark)
        # No space at the end, where an empty answer leaves one: it would be a token that no model expects there.
        return [{"role": "user", "content": content.rstrip()}]

    def _layout(self, name: str, texts: tuple[str, ...], code: str) -> str:
        if not self.coded:
            if name == "gold":
                return " | ".join(texts)
            several = name in ("passages", "answers")
            return "\n".join(f"[{i}] {text}" for i, text in enumerate(texts, start=1)) if several else texts[0]
        tag = {"gold": "accepted_answer", "passages": "passage", "answers": "answer"}.get(name)
        if tag is None:
            return f"<{name} {code}>\n{texts[0]}\n</{name} {code}>"
        return "\n".join(f"<{tag} {i} {code}>\n{text}\n</{tag} {i} {code}>" for i, text in enumerate(texts, start=1))

    def _code(self, texts: Mapping[str, tuple[str, ...]]) -> str:
        """A code that depends on the case alone and stands in none of its texts."""
        held = "\n".join(text for values in texts.values() for text in values).lower()
        key = repr((self.text, sorted(texts.items())))
        attempt = 0
        while True:
            digest = hashlib.sha256(f"{attempt} {key}".encode("utf-8", "surrogatepass")).digest()
            code = "".join(_CODE_LETTERS[byte % len(_CODE_LETTERS)] for byte in digest[:_CODE_LENGTH])
            if code not in held:
                return code
            attempt += 1

    def verdict(self, reply: str, key: str, texts: Mapping[str, tuple[str, ...]]) -> tuple[dict[str, Any], str]:
        """The object of a reply that is the judge's verdict, and the text before the first object."""
        said = _after_thinking(reply)
        objects = [found for found in json_objects(said) if key in found]
        if not objects:
            raise ValueError(f"no JSON object with {key!r} in the reply {_one_line(said, 80)!r}")
        if self.coded:
            code = self._code(texts)
            own = [found for found in objects if str(found.get("code", "")).strip().lower() == code]
            if not own:
                raise ValueError(f"no JSON object in the reply repeats the code {code}")
            own = _without_quoted_examples(own, json_objects(Template(self.text).safe_substitute(code=code)))
            if not own:
                raise ValueError("the reply only quotes the instructions")
        else:
            copied = [_plain(found[key]) for found in _objects_in(texts.values()) if key in found]
            own = [found for found in objects if _plain(found[key]) not in copied]
            if not own:
                raise ValueError(f"the only {key} in the reply also stands in the judged text")
        return own[-1], said.partition("{")[0]


def _after_thinking(reply: str) -> str:
    """A reply without the thinking that it begins with.

    Not ``rag_rl.text.split_thinking``: a judge that quotes a text with such tags in it would lose its verdict. Tags
    further on are left alone, since the last verdict counts anyway.
    """
    if not reply.lstrip().startswith("<think>"):
        return reply
    _, closed, said = reply.partition("</think>")
    if not closed:
        raise ValueError("the thinking part was never closed")
    return said


def _without_quoted_examples(
    objects: Sequence[dict[str, Any]], examples: Collection[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Leaves copies of the prompt's examples out if they differ: then instructions were quoted, no verdict was given.

    A copy of one example alone is how a small model gives its verdict.
    """
    copies = [found for found in objects if found in examples]
    if all(copy == copies[0] for copy in copies):
        return list(objects)
    return [found for found in objects if found not in examples]


def _objects_in(texts: Iterable[tuple[str, ...]]) -> list[dict[str, Any]]:
    return [found for values in texts for text in values for found in json_objects(text)]


def _plain(value: Any) -> Any:
    """A value in one form, whichever way it was written: 1, 1.0, "1" and true are the same score."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    try:
        return to_number(value)
    except ValueError:
        return repr(value)


def _win_rate(place: float, places: Sequence[float]) -> float:
    if len(places) < 2:
        return 0.5
    beaten = sum(other > place for other in places)
    tied = sum(other == place for other in places) - 1
    return (beaten + tied / 2) / (len(places) - 1)


def _reason(found: Mapping[str, Any], before: str) -> str:
    """The judge's own words: its ``reason``, else what it wrote before the verdict."""
    reason = found.get("reason")
    words = reason if isinstance(reason, str) else before
    # Halves of a character, which JSON escapes can hold, would stop the log: pairs become one, others a mark.
    words = words.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return _one_line(re.sub(r"```(?:json)?", "", words), _LONGEST_REASON)


def _one_line(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
