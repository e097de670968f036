from __future__ import annotations

import errno
import hashlib
import logging
import signal
import subprocess

import numpy as np
import pytest

from rag_rl.errors import BackendError, ConfigError, IndexDamagedError, IndexMismatchError
from rag_rl.retrieval import IndexSettings, approximate, build_index, open_index
from rag_rl.retrieval.approximate import ApproximateBackend, build_file, file_name
from rag_rl.retrieval.flat import exact_search
from rag_rl.retrieval.manifest import read_manifest, write_manifest
from rag_rl.types import DenseIndex, Retriever

pytest.importorskip("faiss", reason="faiss is not installed")

KINDS = ["hnsw", "ivf_pq"]


@pytest.fixture(scope="module")
def vectors():
    """3,000 unit vectors in 40 clusters, and 50 queries near some of them."""
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((40, 32))
    rows = centres[rng.integers(0, 40, 3050)] + 0.6 * rng.standard_normal((3050, 32))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return rows[:3000], rows[3000:]


@pytest.fixture(params=KINDS)
def settings(request):
    return IndexSettings(request.param).resolved(3000, 32)


@pytest.fixture
def file(tmp_path, vectors, settings):
    path = tmp_path / file_name(settings)
    build_file(path, vectors[0], settings, tick=lambda rows: None)
    return path


def found(rows, expected):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(rows.tolist(), expected.tolist(), strict=True)])


def test_finds_what_exact_search_finds(file, vectors, settings):
    matrix, queries = vectors
    scores, rows = ApproximateBackend(file, matrix, settings).search(queries, 10)
    expected_scores, expected = exact_search(matrix, queries, 10)
    assert rows.dtype == np.int64
    assert scores.dtype == np.float32
    assert found(rows, expected) >= 0.97
    np.testing.assert_allclose(scores, np.einsum("bd,bkd->bk", queries, matrix[rows]), rtol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert (scores <= expected_scores + 1e-6).all()


def test_a_search_that_sees_everything_is_exact(file, vectors, settings):
    matrix, queries = vectors
    widest = {"ef_search": 3000, "nprobe": settings.get("nlist"), "refine": 300}
    scores, rows = ApproximateBackend(file, matrix, {**settings, **widest}).search(queries, 10)
    expected_scores, expected = exact_search(matrix, queries, 10)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)


def test_what_is_out_of_reach_is_searched_exactly(file, vectors, settings):
    matrix, queries = vectors
    narrow = {**settings, "ef_search": 1, "nprobe": 1}
    _, rows = ApproximateBackend(file, matrix, narrow).search(queries[:3], 3000)
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.broadcast_to(np.arange(3000), (3, 3000)))
    _, expected = exact_search(matrix, queries[:3], 10)
    np.testing.assert_array_equal(rows[:, :10], expected)


def test_candidates_are_scored_again_in_blocks(tmp_path, vectors, monkeypatch):
    matrix, queries = vectors
    settings = IndexSettings("ivf_pq").resolved(3000, 32)
    build_file(tmp_path / "i", matrix, settings, tick=lambda rows: None)
    backend = ApproximateBackend(tmp_path / "i", matrix, settings)
    at_once = backend.search(queries, 5)
    for numbers in (1, 50 * 32 * 7):  # a query at a time; seven
        monkeypatch.setattr(approximate, "_NUMBERS_AT_ONCE", numbers)
        np.testing.assert_array_equal(backend.search(queries, 5)[1], at_once[1])


def test_compressed_scores_alone_are_worse(tmp_path, vectors):
    # Otherwise scoring again would be for nothing.
    matrix, queries = vectors
    settings = IndexSettings("ivf_pq").resolved(3000, 32)
    build_file(tmp_path / "i", matrix, settings, tick=lambda rows: None)
    _, expected = exact_search(matrix, queries, 10)
    shares = [
        found(
            ApproximateBackend(tmp_path / "i", matrix, {**settings, "refine": refine}).search(queries, 10)[1], expected
        )
        for refine in (1, 10)
    ]
    assert shares[0] < 0.9 < shares[1]


def test_the_vectors_are_stored_once(file, vectors, settings):
    matrix, queries = vectors
    # The graph's links, or codes and ids with the centroids: neither has room for 128 bytes a vector more.
    links = 3000 * (64 * 4 + 4 + 8) + 3000 // 32 * 2 * 32 * 4
    codes = 3000 * (8 + 8) + settings.get("nlist", 0) * 32 * 4
    assert file.stat().st_size < 1.3 * (links if settings["kind"] == "hnsw" else codes)
    if settings["kind"] == "hnsw":
        # The graph looks at the very memory that it was given.
        moving = matrix.copy()
        backend = ApproximateBackend(file, moving, settings)
        before, _ = backend.search(queries, 1)
        moving *= 2
        after, _ = backend.search(queries, 1)
        np.testing.assert_allclose(after, 2 * before, rtol=1e-5)


def test_the_same_twice(tmp_path, vectors, settings):
    names = ("a", "b")
    for name in names:
        build_file(tmp_path / name, vectors[0], settings, tick=lambda rows: None)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_name_tells_what_is_built_in():
    known = IndexSettings("ivf_pq").resolved(3000, 32)
    assert file_name(known) == file_name({**known, "nprobe": 1, "refine": 1})
    assert len({file_name(known), file_name({**known, "nlist": 3}), file_name({**known, "pq_m": 4})}) == 3


def test_a_stopped_build_goes_on(tmp_path, vectors, settings, monkeypatch):
    matrix, queries = vectors
    monkeypatch.setattr(approximate, "_ROWS_AT_ONCE", 500)
    monkeypatch.setattr(approximate, "_SECONDS_BETWEEN_SAVES", 0.0)
    ticks = []

    def stop(rows):
        ticks.append(rows)
        if sum(ticks) == 2000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_file(tmp_path / "i", matrix, settings, tick=stop)
    assert ticks == [0, 500, 500, 500, 500]
    again = []
    build_file(tmp_path / "i", matrix, settings, tick=again.append)
    # The last block was added and not saved.
    assert again == [1500, 500, 500, 500]
    _, rows = ApproximateBackend(tmp_path / "i", matrix, settings).search(queries, 10)
    assert found(rows, exact_search(matrix, queries, 10)[1]) >= 0.97
    assert [p.name for p in tmp_path.iterdir()] == ["i"]


def test_a_half_written_save_is_built_anew(file, vectors, settings, caplog):
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    ticks = []
    build_file(file, vectors[0], settings, tick=ticks.append)
    assert ticks[0] == 0
    assert "cannot be read" in caplog.text
    assert file.read_bytes() == whole


def test_a_full_disk(tmp_path, vectors, settings):
    # Whether the first buffer fails or the last one.
    (tmp_path / "i.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space") as caught:
        build_file(tmp_path / "i", vectors[0], settings, tick=lambda rows: None)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_such_index(file, vectors, settings):
    matrix, _ = vectors
    with pytest.raises(IndexDamagedError, match=r"of 3000 vectors of width 32, expected .*, 2999 and 32"):
        ApproximateBackend(file, matrix[:-1], settings)
    with pytest.raises(IndexDamagedError, match=r"of 3000 vectors of width 32, expected .*, 3000 and 16"):
        ApproximateBackend(file, np.ascontiguousarray(matrix[:, :16]), settings)
    other = IndexSettings(*set(KINDS) - {settings["kind"]}).resolved(3000, 32)
    with pytest.raises(IndexDamagedError, match="expected Index"):
        ApproximateBackend(file, matrix, other)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(IndexDamagedError, match="cannot be read"):
        ApproximateBackend(file, matrix, settings)


@pytest.mark.gpu
def test_lists_that_a_gpu_trains(tmp_path, vectors):
    import faiss

    if not (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus()):
        pytest.skip("faiss-gpu is not installed, or there is no GPU")
    matrix, queries = vectors
    settings = IndexSettings("ivf_pq").resolved(3000, 32)
    build_file(tmp_path / "i", matrix, settings, tick=lambda rows: None)
    _, rows = ApproximateBackend(tmp_path / "i", matrix, settings).search(queries, 10)
    assert found(rows, exact_search(matrix, queries, 10)[1]) >= 0.97


# The index folder, from here on.


@pytest.fixture(params=KINDS)
def index(request):
    return IndexSettings(request.param)


@pytest.fixture
def folder(tmp_path, corpus, encoder, index):
    build_index(corpus(1000), encoder, tmp_path / "index", index=index, progress=False)
    return tmp_path / "index"


def words(i):
    return f"alpha{i} beta{i * 7} gamma{i * 13} title {i}"


def test_an_index_of_each_kind_is_searched_as_any_other(folder, corpus, encoder, index, tmp_path):
    build_index(corpus(1000), encoder, tmp_path / "flat", progress=False)
    exact, retriever = open_index(tmp_path / "flat", encoder), open_index(folder, encoder)
    assert isinstance(retriever, Retriever)
    assert isinstance(retriever, DenseIndex)
    queries = [words(i) for i in range(0, 1000, 50)]
    assert [hits[0].passage for hits in retriever.search(queries, top_k=3)] == [
        hits[0].passage for hits in exact.search(queries, top_k=3)
    ]
    # Training gathers the same vectors from the same kind of file.
    rows = np.array([[0, 999], [17, 17]])
    np.testing.assert_array_equal(retriever.vectors(rows), exact.vectors(rows))
    assert not retriever.matrix.flags.owndata
    scores, rows = retriever.search_vectors(retriever.encode_queries(queries), top_k=5)
    own = np.einsum("bd,bkd->bk", retriever.encode_queries(queries), retriever.vectors(rows))
    np.testing.assert_allclose(scores, own, rtol=1e-5)
    # Documents that must not be returned are replaced, down to the last of the corpus.
    first = retriever.search([words(3)], top_k=3)[0]
    others = retriever.search([words(3)], top_k=3, exclude=[[hit.passage.doc_id for hit in first]])[0]
    assert not {hit.passage.doc_id for hit in first} & {hit.passage.doc_id for hit in others}
    left = retriever.search([words(3)], top_k=2, exclude=[[f"d{i}" for i in range(999)]])[0]
    assert [hit.passage.doc_id for hit in left] == ["d999"]
    assert len(retriever.search([words(3)], top_k=1000)[0]) == 1000
    with pytest.raises(ConfigError, match=r"retriever_top_k must be between 1 and 1000.*got 1001"):
        retriever.search([words(3)], top_k=1001)
    retriever.close()


def test_the_setting_is_part_of_manifest_and_fingerprint(folder, corpus, encoder, index, tmp_path):
    retriever = open_index(folder, encoder, index=index)
    assert read_manifest(folder).index == index.resolved(1000, 32)
    build_index(corpus(1000), encoder, tmp_path / "flat", progress=False)
    flat = open_index(tmp_path / "flat", encoder)
    assert read_manifest(tmp_path / "flat").index == {}
    # What a flat index' fingerprint has always been, so that caches and expectations hold.
    texts = hashlib.sha256((tmp_path / "flat" / "passages.jsonl").read_bytes()).hexdigest()
    parts = ["faiss", encoder.fingerprint, texts, "1000", "inner_product"]
    assert flat.fingerprint == hashlib.sha256("\n".join(parts).encode()).hexdigest()
    build_index(corpus(1000), encoder, tmp_path / "again", index=index, progress=False)
    assert open_index(tmp_path / "again", encoder).fingerprint == retriever.fingerprint != flat.fingerprint
    # Searched otherwise it gives other hits, so it is another index to a cache.
    other = {"hnsw": IndexSettings("hnsw", ef_search=1), "ivf_pq": IndexSettings("ivf_pq", nprobe=1, refine=1)}
    assert open_index(folder, encoder, index=other[index.kind]).fingerprint != retriever.fingerprint


def test_the_search_can_be_changed_when_an_index_is_opened(tmp_path, corpus, encoder):
    wide, narrow = IndexSettings("ivf_pq", nprobe=25), IndexSettings("ivf_pq", nprobe=1, refine=1)
    build_index(corpus(1000), encoder, tmp_path, index=wide, progress=False)
    vectors = encoder.encode_queries([words(i) for i in range(100)])
    opened = [open_index(tmp_path, encoder, index=index) for index in (None, wide, narrow)]
    found_rows = [retriever.search_vectors(vectors, top_k=5)[1] for retriever in opened]
    np.testing.assert_array_equal(found_rows[0], found_rows[1])
    _, expected = exact_search(opened[0].matrix, vectors, 5)
    assert found(found_rows[1], expected) > found(found_rows[2], expected) + 0.1
    assert opened[2].manifest.index["nprobe"] == 1
    # The file is left as it was.
    assert read_manifest(tmp_path).index["nprobe"] == 25


def test_another_kind_than_the_folder_has(folder, corpus, encoder, index):
    flat = f"the index {folder} is {index.kind}, retriever_index is flat: set retriever_index {index.kind}"
    with pytest.raises(IndexMismatchError, match=flat):
        open_index(folder, encoder, index=IndexSettings())
    with pytest.raises(IndexMismatchError, match=flat):
        build_index(corpus(1000), encoder, folder, progress=False)
    built_in = {"hnsw": "hnsw_m", "ivf_pq": "nlist"}[index.kind]
    changed = IndexSettings(index.kind, **{built_in: 3})
    with pytest.raises(IndexMismatchError, match=f"was built with {built_in} .*, retriever_index_{built_in} is 3"):
        build_index(corpus(1000), encoder, folder, index=changed, progress=False)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in folder.glob("[!.]*"))
    build_index(corpus(1000), encoder, folder, index=index, progress=False)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in folder.glob("[!.]*")) == before


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damage_is_found_and_named(folder, encoder, damage):
    (path,) = folder.glob("*.faiss")
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-5])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    said = {"cut": f"has {len(content) - 5} bytes, expected {len(content)}", "gone": "is missing"}
    with pytest.raises(
        IndexDamagedError, match=rf"{path.name} {said.get(damage, 'was changed')}.*build the index again"
    ):
        open_index(folder, encoder)


def test_a_probe_that_fails(folder, encoder):
    manifest = read_manifest(folder)
    for probe in manifest.probes[:3]:
        probe.rows[:] = [row + 1 for row in probe.rows]
    write_manifest(folder, manifest)
    with pytest.raises(IndexDamagedError, match="answers the stored queries differently"):
        open_index(folder, encoder)


@pytest.mark.parametrize(
    ("index", "backend", "said"),
    [
        (IndexSettings("ivf_pq", pq_m=5), "faiss", "pq_m 5 does not divide 32, the width of the vectors: 4 does"),
        (IndexSettings("ivf_pq", nlist=100), "faiss", "nlist 100 takes at least 3900 vectors.*there are 1000"),
        (IndexSettings("hnsw"), "chroma", "retriever_index hnsw needs retriever_backend faiss, got chroma"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_embedded(tmp_path, corpus, encoder, index, backend, said):
    with pytest.raises(ConfigError, match=said):
        build_index(corpus(1000), encoder, tmp_path / "i", index=index, backend=backend, progress=False)
    assert encoder.documents == []
    assert not (tmp_path / "i").exists()


def test_a_folder_of_another_backend(tmp_path, corpus, encoder):
    pytest.importorskip("chromadb", reason="chromadb is not installed")
    build_index(corpus(20), encoder, tmp_path, backend="chroma", progress=False)
    open_index(tmp_path, encoder, index=IndexSettings()).close()
    with pytest.raises(IndexMismatchError, match="has backend chroma, retriever_index hnsw is for faiss"):
        open_index(tmp_path, encoder, index=IndexSettings("hnsw"))


def test_a_corpus_of_unknown_size_that_is_too_small(tmp_path, corpus, stub):
    index = IndexSettings("ivf_pq", nlist=100)
    with pytest.raises(ConfigError, match=r"nlist 100 takes at least 3900 vectors.*there are 1000"):
        build_index(iter(corpus(1000)), stub(), tmp_path, index=index, progress=False)
    # What is embedded stays, and the folder can be finished as another kind.
    encoder = stub()
    build_index(iter(corpus(1000)), encoder, tmp_path, index=IndexSettings("hnsw"), progress=False)
    assert encoder.documents == []
    assert open_index(tmp_path, encoder, index=IndexSettings("hnsw")).search([words(5)], top_k=1)[0][0].rank == 1


def test_vectors_of_any_length_are_searched_by_inner_product(tmp_path, corpus, encoder, caplog):
    unit = encoder._encode
    scale = 1.0 + np.arange(1000) % 3

    def documents(texts):
        first = len(encoder.documents)
        encoder.documents += texts
        return (unit(texts) * scale[first : first + len(texts), None]).astype(np.float32)

    encoder.encode_documents = documents
    build_index(corpus(1000), encoder, tmp_path, index=IndexSettings("hnsw"), progress=False)
    assert "lengths from 1 to 3: the graph is built and searched by inner product all the same" in caplog.text
    caplog.clear()
    encoder.documents = []  # the check embeds the first passage again
    retriever = open_index(tmp_path, encoder)
    vectors = encoder.encode_queries([words(i) for i in range(50)])
    scores, rows = retriever.search_vectors(vectors, top_k=5)
    expected_scores, expected = exact_search(retriever.matrix, vectors, 5)
    assert found(rows, expected) > 0.8
    np.testing.assert_allclose(scores[:, 0], expected_scores[:, 0], rtol=1e-5)


def test_a_low_recall_is_told(tmp_path, corpus, encoder, caplog):
    index = IndexSettings("ivf_pq", nprobe=1, refine=1)
    build_index(corpus(1000), encoder, tmp_path, index=index, progress=False)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert record.getMessage().startswith("the ivf_pq index finds only ")


def test_resume_after_sigkill_while_it_is_built(tmp_path, corpus, stub, run_script, index):
    source = f"""
import os, signal
from conftest import StubEncoder, make_passages
from rag_rl.retrieval import IndexSettings, approximate, build_index
approximate._ROWS_AT_ONCE, approximate._SECONDS_BETWEEN_SAVES = 200, 0.0
save, saves = approximate._save, []
def killed(*args, **options):
    save(*args, **options)
    saves.append(1)
    if len(saves) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
approximate._save = killed
build_index(make_passages(1000), StubEncoder(), {str(tmp_path)!r}, index=IndexSettings({index.kind!r}), progress=False)
"""
    done: subprocess.CompletedProcess[str] = run_script(source, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(IndexDamagedError, match="is an unfinished index"):
        open_index(tmp_path, stub())
    encoder = stub()
    build_index(corpus(1000), encoder, tmp_path, index=index, progress=False)
    assert encoder.documents == []
    retriever = open_index(tmp_path, encoder, index=index)
    hits = retriever.search([words(i) for i in range(0, 1000, 20)], top_k=1)
    assert sum(one[0].passage.doc_id == f"d{20 * i}" for i, one in enumerate(hits)) >= 48


def test_a_build_of_other_settings_leaves_nothing(tmp_path, corpus, encoder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("rag_rl.retrieval.build._make_probes", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_index(corpus(1000), encoder, tmp_path, index=IndexSettings("hnsw"), progress=False)
    assert [p.name[:5] for p in tmp_path.glob("*.faiss*")] == ["hnsw-"]
    build_index(corpus(1000), encoder, tmp_path, index=IndexSettings("ivf_pq"), progress=False)
    assert [p.name[:5] for p in tmp_path.glob("*.faiss*")] == ["ivf_p"]


def test_a_full_disk_is_one_clear_line(tmp_path, corpus, encoder, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(approximate, "_save", full)
        with pytest.raises(BackendError, match=r"cannot write the index .*: No space left on device; what is stored"):
            build_index(corpus(1000), encoder, tmp_path, index=IndexSettings("hnsw"), progress=False)
    build_index(corpus(1000), encoder, tmp_path, index=IndexSettings("hnsw"), progress=False)
    assert len(encoder.documents) == 1000
