"""Plain text and Markdown files as documents, one file a document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rag_rl.data.fields import BadRows
from rag_rl.data.jsonl import opened
from rag_rl.types import Passage

TEXT_ENDINGS = (".txt", ".md", ".markdown")
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(?P<title>.*?)(?:[ \t]+#+)?[ \t]*")
_FENCE = re.compile(r" {0,3}(```|~~~)")


def text_files_in(folder: Path) -> Iterator[Path]:
    """Finds the text files of a folder and its subfolders, leaving out what is hidden.

    Args:
        folder: where to look.

    Yields:
        Paths, sorted within each folder.
    """
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        # A link to a folder above would never end.
        if entry.is_dir() and not entry.is_symlink():
            yield from text_files_in(entry)
        elif entry.suffix.lower() in TEXT_ENDINGS and entry.is_file():
            yield entry


def read_text_folder(folder: Path, bad: BadRows) -> Iterator[tuple[int, Passage]]:
    """Reads every text file of a folder as one document.

    Args:
        folder: where the files are.
        bad: takes the files that are not UTF-8.

    Yields:
        File number from 1, and the document; its id is the path below ``folder``, with "/".
    """
    bad.unit = "file"
    for number, path in enumerate(text_files_in(folder), start=1):
        name = path.relative_to(folder).as_posix()
        text = _read(path, number, name, bad)
        if text is not None:
            yield number, Passage(doc_id=name, text=text, title=title_of(path, text))


def read_text_file(path: Path, bad: BadRows) -> Iterator[tuple[int, Passage]]:
    """Reads one text file as one document.

    Args:
        path: the file.
        bad: takes the file when it is not UTF-8.

    Yields:
        1, and the document; its id is the file's name.
    """
    bad.unit = "file"
    text = _read(path, 1, path.name, bad)
    if text is not None:
        yield 1, Passage(doc_id=path.name, text=text, title=title_of(path, text))


def title_of(path: Path, text: str) -> str:
    r"""Finds a document's title.

    Args:
        path: its file.
        text: what is in it.

    Returns:
        For Markdown the first heading outside a code block; else the file's name without its ending.

    Example:
        >>> title_of(Path("a/notes.md"), "Hello\n## The river ##\nText")
        'The river'
        >>> title_of(Path("a/notes.txt"), "# no heading here")
        'notes'
    """
    if path.suffix.lower() != ".txt":
        fence = ""
        for line in text.splitlines():
            mark = _FENCE.match(line)
            if mark and fence in ("", mark[1]):
                fence = "" if fence else mark[1]
            elif not fence and (heading := _HEADING.fullmatch(line)) and heading["title"]:
                return heading["title"]
    return path.stem


def _read(path: Path, number: int, name: str, bad: BadRows) -> str | None:
    with opened(path) as file:
        raw = file.read()
    try:
        return raw.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        bad.add(number, f"{name}: line {line}: is not UTF-8 (byte 0x{raw[error.start]:02x}): save the file as UTF-8")
        return None
