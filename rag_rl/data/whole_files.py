"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing that takes its name only at the end, and then is on the disk.

    Until then it is called ``.<name>.<process>.part``, in the same folder: a file can be replaced in one step only
    within its own file system. After an error that file is gone, and what stood at ``path`` still stands there.

    Args:
        path: the file, in a folder that exists; an existing one is replaced.

    Yields:
        A file to write bytes to.

    Raises:
        OSError: the disk refuses; the caller knows what that means to its user.
    """
    half = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with half.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
    finally:
        with suppress(OSError):
            half.unlink()
