from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from rag_rl.errors import BackendError, ConfigError, IndexDamagedError, IndexMismatchError
from rag_rl.retrieval import build_index, chroma, open_index

pytest.importorskip("chromadb", reason="chromadb is not installed")

COUNT = 1300  # more than Chroma keeps in its write-ahead table, so that its graph is on disk


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An embedded index, built once in a process of its own."""
    folder = tmp_path_factory.mktemp("chroma") / "index"
    here = Path(__file__)
    source = f"""
import sys; sys.path[:0] = [{str(here.parent)!r}, {str(here.parents[2])!r}]
from conftest import StubEncoder, make_passages
from rag_rl.retrieval import build_index
build_index(make_passages({COUNT}), StubEncoder(), {str(folder)!r}, backend="chroma", progress=False)
"""
    import sys

    subprocess.run([sys.executable, "-c", source], check=True, timeout=120)
    return folder


@pytest.fixture
def folder(built, tmp_path):
    import shutil

    return Path(shutil.copytree(built, tmp_path / "copy"))


def words(i):
    return f"alpha{i} beta{i * 7} gamma{i * 13} title {i}"


def database(folder):
    return folder / json.loads((folder / "manifest.json").read_text())["chroma"]["folder"]


def graph(folder):
    return next(p for p in database(folder).iterdir() if p.is_dir())


def test_embedded_search(folder, corpus, encoder):
    index = open_index(folder, encoder)
    assert len(index) == COUNT
    queries = [words(i) for i in range(0, COUNT, 13)]
    found = index.search(queries, top_k=5)
    right = [hits[0].passage.doc_id == f"d{i}" for i, hits in zip(range(0, COUNT, 13), found, strict=True)]
    assert np.mean(right) > 0.95  # the graph is approximate
    vectors = index.encode_queries(queries)
    scores, rows = index.search_vectors(vectors, top_k=5)
    assert (np.diff(scores, axis=1) <= 1e-6).all()
    np.testing.assert_allclose(scores, np.einsum("bd,bkd->bk", vectors, index.vectors(rows)), atol=1e-5)
    assert index.passages[7] == corpus(8)[7]
    kept = index.search(queries[:2], top_k=5, exclude=[["d0"], ["d13"]])
    assert [len(hits) for hits in kept] == [5, 5]
    assert all(h.passage.doc_id not in ("d0", "d13") for hits in kept for h in hits)
    assert len(index.search(queries[:1], top_k=COUNT)[0]) == COUNT
    index.close()


def test_opening_again_and_again(folder, encoder):
    for _ in range(3):
        index = open_index(folder, encoder)
        assert index.search([words(5)], top_k=1)[0][0].passage.doc_id == "d5"
        index.close()


OPEN = """
from conftest import StubEncoder
from rag_rl.errors import IndexDamagedError
from rag_rl.retrieval import open_index
try:
    open_index(sys.argv[1], StubEncoder())
    print("OPENED")
except IndexDamagedError as error:
    print(error)
"""


# Fewer rows than Chroma's own sync_threshold of 1,000 and one more; 2,049 is one more than goes in one request.
@pytest.mark.parametrize("count", [1, 2, 3, 560, 1001, 2049])
def test_an_index_of_any_size_is_opened_again_and_again(tmp_path, encoder, corpus, run_script, count):
    # Each opening in a process of its own, as it happens; what the first one changes, the second one finds.
    build_index(corpus(count), encoder, tmp_path / "index", backend="chroma", progress=False)
    for _ in range(2):
        assert run_script(OPEN, tmp_path / "index").stdout == "OPENED\n"


@pytest.mark.parametrize(
    "damage",
    [
        "sqlite garbage",
        "sqlite truncated",
        "sqlite deleted",
        "sqlite row changed",
        "header garbage",
        "pickle garbage",
        "graph folder deleted",
        "data truncated",
        "data same size",
        "links deleted",
        "whole database deleted",
    ],
)
def test_damage_is_found_and_named(folder, run_script, damage):
    import shutil
    import sqlite3

    main, part = database(folder) / "chroma.sqlite3", graph(folder)
    named = main
    match damage:
        case "sqlite garbage":
            main.write_bytes(b"garbage" * 10_000)
        case "sqlite truncated":
            main.write_bytes(main.read_bytes()[: main.stat().st_size // 2])
        case "sqlite deleted":
            main.unlink()
        case "sqlite row changed":
            with sqlite3.connect(main) as connection:
                connection.execute("UPDATE embeddings SET embedding_id = '99999' WHERE embedding_id = '3'")
            connection.close()
        case "header garbage":
            named = part / "header.bin"
            named.write_bytes(b"\xff" * 100)
        case "pickle garbage":
            named = part / "index_metadata.pickle"
            named.write_bytes(b"\x80\x04garbage")
        case "graph folder deleted":
            named = part
            shutil.rmtree(part)
        case "data truncated":
            named = part / "data_level0.bin"
            named.write_bytes(named.read_bytes()[: named.stat().st_size // 2])
        case "data same size":
            named = part / "data_level0.bin"
            named.write_bytes(named.read_bytes()[::-1])
        case "links deleted":
            named = part / "link_lists.bin"
            named.unlink()
        case "whole database deleted":
            named = database(folder)
            shutil.rmtree(named)
    said = run_script(OPEN, folder).stdout.strip()
    assert str(named) in said
    assert "delete the folder and build the index again" in said
    assert "\n" not in said


def test_a_pickle_in_the_folder_is_never_run(folder, run_script, tmp_path):
    trap = b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
    (graph(folder) / "index_metadata.pickle").write_bytes(trap)
    assert "index_metadata.pickle" in run_script(OPEN, folder).stdout
    assert not (tmp_path / "owned").exists()


def test_reuse_and_mismatch(folder, corpus, encoder, stub):
    build_index(corpus(COUNT), encoder, folder, backend="chroma", progress=False)
    assert encoder.documents == []
    with pytest.raises(IndexMismatchError, match="backend chroma, here faiss"):
        build_index(corpus(COUNT), encoder, folder, progress=False)
    with pytest.raises(IndexMismatchError, match="seed 0 there, 1 here"):
        open_index(folder, stub(seed=1))


def test_killed_while_chroma_fills(tmp_path, corpus, stub, run_script):
    source = f"""
import os, signal
from conftest import StubEncoder, make_passages
from rag_rl.retrieval import build_index, chroma
fill = chroma.fill
def killed(*args, **kwargs):
    seen = []
    def tick(count):
        seen.append(count)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    fill(*args, **{{**kwargs, "tick": tick, "batch_size": 300}})
chroma.fill = killed
build_index(make_passages({COUNT}), StubEncoder(), sys.argv[1], backend="chroma", progress=False)
"""
    assert run_script(source, tmp_path / "i", check=False).returncode == -signal.SIGKILL
    second = stub()
    build_index(corpus(COUNT), second, tmp_path / "i", backend="chroma", progress=False)
    assert second.documents == []
    assert len(list((tmp_path / "i").glob("chroma-*"))) == 1
    index = open_index(tmp_path / "i", stub())
    assert index.search([words(1200)], top_k=1)[0][0].passage.doc_id == "d1200"
    index.close()


def test_full_disk_while_chroma_fills(tmp_path, run_script, stub, corpus):
    source = """
import resource
from conftest import StubEncoder, make_passages
from rag_rl.errors import BackendError
from rag_rl.retrieval import build_index, chroma
fill = chroma.fill
def limited(*args, **kwargs):
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    fill(*args, **kwargs)
chroma.fill = limited
try:
    build_index(make_passages(3000), StubEncoder(), sys.argv[1], backend="chroma", progress=False)
except BackendError as error:
    print(error)
"""
    said = run_script(source, tmp_path / "i").stdout.strip()
    assert said.startswith(f"Chroma at {tmp_path / 'i'} failed to store the vectors: ")
    with pytest.raises(IndexDamagedError, match="unfinished"):
        open_index(tmp_path / "i", stub())
    second = stub()
    build_index(corpus(3000), second, tmp_path / "i", backend="chroma", progress=False)
    assert second.documents == []


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://h:port"])
def test_bad_address(url):
    with pytest.raises(ConfigError, match="retriever_chroma_url"):
        chroma.connect(url=url)


def test_no_server(tmp_path, passages, encoder):
    address = "http://127.0.0.1:9"
    with pytest.raises(BackendError, match=r"no Chroma server answers at http://127\.0\.0\.1:9; .*chroma run --path"):
        build_index(passages, encoder, tmp_path, backend="chroma", chroma_url=address, progress=False)
    assert encoder.documents == []  # noticed before the work, not after


@pytest.mark.server
def test_server(tmp_path, corpus, stub, chroma_server):
    url, process = chroma_server
    build_index(corpus(COUNT), stub(), tmp_path / "i", backend="chroma", chroma_url=url, progress=False)
    encoder = stub()
    build_index(corpus(COUNT), encoder, tmp_path / "i", backend="chroma", chroma_url=url, progress=False)
    assert encoder.documents == []
    index = open_index(tmp_path / "i", encoder)
    queries = [words(i) for i in range(0, COUNT, 13)]
    hits = index.search(queries, top_k=5)
    assert np.mean([h[0].passage.doc_id == f"d{13 * i}" for i, h in enumerate(hits)]) > 0.95
    vectors = index.encode_queries(queries)
    scores, rows = index.search_vectors(vectors, top_k=5)
    np.testing.assert_allclose(scores, np.einsum("bd,bkd->bk", vectors, index.vectors(rows)), atol=1e-5)
    # A collection that lost rows, then one that is gone, then no server at all.
    name = index.manifest.chroma["collection"]
    client = chroma.connect(url=url)
    client.get_collection(name, embedding_function=None).delete(ids=["3"])
    with pytest.raises(IndexDamagedError, match=f"holds {COUNT - 1} vectors, expected {COUNT}"):
        open_index(tmp_path / "i", encoder)
    # The right number of rows under the wrong vectors: the stored queries notice.
    shuffled = np.random.default_rng(0).permutation(index.matrix)
    client.get_collection(name, embedding_function=None).upsert(
        ids=[str(i) for i in range(COUNT)], embeddings=shuffled
    )
    with pytest.raises(IndexDamagedError, match="answers the stored queries differently"):
        open_index(tmp_path / "i", encoder)
    client.delete_collection(name)
    with pytest.raises(IndexDamagedError, match=f"has no collection {name}"):
        open_index(tmp_path / "i", encoder)
    process.kill()
    process.wait()
    with pytest.raises(BackendError, match=f"Chroma at {url} failed to search"):
        index.search(queries[:1], top_k=1)
    with pytest.raises(BackendError, match=f"no Chroma server answers at {url}; start one with: chroma run"):
        open_index(tmp_path / "i", encoder)


@pytest.mark.server
def test_an_embedded_index_is_not_moved_to_a_server(folder, corpus, encoder, chroma_server):
    with pytest.raises(IndexMismatchError, match="in Chroma at the folder itself"):
        build_index(corpus(COUNT), encoder, folder, backend="chroma", chroma_url=chroma_server[0], progress=False)


@pytest.mark.server
def test_a_killed_fill_of_a_server_goes_on(tmp_path, corpus, stub, chroma_server, monkeypatch):
    url, _ = chroma_server
    original = chroma.fill

    def stops(*args, **kwargs):
        ticks = []

        def tick(count):
            ticks.append(count)
            if len(ticks) == 3:
                raise BackendError("stop")

        original(*args, **{**kwargs, "batch_size": 300, "tick": tick})

    with monkeypatch.context() as patch:
        patch.setattr(chroma, "fill", stops)
        with pytest.raises(BackendError, match="stop"):
            build_index(corpus(COUNT), stub(), tmp_path / "i", backend="chroma", chroma_url=url, progress=False)
    second = stub()
    build_index(corpus(COUNT), second, tmp_path / "i", backend="chroma", chroma_url=url, progress=False)
    assert second.documents == []
    assert len(chroma.connect(url=url).list_collections()) == 1
    assert open_index(tmp_path / "i", stub()).search([words(9)], top_k=1)[0][0].passage.doc_id == "d9"
