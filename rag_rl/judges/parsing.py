"""JSON out of a model's reply: tolerant of how it is written, strict about what it says.

Language models wrap JSON in code fences and prose, use Python's quotes and constants, and leave commas behind. All of
that is read. What is never done is to guess: an object that is cut off, or that holds ``8/10`` where a number belongs,
is not there at all.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_BRACE = re.compile(r"[{}]")
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_WORD = re.compile(r"-?[A-Za-z]+")
_STRING = {
    '"': re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL),
    "'": re.compile(r"'([^'\\]*(?:\\.[^'\\]*)*)'", re.DOTALL),
}
# Escapes of UTF-16 stand in pairs for one character: a run of them is read as a whole.
_ESCAPE = re.compile(r"(?:\\u[0-9a-fA-F]{4})+|\\.", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", '"': '"', "'": "'", "\\": "\\", "/": "/"}
# NaN and its like are read so that they can be refused by name, instead of hiding the object that holds them.
_CONSTANTS = {
    "true": True,
    "True": True,
    "false": False,
    "False": False,
    "null": None,
    "None": None,
    "NaN": math.nan,
    "nan": math.nan,
    "Infinity": math.inf,
    "-Infinity": -math.inf,
    "inf": math.inf,
    "-inf": -math.inf,
}
# A brace in prose ("the set {a, b}") opens nothing; this one opens an object, even if the rest of it cannot be read.
_OBJECT_START = re.compile(r"""\{\s*(["'])[^"'{}\n]{1,40}\1\s*:""")
_DEEPEST = 8


class _UnreadableError(Exception):
    """This is no JSON."""


def json_objects(text: str) -> list[dict[str, Any]]:
    r"""Finds the JSON objects in a text.

    Read besides JSON itself: single quotes, trailing commas, ``True``, ``False``, ``None``, ``NaN``, ``Infinity``, a
    sign or a bare point at a number, and line breaks in strings. Keys are stripped and in lower case. A key that is
    given two different values says nothing: its value is None.

    Args:
        text: any text.

    Returns:
        The objects at top level, in order, numbers as floats. Objects inside other objects are part of these; what
        stands inside an object that cannot be read (cut off, say) is left out with it.

    Example:
        >>> json_objects("Well... ```json\n{'score': 1,}\n``` as I said.")
        [{'score': 1.0}]
        >>> json_objects('{"draft": {"score": 1}, "score": 0')
        []
    """
    found: list[dict[str, Any]] = []
    at = unread = 0  # how many unreadable objects are open here
    while (brace := _BRACE.search(text, at)) is not None:
        at = brace.start()
        if brace.group() == "}":
            unread, at = max(0, unread - 1), at + 1
            continue
        try:
            value, at = _object(text, at, 0)
        except _UnreadableError:
            unread += bool(unread or _OBJECT_START.match(text, at))
            at += 1
        else:
            if not unread:
                found.append(value)
    return found


def to_number(value: Any) -> float:
    """Reads a number as a judge may write it.

    Args:
        value: a value out of ``json_objects``: a number, true or false, or a string that holds a number and nothing
            else.

    Returns:
        A finite number; 1.0 and 0.0 for true and false.

    Raises:
        ValueError: anything else, NaN and infinity included.

    Example:
        >>> to_number(" 0.8 "), to_number(True)
        (0.8, 1.0)
    """
    number = value
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        number = float(value.strip())
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{value!r:.40} is not a finite number")
    return float(number) + 0.0  # -0.0 becomes 0.0


def _object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    """Reads the object that starts at ``at``; gives it and the place after it."""
    if depth > _DEEPEST:
        raise _UnreadableError
    pairs: dict[str, Any] = {}
    at = _skip(text, at + 1)
    while not text.startswith("}", at):
        key, at = _string(text, at)
        key, at = key.strip().lower(), _skip(text, at)
        if not text.startswith(":", at):
            raise _UnreadableError
        value, at = _value(text, _skip(text, at + 1), depth)
        pairs[key] = None if key in pairs and pairs[key] != value else value
        at = _comma(text, at, "}")
    return pairs, at + 1


def _array(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    if depth > _DEEPEST:
        raise _UnreadableError
    values: list[Any] = []
    at = _skip(text, at + 1)
    while not text.startswith("]", at):
        value, at = _value(text, at, depth)
        values.append(value)
        at = _comma(text, at, "]")
    return values, at + 1


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    if text.startswith("{", at):
        return _object(text, at, depth + 1)
    if text.startswith("[", at):
        return _array(text, at, depth + 1)
    if text[at : at + 1] in _STRING:
        return _string(text, at)
    if number := _NUMBER.match(text, at):
        return float(number.group()), number.end()
    word = _WORD.match(text, at)
    if word is None or word.group() not in _CONSTANTS:
        raise _UnreadableError
    return _CONSTANTS[word.group()], word.end()


def _string(text: str, at: int) -> tuple[str, int]:
    pattern = _STRING.get(text[at : at + 1])
    match = pattern.match(text, at) if pattern else None
    if match is None:
        raise _UnreadableError
    return _ESCAPE.sub(_unescaped, match.group(1)), match.end()


def _unescaped(match: re.Match[str]) -> str:
    escape = match.group()
    if len(escape) > 2:
        return str(json.loads(f'"{escape}"'))
    return _ESCAPED.get(escape[1], escape)  # "\\(" of a formula stays what it is


def _comma(text: str, at: int, closing: str) -> int:
    """Passes one comma, or stops before the closing bracket."""
    at = _skip(text, at)
    if text.startswith(",", at):
        return _skip(text, at + 1)
    if not text.startswith(closing, at):
        raise _UnreadableError
    return at


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return at if space is None else space.end()
