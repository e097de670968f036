"""Where data lies: ``${data}/...`` in configurations, and what to say about a file that is not there."""

from __future__ import annotations

import os
from pathlib import Path

from rag_rl.errors import DataError

DATA_VARIABLE = "RAG_RL_DATA"
_PLACEHOLDER = "${data}"

# Where the usual data sets come from; first part of a path under the data folder -> what to download.
_SOURCES = {
    "hotpotqa": "https://hotpotqa.github.io",
    "twowiki": "https://github.com/Alab-NII/2wikimultihop",
    "musique": "https://github.com/StonyBrookNLP/musique",
    "scifact": "https://github.com/beir-cellar/beir (scifact)",
    "cranfield": "http://ir.dcs.gla.ac.uk/resources/test_collections/cran",
    "squad_xquad_en": "https://github.com/google-deepmind/xquad",
}


def data_root() -> Path:
    """Finds the folder that ``${data}`` stands for.

    Returns:
        The value of the environment variable RAG_RL_DATA, else ``data`` in the current folder.
    """
    return Path(os.environ.get(DATA_VARIABLE) or "data").expanduser()


def resolve_data_path(text: str | Path, *, must_exist: bool = True) -> Path:
    """Turns a path of a configuration into a path of this machine.

    Args:
        text: ``${data}/scifact/corpus.jsonl``, or any plain path; ``~`` is the home folder.
        must_exist: False for a path that is about to be written.

    Returns:
        The path.

    Raises:
        DataError: nothing is there; the message says how to get it.
    """
    text = str(text)
    if text == _PLACEHOLDER or text.startswith((f"{_PLACEHOLDER}/", f"{_PLACEHOLDER}\\")):
        path = data_root() / text[len(_PLACEHOLDER) + 1 :]
    else:
        path = Path(text).expanduser()
    if must_exist and not path.exists():
        raise missing_path(path, text)
    return path


def missing_path(path: Path, text: str | None = None) -> DataError:
    """Makes the error for a file or folder that is not there.

    Args:
        path: what was looked for.
        text: how the user wrote it; None where that is the same.

    Returns:
        An error that says how to get it.
    """
    given = text if text is not None else str(path)
    if not given.startswith(_PLACEHOLDER):
        advice = f"give an existing path, or {_PLACEHOLDER}/... for a path under ${DATA_VARIABLE}"
        return DataError(f"{given}: no such file or folder{_neighbours(path)}; {advice} (forms: docs/data_formats.md)")
    root = data_root()
    what = f"{given}: no such file or folder: looked for {path}"
    if not root.is_dir():
        now = f"names {root}, which does not exist" if os.environ.get(DATA_VARIABLE) else "is not set"
        advice = f"set the environment variable {DATA_VARIABLE} to the folder that holds the data sets"
        return DataError(f"{what}; {advice} (it {now}){_origin(path, root)}")
    advice = f"put it there, or set {DATA_VARIABLE} to the folder that holds the data sets"
    return DataError(f"{what}{_neighbours(path)}; {advice}{_origin(path, root)}")


def _origin(path: Path, root: Path) -> str:
    name = path.relative_to(root).parts[0] if path != root and path.is_relative_to(root) else ""
    if name not in _SOURCES:
        return ""
    return f"; {name} comes from {_SOURCES[name]}, docs/data_formats.md shows the forms that can be read"


def _neighbours(path: Path, *, shown: int = 8) -> str:
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        return ""
    if not names:
        return ""
    return f" (beside it: {', '.join(names[:shown])}{', ...' if len(names) > shown else ''})"
