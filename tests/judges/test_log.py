from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from rag_rl.errors import BackendError
from rag_rl.judges import VerdictLog


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_a_row_and_new_lines_stay_inside(tmp_path):
    log = VerdictLog(tmp_path / "run" / "verdicts.jsonl")
    assert not log.path.exists()
    log.write({"answer": "two\nlines \u2028 \ud800", "score": None})
    log.write({"answer": "b", "score": 0.5})
    assert rows(log.path) == [{"answer": "two\nlines \u2028 \ud800", "score": None}, {"answer": "b", "score": 0.5}]
    VerdictLog(log.path).write({"answer": "c"})
    assert rows(log.path)[2] == {"answer": "c"}


def test_a_cut_line_spoils_no_other(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    path.write_text('{"answer": "a"}\n{"answer": "cu')
    VerdictLog(path).write({"answer": "b"})
    assert path.read_text() == '{"answer": "a"}\n{"answer": "cu\n{"answer": "b"}\n'


def test_processes_write_whole_lines(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    program = (
        "import sys\nfrom rag_rl.judges import VerdictLog\nlog = VerdictLog(sys.argv[1])\n"
        "for number in range(500):\n    log.write({'who': sys.argv[2], 'n': number, 'text': sys.argv[2] * 20000})\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, str(path), who]) for who in "ab"]
    assert [process.wait(60) for process in processes] == [0, 0]
    found = rows(path)
    assert len(found) == 1000
    assert all(row["text"] == row["who"] * 20000 for row in found)
    for who in "ab":
        assert [row["n"] for row in found if row["who"] == who] == list(range(500))


def test_a_disk_that_refuses_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match=r"the log of verdicts .*verdicts\.jsonl cannot be written"):
        VerdictLog(tmp_path / "file" / "verdicts.jsonl").write({"a": 1})
    if sys.platform == "linux":
        with pytest.raises(BackendError, match="No space left on device"):
            VerdictLog("/dev/full").write({"a": 1})


@pytest.mark.parametrize("code", ["ENOSYS", "ENOTSUP", "ENOLCK"])
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog, code):
    """Lustre without -o flock, NFS without its lock service."""
    asked = []

    def refuse(file, how):
        asked.append(how)
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", refuse)
    log = VerdictLog(tmp_path / "verdicts.jsonl")
    log.write({"answer": "a"})
    log.write({"answer": "b"})
    assert rows(log.path) == [{"answer": "a"}, {"answer": "b"}]
    assert asked == [fcntl.LOCK_EX], "it is asked for once"
    (record,) = caplog.records
    assert record.message.startswith(f"{log.path}: no lock on this file system (")


def test_a_lock_that_fails_otherwise(tmp_path, monkeypatch):
    def fail(file, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(BackendError, match=r"verdicts\.jsonl cannot be written: Input/output error"):
        VerdictLog(tmp_path / "verdicts.jsonl").write({"a": 1})
