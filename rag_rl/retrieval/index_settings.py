"""How vectors are searched: exactly, over a graph, or in lists of compressed vectors; and what the defaults are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from rag_rl.errors import ConfigError, IndexMismatchError

Kind: TypeAlias = Literal["flat", "hnsw", "ivf_pq"]

OF_SEARCH = frozenset({"ef_search", "nprobe", "refine"})
"""May be another value whenever an index is opened; everything else is built in."""

_OF_KIND: dict[str, tuple[str, ...]] = {
    "flat": (),
    "hnsw": ("hnsw_m", "ef_construction", "ef_search"),
    "ivf_pq": ("nlist", "pq_m", "pq_bits", "sample", "nprobe", "refine"),
}
_LEAST = {"hnsw_m": 2}
_BITS = (4, 12)
# FAISS' own rule of thumb, below which its k-means warns.
_POINTS_PER_CENTROID = 39


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """A kind of index and its parameters; None: a default that fits the vectors (``resolved``).

    ``flat`` compares a query with every vector. ``hnsw`` walks a graph of near neighbours (Malkov and Yashunin,
    arXiv 1603.09320). ``ivf_pq`` looks into the lists around the nearest centroids, at vectors compressed to a few
    bytes (Jegou et al., TPAMI 2011), and scores what it finds there again with the vectors themselves. All three are
    FAISS' own, all search by inner product, and all return inner products of the vectors themselves.

    Attributes:
        kind: which one.
        hnsw_m: hnsw: links a passage (M), at least 2; twice as many on the lowest level.
        ef_construction: hnsw: candidates while the graph is built, at least 1.
        ef_search: hnsw: candidates of a search, at least 1; where more passages are asked for, that many.
        nlist: ivf_pq: number of lists, at least 1.
        pq_m: ivf_pq: pieces that a vector is cut into; divides its width.
        pq_bits: ivf_pq: bits of a piece's code, 4 to 12.
        sample: ivf_pq: vectors to train from, at most; at least 39 a list and 39 times 2 to the ``pq_bits``.
        nprobe: ivf_pq: lists that a search looks into, 1 to ``nlist``.
        refine: ivf_pq: so many times the passages asked for are looked up and scored again, at least 1.

    Raises:
        ConfigError: a value out of range, or of another kind.
    """

    kind: Kind = "flat"
    hnsw_m: int | None = None
    ef_construction: int | None = None
    ef_search: int | None = None
    nlist: int | None = None
    pq_m: int | None = None
    pq_bits: int | None = None
    sample: int | None = None
    nprobe: int | None = None
    refine: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _OF_KIND:
            raise ConfigError(f"retriever_index must be flat, hnsw or ivf_pq, got {self.kind!r}")
        for name, value in self._given().items():
            if name not in _OF_KIND[self.kind]:
                (owner,) = [kind for kind, names in _OF_KIND.items() if name in names]
                raise ConfigError(f"retriever_index_{name} needs retriever_index {owner}, got {self.kind}")
            least = _LEAST.get(name, 1)
            if value < least:
                raise ConfigError(f"retriever_index_{name} must be at least {least}, got {value}")
        if self.pq_bits is not None and not _BITS[0] <= self.pq_bits <= _BITS[1]:
            raise ConfigError(f"retriever_index_pq_bits must be between {_BITS[0]} and {_BITS[1]}, got {self.pq_bits}")
        _check_trainable(self.sample, self.nlist, self.pq_bits)
        _check_nprobe(self.nprobe, self.nlist)

    def _given(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if name != "kind" and value is not None}

    def check_width(self, dimension: int) -> None:
        """Passes when vectors of a width can be indexed so.

        Args:
            dimension: width D.

        Raises:
            ConfigError: D is no multiple of ``pq_m``.
        """
        if self.pq_m is not None and dimension % self.pq_m:
            raise ConfigError(
                f"retriever_index_pq_m {self.pq_m} does not divide {dimension}, the width of the vectors: "
                f"{_largest_divisor(dimension, self.pq_m)} does"
            )

    def resolved(self, count: int, dimension: int) -> dict[str, Any]:
        """Every parameter, with defaults that follow from the number of vectors and their width.

        ``hnsw``: 32 links, 4 times as many candidates while building, 128 while searching (256 from 10 million vectors
        on). ``ivf_pq``: ``4 * sqrt(N)`` lists, twice the square root of their number searched (at least 8), 4 numbers
        a piece and at most 96 pieces, 8 bits (fewer for less than 9,984 vectors), 64 vectors a list to train from, 5
        times as many scored again as are asked for.

        Args:
            count: number of vectors N.
            dimension: their width D.

        Returns:
            Names to values, with ``kind``; empty for ``flat``, which has none.

        Raises:
            ConfigError: the parameters do not fit each other or the vectors.

        Example:
            >>> IndexSettings("ivf_pq").resolved(1_000_000, 384)["nlist"]
            4000
            >>> IndexSettings("flat").resolved(1_000_000, 384)
            {}
        """
        self.check_width(dimension)
        if self.kind == "flat":
            return {}
        if self.kind == "hnsw":
            links = self.hnsw_m or 32
            return {
                "kind": "hnsw",
                "hnsw_m": links,
                "ef_construction": self.ef_construction or 4 * links,
                "ef_search": self.ef_search or (128 if count < 10_000_000 else 256),
            }
        fewest = _POINTS_PER_CENTROID * 2 ** _BITS[0]
        if count < fewest:
            raise ConfigError(
                f"retriever_index ivf_pq learns from at least {fewest} vectors, there are {count}: "
                "use flat, which is fast at that size"
            )
        most = min(self.sample or count, count)  # to train from
        nlist = self.nlist or max(1, min(round(4 * math.sqrt(count)), most // _POINTS_PER_CENTROID))
        bits = self.pq_bits or max(_BITS[0], min(8, (most // _POINTS_PER_CENTROID).bit_length() - 1))
        _check_trainable(most, nlist, bits)
        _check_nprobe(self.nprobe, nlist)
        return {
            "kind": "ivf_pq",
            "nlist": nlist,
            "pq_m": self.pq_m or _largest_divisor(dimension, max(1, min(96, dimension // 4))),
            "pq_bits": bits,
            "sample": self.sample or min(count, max(64 * nlist, _POINTS_PER_CENTROID * 2**bits)),
            "nprobe": self.nprobe or min(nlist, max(8, math.isqrt(4 * nlist))),
            "refine": self.refine or 5,
        }

    def opened(self, stored: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The parameters of a finished index, those of the search replaced where they are given.

        Args:
            stored: what ``resolved`` gave when it was built.
            where: which index, for the message.

        Returns:
            As ``resolved``.

        Raises:
            IndexMismatchError: it is of another kind, or was built with another value.
            ConfigError: a parameter of the search does not fit it.
        """
        kind = stored.get("kind", "flat")
        if kind != self.kind:
            raise IndexMismatchError(
                f"{where} is {kind}, retriever_index is {self.kind}: set retriever_index {kind}, or build one in "
                "another folder"
            )
        given = self._given()
        for name, value in given.items():
            if name not in OF_SEARCH and value != stored[name]:
                raise IndexMismatchError(
                    f"{where} was built with {name} {stored[name]}, retriever_index_{name} is {value}: use that, or "
                    "build one in another folder"
                )
        _check_nprobe(self.nprobe, stored.get("nlist"))
        return {**stored, **given}

    def of_building(self) -> list[tuple[str, int]]:
        """The given parameters that are built in: with them, and the kind, a cache tells one index from another.

        Returns:
            (name, value), those of the search left out.
        """
        return [(name, value) for name, value in self._given().items() if name not in OF_SEARCH]


def _check_trainable(sample: int | None, nlist: int | None, bits: int | None) -> None:
    centroids = {"nlist": nlist, "pq_bits": None if bits is None else 2**bits}
    for name, number in centroids.items():
        if sample is not None and number is not None and sample < _POINTS_PER_CENTROID * number:
            raise ConfigError(
                f"retriever_index_{name} {nlist if name == 'nlist' else bits} takes at least "
                f"{_POINTS_PER_CENTROID * number} vectors to train from, {_POINTS_PER_CENTROID} a centroid, there are "
                f"{sample}: lower it, raise retriever_index_sample, or use retriever_index flat for a small corpus"
            )


def _check_nprobe(nprobe: int | None, nlist: int | None) -> None:
    if nprobe is not None and nlist is not None and nprobe > nlist:
        raise ConfigError(f"retriever_index_nprobe must be between 1 and {nlist}, the number of lists, got {nprobe}")


def _largest_divisor(number: int, most: int) -> int:
    return next(size for size in range(min(most, number), 0, -1) if number % size == 0)
