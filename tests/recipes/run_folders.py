"""What a run leaves, as the tests read it: files, metrics, rows, logged steps, weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# What metrics.json holds after every training (DESIGN section 4); some recipes add to it.
KEYS = {
    "recipe", "config", "seed", "status", "before", "after", "n_eval", "num_processes", "ci95", "train_seconds",
    "eval_seconds", "peak_memory_bytes",
}  # fmt: skip
# Plain gradient descent shows a gradient that is off by a factor, which Adam hides.
SGD = {
    "optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0, "learning_rate": 0.05,
}  # fmt: skip
# What lies in the folder of every finished run, whatever it trained.
RUN_FILES = {
    "README.md", "resolved_config.yaml", "trainer_state.json", "curves.png", "report.html", "metrics.json",
    "before.jsonl", "after.jsonl",
}  # fmt: skip


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, rows: Iterable[object]) -> Path:
    """Writes rows as JSONL, a string as it is; gives the path back."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# ---- its files


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def leftovers_in(folder: Path) -> list[str]:
    """Files that a finished run must not leave: half-written ones, and what is pickled."""
    return sorted(name for name in names_in(folder) if name.endswith((".part", ".tmp", ".bin", ".pt", ".pkl")))


def times_of(folder: Path) -> dict[Path, int]:
    """When everything below a folder was last written: the same twice means that nothing was touched in between."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# ---- what was measured and logged


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def rows_of(folder: Path, when: str) -> list[dict[str, Any]]:
    """One row a held-out question, as measured ``before`` or ``after`` training."""
    return read_lines(folder / f"{when}.jsonl")


def history_of(folder: Path, having: str = "loss") -> list[dict[str, Any]]:
    """What was logged at each training step; trainers other than PPO's log a ``loss``."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if having in entry]


def steps_of(folder: Path, having: str = "loss") -> list[int]:
    return [entry["step"] for entry in history_of(folder, having)]


def logged(folder: Path, name: str) -> dict[int, float]:
    """A logged figure by step."""
    return {entry["step"]: entry[name] for entry in history_of(folder, name)}


# ---- its weights


def weights_in(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def largest_difference(one: dict[str, Any], two: dict[str, Any]) -> float:
    """The largest absolute difference between weights; ``one`` has all names of ``two``, and may have more."""
    return max((one[name] - weight).abs().max().item() for name, weight in two.items())


def difference(one: Path, two: Path, *, prefix: str = "") -> float:
    """The same of two model folders; ``two`` has all weights of ``one``, under names that begin with ``prefix``."""
    return largest_difference({name.removeprefix(prefix): w for name, w in weights_in(two).items()}, weights_in(one))
