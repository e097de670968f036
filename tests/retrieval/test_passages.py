from __future__ import annotations

import numpy as np
import pytest

from rag_rl.retrieval.passages import ENDS, ENDS_DTYPE, TEXTS, PassageStore, encode_passage
from rag_rl.types import Passage


def write(folder, passages):
    lines = [encode_passage(passage) for passage in passages]
    (folder / TEXTS).write_bytes(b"".join(lines))
    np.cumsum([len(line) for line in lines], dtype=ENDS_DTYPE).tofile(folder / ENDS)


def test_rows_come_back_as_they_were(tmp_path):
    odd = Passage("d", 'quote " back\\slash \n newline \u2028 東京 \x00', "", 3)
    half = Passage("e", "half a pair \ud83d", "Ti\ttle")
    write(tmp_path, [Passage("a", ""), odd, half])
    store = PassageStore(tmp_path)
    assert list(store) == [Passage("a", ""), odd, half]
    assert store.take([2, 1, 2]) == [half, odd, half]
    assert store[-1] == half
    assert store[:2] == [Passage("a", ""), odd]
    assert len(store) == 3


def test_one_line_a_passage(corpus):
    assert all(encode_passage(p).count(b"\n") == 1 for p in [*corpus(5), Passage("a", "x\ny\r\nz")])


def test_row_out_of_range(tmp_path, corpus):
    write(tmp_path, corpus(3))
    store = PassageStore(tmp_path)
    with pytest.raises(IndexError, match="row 3 of 3"):
        store[3]
    with pytest.raises(IndexError):
        store[-4]


def test_memory_is_bounded_and_answers_stay_right(tmp_path, corpus):
    passages = corpus(200)
    write(tmp_path, passages)
    store = PassageStore(tmp_path, keep=20)
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows = rng.integers(0, 200, size=30).tolist()
        assert store.take(rows) == [passages[row] for row in rows]
        assert len(store._decoded) <= 20


def test_decoded_passages_are_shared(tmp_path, corpus):
    write(tmp_path, corpus(3))
    store = PassageStore(tmp_path)
    assert store[1] is store[1]
