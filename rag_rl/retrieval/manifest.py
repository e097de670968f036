"""``manifest.json``: what an index folder holds, and how to tell that it still does.

The manifest is written last, so a folder without one is an unfinished build. Every file has a checksum in it. Chroma's
database file changes whenever Chroma opens it (it takes a write lock through a table), so what is hashed there is the
content of its tables.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from rag_rl.errors import IndexDamagedError, IndexMismatchError
from rag_rl.types import Array

MANIFEST = "manifest.json"
FORMAT = 1
VECTORS = "vectors.f32"
VECTORS_DTYPE = np.dtype("<f4")
# Chroma writes a row here each time it opens the database.
_LOCK_TABLE = "acquire_write"
_REMEDY = "delete the folder and build the index again"


@dataclass(frozen=True, slots=True)
class Probe:
    """A search whose outcome is known.

    Attributes:
        rows: what the backend returned when the index was made, best first.
        scores: their inner products.
        row: the stored vector that is the query; None where ``vector`` is.
        text: the query text; empty where ``row`` is the query.
        vector: the vector of ``text``, base64 of little-endian float32; empty where ``row`` is the query.
    """

    rows: list[int]
    scores: list[float]
    row: int | None = None
    text: str = ""
    vector: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an index folder holds.

    Attributes:
        backend: ``"faiss"`` or ``"chroma"``.
        count: number of passages.
        dimension: width D of the vectors.
        metric: always ``"inner_product"``.
        encoder: fingerprint of the encoder.
        encoder_settings: its settings by name (model name, prompts, normalisation, ...), for messages and readers.
        files: path in the folder -> ``{"size", "sha256"}``; for a database the hash is of its content, its size None.
        probes: searches with known outcome, the first one from a text.
        chroma: ``{"collection", "folder" | None, "url" | None}``, empty for FAISS.
        index: kind and parameters of an approximate FAISS index (``IndexSettings.resolved``), empty for all others.
        format: version of this format.
    """

    backend: str
    count: int
    dimension: int
    metric: str
    encoder: str
    encoder_settings: dict[str, Any]
    files: dict[str, dict[str, Any]]
    probes: list[Probe] = field(default_factory=list)
    chroma: dict[str, Any] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def fingerprint(self) -> str:
        """Same encoder, same passages in the same order, same search: same fingerprint, wherever it was built."""
        parts = [self.backend, self.encoder, self.files["passages.jsonl"]["sha256"], str(self.count), self.metric]
        if self.index:
            parts.append(json.dumps(self.index, sort_keys=True))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def pack_vector(vector: Array) -> str:
    """A vector as text.

    Args:
        vector: (D,) float32.

    Returns:
        Base64 of its little-endian bytes.
    """
    return base64.b64encode(np.asarray(vector, dtype=VECTORS_DTYPE).tobytes()).decode("ascii")


def unpack_vector(text: str) -> Array:
    """The vector that ``pack_vector`` wrote.

    Args:
        text: base64.

    Returns:
        (D,) float32.
    """
    return np.frombuffer(base64.b64decode(text), dtype=VECTORS_DTYPE)


def write_json(path: Path, value: Any) -> None:
    """Writes a small JSON file so that a reader sees all of it or nothing.

    Args:
        path: the file, in a folder that exists.
        value: anything that JSON can hold.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _own_checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Makes a folder an index.

    Args:
        folder: the index folder.
        manifest: what it holds.
    """
    content = asdict(manifest)
    write_json(folder / MANIFEST, {**content, "checksum": _own_checksum(content)})


def read_manifest(folder: Path) -> Manifest:
    """What an index folder says that it holds.

    Args:
        folder: the index folder.

    Returns:
        The manifest, whole and of a known format.

    Raises:
        IndexDamagedError: there is none, or it cannot be read.
        IndexMismatchError: another version of rag-rl made it.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("checksum")
    except FileNotFoundError:
        if (folder / "progress.json").exists():
            raise IndexDamagedError(f"{folder} is an unfinished index: build it again, which resumes") from None
        raise IndexDamagedError(f"{path} is missing: {folder} is no index; build one with build_index") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise IndexDamagedError(f"{path} cannot be read ({error}): {_REMEDY}") from error
    if content.get("format") != FORMAT:
        raise IndexMismatchError(f"{path} has format {content.get('format')}, expected {FORMAT}: {_REMEDY}")
    if checksum != _own_checksum(content):
        raise IndexDamagedError(f"{path} was changed after the index was made: {_REMEDY}")
    probes = [Probe(**probe) for probe in content.pop("probes")]
    return Manifest(**content, probes=probes)


def file_checksum(path: Path) -> dict[str, Any]:
    """Size and hash of a file, read in pieces.

    Args:
        path: a file, or a Chroma database (by its suffix).

    Returns:
        ``{"size", "sha256"}``; the size of a database is None.

    Raises:
        OSError: it cannot be read.
        sqlite3.Error: it is no sound database.
    """
    if path.suffix == ".sqlite3":
        return {"size": None, "sha256": _database_checksum(path)}
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def _database_checksum(path: Path) -> str:
    digest = hashlib.sha256()
    # Opened read-only; mode=ro also keeps sqlite from creating the file when it is missing.
    connection = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True, timeout=60.0)
    try:
        verdict = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall()
        for (table,) in tables:
            if table == _LOCK_TABLE:
                continue
            digest.update(table.encode())
            # Tables without a rowid come in key order anyway.
            for row in connection.execute(f'SELECT * FROM "{table}"'):
                digest.update(repr(row).encode("utf-8", "surrogatepass"))
    finally:
        connection.close()
    return digest.hexdigest()


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Passes when every file of the index is as it was made.

    Each file is read whole: a size or a date does not tell a changed file from a sound one.

    Args:
        folder: the index folder.
        manifest: what it should hold.

    Raises:
        IndexDamagedError: naming the first file that is missing, cut or changed.
    """
    expected_size = manifest.count * manifest.dimension * VECTORS_DTYPE.itemsize
    if manifest.files[VECTORS]["size"] != expected_size:
        raise IndexDamagedError(f"{folder / MANIFEST}: count and dimension do not fit {VECTORS}: {_REMEDY}")
    # Sizes first: a cut file is named at once, before gigabytes are read.
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise IndexDamagedError(f"{path} is missing: {_REMEDY}")
        size = path.stat().st_size
        if expected["size"] is not None and size != expected["size"]:
            raise IndexDamagedError(f"{path} has {size} bytes, expected {expected['size']}: {_REMEDY}")
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            found = file_checksum(path)
        except (OSError, sqlite3.Error) as error:
            raise IndexDamagedError(f"{path} cannot be read ({error}): {_REMEDY}") from error
        if found["sha256"] != expected["sha256"]:
            raise IndexDamagedError(f"{path} was changed after the index was made: {_REMEDY}")


def encoder_settings(encoder: object) -> dict[str, Any]:
    """The settings that an encoder tells, or its class name where it tells none.

    Args:
        encoder: any encoder.

    Returns:
        Names to JSON values, with at least ``name``.
    """
    return {"name": type(encoder).__name__, **dict(getattr(encoder, "settings", {}))}


def check_encoder(where: str, fingerprint: str, settings: Mapping[str, Any], encoder: Any) -> None:
    """Passes when an encoder is the one that made the vectors.

    Args:
        where: what was made, for the message.
        fingerprint: of the encoder that made it.
        settings: its settings.
        encoder: the encoder at hand.

    Raises:
        IndexMismatchError: it is another one; the message names each setting that differs.
    """
    if encoder.fingerprint == fingerprint:
        return
    here = encoder_settings(encoder)
    differing = [key for key in sorted({*settings, *here} - {"name"}) if settings.get(key) != here.get(key)]
    told = []
    for key in differing:
        hashed = key in ("weights", "tokenizer")
        told.append(f"{key} changed" if hashed else f"{key} {settings.get(key)!r} there, {here.get(key)!r} here")
    what = "; ".join(told) or "its fingerprint differs"
    raise IndexMismatchError(
        f"{where} was made with another encoder ({settings.get('name')}; here {here['name']}): {what}; "
        "use that encoder, or delete the folder and build the index again"
    )
