from __future__ import annotations

import pytest

from rag_rl.errors import ConfigError, IndexMismatchError
from rag_rl.retrieval import IndexSettings


def hnsw(**changed):
    return {"kind": "hnsw", "hnsw_m": 32, "ef_construction": 128, "ef_search": 128, **changed}


def ivf_pq(**changed):
    known = {"nlist": 4000, "pq_m": 96, "pq_bits": 8, "sample": 256_000, "nprobe": 126, "refine": 5}
    return {"kind": "ivf_pq", **known, **changed}


@pytest.mark.parametrize(
    ("settings", "count", "dimension", "expected"),
    [
        (IndexSettings(), 10, 7, {}),
        (IndexSettings("hnsw"), 10, 7, hnsw()),
        (IndexSettings("hnsw"), 10_000_000, 384, hnsw(ef_search=256)),
        (IndexSettings("hnsw", hnsw_m=16), 10**6, 384, hnsw(hnsw_m=16, ef_construction=64)),
        (
            IndexSettings("hnsw", hnsw_m=8, ef_construction=9, ef_search=1),
            10**6,
            384,
            hnsw(hnsw_m=8, ef_construction=9, ef_search=1),
        ),
        (IndexSettings("ivf_pq"), 10**6, 384, ivf_pq()),
        (IndexSettings("ivf_pq"), 10**6, 768, ivf_pq()),
        # 96 pieces do not divide 1024 numbers, 64 do; a prime width cannot be cut at all.
        (IndexSettings("ivf_pq"), 10**6, 1024, ivf_pq(pq_m=64)),
        (IndexSettings("ivf_pq"), 10**6, 127, ivf_pq(pq_m=1)),
        (IndexSettings("ivf_pq"), 21_000_000, 384, ivf_pq(nlist=18_330, sample=1_173_120, nprobe=270)),
        # A small corpus has neither for 4 * sqrt(N) lists nor for 256 codes enough to learn from.
        (IndexSettings("ivf_pq"), 1000, 32, ivf_pq(nlist=25, pq_m=8, pq_bits=4, sample=1000, nprobe=10)),
        (IndexSettings("ivf_pq"), 624, 32, ivf_pq(nlist=16, pq_m=8, pq_bits=4, sample=624, nprobe=8)),
        (IndexSettings("ivf_pq", sample=50_000), 10**6, 384, ivf_pq(nlist=1282, sample=50_000, nprobe=71)),
        (
            IndexSettings("ivf_pq", nlist=5, pq_m=2, pq_bits=5, sample=5000, nprobe=5, refine=1),
            2000,
            4,
            ivf_pq(nlist=5, pq_m=2, pq_bits=5, sample=5000, nprobe=5, refine=1),
        ),
    ],
)
def test_parameters_follow_from_number_and_width(settings, count, dimension, expected):
    assert settings.resolved(count, dimension) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "lsh"}, "must be flat, hnsw or ivf_pq, got 'lsh'"),
        ({"nprobe": 3}, "retriever_index_nprobe needs retriever_index ivf_pq, got flat"),
        ({"kind": "ivf_pq", "ef_search": 3}, "retriever_index_ef_search needs retriever_index hnsw, got ivf_pq"),
        ({"kind": "hnsw", "hnsw_m": 1}, "retriever_index_hnsw_m must be at least 2, got 1"),
        ({"kind": "hnsw", "ef_search": 0}, "retriever_index_ef_search must be at least 1, got 0"),
        ({"kind": "ivf_pq", "refine": -1}, "retriever_index_refine must be at least 1, got -1"),
        ({"kind": "ivf_pq", "pq_bits": 3}, "retriever_index_pq_bits must be between 4 and 12, got 3"),
        ({"kind": "ivf_pq", "pq_bits": 13}, "retriever_index_pq_bits must be between 4 and 12, got 13"),
        ({"kind": "ivf_pq", "nlist": 4, "nprobe": 5}, "nprobe must be between 1 and 4, the number of lists, got 5"),
        (
            {"kind": "ivf_pq", "nlist": 100, "sample": 3899},
            "retriever_index_nlist 100 takes at least 3900 vectors to train from, 39 a centroid, there are 3899",
        ),
        (
            {"kind": "ivf_pq", "pq_bits": 8, "sample": 9983},
            "retriever_index_pq_bits 8 takes at least 9984 vectors to train from, 39 a centroid, there are 9983",
        ),
    ],
)
def test_parameters_that_do_not_go_together(given, said):
    with pytest.raises(ConfigError, match=said):
        IndexSettings(**given)


@pytest.mark.parametrize(
    ("given", "count", "dimension", "said"),
    [
        ({"pq_m": 96}, 10**6, 100, r"pq_m 96 does not divide 100, the width of the vectors: 50 does"),
        ({}, 623, 32, "learns from at least 624 vectors, there are 623: use flat"),
        ({"nlist": 100}, 3000, 32, "nlist 100 takes at least 3900 vectors.*there are 3000"),
        ({"pq_bits": 8}, 3000, 32, "pq_bits 8 takes at least 9984 vectors.*there are 3000"),
        ({"sample": 300}, 3000, 32, "pq_bits 4 takes at least 624 vectors.*there are 300"),
        ({"nprobe": 26}, 1000, 32, "between 1 and 25, the number of lists, got 26"),
    ],
)
def test_parameters_that_do_not_fit_the_vectors(given, count, dimension, said):
    with pytest.raises(ConfigError, match=said):
        IndexSettings("ivf_pq", **given).resolved(count, dimension)


def test_what_an_index_is_searched_with():
    stored = ivf_pq()
    assert IndexSettings("ivf_pq").opened(stored, "the index x") == stored
    again = IndexSettings("ivf_pq", nlist=4000, nprobe=4000, refine=2)
    assert again.opened(stored, "the index x") == ivf_pq(nprobe=4000, refine=2)
    assert IndexSettings().opened({}, "the index x") == {}
    with pytest.raises(
        IndexMismatchError, match="the index x is ivf_pq, retriever_index is flat: set retriever_index"
    ):
        IndexSettings().opened(stored, "the index x")
    with pytest.raises(IndexMismatchError, match="the index x is flat, retriever_index is hnsw"):
        IndexSettings("hnsw").opened({}, "the index x")
    with pytest.raises(IndexMismatchError, match="was built with nlist 4000, retriever_index_nlist is 5"):
        IndexSettings("ivf_pq", nlist=5).opened(stored, "the index x")
    with pytest.raises(ConfigError, match="between 1 and 4000, the number of lists, got 4001"):
        IndexSettings("ivf_pq", nprobe=4001).opened(stored, "the index x")


def test_what_is_built_in():
    assert IndexSettings("hnsw", hnsw_m=8, ef_search=9).of_building() == [("hnsw_m", 8)]
    assert IndexSettings("ivf_pq", nlist=3, nprobe=2, refine=1).of_building() == [("nlist", 3)]
    assert IndexSettings("hnsw").of_building() == []
