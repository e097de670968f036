from __future__ import annotations

import errno
import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rag_rl.errors import (
    BackendError,
    ConfigError,
    DataError,
    IndexDamagedError,
    IndexMismatchError,
    RunFolderError,
)
from rag_rl.retrieval import build, build_index, open_index
from rag_rl.types import Passage

pytest.importorskip("faiss", reason="faiss is not installed")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def build_quiet(passages, encoder, folder, **options):
    build_index(passages, encoder, folder, **{"progress": False, "batch_size": 16, **options})


def test_what_lies_in_the_folder(tmp_path, passages, encoder):
    build_quiet(iter(passages), encoder, tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == [".lock", "manifest.json", "passages.ends", "passages.jsonl", "vectors.f32"]
    assert encoder.documents == [p.contents for p in passages]
    assert (tmp_path / "a" / "b" / "vectors.f32").stat().st_size == 300 * 32 * 4


def test_a_finished_index_is_reused(tmp_path, passages, encoder, stub):
    build_quiet(passages, encoder, tmp_path)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir() if p.name != ".lock"}
    fresh = stub()
    build_quiet(passages, fresh, tmp_path)
    assert fresh.documents == []
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.iterdir() if p.name != ".lock"} == before


def test_a_finished_index_of_something_else(tmp_path, passages, encoder, stub):
    build_quiet(passages, encoder, tmp_path)
    with pytest.raises(IndexMismatchError, match="seed 0 there, 1 here"):
        build_quiet(passages, stub(seed=1), tmp_path)
    with pytest.raises(IndexMismatchError, match="backend faiss, here chroma"):
        build_quiet(passages, encoder, tmp_path, backend="chroma")
    with pytest.raises(IndexMismatchError, match="holds 300 passages, the corpus 299"):
        build_quiet(passages[:-1], encoder, tmp_path)
    with pytest.raises(IndexMismatchError, match="holds 300 passages, the corpus 301"):
        build_quiet([*passages, Passage("new", "x")], encoder, tmp_path)
    changed = [*passages[:7], Passage("d7", "another text", "Title 7"), *passages[8:]]
    with pytest.raises(IndexMismatchError, match=r"passage 8 has doc_id 'd7' there, 'd7' here \(differing: text\)"):
        build_quiet(changed, encoder, tmp_path)


def test_a_finished_index_that_is_damaged(tmp_path, passages, encoder):
    build_quiet(passages, encoder, tmp_path)
    with (tmp_path / "vectors.f32").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(IndexDamagedError, match=r"vectors\.f32 has 100 bytes"):
        build_quiet(passages, encoder, tmp_path)


@pytest.mark.parametrize("empty", [[], iter(())])
def test_empty_corpus(tmp_path, encoder, empty):
    with pytest.raises(DataError, match="the corpus is empty"):
        build_quiet(empty, encoder, tmp_path / "i")
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("place", [1, 15, 16, 299])
def test_repeated_passage(tmp_path, passages, encoder, place):
    repeated = [*passages[:place], Passage("d0", "other"), *passages[place:]]
    with pytest.raises(DataError, match=f"passages 1 and {place + 1} .*same doc_id 'd0' and chunk 0"):
        build_quiet(repeated, encoder, tmp_path)
    with pytest.raises(IndexDamagedError, match="unfinished"):
        open_index(tmp_path, encoder)
    # Nothing of what was right is lost when the row is taken out.
    done = len(encoder.documents)
    build_quiet(passages, encoder, tmp_path)
    assert len(encoder.documents) == 300
    assert done == place // 16 * 16


def test_chunks_of_a_document_are_no_repetition(tmp_path, corpus, encoder):
    build_quiet(corpus(40, 4), encoder, tmp_path)
    assert len(open_index(tmp_path, encoder)) == 40


@pytest.mark.parametrize("bad", [Passage("", "x"), Passage(3, "x"), Passage("a", None)])
def test_passage_without_id_or_text(tmp_path, encoder, bad):
    with pytest.raises(DataError, match="passage 2 of the corpus has doc_id"):
        build_quiet([Passage("ok", "x"), bad], encoder, tmp_path)


def test_bad_arguments(tmp_path, passages, encoder):
    with pytest.raises(ConfigError, match="must be faiss or chroma, got 'milvus'"):
        build_quiet(passages, encoder, tmp_path, backend="milvus")
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        build_quiet(passages, encoder, tmp_path, batch_size=0)
    with pytest.raises(ConfigError, match="needs retriever_backend chroma"):
        build_quiet(passages, encoder, tmp_path, chroma_url="http://127.0.0.1:8000")
    assert names(tmp_path) == []


def test_a_folder_with_something_else_is_left_alone(tmp_path, passages, encoder):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunFolderError, match=r"is not empty \(it holds thesis\.tex\)"):
        build_quiet(passages, encoder, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


# --------------------------------------------------------------------------------------------------------- resuming


def whole(folder, passages, encoder):
    build_quiet(passages, encoder, folder)
    return {name: (folder / name).read_bytes() for name in ("vectors.f32", "passages.jsonl", "passages.ends")}


@pytest.mark.parametrize("batch_size", [16, 23, 512])
def test_resume_after_a_failing_encoder(tmp_path, passages, stub, batch_size):
    expected = whole(tmp_path / "whole", passages, stub())
    failing = stub(fail_after=100)
    with pytest.raises(RuntimeError, match="the device is gone"):
        build_quiet(passages, failing, tmp_path / "i")
    assert len(failing.documents) == 112
    with pytest.raises(IndexDamagedError, match="unfinished index: build it again, which resumes"):
        open_index(tmp_path / "i", stub())
    second = stub()
    build_quiet(passages, second, tmp_path / "i", batch_size=batch_size)
    assert second.documents == [p.contents for p in passages[112:]]
    assert {name: (tmp_path / "i" / name).read_bytes() for name in expected} == expected
    open_index(tmp_path / "i", stub())


KILLED = """
import os, signal
from conftest import StubEncoder, make_passages
from rag_rl.retrieval import build_index

class Killed(StubEncoder):
    def encode_documents(self, texts):
        if len(self.documents) >= 100:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_documents(texts)

build_index(make_passages(300), Killed(), sys.argv[1], batch_size=16, progress=False)
"""


def test_resume_after_sigkill(tmp_path, passages, stub, run_script):
    expected = whole(tmp_path / "whole", passages, stub())
    done = run_script(KILLED, tmp_path / "i", check=False)
    assert done.returncode == -signal.SIGKILL
    assert "manifest.json" not in names(tmp_path / "i")
    second = stub()
    build_quiet(passages, second, tmp_path / "i")
    assert second.documents == [p.contents for p in passages[112:]]
    assert {name: (tmp_path / "i" / name).read_bytes() for name in expected} == expected
    assert names(tmp_path / "i") == names(tmp_path / "whole")


def test_resume_after_sigkill_at_any_moment(tmp_path, corpus, stub):
    """Killed from outside, again and again, wherever it happens to be."""
    source = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]\n"
        "from conftest import StubEncoder, make_passages\n"
        "from rag_rl.retrieval import build_index\n"
        "build_index(make_passages(4000), StubEncoder(), sys.argv[1], batch_size=8, progress=False)\n"
    )
    target = tmp_path / "i" / "vectors.f32"
    rng = np.random.default_rng(0)
    for _ in range(3):
        before = target.stat().st_size if target.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", source, str(tmp_path / "i")])
        deadline = time.monotonic() + 60
        while process.poll() is None and (not target.exists() or target.stat().st_size <= before):
            assert time.monotonic() < deadline
        time.sleep(float(rng.uniform(0.0, 0.03)))
        process.kill()
        process.wait()
    build_quiet(corpus(4000), stub(), tmp_path / "i")
    expected = whole(tmp_path / "whole", corpus(4000), stub())
    assert (tmp_path / "i" / "passages.jsonl").read_bytes() == expected["passages.jsonl"]
    # The same vectors up to rounding: a batch of another size may be summed in another order.
    got = np.fromfile(target, dtype="<f4")
    np.testing.assert_allclose(got, np.frombuffer(expected["vectors.f32"], dtype="<f4"), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "cut", "kept"),
    [("vectors.f32", 5, 111), ("passages.ends", 3, 111), ("passages.jsonl", 2, 111), ("vectors.f32", 32 * 4 * 20, 92)],
)
def test_resume_with_a_torn_file(tmp_path, passages, stub, name, cut, kept):
    expected = whole(tmp_path / "whole", passages, stub())
    with pytest.raises(RuntimeError):
        build_quiet(passages, stub(fail_after=100), tmp_path / "i")
    with (tmp_path / "i" / name).open("r+b") as file:
        file.truncate(os.path.getsize(tmp_path / "i" / name) - cut)
    second = stub()
    build_quiet(passages, second, tmp_path / "i")
    assert len(second.documents) == 300 - kept
    assert {n: (tmp_path / "i" / n).read_bytes() for n in expected} == expected


def test_resume_with_something_else(tmp_path, passages, encoder, stub):
    with pytest.raises(RuntimeError):
        build_quiet(passages, stub(fail_after=100), tmp_path)
    with pytest.raises(IndexMismatchError, match=r"unfinished index .*seed 0 there, 1 here"):
        build_quiet(passages, stub(seed=1), tmp_path)
    with pytest.raises(IndexMismatchError, match="begun with backend 'faiss', here 'chroma'"):
        build_quiet(passages, encoder, tmp_path, backend="chroma")
    with pytest.raises(IndexMismatchError, match="passage 1 has doc_id 'd0' there, 'd1' here"):
        build_quiet(passages[1:], encoder, tmp_path)
    with pytest.raises(IndexMismatchError, match="holds 112 passages already, the corpus only 50"):
        build_quiet(passages[:50], encoder, tmp_path)
    assert encoder.documents == []


def test_a_repeated_passage_is_found_after_a_resume_too(tmp_path, passages, stub):
    with pytest.raises(RuntimeError):
        build_quiet(passages, stub(fail_after=100), tmp_path)
    with pytest.raises(DataError, match="passages 3 and 301"):
        build_quiet([*passages, Passage("d2", "again")], stub(), tmp_path)


def test_two_builders_at_once(tmp_path, passages, encoder):
    """As the processes of a distributed run would: one builds, the other waits and embeds nothing."""
    source = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]\n"
        "from conftest import StubEncoder, make_passages\n"
        "from rag_rl.retrieval import build_index\n"
        "encoder = StubEncoder()\n"
        "build_index(make_passages(2000), encoder, sys.argv[1], batch_size=8, progress=False)\n"
        "print(len(encoder.documents))\n"
    )
    command = [sys.executable, "-c", source, str(tmp_path / "i")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(int(p.communicate(timeout=60)[0]) for p in both) == [0, 2000]
    assert [p.returncode for p in both] == [0, 0]


@pytest.mark.parametrize("code", ["ENOSYS", "ENOTSUP", "ENOLCK"])
@pytest.mark.parametrize("busy", [False, True])
def test_a_file_system_without_locks(tmp_path, passages, encoder, stub, monkeypatch, caplog, code, busy):
    """Lustre without -o flock, NFS without its lock service: at the first call, or when it comes to waiting."""

    def refuse(handle, how):
        if busy and how & fcntl.LOCK_NB:
            raise BlockingIOError(errno.EAGAIN, "held")
        number = getattr(errno, code)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    build_quiet(passages, encoder, tmp_path)
    (line,) = [record.message for record in caplog.records if "no lock" in record.message]
    assert line.startswith(f"{tmp_path}: no lock on this file system (")
    assert line.endswith("): build the index once before several runs start")
    caplog.clear()
    build_quiet(passages, stub(), tmp_path)
    assert "no lock" not in caplog.text, "a finished index needs none"
    assert len(open_index(tmp_path, stub())) == len(passages)


def test_a_lock_that_fails_otherwise_is_one_line(tmp_path, passages, encoder, monkeypatch):
    def fail(handle, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(BackendError, match=r"cannot lock the index .*: Input/output error"):
        build_quiet(passages, encoder, tmp_path)
    assert encoder.documents == []


# -------------------------------------------------------------------------------------------------- failing disks


def test_file_size_limit_is_one_clear_line(tmp_path, run_script, stub, corpus):
    source = """
import resource
from conftest import StubEncoder, make_passages
from rag_rl.errors import BackendError
from rag_rl.retrieval import build_index
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    build_index(make_passages(3000), StubEncoder(), sys.argv[1], batch_size=64, progress=False)
except BackendError as error:
    print(error)
"""
    said = run_script(source, tmp_path / "i").stdout.strip()
    assert said.startswith(f"cannot write the index {tmp_path / 'i'}: ")
    assert said.endswith("make room and build again, which resumes")
    assert "\n" not in said
    with pytest.raises(IndexDamagedError, match="unfinished"):
        open_index(tmp_path / "i", stub())
    # With room again, it goes on.
    second = stub()
    build_quiet(corpus(3000), second, tmp_path / "i")
    assert 0 < len(second.documents) < 3000
    assert len(open_index(tmp_path / "i", stub())) == 3000


@pytest.mark.parametrize("step", ["write", "keys", "manifest"])
def test_full_disk(tmp_path, passages, stub, monkeypatch, step):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        if step == "write":
            calls = iter(range(1000))
            original = build._Appender.write

            def write(self, data):
                if next(calls) == 13:
                    original(self, memoryview(data).cast("B")[:100])  # a part gets through
                    raise full
                original(self, data)

            patch.setattr(build._Appender, "write", write)
        elif step == "keys":

            def add(self, first_row, passages):
                raise sqlite3.OperationalError("database or disk is full")

            patch.setattr(build._Keys, "add", add)
        else:

            def fail(folder, manifest):
                raise full

            patch.setattr(build, "write_manifest", fail)
        with pytest.raises(BackendError, match=r"cannot write the index .*(No space left|disk is full)"):
            build_quiet(passages, stub(), tmp_path / "i")
    with pytest.raises(IndexDamagedError, match="unfinished"):
        open_index(tmp_path / "i", stub())
    build_quiet(passages, stub(), tmp_path / "i")
    expected = whole(tmp_path / "whole", passages, stub())
    assert {name: (tmp_path / "i" / name).read_bytes() for name in expected} == expected


def test_an_oserror_of_the_encoder_is_not_the_disk(tmp_path, passages, encoder, monkeypatch):
    def broken(texts):
        raise ConnectionError("endpoint gone")

    monkeypatch.setattr(encoder, "encode_documents", broken)
    with pytest.raises(ConnectionError, match="endpoint gone"):
        build_quiet(passages, encoder, tmp_path)


def test_vectors_that_are_none(tmp_path, passages, encoder, monkeypatch):
    original = encoder.encode_documents

    def poisoned(texts):
        vectors = original(texts)
        if len(encoder.documents) > 100:
            vectors[3, 5] = np.nan
        return vectors

    monkeypatch.setattr(encoder, "encode_documents", poisoned)
    with pytest.raises(BackendError, match=r"not finite for passage 100 \(doc_id 'd99'\)"):
        build_quiet(passages, encoder, tmp_path / "a")
    monkeypatch.setattr(encoder, "encode_documents", lambda texts: original(texts)[:, :5])
    with pytest.raises(BackendError, match=r"shape \(16, 5\), expected \(16, 32\)"):
        build_quiet(passages, encoder, tmp_path / "b")


def test_memory_does_not_grow_with_the_corpus(tmp_path, run_script):
    source = """
import numpy as np
from rag_rl.retrieval import build_index
from rag_rl.types import Passage

class Encoder:
    dimension, fingerprint = 256, "x"
    def encode_documents(self, texts):
        return np.full((len(texts), 256), len(texts[0]), dtype=np.float32)
    encode_queries = encode_documents

def anonymous():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024

build_index((Passage(f"w{i}", "warm up") for i in range(2000)), Encoder(), sys.argv[1] + "/w", progress=False)
for count in (4_000, 40_000):
    passages = (Passage(f"d{i}", "some text " * 20) for i in range(count))
    build_index(passages, Encoder(), f"{sys.argv[1]}/{count}", progress=False)
    print(anonymous())
"""
    small, large = map(float, run_script(source, tmp_path).stdout.split())
    # 36,000 more passages are 37 MB of vectors and 7 MB of text.
    assert large - small < 4


def test_progress_bar_goes_to_stderr_or_nowhere(tmp_path, passages, encoder, capsys):
    build_index(passages, encoder, tmp_path / "a", progress=True)
    shown = capsys.readouterr()
    assert "300/300" in shown.err
    assert shown.out == ""
    build_index(passages, encoder, tmp_path / "b", progress=False)
    assert capsys.readouterr().err == ""
