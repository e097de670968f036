from __future__ import annotations

import json
import sqlite3

import numpy as np
import pytest

from rag_rl.errors import IndexDamagedError, IndexMismatchError
from rag_rl.retrieval import manifest as m


def make(folder, **changes):
    np.arange(8, dtype="<f4").tofile(folder / m.VECTORS)
    (folder / "passages.jsonl").write_text("{}\n{}\n")
    files = {name: m.file_checksum(folder / name) for name in (m.VECTORS, "passages.jsonl")}
    fields = {
        "backend": "faiss",
        "count": 2,
        "dimension": 4,
        "metric": "inner_product",
        "encoder": "abc",
        "encoder_settings": {"name": "e", "query_prompt": "query: "},
        "files": files,
        "probes": [m.Probe(rows=[1, 0], scores=[0.5, 0.25], text="t", vector=m.pack_vector(np.ones(4)))],
    }
    return m.Manifest(**{**fields, **changes})


def test_round_trip(tmp_path):
    written = make(tmp_path)
    m.write_manifest(tmp_path, written)
    assert m.read_manifest(tmp_path) == written
    m.verify_files(tmp_path, written)
    assert sorted(p.name for p in tmp_path.iterdir()) == [m.MANIFEST, "passages.jsonl", m.VECTORS]


def test_vector_round_trip():
    vector = np.random.default_rng(0).standard_normal(5).astype(np.float32)
    np.testing.assert_array_equal(m.unpack_vector(m.pack_vector(vector)), vector)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00garbage", b"[]", b"3", b'{"format": 1}'])
def test_unreadable_manifest(tmp_path, content):
    (tmp_path / m.MANIFEST).write_bytes(content)
    with pytest.raises(IndexDamagedError, match=r"manifest\.json .*delete the folder and build the index again"):
        m.read_manifest(tmp_path)


def test_edited_manifest(tmp_path):
    m.write_manifest(tmp_path, make(tmp_path))
    content = json.loads((tmp_path / m.MANIFEST).read_text())
    content["count"] = 3
    (tmp_path / m.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(IndexDamagedError, match="was changed"):
        m.read_manifest(tmp_path)


def test_other_format(tmp_path):
    m.write_manifest(tmp_path, make(tmp_path, format=99))
    with pytest.raises(IndexMismatchError, match="format 99, expected 1"):
        m.read_manifest(tmp_path)


def test_no_manifest(tmp_path):
    with pytest.raises(IndexDamagedError, match="is no index"):
        m.read_manifest(tmp_path)
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(IndexDamagedError, match="unfinished index: build it again, which resumes"):
        m.read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 31 bytes, expected 32"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "was changed"),
    ],
)
def test_damaged_file_is_named(tmp_path, damage, said):
    whole = make(tmp_path)
    damage(tmp_path / m.VECTORS)
    with pytest.raises(IndexDamagedError, match=said) as caught:
        m.verify_files(tmp_path, whole)
    assert str(tmp_path / m.VECTORS) in str(caught.value)


def test_count_that_does_not_fit_the_vectors(tmp_path):
    with pytest.raises(IndexDamagedError, match="count and dimension"):
        m.verify_files(tmp_path, make(tmp_path, count=3))


def test_database_checksum_ignores_the_lock_table_only(tmp_path):
    path = tmp_path / "a.sqlite3"
    connection = sqlite3.connect(path)
    connection.executescript("CREATE TABLE acquire_write (n); CREATE TABLE t (n); INSERT INTO t VALUES (1)")
    before = m.file_checksum(path)
    connection.execute("INSERT INTO acquire_write VALUES (1)")
    connection.commit()
    assert m.file_checksum(path) == before
    connection.execute("UPDATE t SET n = 2")
    connection.commit()
    connection.close()
    assert m.file_checksum(path) != before


def test_fingerprint_depends_on_encoder_passages_and_backend(tmp_path):
    base = make(tmp_path)
    assert base.fingerprint == make(tmp_path, probes=[]).fingerprint
    assert base.fingerprint != make(tmp_path, encoder="other").fingerprint
    assert base.fingerprint != make(tmp_path, backend="chroma").fingerprint


def test_other_encoder_is_told_by_its_settings():
    class Other:
        fingerprint = "xyz"
        settings = {"name": "f", "query_prompt": "", "weights": "1"}  # noqa: RUF012

    with pytest.raises(IndexMismatchError, match=r"query_prompt 'query: ' there, '' here; weights changed") as caught:
        m.check_encoder("the index x", "abc", {"name": "e", "query_prompt": "query: ", "weights": "0"}, Other())
    assert "\n" not in str(caught.value)
