"""Steps of a run that are runs of their own, each done once, and anew when what it is made of changes.

A step's ``manifest.json`` names what it was made of: settings, and digests of files and weights. Nothing else decides
whether it is done anew, so that a change reaches exactly the steps that depend on it: those after a step that came out
otherwise find other weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rag_rl.config.parsing import config_difference, resolved
from rag_rl.config.parts import expand
from rag_rl.run import RUNTIME_KEYS, Run, last_checkpoint, main_process_only, write_whole

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""In the folder of a step: what it was made of and, later, what was decided about it."""

# What of a folder makes up a model: weights, how they are read, and the tokenizer. Reports and checkpoints do not.
_OF_A_MODEL = (
    "*.safetensors", "pytorch_model*.bin", "config.json", "*_config.json", "modules.json", "tokenizer*", "vocab*",
    "merges.txt", "*.model", "*.jinja", "[0-9]_*/config.json", "[0-9]_*/*.safetensors",
)  # fmt: skip


def content_digest(name: str, *, model: bool = False) -> str:
    """What changes when the content of a file or folder does; neither where it lies nor when it was written matters.

    Args:
        name: a path, which may begin with ``${data}`` or ``${tiny}``. Anything else stands for itself: a Hub id does
            not tell when its content changes.
        model: of a folder only the model that lies in it counts.

    Returns:
        A hash in hexadecimal, or the name.
    """
    path = Path(expand(name))
    if path.is_file():
        return _file_digest(path)
    if not name or not path.is_dir():
        return name
    if model:
        files = {file for pattern in _OF_A_MODEL for file in path.glob(pattern) if file.is_file()}
    else:
        files = {file for file in path.rglob("*") if file.is_file()}
    told = [(file.relative_to(path).as_posix(), _file_digest(file)) for file in sorted(files)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def open_step(
    run: Run,
    name: str,
    *,
    recipe: str,
    seed: int,
    arguments: Sequence[Any],
    inputs: Mapping[str, Any],
    ignore: Collection[str] = (),
) -> Run:
    """Opens a step: finished, to be gone on with, or new; what was made of something else is deleted first.

    Args:
        run: which the step belongs to.
        name: of its folder, below that of the run.
        recipe: which makes such a thing when it runs alone; the folder can be used as if it were a run of it.
        seed: of the step.
        arguments: dataclasses that the step is made by.
        inputs: digests of what it is made of, by name.
        ignore: settings that change nothing, beside those of every run, or whose content is among the inputs.

    Returns:
        A run with the step's folder, seed and resume point.

    Raises:
        ConfigError: there is no such prompt.
    """
    from transformers import set_seed

    folder = run.folder / name
    settings = resolved(arguments)
    leave = RUNTIME_KEYS | {"seed", *ignore}
    made_of = {
        "seed": seed,
        "inputs": dict(inputs),
        "settings": {key: value for key, value in settings.items() if key not in leave},
    }
    own = {"output_dir": str(folder), "seed": seed}
    recorded = {**settings, **{key: value for key, value in own.items() if key in settings}}
    step = Run(folder, recipe, run.config, seed, None, recorded, tuple(arguments))
    with main_process_only() as main:
        if main:
            changed = _changes(read_manifest(folder), made_of)
            if changed and folder.exists():
                logger.info("%s is made anew: %s", name, "; ".join(changed[:3]))
                # First what says that the rest is whole.
                (folder / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(folder)
            if changed or not step.finished:
                step.keep_settings()
            if changed:
                write_whole(folder / MANIFEST, json.dumps({"step": name, **made_of}, indent=2) + "\n")
    step.checkpoint = last_checkpoint(folder)
    if step.checkpoint and not step.finished:
        logger.info("%s goes on from %s", name, step.checkpoint)
    set_seed(seed)
    return step


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a step says of itself.

    Args:
        folder: of the step.

    Returns:
        The content of its manifest; nothing where there is none.
    """
    path = folder / MANIFEST
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def note(folder: Path, **told: Any) -> None:
    """Adds to a step's manifest what was decided about it; by one process only.

    Args:
        folder: of the step.
        **told: by name.
    """
    write_whole(folder / MANIFEST, json.dumps({**read_manifest(folder), **told}, indent=2) + "\n")


def _changes(manifest: Mapping[str, Any], made_of: Mapping[str, Any]) -> list[str]:
    """What the step on the disk was made of otherwise; it differs also where nothing is known of it."""
    if not manifest:
        return ["it has no manifest"]
    # As it reads after JSON: a tuple is a list there.
    now = json.loads(json.dumps(made_of))
    return [
        *config_difference({"seed": manifest.get("seed")}, {"seed": now["seed"]}),
        *(f"another {key}" for key in now["inputs"] if manifest.get("inputs", {}).get(key) != now["inputs"][key]),
        *(f"no {key}" for key in manifest.get("inputs", {}) if key not in now["inputs"]),
        *config_difference(manifest.get("settings", {}), now["settings"]),
    ]


def _file_digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()
