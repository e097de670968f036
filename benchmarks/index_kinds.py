"""What the kinds of ``retriever_index`` give and cost: recall, latency, build time and memory, next to flat search.

    python benchmarks/index_kinds.py                              100,000 vectors of width 384, all kinds
    python benchmarks/index_kinds.py --n 1000000 --kinds flat ivf_pq
    python benchmarks/index_kinds.py --sweep                      other search settings of the same indexes too
    python benchmarks/index_kinds.py --n 5000 --quick             shows that it runs

- vectors: from a seeded mixture of ``n / 100`` clusters, each a point of a space of 48 dimensions whose spread falls
  as 1 / sqrt(place), with as much spread again within a cluster, mapped to 384 dimensions, a little noise added, made
  unit length. Queries are further points of the same mixture. Uniform random vectors tell nothing about recall: all
  are equally far from a query, so there are no neighbours to find. Text embeddings have clusters and far fewer
  directions than dimensions; how a real encoder's compare, only they themselves can tell.
- recall@10: share of the 10 vectors that flat search finds, mean over 1,000 queries.
- latency: processor time (all threads) of ``search_vectors`` over that of the flat index, 20 queries one by one
  (batch 1) and 256 at once; the median of interleaved pairs and a 95% interval of it (bootstrap over the pairs).
- build: processor seconds of ``build_index`` in a process of its own, next to free embedding included, and the most
  anonymous memory (RssAnon) that it held beyond what it had before.
- open: anonymous memory beyond that before opening, and file pages that were touched, after 512 searches; the second
  is the system's page cache, which it takes back when it needs to and which all processes share.
- disk: bytes of the vectors (which every kind keeps, for training and for exact scores), and what comes on top.

Seconds depend on the processor: say which. Processor time, since other work on a core would count as latency.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rag_rl.retrieval import DenseRetriever, IndexSettings, build_index, open_index
from rag_rl.types import Passage

WIDTH = 384
LATENT = 48
TOP_K = 10
QUERIES = 1000
MIB = 1 << 20
SWEEP: dict[str, list[dict[str, int]]] = {
    "hnsw": [{"ef_search": value} for value in (16, 32, 64, 128, 256)],
    "ivf_pq": [
        *({"nprobe": value, "refine": 10} for value in (1, 8, 16, 32, 64, 128)),
        *({"nprobe": 32, "refine": value} for value in (1, 2, 4, 20)),
    ],
}


def mixture(count: int, clusters: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks of unit vectors; the clusters are the same for every seed."""
    world, rng = np.random.default_rng(0), np.random.default_rng([1, seed])
    spread = (1.0 / np.sqrt(np.arange(1, LATENT + 1))).astype(np.float32)
    centres = world.standard_normal((clusters, LATENT), dtype=np.float32) * spread
    directions = world.standard_normal((LATENT, WIDTH), dtype=np.float32)
    for start in range(0, count, 50_000):
        size = min(50_000, count - start)
        points = centres[rng.integers(0, clusters, size)]
        points = points + rng.standard_normal((size, LATENT), dtype=np.float32) * spread
        block = points @ directions + 0.1 * rng.standard_normal((size, WIDTH), dtype=np.float32)
        yield block / np.linalg.norm(block, axis=1, keepdims=True)


class StoredVectors:
    """An encoder that looks vectors up: a document's text is the number of its row."""

    dimension = WIDTH
    fingerprint = "mixture"

    def __init__(self, path: Path) -> None:
        self._vectors = np.memmap(path, dtype=np.float32, mode="r").reshape(-1, WIDTH)

    def __len__(self) -> int:
        return len(self._vectors)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Rows of the file."""
        return np.array(self._vectors[[int(text) for text in texts]])

    def encode_queries(self, queries: Sequence[object]) -> np.ndarray:
        """The first row, for the probe."""
        return np.array(self._vectors[[0] * len(queries)])


def settings_of(kind: str, given: dict[str, int]) -> IndexSettings:
    """Defaults, but for what the command line says of this kind."""
    known = {"hnsw": ("hnsw_m", "ef_construction", "ef_search"), "flat": ()}
    names = known.get(kind, ("nlist", "pq_m", "pq_bits", "sample", "nprobe", "refine"))
    return IndexSettings(kind, **{name: value for name, value in given.items() if name in names})  # type: ignore[arg-type]


def resident() -> dict[str, float]:
    """Anonymous memory and file pages of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {name: int(found[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}


def child(what: str, kind: str, folder: Path, given: dict[str, int]) -> dict[str, float]:
    """Runs one measurement of memory in a process of its own."""
    command = [sys.executable, __file__, "--child", what, kind, str(folder), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def build_child(kind: str, folder: Path, given: dict[str, int]) -> dict[str, float]:
    """Builds an index and says how long that took and how much memory it held at most."""
    import faiss  # noqa: F401  (its libraries are no memory of an index)

    encoder = StoredVectors(folder / "vectors")
    before = most = resident()["RssAnon"]
    finished = threading.Event()

    def look() -> None:
        nonlocal most
        while not finished.wait(0.05):
            most = max(most, resident()["RssAnon"])

    watching = threading.Thread(target=look)
    watching.start()
    passages = (Passage(f"d{row}", str(row)) for row in range(len(encoder)))
    started = time.process_time()
    build_index(passages, encoder, folder / kind, index=settings_of(kind, given), batch_size=4096, progress=False)
    seconds = time.process_time() - started
    finished.set()
    watching.join()
    return {"seconds": seconds, "build MiB": most - before}


def open_child(kind: str, folder: Path, given: dict[str, int]) -> dict[str, float]:
    """Opens an index, searches a little, and says what it holds."""
    import faiss  # noqa: F401

    encoder = StoredVectors(folder / "vectors")
    queries = np.array(StoredVectors(folder / "queries").encode_documents([str(i) for i in range(512)]))
    before = resident()
    retriever = open_index(folder / kind, encoder, index=settings_of(kind, given))
    retriever.search_vectors(queries, top_k=TOP_K)
    after = resident()
    return {"anonymous MiB": after["RssAnon"] - before["RssAnon"], "pages MiB": after["RssFile"] - before["RssFile"]}


def seconds_of(call: Callable[[], object]) -> float:
    """Processor time of one call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def paired(ours: Callable[[], object], flat: Callable[[], object], pairs: int) -> tuple[float, float, float]:
    """Time of ours over that of flat: median and interval, after an unmeasured pair."""
    measured = []
    for number in range(pairs + 1):
        # Every second pair the other way round: neither side always runs first.
        if number % 2:
            mine, other = seconds_of(ours), seconds_of(flat)
        else:
            other, mine = seconds_of(flat), seconds_of(ours)
        measured.append(mine / other)
    values = np.asarray(measured[1:])
    sample = np.random.default_rng(0).choice(values, size=(10_000, len(values)))
    low, high = np.quantile(np.median(sample, axis=1), [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


def recall(found: np.ndarray, expected: np.ndarray) -> float:
    """Share of the expected rows that were found."""
    shares = [len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
    return float(np.mean(shares))


def shown(ratio: tuple[float, float, float]) -> str:
    """A ratio with its interval."""
    return f"{ratio[0]:.4f} ({ratio[1]:.4f} to {ratio[2]:.4f})"


def singles(retriever: DenseRetriever, queries: np.ndarray) -> Callable[[], object]:
    """Batch 1."""
    return lambda: [retriever.search_vectors(queries[i : i + 1], top_k=TOP_K) for i in range(20)]


def batch(retriever: DenseRetriever, queries: np.ndarray) -> Callable[[], object]:
    """Batch 256."""
    return lambda: retriever.search_vectors(queries[:256], top_k=TOP_K)


def measured(folder: Path, kinds: Sequence[str], given: dict[str, int], pairs: int, *, sweep: bool) -> None:
    """Builds, opens and searches each kind, and prints a table."""
    encoder = StoredVectors(folder / "vectors")
    queries = np.array(StoredVectors(folder / "queries").encode_documents([str(i) for i in range(QUERIES)]))
    built: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(["flat", *kinds]):
        there = (folder / kind / "manifest.json").exists()
        built[kind] = {} if there else child("build", kind, folder, given)
        built[kind] |= {"seconds": math.nan, "build MiB": math.nan} if there else {}
        built[kind] |= child("open", kind, folder, given)
        print(f"  {kind}: built in {built[kind]['seconds']:.1f} s", flush=True)
    flat = open_index(folder / "flat", encoder)
    _, expected = flat.search_vectors(queries, top_k=TOP_K)
    once = [seconds_of(partial(flat.search_vectors, queries[:size], top_k=TOP_K)) for size in (1, 256)]
    print(f"  flat itself: {1000 * once[0]:.1f} ms for one query, {1000 * once[1]:.1f} ms for 256")
    columns = "index, recall@10, batch 1 / flat, batch 256 / flat, build s, build MiB, open MiB, pages MiB, disk MiB"
    print("|", " | ".join(columns.split(", ")), "|\n" + "|---" * 9 + "|")
    for kind in kinds:
        index = open_index(folder / kind, encoder, index=settings_of(kind, given))
        share = recall(index.search_vectors(queries, top_k=TOP_K)[1], expected)
        one, many = (shown(paired(form(index, queries), form(flat, queries), pairs)) for form in (singles, batch))
        of = built[kind]
        extra = sum(path.stat().st_size for path in (folder / kind).glob("*.faiss")) / MIB
        vectors = (folder / kind / "vectors.f32").stat().st_size / MIB
        print(
            f"| {kind} | {share:.3f} | {one} | {many} | {of['seconds']:.1f} | {of['build MiB']:.0f} | "
            f"{of['anonymous MiB']:.0f} | {of['pages MiB']:.0f} | {vectors:.0f} + {extra:.0f} |",
            flush=True,
        )
        print(f"  {json.dumps(index.manifest.index)}", flush=True)
        for changed in SWEEP.get(kind, []) if sweep else []:
            other = open_index(folder / kind, encoder, index=IndexSettings(kind, **changed))  # type: ignore[arg-type]
            share = recall(other.search_vectors(queries, top_k=TOP_K)[1], expected)
            one = shown(paired(singles(other, queries), singles(flat, queries), pairs))
            print(f"  {changed}: recall {share:.3f}, batch 1 {one}", flush=True)
            other.close()
        index.close()


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100_000, help="vectors")
    parser.add_argument("--kinds", nargs="+", default=["flat", "hnsw", "ivf_pq"], choices=["flat", "hnsw", "ivf_pq"])
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs, at least 7")
    parser.add_argument("--quick", action="store_true", help="one pair; shows that it runs, not how fast")
    parser.add_argument("--sweep", action="store_true", help="also other settings of the search, at batch 1")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="settings, such as hnsw_m=16")
    parser.add_argument("--folder", type=Path, help="keeps vectors and indexes there, and does not build them again")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        what, kind, folder, given = asked.child
        run: Callable[..., Any] = {"build": build_child, "open": open_child}[what]
        print(json.dumps(run(kind, Path(folder), json.loads(given))))
        return 0
    if asked.pairs < 7:
        parser.error(f"--pairs must be at least 7, got {asked.pairs}")
    given = {name: int(number) for name, _, number in (text.partition("=") for text in asked.set)}
    print(f"threads: OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}, {os.cpu_count()} cores")
    print(f"{asked.n:,} vectors of width {WIDTH} in {max(1, asked.n // 100):,} clusters, seed 0")
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, count, seed in (("vectors", asked.n, 0), ("queries", QUERIES, 1)):
            if (folder / name).exists():
                continue
            with (folder / name).open("wb") as file:
                for block in mixture(count, max(1, asked.n // 100), seed):
                    file.write(block.tobytes())
        measured(folder, asked.kinds, given, 1 if asked.quick else asked.pairs, sweep=asked.sweep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
