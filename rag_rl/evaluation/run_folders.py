"""Finished run folders, read back: what they hold, and what is wrong with those that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from rag_rl.errors import RunFolderError


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what a finished run says of itself.

    Args:
        folder: the run folder.

    Returns:
        The content of ``metrics.json``, and every setting.

    Raises:
        RunFolderError: no run is there, it is not finished, or its files are cut or of another version.
    """
    recorded, measured = folder / "resolved_config.yaml", folder / "metrics.json"
    if not recorded.is_file():
        raise RunFolderError(f"{folder} holds no run (there is no resolved_config.yaml in it)")
    if not measured.is_file():
        raise RunFolderError(f"{folder} holds an unfinished run (there is no metrics.json in it): let it finish first")
    try:
        settings = yaml.safe_load(recorded.read_text(encoding="utf-8"))
        summary = json.loads(measured.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        first = str(error).strip().split("\n")[0]
        raise RunFolderError(
            f"{folder} is damaged: metrics.json or resolved_config.yaml cannot be read: {first}"
        ) from error
    if not isinstance(settings, dict) or not isinstance(summary, dict) or "recipe" not in settings:
        raise RunFolderError(f"{folder} {other_version(settings)}: no recipe is named in resolved_config.yaml")
    if summary.get("status") != "complete":
        raise RunFolderError(
            f"{folder} holds an unfinished run (status: {summary.get('status')}): let it finish first"
        )
    needed = "metrics" if settings["recipe"] == "evaluate_rag" else "after"
    if not isinstance(summary.get(needed), dict) or not isinstance(summary.get("n_eval"), int):
        raise RunFolderError(f"{folder} {other_version(settings)}: metrics.json has no {needed!r} or no 'n_eval'")
    return summary, settings


def other_version(settings: Any) -> str:
    """Says that a run came from another version, where something that this one writes is missing from it.

    Args:
        settings: of the run.

    Returns:
        The end of a sentence that begins with the folder.

    Example:
        >>> other_version({"made_with": {"rag-rl": "0.0.1"}}).startswith("was made by rag-rl 0.0.1, and this is ")
        True
    """
    from rag_rl import __version__

    made = (settings.get("made_with") or {}).get("rag-rl") if isinstance(settings, dict) else None
    return f"was made by rag-rl {made or 'of a version that it does not name'}, and this is {__version__}"
