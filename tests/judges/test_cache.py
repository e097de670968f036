from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from rag_rl.errors import BackendError, ConfigError
from rag_rl.judges import VerdictCache
from rag_rl.judges.cache import case_hash, cases_key
from rag_rl.types import JudgeCase, Verdict

CASE = JudgeCase("Who?", "Mira", gold=("Mira", "the Mira"), passages=("p",), meta={"query": "q", "hop": 2})

WRITER = """
import sys
from rag_rl.judges import VerdictCache
from rag_rl.types import Verdict

cache = VerdictCache(sys.argv[1])
number = int(sys.argv[2])
while number < int(sys.argv[3]):
    cache.store(number.to_bytes(32, "big"), [Verdict((number % 11) / 10, f"reason {number} " + "x" * 300)])
    number += 1
    print(number, flush=True)
"""


def writer(path, start, end):
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(start), str(end)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def key(number):
    return number.to_bytes(32, "big")


def expected(number):
    return [Verdict((number % 11) / 10, f"reason {number} " + "x" * 300)]


@pytest.mark.parametrize("name", [None, "folder/verdicts.sqlite3"])
def test_verdicts_are_kept_in_order_and_exactly(tmp_path, name):
    cache = VerdictCache(None if name is None else tmp_path / name)
    verdicts = [Verdict(0.1 + 0.2, "first 'quoted' ö \ud800"), Verdict(1.0), Verdict(0.0, "")]
    cache.store(key(1), verdicts)
    assert cache.load([key(2), key(1)]) == {key(1): verdicts}
    assert cache.load([]) == {}
    assert len(cache) == 1
    if name is not None:
        cache.close()
        assert VerdictCache(tmp_path / name).load([key(1)]) == {key(1): verdicts}


def test_the_first_verdict_stays():
    cache = VerdictCache()
    cache.store(key(1), [Verdict(1.0)])
    cache.store(key(1), [Verdict(0.0)])
    assert cache.load([key(1)]) == {key(1): [Verdict(1.0)]}


def test_only_verdicts_with_a_score_are_kept():
    cache = VerdictCache()
    with pytest.raises(ValueError, match="without a score"):
        cache.store(key(1), [Verdict(1.0), Verdict(None, "unreadable")])
    assert len(cache) == 0


def test_many_keys_are_looked_up_at_once():
    cache = VerdictCache()
    for number in range(1203):
        cache.store(key(number), [Verdict(0.5)])
    assert len(cache.load([key(number) for number in range(5000)])) == 1203


def test_two_processes_write_at_once(tmp_path):
    path = tmp_path / "verdicts.sqlite3"
    # Half of what each writes the other one writes, too.
    processes = [writer(path, 0, 400), writer(path, 200, 600)]
    for process in processes:
        _, told = process.communicate(timeout=60)
        assert (process.returncode, told) == (0, "")
    cache = VerdictCache(path)
    assert len(cache) == 600
    assert cache.load([key(n) for n in range(600)]) == {key(n): expected(n) for n in range(600)}


def test_a_killed_writer_leaves_whole_verdicts(tmp_path):
    path = tmp_path / "verdicts.sqlite3"
    process = writer(path, 0, 10**9)
    other = VerdictCache(path)  # which goes on through it all
    for number in range(150):
        assert int(process.stdout.readline()) == number + 1
        other.store(key(10**10 + number), expected(number))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    cache = VerdictCache(path)
    stored = len(cache) - 150
    assert stored >= 150
    assert cache.load([key(n) for n in range(stored + 100)]) == {key(n): expected(n) for n in range(stored)}
    assert len(other.load([key(10**10 + n) for n in range(150)])) == 150
    cache.store(key(10**9), [Verdict(1.0)])


def test_a_damaged_entry_is_named_and_no_score(tmp_path):
    cache = VerdictCache(tmp_path / "verdicts.sqlite3")
    cache._database.write("INSERT INTO verdicts VALUES (?, ?)", (key(1), '[[0.5, "cut'))
    with pytest.raises(BackendError, match=r"the verdict cache .*verdicts\.sqlite3 fails"):
        cache.load([key(1)])


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "verdicts.sqlite3"
    path.write_bytes(b"PAR1" * 1000)
    with pytest.raises(BackendError, match=r"verdicts\.sqlite3"):
        VerdictCache(path)


def test_the_key_tells_apart_all_that_decides_a_verdict():
    from dataclasses import replace

    base = ("judge", "model", "rubric", "1", [CASE])
    others = [
        ("judge2", "model", "rubric", "1", [CASE]),
        ("judge", "model2", "rubric", "1", [CASE]),
        ("judge", "model", "rubric2", "1", [CASE]),
        ("judge", "model", "rubric", "2", [CASE]),
        ("judgem", "odel", "rubric", "1", [CASE]),
        ("judge", "model", "rubric", "1", [CASE, CASE]),
        ("judge", "model", "rubric", "1", [replace(CASE, question="Where?")]),
        ("judge", "model", "rubric", "1", [replace(CASE, answer="mira")]),
        ("judge", "model", "rubric", "1", [replace(CASE, gold=("Mira",))]),
        ("judge", "model", "rubric", "1", [replace(CASE, gold=("the Mira", "Mira"))]),
        ("judge", "model", "rubric", "1", [replace(CASE, passages=())]),
        ("judge", "model", "rubric", "1", [replace(CASE, meta={"query": "q"})]),
        ("judge", "model", "rubric", "1", [replace(CASE, meta={"query": "q", "hop": 3})]),
    ]
    keys = {cases_key(*parts) for parts in [base, *others]}
    assert len(keys) == 1 + len(others)
    assert {len(one) for one in keys} == {32}
    same = replace(CASE, meta={"hop": 2, "query": "q"})
    assert cases_key("judge", "model", "rubric", "1", [same]) == cases_key(*base)
    assert case_hash(same) == case_hash(CASE) != case_hash(replace(CASE, answer=""))


def test_what_has_no_lasting_text_is_refused():
    with pytest.raises(ConfigError, match=r"JudgeCase\.meta .*'thing', 'object'"):
        case_hash(JudgeCase("Who?", "Mira", meta={"thing": object()}))
