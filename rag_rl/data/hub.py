"""Data sets of the Hugging Face Hub, or a local folder in the same form, as rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from rag_rl.errors import BackendError, DataError, MissingPackageError

HUB_PREFIX = "hub:"
# hub:<id>, hub:<id>:<split>, hub:<id>:<configuration>:<split>; a split may be a slice such as train[:1000].
_SOURCE = re.compile(r"hub:(?P<id>[^:]+)(?::(?P<config>[^:\[\]]+)(?=:))?(?::(?P<split>[^:\[\]]+(?:\[[^\[\]]*\])?))?")


def is_hub_source(source: object) -> bool:
    """Tells a data set id from a path.

    Args:
        source: what the user gave.

    Returns:
        Whether it starts with ``hub:``.
    """
    return isinstance(source, str) and source.startswith(HUB_PREFIX)


def parse_hub_source(source: str) -> tuple[str, str | None, str | None]:
    """Takes a source apart.

    Args:
        source: ``hub:<data set id or folder>[:<configuration>][:<split>]``.

    Returns:
        Id, configuration and split; None for what is not given.

    Raises:
        DataError: it has another form.

    Example:
        >>> parse_hub_source("hub:hotpotqa/hotpot_qa:distractor:validation[:100]")
        ('hotpotqa/hotpot_qa', 'distractor', 'validation[:100]')
        >>> parse_hub_source("hub:me/wines:train"), parse_hub_source("hub:me/wines")
        (('me/wines', None, 'train'), ('me/wines', None, None))
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise DataError(f"{source}: expected hub:<data set id>[:<split>] or hub:<data set id>:<configuration>:<split>")
    return match["id"], match["config"], match["split"]


def load_hub_rows(source: str) -> HubRows:
    """Opens a split; its rows stay on disk (memory-mapped Arrow).

    Args:
        source: as in ``parse_hub_source``. Without a split the data set must have only one.

    Returns:
        The rows, which can be iterated again and again.

    Raises:
        DataError: no such data set, configuration or split.
        BackendError: the Hub cannot be reached.
        MissingPackageError: ``datasets`` is not installed.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise MissingPackageError("datasets is not installed: pip install datasets") from error
    name, config, split = parse_hub_source(source)
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except FileNotFoundError as error:
        raise DataError(f"{source}: no such data set: {_first_line(error)}") from error
    except OSError as error:
        raise BackendError(f"{source}: the Hub cannot be reached: {_first_line(error)}") from error
    except (ValueError, DatasetsError) as error:
        raise DataError(f"{source}: cannot be loaded: {_first_line(error)}") from error
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            raise DataError(f"{source}: name one of its splits: {', '.join(f'{source}:{key}' for key in loaded)}")
        loaded = next(iter(loaded.values()))
    return HubRows(source, loaded)


class HubRows:
    """The rows of one split.

    Attributes:
        source: what the user gave.
        names: the columns.
    """

    def __init__(self, source: str, dataset: Any) -> None:
        """Wraps a split.

        Args:
            source: what the user gave.
            dataset: a ``datasets.Dataset``.
        """
        self.source = source
        self.names: list[str] = list(dataset.column_names)
        self._dataset = dataset

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Reads the rows.

        Yields:
            Row number from 1, and the row.
        """
        yield from enumerate(self._dataset, start=1)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
