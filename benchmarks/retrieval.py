"""What retrieval costs on top of the library underneath: ratios, both sides timed in one run.

    python benchmarks/retrieval.py [--quick] [--only search,chroma,indexing,memory] [--pairs 9]

Rows of the table: the median ratio over interleaved pairs (ours, theirs, theirs, ours, ...), an interval of that
median (bootstrap over the pairs, 95%) and the bound. A bound holds where the lower end of the interval is within it.

- search: 256 query vectors in 100,000 x 384, k = 10, ``Hit`` objects with their passages included; passages decoded
  before ("warm") and never seen ("cold"). Two denominators, both with the bound: the kernel that we call
  (``faiss.knn``) on the very bytes that we search, which leaves only our own cost, and ``faiss.IndexFlatIP.search``.
  Read the second with care: FAISS' kernel is about 1.3 times faster on vectors that begin at a multiple of 64 bytes
  (measured with one buffer and nothing but the offset changed). A mapped file always does, the index' own storage
  mostly does not, so a ratio below 1 there is luck of the allocator and would hide an overhead of ours.
- chroma: the same against ``collection.query`` of an embedded Chroma with the same vectors and settings.
- indexing: ``build_index`` against encoding all texts and adding them to an ``IndexFlatIP`` (nothing written to disk),
  with an encoder that computes for about 1 ms a text.
- memory: highest anonymous memory (``RssAnon``) while indexing ten times as many passages, over that of the smaller
  corpus. The interval is that of repeated runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rag_rl.retrieval import DenseRetriever, build_index, open_index
from rag_rl.types import Passage

WIDTH = 384
QUERIES = 256
TOP_K = 10
WORDS = (
    "river amber guild tower weaver north harbour stone winter copper market raven bridge silver field crown".split()
)


class TableEncoder:
    """Next to free: two rows of a table a text; ``work`` square matrix products of ``WIDTH`` a text on top."""

    dimension = WIDTH
    fingerprint = "table"

    def __init__(self, work: int = 0) -> None:
        rng = np.random.default_rng(0)
        self._table = rng.standard_normal((8192, WIDTH), dtype=np.float32)
        self._weight = rng.standard_normal((WIDTH, WIDTH), dtype=np.float32)
        self._work = work

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of length 1."""
        codes = np.array([zlib.crc32(text.encode()) for text in texts])
        vectors = self._table[codes % 8192] + self._table[(codes >> 13) % 8192]
        for _ in range(self._work * len(texts)):
            self._weight @ self._weight
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    encode_queries = encode_documents


def corpus(count: int) -> Iterator[Passage]:
    """Passages of about 500 characters, all different."""
    for i in range(count):
        text = " ".join(WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(75))
        yield Passage(f"doc-{i}", f"{i} {text}", f"Title {i}")


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratios(
    ours: Callable[[], object], theirs: Callable[[], object], pairs: int, before: Callable[[], object] | None = None
) -> list[float]:
    """Time of ours over theirs by pair, after an unmeasured pair; ``before`` runs untimed before each of ours."""
    measured = []
    for number in range(pairs + 1):
        if before is not None:
            before()
        # Every second pair the other way round: neither side always runs first.
        if number % 2:
            mine, other = seconds(ours), seconds(theirs)
        else:
            other, mine = seconds(theirs), seconds(ours)
        measured.append(mine / other)
    return measured[1:]


def row(name: str, values: Sequence[float], bound: float | None) -> bool:
    """Prints one line of the table; whether the bound holds."""
    sample = np.random.default_rng(0).choice(np.asarray(values), size=(10_000, len(values)))
    low, high = np.quantile(np.median(sample, axis=1), [0.025, 0.975])
    held = bound is None or low <= bound
    verdict = "" if bound is None else f"<= {bound:.2f}  {'OK' if held else 'MISS'}"
    told = f"{np.median(values):6.3f}  [{low:.3f}, {high:.3f}]  n={len(values):<3} {verdict}"
    print(f"{name:<58} {told}", flush=True)
    return held


def query_vectors(index: DenseRetriever) -> np.ndarray:
    """Noisy copies of document vectors, spread over the corpus."""
    rng = np.random.default_rng(1)
    vectors = index.vectors(rng.integers(0, len(index), QUERIES))
    vectors = vectors + 0.02 * rng.standard_normal(vectors.shape, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def search(folder: Path, count: int, pairs: int) -> bool:
    """Exact search against FAISS."""
    import faiss

    encoder = TableEncoder()
    build_index(corpus(count), encoder, folder / "faiss", batch_size=4096, progress=False)
    index = open_index(folder / "faiss", encoder)
    queries = query_vectors(index)
    raw = faiss.IndexFlatIP(WIDTH)
    raw.add(np.array(index.matrix))
    _, expected = raw.search(queries, TOP_K)
    found = index.search_hits(queries, top_k=TOP_K)
    assert [[int(hit.passage.doc_id[4:]) for hit in hits] for hits in found] == expected.tolist()

    def ours() -> object:
        return index.search_hits(queries, top_k=TOP_K)

    def kernel() -> object:
        return faiss.knn(queries, index.matrix, TOP_K, metric=faiss.METRIC_INNER_PRODUCT)

    def flat() -> object:
        return raw.search(queries, TOP_K)

    print(f"  {QUERIES} queries in {count:,} x {WIDTH}, k={TOP_K}")
    row("the kernel / itself: what this machine's noise makes of 1", ratios(kernel, kernel, pairs), None)
    held = row("search, warm / faiss.knn on the same bytes", ratios(ours, kernel, pairs), 1.05)
    cold = ratios(ours, kernel, pairs, index.passages.forget)
    row("search, cold passages / faiss.knn on the same bytes", cold, None)
    return row("search, warm / IndexFlatIP (other alignment)", ratios(ours, flat, pairs), 1.05) and held


def chroma(folder: Path, count: int, pairs: int) -> bool:
    """Approximate search against Chroma."""
    import chromadb
    from chromadb.config import Settings

    encoder = TableEncoder()
    build_index(corpus(count), encoder, folder / "chroma", backend="chroma", batch_size=4096, progress=False)
    index = open_index(folder / "chroma", encoder)
    queries = query_vectors(index)
    client = chromadb.PersistentClient(str(folder / "raw"), settings=Settings(anonymized_telemetry=False))
    raw = client.create_collection("raw", configuration={"hnsw": {"space": "ip"}}, embedding_function=None)
    for start in range(0, count, 2048):
        block = np.array(index.matrix[start : start + 2048])
        raw.upsert(ids=[str(start + i) for i in range(len(block))], embeddings=block)
    client.close()
    # Opened again, as ours is: a graph that was just filled is laid out differently in memory.
    client = chromadb.PersistentClient(str(folder / "raw"), settings=Settings(anonymized_telemetry=False))
    raw = client.get_collection("raw", embedding_function=None)

    def theirs() -> object:
        return raw.query(query_embeddings=queries, n_results=TOP_K, include=["distances"])

    def ours() -> object:
        return index.search_hits(queries, top_k=TOP_K)

    held = row(f"chroma, warm: {QUERIES} queries in {count:,} x {WIDTH}, k={TOP_K}", ratios(ours, theirs, pairs), 1.05)
    row("chroma, cold passages", ratios(ours, theirs, pairs, before=index.passages.forget), None)
    return held


def indexing(folder: Path, count: int, pairs: int) -> bool:
    """Building an index against encoding and adding."""
    import faiss

    # As many matrix products as take about 1 ms, what a small encoder on a GPU or a tiny one on a CPU needs for a
    # text.
    product = TableEncoder(work=1)
    product.encode_documents(["warm up"] * 20)
    once = seconds(lambda: product.encode_documents(["text"] * 100)) / 100
    encoder = TableEncoder(work=max(1, round(1e-3 / once)))
    passages = list(corpus(count))
    numbers = iter(range(10_000))

    def ours() -> None:
        build_index(passages, encoder, folder / f"indexing-{next(numbers)}", progress=False)

    def theirs() -> None:
        index = faiss.IndexFlatIP(WIDTH)
        index.add(encoder.encode_documents([passage.contents for passage in passages]))

    return row(f"indexing {count:,} passages at about 1 ms a text", ratios(ours, theirs, pairs), 1.05)


def memory(folder: Path, counts: tuple[int, int], runs: int) -> bool:
    """Anonymous memory after indexing a small and a large corpus, each in a process of its own."""
    peaks = {}
    for count in counts:
        peaks[count] = []
        for run in range(runs):
            command = [sys.executable, __file__, "--memory-of", str(count), str(folder / f"memory-{count}-{run}")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks[count].append(float(done.stdout))
    small, large = (peaks[count] for count in counts)
    for count in counts:
        print(f"  RssAnon at its highest while indexing {count:,}: {np.median(peaks[count]):.1f} MiB")
    values = [b / a for a, b in zip(small, large, strict=True)]
    return row(f"memory: indexing {counts[1]:,} / {counts[0]:,} passages", values, 1.05)


def memory_of(count: int, folder: Path) -> float:
    """Highest anonymous memory in MiB, looked at between the batches and at the end."""
    highest = 0.0

    def look() -> None:
        nonlocal highest
        status = Path("/proc/self/status").read_text()
        highest = max(highest, int(status.split("RssAnon:")[1].split()[0]) / 1024)

    def watched() -> Iterator[Passage]:
        for number, passage in enumerate(corpus(count)):
            if number % 1000 == 0:
                look()
            yield passage

    build_index(watched(), TableEncoder(), folder, progress=False)
    look()
    return highest


def main() -> int:
    """Prints the table; 1 if a bound was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes; shows that it runs, not how fast")
    parser.add_argument("--only", default="search,chroma,indexing,memory", help="which parts, with commas")
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs, at least 7")
    parser.add_argument("--memory-of", nargs=2, metavar=("COUNT", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        print(memory_of(int(given.memory_of[0]), Path(given.memory_of[1])))
        return 0
    if given.pairs < 7:
        parser.error(f"--pairs must be at least 7, got {given.pairs}")
    quick = given.quick
    parts: dict[str, Callable[[Path], bool]] = {
        "search": lambda folder: search(folder, 10_000 if quick else 100_000, given.pairs),
        "chroma": lambda folder: chroma(folder, 2_000 if quick else 100_000, given.pairs),
        "indexing": lambda folder: indexing(folder, 200 if quick else 1_000, given.pairs),
        "memory": lambda folder: memory(folder, (2_000, 20_000) if quick else (20_000, 200_000), 1 if quick else 3),
    }
    chosen = given.only.split(",")
    if unknown := set(chosen) - set(parts):
        parser.error(f"--only {', '.join(sorted(unknown))}: choose from {', '.join(parts)}")
    print(f"threads: OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}, {os.cpu_count()} cores")
    print(f"{'ours / theirs':<58} {'median':>6}  interval")
    with tempfile.TemporaryDirectory() as folder:
        held = [parts[name](Path(folder)) for name in chosen]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
