from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest

from rag_rl.errors import BackendError
from rag_rl.judges.database import Database

SCHEMA = "CREATE TABLE IF NOT EXISTS notes (number INTEGER PRIMARY KEY, text TEXT NOT NULL)"


def opened(path):
    return Database(path, SCHEMA, what="the notebook", loss="the notes")


def in_a_process(program, *arguments):
    lead = (
        "import sys\nfrom rag_rl.judges.database import Database\n"
        f"database = Database(sys.argv[1], {SCHEMA!r}, what='the notebook', loss='the notes')\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", lead + textwrap.dedent(program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", [None, "folder/notes.sqlite3"])
def test_what_is_written_can_be_read(tmp_path, name):
    database = opened(None if name is None else tmp_path / name)
    assert database.write("INSERT INTO notes VALUES (?, ?)", (1, "a")) == 1
    assert database.write("UPDATE notes SET text = 'b' WHERE number = ?", (2,)) == 0
    assert database.read("SELECT * FROM notes") == [(1, "a")]
    database.close()
    database.close()
    assert database.read("SELECT * FROM notes") == ([] if name is None else [(1, "a")])


def test_threads_share_one(tmp_path):
    database = opened(tmp_path / "notes.sqlite3")

    def work(start):
        for number in range(start, start + 50):
            database.write("INSERT INTO notes VALUES (?, 'x')", (number,))

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert database.read("SELECT count(*) FROM notes") == [(200,)]


def test_processes_may_open_and_write_at_once(tmp_path):
    path = tmp_path / "notes.sqlite3"
    program = """
    for number in range(300):
        database.write("INSERT INTO notes VALUES (?, ?)", (int(sys.argv[2]) * 1000 + number, "x" * 500))
    """
    processes = [in_a_process(program, path, number) for number in range(3)]
    for process in processes:
        _, told = process.communicate(timeout=60)
        assert (process.returncode, told) == (0, "")
    database = opened(path)
    assert database.read("SELECT count(*), count(DISTINCT text) FROM notes") == [(900, 1)]
    assert database.read("PRAGMA journal_mode") == [("wal",)]


def test_a_killed_writer_leaves_all_that_it_had_written(tmp_path):
    path = tmp_path / "notes.sqlite3"
    program = """
    number = 0
    while True:
        number += 1
        database.write("INSERT INTO notes VALUES (?, ?)", (number, "x" * 5000))
        print(number, flush=True)
    """
    process = in_a_process(program, path)
    for _ in range(200):
        written = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate(timeout=60)
    written = max([written, *(int(line) for line in rest.split("\n")[:-1] if line)])
    database = opened(path)
    count, lowest, highest = database.read("SELECT count(*), min(number), max(number) FROM notes")[0]
    assert count == highest - lowest + 1 >= written >= 200
    assert database.read("SELECT DISTINCT length(text) FROM notes") == [(5000,)]
    assert database.read("PRAGMA integrity_check") == [("ok",)]
    assert database.write("INSERT INTO notes VALUES (0, 'goes on')") == 1


def test_a_forked_process_opens_its_own(tmp_path):
    database = opened(tmp_path / "notes.sqlite3")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forking beside threads; this child does next to nothing
        child = os.fork()
    if child == 0:
        try:
            os._exit(0 if database.write("INSERT INTO notes VALUES (1, 'child')") == 1 else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    database.write("INSERT INTO notes VALUES (2, 'parent')")
    assert database.read("SELECT text FROM notes ORDER BY number") == [("child",), ("parent",)]


def test_what_is_no_sqlite_file_is_named(tmp_path):
    path = tmp_path / "notes.sqlite3"
    path.write_text("this is no database" * 100)
    with pytest.raises(BackendError, match=r"the notebook .*notes\.sqlite3 fails .*deleting it loses the notes"):
        opened(path)
    assert path.read_text().startswith("this is no")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match=r"cannot make the folder of the notebook .*notes\.sqlite3"):
        opened(tmp_path / "file" / "notes.sqlite3")


def test_a_wrong_statement_names_the_file(tmp_path):
    with pytest.raises(BackendError, match=r"notes\.sqlite3 fails \(no such table: missing\)"):
        opened(tmp_path / "notes.sqlite3").read("SELECT * FROM missing")


def test_a_lost_one_closes_its_file(tmp_path):
    database = opened(tmp_path / "notes.sqlite3")
    connection = database._connection
    del database
    gc.collect()
    with pytest.raises(Exception, match="closed"):
        connection.execute("SELECT 1")
