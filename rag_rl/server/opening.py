"""What is served: an index folder, or the retriever that a config or a run names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rag_rl.config.arguments import DataArguments, RetrieverArguments
from rag_rl.config.parsing import fill, read_known
from rag_rl.errors import ConfigError
from rag_rl.types import Retriever


def open_folder(
    folder: Path, *, encoder: str | None = None, chroma_url: str | None = None, devices: Sequence[str] = ()
) -> Retriever:
    """Opens an index folder with the encoder, and the settings of it, that its manifest names.

    Args:
        folder: made by ``build_index``.
        encoder: where the encoder lies now; None: where it lay when the index was made.
        chroma_url: as in ``open_index``.
        devices: as in ``SentenceEncoder``.

    Returns:
        The retriever.

    Raises:
        RetrievalIndexError: the folder is no index, is damaged, or does not fit the encoder.
        ConfigError: the encoder cannot be loaded.
        BackendError: the Chroma server does not answer.
    """
    from rag_rl.config.parts import build_encoder
    from rag_rl.retrieval import open_index
    from rag_rl.retrieval.manifest import read_manifest

    known = read_manifest(folder).encoder_settings
    if "weights" not in known:
        raise ConfigError(
            f"the index {folder} was made with {known['name']}, which is no model of sentence-transformers: name a "
            "retriever of your own in a --config (retriever_name package.module:attribute)"
        )
    modes: list[Any] = known["pooling"]
    pooling: Any = modes[0] if len(modes) == 1 and isinstance(modes[0], str) else None  # several joined: the model's
    args = RetrieverArguments(
        retriever_encoder=encoder or known["name"],
        retriever_pooling=pooling,
        retriever_normalize=known["normalize"],
        retriever_query_prompt=known["query_prompt"],
        retriever_document_prompt=known["document_prompt"],
        retriever_max_length=known["max_length"],
        retriever_dtype=known["dtype"],
        retriever_devices=list(devices),
    )
    try:
        model = build_encoder(args)
    except ConfigError as error:
        raise ConfigError(f"the encoder of the index {folder}: {error}; --encoder says where it lies now") from error
    return open_index(folder, model, chroma_url=chroma_url)


def open_settings(settings: Mapping[str, Any], *, devices: Sequence[str] = (), run: Path | None = None) -> Retriever:
    """Opens the retriever that settings of a recipe name; a missing index is built from the corpus first.

    Args:
        settings: by name; what is not of the retriever or of the data is left out.
        devices: as in ``SentenceEncoder``; empty: as in the settings.
        run: the run folder that the settings come from; one in which a query encoder was trained is served with it.

    Returns:
        The retriever.

    Raises:
        UserError: as ``build_retriever`` does, or there is no retriever in the settings.
        BackendError: as there.
    """
    from rag_rl.config.parts import build_retriever
    from rag_rl.retrieval import HistoryEncoder

    args = fill(RetrieverArguments, settings)
    if devices:
        args = dataclasses.replace(args, retriever_devices=list(devices))
    retriever: Any = build_retriever(args, fill(DataArguments, settings))
    if retriever is None:
        raise ConfigError("retriever_name is none: there is nothing to serve")
    if run is None or "retriever_train" not in settings:
        return retriever
    trained = retriever.encoder.trained(run, devices=args.retriever_devices or None)
    history, most = settings.get("reader_history", True), settings.get("retriever_state_tokens")
    encoder = HistoryEncoder(trained, history, max_tokens=most)
    return retriever.with_query_encoder(encoder)


def read_config(path: Path) -> dict[str, Any]:
    """What a recipe's config says of the retriever and the data, checked as the recipe would.

    Args:
        path: a YAML file.

    Returns:
        Settings by name.

    Raises:
        ConfigError: it cannot be read, or a value has the wrong type.
    """
    return read_known(path, (RetrieverArguments, DataArguments))
