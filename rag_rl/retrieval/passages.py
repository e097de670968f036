"""Passages on disk, read by row: a JSONL file and the end offset of every line, both memory-mapped."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import overload

import numpy as np

from rag_rl.types import Passage

TEXTS = "passages.jsonl"
ENDS = "passages.ends"
ENDS_DTYPE = np.dtype("<u8")


def encode_passage(passage: Passage) -> bytes:
    r"""One line of ``passages.jsonl``.

    Args:
        passage: the passage.

    Returns:
        UTF-8 JSON, ended by a newline; equal passages give equal bytes.

    Example:
        >>> encode_passage(Passage("d1", "Some text."))
        b'{"doc_id": "d1", "title": "", "text": "Some text.", "chunk": 0}\n'
    """
    row = {"doc_id": passage.doc_id, "title": passage.title, "text": passage.text, "chunk": passage.chunk}
    # Half of a surrogate pair is not UTF-8, yet occurs in scraped text; json.loads reads it back from this form.
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


class PassageStore(Sequence[Passage]):
    """The passages of an index by row, decoded on demand.

    Only the latest ``keep`` decoded passages are held in memory; the files stay on disk.

    Args:
        folder: the index folder.
        keep: decoded passages to hold, at least 0.
    """

    def __init__(self, folder: str | Path, *, keep: int = 16_384) -> None:
        folder = Path(folder)
        self._keep = keep
        self._decoded: dict[int, Passage] = {}
        self._ends = np.memmap(folder / ENDS, dtype=ENDS_DTYPE, mode="r")
        with (folder / TEXTS).open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> Passage: ...

    @overload
    def __getitem__(self, row: slice) -> Sequence[Passage]: ...

    def __getitem__(self, row: int | slice) -> Passage | Sequence[Passage]:
        if isinstance(row, slice):
            return self.take(range(*row.indices(len(self))))
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} passages")
        return self.take([row])[0]

    def line(self, row: int) -> bytes:
        """The stored bytes of one passage.

        Args:
            row: from 0.

        Returns:
            Its line, newline included.
        """
        start = int(self._ends[row - 1]) if row else 0
        return self._bytes[start : int(self._ends[row])]

    def take(self, rows: Iterable[int]) -> list[Passage]:
        """Many passages at once, which is much cheaper than one by one.

        Args:
            rows: row numbers from 0 to the number of passages less one, in any order, repeats allowed.

        Returns:
            One passage a row.
        """
        rows = list(rows)
        decoded = self._decoded
        try:
            return [decoded[row] for row in rows]
        except KeyError:
            pass
        missing = sorted({row for row in rows if row not in decoded})
        # One parser call for all of them: the call costs as much as parsing a short passage.
        array = json.loads(b"[" + b",".join([self.line(row) for row in missing]) + b"]")
        fresh = {
            row: Passage(item["doc_id"], item["text"], item["title"], item["chunk"])
            for row, item in zip(missing, array, strict=True)
        }
        found = [fresh[row] if row in fresh else decoded[row] for row in rows]
        decoded.update(fresh)
        if len(decoded) > self._keep:
            for row in list(islice(decoded, len(decoded) - self._keep)):
                decoded.pop(row, None)
        return found

    def forget(self) -> None:
        """Drops the decoded passages, as measurements of a cold start need."""
        self._decoded.clear()

    def close(self) -> None:
        """Lets go of the files."""
        self._bytes.close()
        self._decoded.clear()
