"""One way to read typed fields from a row, so that every loader complains about bad rows in the same words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rag_rl.errors import DataError, bad_rows

_SHOWN = 5
_SHOWN_NAMES = 8
_LONGEST_SHOWN = 40


class BadRows:
    """Collects the bad rows of one file; the error spells out the first five and counts the others.

    Attributes:
        path: the file.
        unit: what rows are counted in: ``"line"``, or ``"item"`` of a JSON array, or ``"row"`` of a table.
        hint: what to do about it, said once at the end.
    """

    def __init__(self, path: object, unit: str = "line") -> None:
        """Starts with no bad row.

        Args:
            path: the file, as it shall stand in the error.
            unit: what rows are counted in.
        """
        self.path = str(path)
        self.unit = unit
        self.hint = ""
        self._fields_of_a_row = ""
        self._first: list[tuple[int, str]] = []
        self._count = 0

    def __len__(self) -> int:
        """Counts the bad rows.

        Returns:
            How many there are so far.
        """
        return self._count

    def add(self, number: int, trouble: str) -> None:
        """Notes a bad row.

        Args:
            number: where it stands, from 1.
            trouble: what is wrong with it.
        """
        self._count += 1
        # A file of a million bad rows must not fill the memory: later rows are only counted.
        if len(self._first) < _SHOWN:
            self._first.append((number, trouble))

    def add_fields(self, number: int, fields: Fields) -> None:
        """Notes a row by what is wrong with its fields.

        Args:
            number: where it stands, from 1.
            fields: its fields, after reading.
        """
        self.add(number, "; ".join(fields.troubles))
        # Names that are there say at once what the missing one is called; once is enough.
        if fields.lacks_one and not self._fields_of_a_row:
            names = [str(name) for name in fields.row]
            shown = ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
            self._fields_of_a_row = f"; {self.unit} {number} has the fields: {shown or 'none'}"

    def error(self) -> DataError:
        """Makes the error for the rows noted so far.

        Returns:
            An error that names file, place and trouble.
        """
        uncounted = [(0, "")] * (self._count - len(self._first))
        message = bad_rows(self.path, [*self._first, *uncounted], shown=_SHOWN, unit=self.unit)
        return DataError(f"{message}{self._fields_of_a_row}{f'; {self.hint}' if self.hint else ''}")

    def raise_if_any(self) -> None:
        """Ends the reading of a file.

        Raises:
            DataError: at least one row is bad.
        """
        if self._count:
            raise self.error()


def describe(value: object) -> str:
    """Names a JSON value the way its writer sees it.

    Args:
        value: anything that JSON can hold.

    Returns:
        Kind and, for a plain value, the value itself, cut when long.

    Example:
        >>> describe("x"), describe(None), describe([1]), describe(True)
        ("text 'x'", 'null', 'a list', 'true')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"text {_cut(repr(value))}"
    if isinstance(value, (int, float)):
        return f"number {value!r}"
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, (list, tuple)) else type(value).__name__


def broken_character(text: str) -> str | None:
    r"""Looks for half a character, which no tokenizer and no file takes.

    Args:
        text: any text.

    Returns:
        What is broken; None where the text is sound.

    Example:
        >>> broken_character("fine"), broken_character(chr(0xD83D))
        (None, 'has half a character (\\ud83d)')
    """
    if text.isascii():
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Tables are decoded with "surrogateescape", which maps an undecodable byte b to U+DC00 + b.
        if 0xDC80 <= code <= 0xDCFF:
            return f"is not UTF-8 (byte 0x{code - 0xDC00:02x} at character {error.start + 1}): save the file as UTF-8"
        return f"has half a character (\\u{code:04x})"
    return None


class Fields:
    """Reads the fields of one row and notes what is wrong with them, instead of raising at the first.

    Every getter returns a harmless value where the field is bad, so that all fields can be looked at before the row is
    given up.

    Attributes:
        row: the row.
        troubles: one short sentence for each bad field, in the order of reading.
        lacks_one: whether a field is missing altogether.
    """

    __slots__ = ("row", "troubles", "lacks_one")

    def __init__(self, row: Mapping[str, Any]) -> None:
        """Starts with nothing read.

        Args:
            row: the row, as parsed.
        """
        self.row = row
        self.troubles: list[str] = []
        self.lacks_one = False

    def bad(self, name: str, trouble: str) -> None:
        """Notes a bad field.

        Args:
            name: of the field.
            trouble: what is wrong; continues the words "field 'name' ...".
        """
        self.troubles.append(f"field {name!r} {trouble}")

    def missing(self, name: str) -> None:
        """Notes a missing field.

        Args:
            name: of the field.
        """
        self.bad(name, "is missing")
        self.lacks_one = True

    def text(self, name: str, *, required: bool = True, may_be_empty: bool = False) -> str:
        """Reads a text.

        Args:
            name: of the field.
            required: whether it is an error that the field is missing or null.
            may_be_empty: whether a text of nothing but spaces will do.

        Returns:
            The text as it stands; "" where it is missing or bad.
        """
        if name not in self.row:
            if required:
                self.missing(name)
            return ""
        value = self.row[name]
        if value is None and not required:
            return ""
        if not isinstance(value, str):
            self.bad(name, f"must be text, got {describe(value)}")
            return ""
        if not may_be_empty and not value.strip():
            self.bad(name, "is empty")
        elif broken := broken_character(value):
            self.bad(name, broken)
        return value

    def printable(self, name: str) -> str:
        """Reads a text or a number, for columns that are joined into a text.

        Args:
            name: of the field.

        Returns:
            The value as text; "" where it is missing, null or bad.
        """
        value = self.row.get(name)
        if name in self.row and (value is None or (isinstance(value, float) and math.isnan(value))):
            return ""
        if isinstance(value, (int, float)):
            return str(value)
        return self.text(name, may_be_empty=True)

    def identifier(self, *names: str) -> str:
        """Reads an id: a text, or a whole number, which becomes text.

        Args:
            *names: of the field, the preferred one first.

        Returns:
            The id; "" where it is missing or bad.
        """
        name = next((name for name in names if name in self.row), None)
        if name is None:
            self.missing(names[0])
            return ""
        value = self.row[name]
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.text(name)

    def texts(self, name: str, *, required: bool = True, may_be_empty: bool = False) -> tuple[str, ...]:
        """Reads a list of texts; whole numbers in it become text.

        Args:
            name: of the field.
            required: whether it is an error that the field is missing or null.
            may_be_empty: whether a list of nothing will do; a text of nothing in it never does.

        Returns:
            The texts without repetitions; empty where the field is missing or bad.
        """
        value = self.row.get(name)
        if value is None and not required:
            return ()
        if name not in self.row:
            self.missing(name)
            return ()
        if not isinstance(value, (list, tuple)):
            self.bad(name, f"must be a list of texts, got {describe(value)}")
            return ()
        found: dict[str, None] = {}
        for position, entry in enumerate(value):
            if isinstance(entry, int) and not isinstance(entry, bool):
                entry = str(entry)
            if not isinstance(entry, str):
                self.bad(name, f"must be a list of texts, got {describe(entry)} at place {position + 1}")
            elif not entry.strip():
                self.bad(name, f"holds an empty text at place {position + 1}")
            elif broken := broken_character(entry):
                self.bad(name, broken)
            else:
                found[entry] = None
        if not value and not may_be_empty:
            self.bad(name, "is empty")
        return tuple(found)

    def integer(self, name: str, *, lowest: int, required: bool = False) -> int | None:
        """Reads a whole number.

        Args:
            name: of the field.
            lowest: the smallest number that is accepted.
            required: whether it is an error that the field is missing or null.

        Returns:
            The number; None where it is missing or bad.
        """
        value = self.row.get(name)
        if value is None and not required:
            return None
        if name not in self.row:
            self.missing(name)
        elif isinstance(value, bool) or not isinstance(value, int):
            self.bad(name, f"must be a whole number, got {describe(value)}")
        elif value < lowest:
            self.bad(name, f"must be at least {lowest}, got {value}")
        else:
            return value
        return None


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
