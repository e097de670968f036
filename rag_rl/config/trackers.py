"""Experiment trackers, the setting ``report_to``: what is not installed is said before anything is loaded.

transformers' trainers report to them; without one the run folder holds everything.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import util

from rag_rl.errors import ConfigError, MissingPackageError

TRACKERS: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Name of each tracker of transformers to the modules of which it needs one."""

# Where pip has another name for it than Python.
_ON_THE_INDEX = {"azureml": "azureml-sdk", "comet_ml": "comet-ml"}


def check_trackers(names: str | Sequence[str] | None) -> None:
    """Refuses a tracker that would fail, which transformers finds out only when the trainer is made.

    Args:
        names: as in ``report_to`` of ``TrainingArguments``.

    Raises:
        ConfigError: there is no such tracker.
        MissingPackageError: its package is not installed; the message says how to install it.

    Example:
        >>> check_trackers("none")
        >>> check_trackers(["tensorbord"])
        Traceback (most recent call last):
        ...
        rag_rl.errors.ConfigError: report_to: there is no tracker 'tensorbord'; the closest one is tensorboard
    """
    for name in [names] if isinstance(names, str) else names or []:
        if name in ("none", "all"):
            continue
        if name not in TRACKERS:
            closest = difflib.get_close_matches(name, TRACKERS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"report_to: there is no tracker {name!r}; the closest one is {closest}")
        modules = TRACKERS[name]
        if modules and not any(util.find_spec(module) for module in modules):
            package = _ON_THE_INDEX.get(modules[0], modules[0])
            raise MissingPackageError(
                f"report_to {name}: {package} is not installed: pip install {package}, or leave report_to out (curves "
                "and figures are in the run folder either way)"
            )
