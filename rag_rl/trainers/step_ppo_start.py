"""What reinforcement of a reasoner may start from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from rag_rl.errors import ConfigError

logger = logging.getLogger(__name__)

# Its packaged model is taught the form of a step.
_PACKAGED = Path(__file__).parents[1] / "tiny"


def check_start(model: str) -> None:
    """Warns where a model has not been taught the form of a step for at least one epoch: such models collapse.

    Args:
        model: folder or Hub id.

    Raises:
        ConfigError: the folder holds an adapter, on which no second one can be put.
    """
    folder = Path(model)
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"model_name_or_path {model} is an adapter: save that run with --save_merged true and start from it"
        )
    if _PACKAGED in folder.resolve().parents:
        return
    epochs = _cold_start_epochs(folder)
    if epochs is None:
        logger.warning("%s is no run of sft_reasoner: a model that was not taught the form of a step collapses", model)
    elif epochs < 1:
        logger.warning("%s was taught for %.2f epochs only: models collapse after less than one", model, epochs)


def _cold_start_epochs(folder: Path) -> float | None:
    try:
        recipe = json.loads((folder / "metrics.json").read_text(encoding="utf-8")).get("recipe")
        epochs = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")).get("epoch")
    except (OSError, ValueError):
        return None
    return float(epochs) if recipe == "sft_reasoner" and epochs is not None else None
