"""Building an index folder: passages and vectors go straight to disk, and a killed build resumes where it stopped.

Texts, line ends and vectors are append-only files, written in this order for every batch. So what a killed build has
done can be read off the files themselves: as many rows as all three hold. The manifest comes last and makes the folder
an index.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from rag_rl.errors import (
    BackendError,
    ConfigError,
    DataError,
    IndexDamagedError,
    IndexMismatchError,
    RagRLError,
    RunFolderError,
)
from rag_rl.retrieval import approximate, chroma
from rag_rl.retrieval.encoder import Encoder
from rag_rl.retrieval.flat import FlatBackend, exact_search, import_faiss
from rag_rl.retrieval.index_settings import IndexSettings
from rag_rl.retrieval.manifest import (
    FORMAT,
    MANIFEST,
    VECTORS,
    VECTORS_DTYPE,
    Manifest,
    Probe,
    check_encoder,
    encoder_settings,
    file_checksum,
    pack_vector,
    read_manifest,
    verify_files,
    write_json,
    write_manifest,
)
from rag_rl.retrieval.passages import ENDS, ENDS_DTYPE, TEXTS, PassageStore, encode_passage
from rag_rl.types import Array, Passage

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
_KEYS = "keys.sqlite3"
_LOCK = ".lock"
# What a file system without locks says: Lustre mounted without -o flock, NFS whose lock service does not run.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
_PROBES = 8
_PROBE_TOP_K = 10

_Searcher: TypeAlias = "FlatBackend | approximate.ApproximateBackend | chroma.ChromaBackend"


def build_index(
    passages: Iterable[Passage],
    encoder: Encoder,
    folder: str | Path,
    *,
    backend: Literal["faiss", "chroma"] = "faiss",
    chroma_url: str | None = None,
    index: IndexSettings | None = None,
    batch_size: int = 512,
    progress: bool = True,
) -> None:
    """Makes an index folder, resumes one, or finds it finished.

    Memory does not grow with the corpus, except for what the kinds of index that are not flat keep in it while they
    are built (``rag_rl.retrieval.approximate``; Chroma's graph). After a kill, the same call goes on: the passages are
    read again and compared with what is stored, but no stored one is embedded again, and a graph or lists go on from
    where they were last saved. Several processes may call this for the same folder: one builds, the others wait and
    find it finished. Where the file system has no locks a warning says so, and nobody waits: build there first.

    Args:
        passages: the corpus, in a fixed order; read once.
        encoder: makes the vectors.
        folder: an index folder, an unfinished one, or one that is empty or not there yet.
        backend: ``"faiss"`` or ``"chroma"`` (approximate; meant for vectors of length 1).
        chroma_url: a Chroma server, ``http://host:port``; None: Chroma's database lies in the folder.
        index: kind of FAISS' index; None: flat, which is exact. An unfinished folder may be finished with another.
        batch_size: passages that are embedded, then written, at a time; at least 1.
        progress: show a bar.

    Raises:
        ConfigError: an unknown backend, a bad batch size, a server address without Chroma, or a kind of index that
            does not fit the backend, the width of the vectors or their number.
        DataError: no passages, an invalid one, or the same (doc_id, chunk) twice.
        IndexMismatchError: the folder has an index, finished or not, of another encoder, other passages or another
            backend, or a finished one of another kind.
        IndexDamagedError: the finished index in the folder is damaged.
        RunFolderError: the folder holds something else.
        MissingPackageError: the backend's package is not installed.
        BackendError: the disk is full or fails, Chroma failed, or the encoder gave no proper vectors.
    """
    if backend not in ("faiss", "chroma"):
        raise ConfigError(f"retriever_backend must be faiss or chroma, got {backend!r}")
    if batch_size < 1:
        raise ConfigError(f"the indexing batch size must be at least 1, got {batch_size}")
    if chroma_url is not None and backend != "chroma":
        raise ConfigError(f"retriever_chroma_url needs retriever_backend chroma, got {backend}")
    index = index or IndexSettings()
    if index.kind != "flat" and backend != "faiss":
        raise ConfigError(f"retriever_index {index.kind} needs retriever_backend faiss, got {backend}")
    # Before hours of embedding, not after.
    if backend == "faiss":
        import_faiss()
    elif chroma_url is None:
        chroma.import_chromadb()
    else:
        chroma.connect(url=chroma_url).close()

    total = len(passages) if isinstance(passages, Sized) else None
    if total is None:
        index.check_width(encoder.dimension)
    elif total:
        index.resolved(total, encoder.dimension)
    stream = iter(passages)
    first = next(stream, None)
    if first is None:
        raise DataError(f"no passages to index into {folder}: the corpus is empty")
    stream = chain([first], stream)

    folder = Path(folder)
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if (folder / MANIFEST).exists():
            _check_finished(stream, encoder, folder, backend, chroma_url, index, progress=progress, total=total)
            return
        _start(folder, encoder, backend, chroma_url)
        count = _embed(stream, encoder, folder, batch_size=batch_size, progress=progress, total=total)
        _finish(folder, encoder, backend, chroma_url, index, count, progress=progress)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns a failing disk into one line; only writes may stand inside, lest another's OSError be taken for it."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BackendError(
            f"cannot write the index {folder}: {reason}; what is stored so far is kept: "
            "make room and build again, which resumes"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One builder a folder; the lock goes with its process."""
    try:
        import fcntl
    except ImportError:  # Windows: no lock, as with most tools there
        yield
        return
    with _disk_errors(folder):
        handle = (folder / _LOCK).open("w")
    with handle:
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("another process is building %s; waiting for it", folder)
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise BackendError(f"cannot lock the index {folder}: {error.strerror or error}") from error
            if not (folder / MANIFEST).exists():
                logger.warning(
                    "%s: no lock on this file system (%s): build the index once before several runs start",
                    folder,
                    error.strerror,
                )
        yield


def _start(folder: Path, encoder: Encoder, backend: str, chroma_url: str | None) -> None:
    path = folder / PROGRESS
    plan = {"format": FORMAT, "backend": backend, "chroma_url": chroma_url, "dimension": encoder.dimension}
    if not path.exists():
        # A build that was killed in its first moment leaves these.
        others = sorted(e.name for e in folder.iterdir() if e.name != _LOCK and not e.name.startswith(f"{PROGRESS}."))
        if others:
            raise RunFolderError(
                f"{folder} is no index and is not empty (it holds {', '.join(others[:3])}): choose an empty folder"
            )
        content: dict[str, Any] = {
            **plan,
            "encoder": encoder.fingerprint,
            "encoder_settings": encoder_settings(encoder),
        }
        # The collection of a server outlives the folder, hence a name that is used once.
        content["collection"] = f"rag-rl-{secrets.token_hex(8)}"
        with _disk_errors(folder):
            write_json(path, content)
        return
    content = _read_progress(folder)
    for key, value in plan.items():
        if content.get(key) != value:
            raise IndexMismatchError(
                f"the unfinished index {folder} was begun with {key} {content.get(key)!r}, here {value!r}: "
                "use the same, or delete the folder"
            )
    check_encoder(f"the unfinished index {folder}", content["encoder"], content["encoder_settings"], encoder)


def _read_progress(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((folder / PROGRESS).read_bytes())
    except (OSError, ValueError) as error:
        raise IndexDamagedError(
            f"{folder / PROGRESS} cannot be read ({error}): delete the folder and build the index again"
        ) from error
    return content


class _Appender:
    """An append-only file, cut to a known length first; unbuffered, so that what it took is in the system's hands."""

    def __init__(self, path: Path, size: int) -> None:
        self._file = path.open("ab", buffering=0)
        self._file.truncate(size)

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            # A disk that runs full takes a part first and fails on the next call.
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> _Appender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class _Keys:
    """Which (doc_id, chunk) were seen, on disk: a set in memory would grow with the corpus."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._database = sqlite3.connect(path, isolation_level=None)
        # Rebuilt from the passages by every build, so it needs no journal; the cache is bounded at 2 MB.
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-2000", "locking_mode=EXCLUSIVE"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE keys (key BLOB PRIMARY KEY, row INTEGER) WITHOUT ROWID")

    def add(self, first_row: int, passages: Sequence[Passage]) -> tuple[Passage, int, int] | None:
        """Notes the passages; returns (passage, its row, the row of the same key) for the first repeated one."""
        hashed = [
            (hashlib.blake2b(f"{p.chunk}\n{p.doc_id}".encode("utf-8", "surrogatepass"), digest_size=16).digest(), row)
            for row, p in enumerate(passages, start=first_row)
        ]
        self._database.execute("BEGIN")
        before = self._database.total_changes
        self._database.executemany("INSERT OR IGNORE INTO keys VALUES (?, ?)", hashed)
        fresh = self._database.total_changes - before
        self._database.execute("COMMIT")
        if fresh == len(hashed):
            return None
        for key, row in hashed:
            (seen,) = self._database.execute("SELECT row FROM keys WHERE key = ?", (key,)).fetchone()
            if seen != row:
                return passages[row - first_row], row, seen
        raise AssertionError("a key was ignored, yet none is repeated")

    def close(self) -> None:
        self._database.close()


def _stored_rows(folder: Path, dimension: int) -> int:
    """How many passages an earlier build got wholly to disk."""
    sizes = [path.stat().st_size if path.exists() else 0 for path in (folder / ENDS, folder / VECTORS)]
    rows = min(sizes[0] // ENDS_DTYPE.itemsize, sizes[1] // (dimension * VECTORS_DTYPE.itemsize))
    if rows:
        # With the shape told, since the file may end in a part of a number.
        ends = np.memmap(folder / ENDS, dtype=ENDS_DTYPE, mode="r", shape=(rows,))
        texts = folder / TEXTS
        # After a power cut a later file may have come through and an earlier one not.
        rows = min(rows, int(np.searchsorted(ends, texts.stat().st_size if texts.exists() else 0, side="right")))
    return rows


def _embed(
    stream: Iterator[Passage], encoder: Encoder, folder: Path, *, batch_size: int, progress: bool, total: int | None
) -> int:
    dimension = encoder.dimension
    done = _stored_rows(folder, dimension)
    end = int(np.memmap(folder / ENDS, dtype=ENDS_DTYPE, mode="r", shape=(done,))[-1]) if done else 0
    with _disk_errors(folder):
        texts_file = _Appender(folder / TEXTS, end)
        ends_file = _Appender(folder / ENDS, done * ENDS_DTYPE.itemsize)
        vectors_file = _Appender(folder / VECTORS, done * dimension * VECTORS_DTYPE.itemsize)
        keys = _Keys(folder / _KEYS)
    stored = PassageStore(folder) if done else None
    seen = 0
    bar = tqdm(total=total, desc="indexing", unit=" passages", disable=not progress)
    with texts_file, ends_file, vectors_file, bar:
        while batch := list(islice(stream, batch_size)):
            lines = [_checked_line(passage, seen + place) for place, passage in enumerate(batch)]
            with _disk_errors(folder):
                repeated = keys.add(seen, batch)
            if repeated is not None:
                passage, row, earlier = repeated
                raise DataError(
                    f"passages {earlier + 1} and {row + 1} of the corpus have the same doc_id {passage.doc_id!r} "
                    f"and chunk {passage.chunk}: every (doc_id, chunk) may occur once"
                )
            known = min(max(done - seen, 0), len(batch))
            if stored is not None:
                for place in range(known):
                    _check_line(lines[place], stored, seen + place, f"the unfinished index {folder}")
            if known < len(batch):
                vectors = _vectors_of(batch[known:], encoder, seen + known)
                sizes = np.array([len(line) for line in lines[known:]], dtype=ENDS_DTYPE)
                sizes[0] += end
                new_ends = np.cumsum(sizes, dtype=ENDS_DTYPE)
                with _disk_errors(folder):
                    texts_file.write(b"".join(lines[known:]))
                    ends_file.write(new_ends.tobytes())
                    vectors_file.write(vectors.tobytes())
                end = int(new_ends[-1])
            seen += len(batch)
            bar.update(len(batch))
        if seen < done:
            raise IndexMismatchError(
                f"the unfinished index {folder} holds {done} passages already, the corpus only {seen}: "
                "it is another corpus; delete the folder"
            )
        keys.close()
        with _disk_errors(folder):
            for file in (texts_file, ends_file, vectors_file):
                file.close()
            (folder / _KEYS).unlink()
    return seen


def _checked_line(passage: Passage, row: int) -> bytes:
    if not isinstance(passage.doc_id, str) or not passage.doc_id or not isinstance(passage.text, str):
        raise DataError(
            f"passage {row + 1} of the corpus has doc_id {passage.doc_id!r} and a text of type "
            f"{type(passage.text).__name__}: expected two strings, the first not empty"
        )
    return encode_passage(passage)


def _check_line(line: bytes, stored: PassageStore, row: int, where: str) -> None:
    if stored.line(row) != line:
        there, here = json.loads(stored.line(row)), json.loads(line)
        differing = ", ".join(key for key in there if there[key] != here.get(key))
        raise IndexMismatchError(
            f"{where} was made of another corpus: passage {row + 1} has doc_id {there['doc_id']!r} there, "
            f"{here['doc_id']!r} here (differing: {differing}); use that corpus, or delete the folder and build again"
        )


def _vectors_of(passages: Sequence[Passage], encoder: Encoder, first_row: int) -> Array:
    vectors = np.ascontiguousarray(encoder.encode_documents([p.contents for p in passages]), dtype=VECTORS_DTYPE)
    if vectors.shape != (len(passages), encoder.dimension):
        raise BackendError(
            f"the encoder gave vectors of shape {vectors.shape}, expected {(len(passages), encoder.dimension)}"
        )
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        place = int(np.argmin(finite))
        raise BackendError(
            f"the encoder gave a vector that is not finite for passage {first_row + place + 1} "
            f"(doc_id {passages[place].doc_id!r}): try retriever_dtype float32"
        )
    return vectors


def open_matrix(folder: Path, dimension: int) -> Array:
    """The vectors of an index, memory-mapped and read-only.

    Args:
        folder: the index folder.
        dimension: width D.

    Returns:
        (N, D) float32.
    """
    mapped = np.memmap(folder / VECTORS, dtype=VECTORS_DTYPE, mode="r")
    # A plain view: np.memmap's own indexing makes memmap objects, which cost more than the gather of a few rows.
    return np.asarray(mapped).reshape(-1, dimension).view(np.ndarray)


def _finish(
    folder: Path,
    encoder: Encoder,
    backend: str,
    chroma_url: str | None,
    index: IndexSettings,
    count: int,
    *,
    progress: bool,
) -> None:
    matrix = open_matrix(folder, encoder.dimension)
    place: dict[str, Any] = {}
    settings = index.resolved(count, encoder.dimension)
    names = [TEXTS, ENDS, VECTORS]
    searcher: _Searcher
    if backend == "chroma":
        place, searcher = _fill_chroma(folder, chroma_url, matrix, progress=progress)
    elif settings:
        names.append(approximate.file_name(settings))
        searcher = _build_approximate(folder / names[-1], matrix, settings, progress=progress)
    else:
        searcher = FlatBackend(matrix)
    probes = _make_probes(folder, encoder, matrix, searcher)
    searcher.close()
    if not isinstance(searcher, FlatBackend):
        _warn_of_low_recall(matrix, probes, "Chroma's graph" if backend == "chroma" else f"the {index.kind} index")

    if place.get("folder"):
        names += sorted(str(p.relative_to(folder)) for p in (folder / place["folder"]).rglob("*") if p.is_file())
    with _disk_errors(folder):
        for name in names:
            descriptor = os.open(folder / name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        manifest = Manifest(
            backend=backend,
            count=count,
            dimension=encoder.dimension,
            metric="inner_product",
            encoder=encoder.fingerprint,
            encoder_settings=encoder_settings(encoder),
            files={name: file_checksum(folder / name) for name in names},
            probes=probes,
            chroma=place,
            index=settings,
        )
        write_manifest(folder, manifest)
        (folder / PROGRESS).unlink()


def _build_approximate(
    path: Path, matrix: Array, settings: dict[str, Any], *, progress: bool
) -> approximate.ApproximateBackend:
    for leftover in path.parent.glob(f"*{approximate.SUFFIX}*"):
        if leftover != path:  # of a build with other settings, or the half of a save
            leftover.unlink()
    _warn_of_lengths(path.parent, matrix, settings["kind"])
    bar = tqdm(total=len(matrix), desc=f"building {settings['kind']}", unit=" vectors", disable=not progress)
    with bar, _disk_errors(path.parent):
        approximate.build_file(path, matrix, settings, tick=bar.update)
    return approximate.ApproximateBackend(path, matrix, settings)


def _warn_of_lengths(folder: Path, matrix: Array, kind: str) -> None:
    rows = np.unique(np.linspace(0, len(matrix) - 1, 1000).astype(np.int64))
    lengths = np.linalg.norm(matrix[rows], axis=1)
    if kind == "hnsw" and lengths.max() > 1.01 * lengths.min():
        logger.warning(
            "the vectors of %s have lengths from %.3g to %.3g: the graph is built and searched by inner product all "
            "the same, the metric of every index here, and finds less of it than of unit vectors; retriever_normalize "
            "true makes them so, retriever_index flat is exact",
            folder, lengths.min(), lengths.max(),
        )  # fmt: skip


def _fill_chroma(
    folder: Path, url: str | None, matrix: Array, *, progress: bool
) -> tuple[dict[str, Any], chroma.ChromaBackend]:
    collection = _read_progress(folder)["collection"]
    database: Path | None = None
    if url is None:
        # A killed Chroma may leave a graph that answers wrongly without a word, so its database starts anew; vectors
        # are on disk already. Under a new name, since Chroma remembers the databases that a process has opened by
        # their path.
        for leftover in folder.glob("chroma-*"):
            shutil.rmtree(leftover)
        database = folder / f"chroma-{secrets.token_hex(4)}"
    where = url or str(folder)
    client = chroma.connect(folder=database, url=url)
    bar = tqdm(total=len(matrix), desc="filling Chroma", unit=" vectors", disable=not progress)
    tick: Callable[[int], Any] = bar.update
    try:
        with bar:
            chroma.fill(client, collection, matrix, where=where, batch_size=2048, tick=tick)
        if database is not None:
            # Closed and opened again: the probes must see what the next process will see.
            client.close()
            client = chroma.connect(folder=database)
        searcher = chroma.ChromaBackend(client, collection, matrix, where=where)
    except RagRLError:
        client.close()
        raise
    return {"collection": collection, "folder": database.name if database else None, "url": url}, searcher


def _make_probes(folder: Path, encoder: Encoder, matrix: Array, searcher: _Searcher) -> list[Probe]:
    # The first words of the first passage: any text will do, as long as it is not empty.
    store = PassageStore(folder)
    text = " ".join(store[0].contents.split()[:12]) or "probe"
    store.close()
    asked = np.ascontiguousarray(encoder.encode_queries([text]), dtype=np.float32)
    if asked.shape != (1, matrix.shape[1]) or not np.isfinite(asked).all():
        raise BackendError(f"the encoder gave no finite (1, {matrix.shape[1]}) vector for the query {text!r}")
    rows = np.unique(np.linspace(0, len(matrix) - 1, _PROBES).astype(np.int64))
    queries = np.concatenate([asked, matrix[rows]])
    scores, found = searcher.search(queries, min(_PROBE_TOP_K, len(matrix)))
    described = [{"text": text, "vector": pack_vector(asked[0])}, *({"row": int(row)} for row in rows)]
    return [
        Probe(rows=r.tolist(), scores=s.tolist(), **about)  # type: ignore[arg-type]
        for about, r, s in zip(described, found, scores, strict=True)
    ]


def _warn_of_low_recall(matrix: Array, probes: Sequence[Probe], what: str) -> None:
    queries = np.stack([matrix[probe.row] for probe in probes if probe.row is not None])
    _, exact = exact_search(matrix, queries, len(probes[0].rows))
    shares = [
        len(set(probe.rows) & set(best.tolist())) / len(probe.rows)
        for probe, best in zip([probe for probe in probes if probe.row is not None], exact, strict=True)
    ]
    recall = float(np.mean(shares))
    if recall < 0.9:
        logger.warning(
            "%s finds only %.0f%% of the exact neighbours; retriever_backend faiss with retriever_index flat is exact",
            what,
            100 * recall,
        )


def _check_finished(
    stream: Iterator[Passage],
    encoder: Encoder,
    folder: Path,
    backend: str,
    chroma_url: str | None,
    index: IndexSettings,
    *,
    progress: bool,
    total: int | None,
) -> None:
    manifest = read_manifest(folder)
    if manifest.backend != backend:
        raise IndexMismatchError(
            f"the index {folder} has backend {manifest.backend}, here {backend}: use that, or delete the folder"
        )
    if backend == "faiss":
        index.opened(manifest.index, f"the index {folder}")
    # A server may have moved to another address, so only "embedded or server" is compared.
    if backend == "chroma" and (manifest.chroma["url"] is None) != (chroma_url is None):
        raise IndexMismatchError(
            f"the index {folder} has its vectors in Chroma at {manifest.chroma['url'] or 'the folder itself'}, "
            f"retriever_chroma_url is {chroma_url}: use the same, or delete the folder"
        )
    check_encoder(f"the index {folder}", manifest.encoder, manifest.encoder_settings, encoder)
    verify_files(folder, manifest)
    stored = PassageStore(folder, keep=0)
    seen = 0
    for passage in tqdm(stream, total=total, desc="comparing", unit=" passages", disable=not progress):
        if seen < len(stored):
            _check_line(encode_passage(passage), stored, seen, f"the index {folder}")
        seen += 1
    if seen != len(stored):
        raise IndexMismatchError(
            f"the index {folder} holds {len(stored)} passages, the corpus {seen}: "
            "use that corpus, or delete the folder and build again"
        )
    # A build that was killed between its last two steps.
    (folder / PROGRESS).unlink(missing_ok=True)
