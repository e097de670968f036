"""Text to vectors: the encoder protocol, and sentence-transformers behind it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np

from rag_rl.errors import ConfigError, MissingPackageError
from rag_rl.types import Array, Query

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Names that people use for sentence-transformers' own.
_POOLING_ALIASES = {"last": "lasttoken"}
# A bar for fewer batches than this is noise: a search in a training step must stay silent.
_BAR_FROM_BATCHES = 64
# Its token ids stand for the tokenizer in the fingerprint: ids do not depend on how a library serialises a tokenizer.
_TOKENIZER_PROBE = "The Amber river, 1842: naïve café & Größe — 東京 привет 🙂 unbelievably/tokenised."


@runtime_checkable
class Encoder(Protocol):
    """Texts in, float32 vectors out; all that an index needs to know of a model.

    An encoder may also have ``settings``, a mapping of names to JSON values (prompts, pooling, ...): an index stores
    it and names the entries that differ when another encoder opens it.
    """

    @property
    def dimension(self) -> int:
        """Width D of a vector."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever the vectors would: weights, pooling, prompts, normalisation, length, precision."""
        ...

    def encode_queries(self, queries: Sequence[str | Query]) -> Array:
        """Returns (B, D) float32."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> Array:
        """Returns (B, D) float32."""
        ...


def query_text(query: str | Query) -> str:
    """The part of a query that a history-unaware retriever reads.

    Args:
        query: plain text, or a query with its history.

    Returns:
        The text alone.

    Example:
        >>> query_text(Query("who?", question="who built it?"))
        'who?'
    """
    return query.text if isinstance(query, Query) else query


class SentenceEncoder:
    """A sentence-transformers model as an encoder.

    Prompts, pooling, normalisation and length are the model's own unless overridden. A model that says nothing on
    prompts gets none, although some (E5: ``"query: "`` and ``"passage: "``) need them: pass those. Normalisation is on
    where the model ends in a ``Normalize`` module or compares by cosine. Code from a model's repository is never run.

    Args:
        name_or_path: Hub id, folder, or a loaded ``SentenceTransformer`` (whose weights are shared, not copied).
        pooling: ``"cls"``, ``"mean"``, ``"last"`` or another mode of sentence-transformers; None: the model's own.
        normalize: vectors of length 1 or as they come; None: what the model was made for.
        query_prompt: put before each query, ``""`` for nothing; None: the model's own.
        document_prompt: put before each document, ``""`` for nothing; None: the model's own.
        max_length: cut texts to so many tokens, prompt included; None: the model's own.
        batch_size: texts in a forward pass, at least 1.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``; None: as the weights are stored. Vectors are float32
            always.
        devices: one device, or several to spread large calls over, one process each; None: the best that there is.

    Raises:
        ConfigError: the model cannot be loaded, or a setting does not fit it.
        MissingPackageError: sentence-transformers is not installed.
    """

    def __init__(
        self,
        name_or_path: str | Path | SentenceTransformer,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
        dtype: str | None = None,
        devices: str | Sequence[str] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"retriever_batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self._devices = [devices] if isinstance(devices, str) else list(devices or [])
        self._pool: Any = None
        self._cached_weights: tuple[object, str] | None = None

        self.model = _load(name_or_path, dtype, self._devices[0] if len(self._devices) == 1 else None)
        self.name = name_or_path if isinstance(name_or_path, str) else _folder_name(name_or_path)
        self.model = _with_pooling(self.model, pooling)
        own_length = self.model.max_seq_length
        if max_length is not None:
            limit = getattr(self.model.config, "max_position_embeddings", None)
            if max_length < 1 or (limit is not None and max_length > limit):
                raise ConfigError(
                    f"retriever_max_length must be between 1 and {limit} for {self.name}, got {max_length}"
                )
            self.model.max_seq_length = max_length
        self.max_length = max_length if max_length is not None else own_length

        prompts = {key: value for key, value in self.model.prompts.items() if value}
        fallback = prompts.get(self.model.default_prompt_name or "", "")
        self.query_prompt = query_prompt if query_prompt is not None else prompts.get("query", fallback)
        if document_prompt is None:
            named = [prompts[key] for key in ("document", "passage", "corpus") if key in prompts]
            document_prompt = named[0] if named else fallback
        self.document_prompt = document_prompt

        has_module = any(type(module).__name__ == "Normalize" for module in self.model)
        self.normalize = (
            normalize if normalize is not None else has_module or self.model.similarity_fn_name == "cosine"
        )
        if has_module and not self.normalize:
            self.model = _rebuilt(self.model, [m for m in self.model if type(m).__name__ != "Normalize"])

        self.dimension = int(cast(int, self.model.get_embedding_dimension()))

    def trained(self, folder: str | Path, *, devices: str | Sequence[str] | None = None) -> SentenceEncoder:
        """Opens what was trained from this encoder: other weights, the same settings.

        Args:
            folder: of a run, or of a saved ``SentenceTransformer``.
            devices: where it goes.

        Returns:
            A new encoder.

        Raises:
            DataError: there is no such model, or it cannot be loaded.
        """
        return SentenceEncoder(
            folder,
            normalize=self.normalize,
            query_prompt=self.query_prompt,
            document_prompt=self.document_prompt,
            max_length=self.max_length,
            batch_size=self.batch_size,
            devices=devices,
        )

    def encode_queries(self, queries: Sequence[str | Query]) -> Array:
        """Query vectors.

        Args:
            queries: B queries; of a ``Query`` its text.

        Returns:
            (B, D) float32.
        """
        return self._encode([query_text(query) for query in queries], self.query_prompt, "query")

    def encode_documents(self, texts: Sequence[str]) -> Array:
        """Document vectors.

        Args:
            texts: B texts (``Passage.contents``).

        Returns:
            (B, D) float32.
        """
        return self._encode(list(texts), self.document_prompt, "document")

    @property
    def settings(self) -> dict[str, Any]:
        """All that the vectors depend on, by name."""
        pooling = [module.pooling_mode for module in self.model if hasattr(module, "pooling_mode")]
        return {
            "name": self.name,
            "weights": self._weights_hash(),
            "tokenizer": self._tokenizer_hash(),
            "pooling": [list(mode) if isinstance(mode, tuple) else mode for mode in pooling],
            "normalize": self.normalize,
            "query_prompt": self.query_prompt,
            "document_prompt": self.document_prompt,
            "max_length": self.max_length,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    @property
    def fingerprint(self) -> str:
        """Hash over weights, tokenizer, pooling, prompts, normalisation, length and precision.

        The model's name is left out, and so are the names that a library gives to its weights: the same model under
        another path or another version of sentence-transformers has the same fingerprint. Cached until a weight is
        written to.
        """
        settings = {key: value for key, value in self.settings.items() if key != "name"}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def close(self) -> None:
        """Ends the worker processes of several devices, if there are any."""
        if self._pool is not None:
            self.model.stop_multi_process_pool(self._pool)
            self._pool = None

    def _encode(self, texts: list[str], prompt: str, task: str) -> Array:
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        many = len(texts) > _BAR_FROM_BATCHES * self.batch_size
        if len(self._devices) > 1 and len(texts) > self.batch_size and self._pool is None:
            self._pool = self.model.start_multi_process_pool(self._devices)
        encode = self.model.encode_query if task == "query" else self.model.encode_document
        vectors = encode(
            texts,
            prompt=prompt,
            batch_size=self.batch_size,
            show_progress_bar=many,
            convert_to_numpy=True,
            pool=self._pool if len(texts) > self.batch_size else None,
        )
        result = np.ascontiguousarray(vectors, dtype=np.float32)
        if self.normalize:
            # In float32 whatever the model computes in: bfloat16 vectors are off length 1 by up to 0.4%.
            result /= np.maximum(np.linalg.norm(result, axis=1, keepdims=True), 1e-12)
        return result

    def _weights_hash(self) -> str:
        import torch

        # A write to a weight raises its version, so a training step is noticed without reading the weights.
        state = tuple((weight.data_ptr(), weight._version) for weight in self.model.parameters())
        if self._cached_weights is not None and self._cached_weights[0] == state:
            return self._cached_weights[1]
        digests = set()
        for tensor in self.model.state_dict().values():
            # Index buffers (position ids) are stored by some versions of transformers and left out by others.
            if not isinstance(tensor, torch.Tensor) or tensor.dtype in (torch.int64, torch.bool):
                continue
            digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            # One tensor at a time: the copy on the CPU is never larger than the largest weight.
            digest.update(tensor.detach().reshape(-1).contiguous().cpu().view(torch.uint8).numpy().data)
            digests.add(digest.hexdigest())
        value = hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
        self._cached_weights = (state, value)
        return value

    def _tokenizer_hash(self) -> str:
        features = self.model.preprocess([_TOKENIZER_PROBE])
        ids = features["input_ids"].flatten().tolist() if "input_ids" in features else sorted(features)
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _load(source: str | Path | SentenceTransformer, dtype: str | None, device: str | None) -> SentenceTransformer:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingPackageError(
            "sentence-transformers is not installed: pip install 'rag-rl[cpu]' (or [gpu])"
        ) from error
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ConfigError(f"retriever_dtype must be float32, bfloat16 or float16, got {dtype}")
    if isinstance(source, SentenceTransformer):
        if dtype is not None and str(source.dtype) != f"torch.{dtype}":
            raise ConfigError(f"retriever_dtype {dtype} does not fit the loaded model, which is {source.dtype}")
        return source.to(device) if device else source
    try:
        return SentenceTransformer(
            str(source), device=device, trust_remote_code=False, model_kwargs={"dtype": dtype} if dtype else None
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"retriever_name: cannot load {str(source)!r} as a sentence encoder ({reason}); "
            "give a Hub id or the folder of a saved model"
        ) from error


def _folder_name(source: Path | SentenceTransformer) -> str:
    if isinstance(source, Path):
        return str(source)
    return source.model_card_data.base_model or type(source).__name__


def _rebuilt(model: SentenceTransformer, modules: list[Any]) -> SentenceTransformer:
    """The same weights in another arrangement; the model that was given stays as it is."""
    return type(model)(
        modules=modules,
        device=str(model.device),
        prompts=dict(model.prompts),
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
        truncate_dim=model.truncate_dim,
    )


def _with_pooling(model: SentenceTransformer, pooling: str | None) -> SentenceTransformer:
    if pooling is None:
        return model
    mode = _POOLING_ALIASES.get(pooling, pooling)
    modules = list(model)
    for place, module in enumerate(modules):
        if hasattr(module, "pooling_mode"):
            if module.pooling_mode == mode:
                return model
            if mode not in module.POOLING_MODES:
                valid = ", ".join(["last", *module.POOLING_MODES])
                raise ConfigError(f"retriever_pooling must be one of {valid}, got {pooling}")
            modules[place] = type(module)(module.embedding_dimension, mode, include_prompt=module.include_prompt)
            return _rebuilt(model, modules)
    raise ConfigError(f"retriever_pooling {pooling}: this model has no pooling layer to replace")
