"""Rows of a reranker: the file, the split, what each epoch draws, and mining."""

from __future__ import annotations

import json
import logging
from collections import Counter

import pytest

from rag_rl.data.pairs import (
    ANSWERS,
    RETRIEVED,
    RETRIEVED_SCORES,
    PairRow,
    PairSampler,
    check_leakage,
    load_pairs,
    mine_pairs,
    split_pairs,
    write_pairs,
)
from rag_rl.errors import ConfigError, DataError
from rag_rl.types import Hit, Passage, Question

ROW = {
    "query_text": "Where does Mira live?",
    "positives": [{"doc_id": "p1", "text": "Mira lives in Elm."}],
    "negatives": [{"doc_id": "n1", "text": "Tom lives in Oak."}, {"doc_id": "n2", "text": "Elm lies low."}],
    "source_chunk": "c1",
    "meta": {"domain": "towns", "prompt_style": "plain"},
}


def doc(doc_id: str, text: str) -> dict[str, str]:
    return {"doc_id": doc_id, "text": text}


def changed(**fields: object) -> dict[str, object]:
    return {**ROW, **fields}


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def row(query: str, positives: str, negatives: str = "", source: str | None = None) -> PairRow:
    """Documents are words; each is its own id."""
    made = (tuple(Passage(word, f"{word}.") for word in words.split()) for words in (positives, negatives))
    return PairRow(query, *made, source)


# ---- the file


def test_all_fields_come_through(tmp_path):
    (found,) = load_pairs(write(tmp_path / "a.jsonl", ROW))
    assert found == PairRow(
        "Where does Mira live?",
        (Passage("p1", "Mira lives in Elm."),),
        (Passage("n1", "Tom lives in Oak."), Passage("n2", "Elm lies low.")),
        "c1",
        {"domain": "towns", "prompt_style": "plain"},
    )


def test_optional_fields_may_be_missing_and_negatives_empty(tmp_path):
    bare = {"query_text": "Who?", "positives": [doc("p", "Mira.")], "negatives": []}
    (found,) = load_pairs(write(tmp_path / "a.jsonl", bare))
    assert (found.negatives, found.source_chunk, found.meta) == ((), None, {})


def test_what_is_written_is_read_again(tmp_path):
    rows = load_pairs(write(tmp_path / "a.jsonl", ROW, changed(query_text="Who?", source_chunk=None, meta={})))
    assert write_pairs(tmp_path / "b.jsonl", rows) == 2
    assert load_pairs(tmp_path / "b.jsonl") == rows


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (changed(query_text="  "), "field 'query_text' is empty"),
        (changed(query_text=3), "field 'query_text' must be text, got number 3"),
        ({k: v for k, v in ROW.items() if k != "query_text"}, "field 'query_text' is missing"),
        (changed(positives=[]), "field 'positives' is empty: a query needs at least one document that answers it"),
        ({k: v for k, v in ROW.items() if k != "positives"}, "field 'positives' is missing"),
        ({k: v for k, v in ROW.items() if k != "negatives"}, "field 'negatives' is missing"),
        (changed(positives="p1"), "field 'positives' must be a list of objects with doc_id and text, got text 'p1'"),
        (changed(negatives=["n1"]), "field 'negatives[0]' must be an object with doc_id and text, got text 'n1'"),
        (changed(negatives=[{"doc_id": "n"}]), "field 'negatives[0].text' is missing"),
        (changed(negatives=[doc("n", " ")]), "field 'negatives[0].text' is empty"),
        (changed(negatives=[{"doc_id": 7, "text": "x"}]), "field 'negatives[0].doc_id' must be text, got number 7"),
        (changed(source_chunk=1), "field 'source_chunk' must be text, got number 1"),
        (changed(meta="towns"), "field 'meta' must be an object, got text 'towns'"),
        (
            changed(negatives=ROW["positives"]),
            "field 'negatives' has the document 'p1', which is also among the positives",
        ),
        (  # the same document under another id, with other spaces
            changed(negatives=[doc("n", "mira  lives in ELM.")]),
            "field 'negatives' has the document 'n', which is also among the positives",
        ),
        (
            changed(negatives=[doc("n1", "One text."), doc("n1", "Another.")]),
            "field 'negatives' has the id 'n1' with another text than before in this row",
        ),
        (
            changed(negatives=[doc("p1", "Another text.")]),
            "field 'negatives' has the id 'p1' with another text than before in this row",
        ),
        ("{\n", "is not JSON"),
        ("[1]\n", "must be an object {...}, got a list"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, bad, expected):
    path = write(tmp_path / "a.jsonl", changed(query_text="Who?"), bad)
    with pytest.raises(DataError) as caught:
        load_pairs(path)
    assert str(caught.value).startswith(f"{path}: 1 bad row: line 2: {expected}")


def test_one_query_on_two_lines_must_agree(tmp_path):
    other = changed(positives=[doc("x", "Elm lies low.")], negatives=[], query_text="where does mira live?")
    with pytest.raises(DataError, match=r"line 2: .*'x', which is also among the negatives on line 1, for the"):
        load_pairs(write(tmp_path / "a.jsonl", ROW, other))


def test_five_bad_rows_are_spelt_out_and_the_others_counted(tmp_path):
    with pytest.raises(DataError) as caught:
        load_pairs(write(tmp_path / "a.jsonl", ROW, *[changed(positives=[])] * 8))
    assert "8 bad rows: line 2: " in str(caught.value)
    assert "line 6: " in str(caught.value)
    assert "line 7: " not in str(caught.value)
    assert "; and 3 more" in str(caught.value)


def test_an_empty_file_and_a_missing_one(tmp_path):
    with pytest.raises(DataError, match="there are no queries in it"):
        load_pairs(write(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="no-such"):
        load_pairs(tmp_path / "no-such.jsonl")


# ---- the split


@pytest.fixture(scope="module")
def many() -> list[PairRow]:
    """60 rows: 40 queries, half of them twice, and chunks that some queries share."""
    rows = [row(f"Query {i}?", f"gold{i}", "a b", f"c{i // 3}" if i % 4 else None) for i in range(40)]
    return rows + [row(f"  query {i}? ", f"other{i}", "c", None) for i in range(20)]


@pytest.mark.parametrize("seed", range(5))
def test_no_query_and_no_chunk_is_on_both_sides(many, seed):
    train, held_out = split_pairs(many, eval_size=0.25, seed=seed)
    assert len(train) + len(held_out) == 60
    assert 10 <= len(held_out) <= 15
    assert not {r.query.strip().lower() for r in train} & {r.query.strip().lower() for r in held_out}
    assert not {r.source_chunk for r in train if r.source_chunk} & {r.source_chunk for r in held_out}
    check_leakage(train, held_out, names=("a", "b"))


def test_the_split_follows_from_the_seed_not_from_the_order(many):
    first = split_pairs(many, eval_size=12, seed=1)
    again = split_pairs(many[::-1], eval_size=12, seed=1)
    assert first[1] == again[1][::-1]
    assert first != split_pairs(many, eval_size=12, seed=2)


def test_equal_rows_may_be_split_too():
    train, held_out = split_pairs([*[row("A?", "x")] * 2, row("B?", "y")], eval_size=1, seed=0)
    assert [r.query for r in train] == ["A?", "A?"]
    assert [r.query for r in held_out] == ["B?"]


def test_leaks_are_named():
    train = [row("A?", "x", source="c1"), row("B?", "y")]
    check_leakage(train, [row("C?", "x", source="c2")], names=("train.jsonl", "valid.jsonl"))
    with pytest.raises(DataError) as caught:
        check_leakage(train, [row(" b?", "z"), row("D?", "z", source="c1")], names=("train.jsonl", "valid.jsonl"))
    assert str(caught.value) == (
        "valid.jsonl: 2 of its queries and source chunks are also in train.jsonl: query ' b?'; source_chunk 'c1'; "
        "take them out of one of the two files"
    )
    with pytest.raises(DataError, match=r"8 of its queries.*; and 3 more; take"):
        check_leakage([row("A?", "x")], [row("A?", "x")] * 8, names=("a", "b"))


# ---- what an epoch draws

WORDS = "a b c d e f g h"


def drawn(sampler: PairSampler, epoch: int) -> list[tuple[str, list[str], list[float]]]:
    return [sampler.draw(i, epoch) for i in range(len(sampler))]


@pytest.fixture
def rows() -> list[PairRow]:
    own = {i: " ".join(f"hard{i}{letter}" for letter in WORDS.split()) for i in range(30)}
    return [row(f"Query {i}?", f"gold{i}a gold{i}b", own[i]) for i in range(30)]


def own_of(number: int, texts: list[str]) -> int:
    return sum(text in {f"hard{number}{letter}." for letter in WORDS.split()} for text in texts)


def test_an_epoch_repeats_and_the_next_one_differs(rows):
    sampler, again = (PairSampler(rows, negatives=4, hard_share=0.5, seed=1) for _ in range(2))
    # A resumed run asks for the later epoch first.
    assert drawn(again, 1) == drawn(sampler, 1)
    assert drawn(again, 0) == drawn(sampler, 0)
    first, second = ([tuple(docs[2:]) for _, docs, _ in drawn(sampler, epoch)] for epoch in (0, 1))
    assert sum(a != b for a, b in zip(first, second, strict=True)) >= 29
    assert drawn(PairSampler(rows, negatives=4, hard_share=0.5, seed=2), 0) != drawn(sampler, 0)


def test_positives_come_first_and_are_labelled(rows):
    query, documents, labels = PairSampler(rows, negatives=3, hard_share=1.0, seed=0).draw(4, 0)
    assert query == "Query 4?"
    assert documents[:2] == ["gold4a.", "gold4b."]
    assert labels == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert all(text.startswith("hard4") for text in documents[2:])


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_share_of_hard_negatives(rows, share, expected):
    sampler = PairSampler(rows, negatives=4, hard_share=share, seed=0)
    for i, (_, documents, labels) in enumerate(drawn(sampler, 3)):
        negatives = [text for text, label in zip(documents, labels, strict=True) if not label]
        assert len(set(negatives)) == 4
        # A random document may by chance be one of the row's own.
        assert expected <= own_of(i, negatives) <= expected + 1
        assert not set(negatives) & {f"gold{i}a.", f"gold{i}b."}


def test_a_share_between_two_numbers_holds_on_average(rows):
    sampler = PairSampler(rows, negatives=3, hard_share=0.5, seed=0)
    own = Counter(own_of(i, sampler.draw(i, epoch)[1]) for epoch in range(40) for i in range(3))
    assert own.keys() >= {1, 2}
    assert 1.3 < sum(n * times for n, times in own.items()) / 120 < 1.75


def test_a_positive_of_the_same_query_in_another_row_is_never_a_negative():
    rows = [row("A?", "x", "y z"), row(" a? ", "w", "v")]
    for epoch in range(30):
        for _, documents, labels in drawn(PairSampler(rows, negatives=5, hard_share=0.5, seed=0), epoch):
            negatives = {text for text, label in zip(documents, labels, strict=True) if not label}
            assert negatives == {"y.", "z.", "v."}, "and where fewer are there, all are drawn"


def test_positives_may_be_drawn_as_well(rows):
    sampler = PairSampler(rows, negatives=2, hard_share=0.5, seed=0, positives=1)
    found = {sampler.draw(0, epoch)[1][0] for epoch in range(20)}
    assert found == {"gold0a.", "gold0b."}
    assert sampler.draw(0, 0)[2] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"negatives": 0}, "at least 1 positive and 1 negative, got None and 0"),
        ({"positives": 0}, "at least 1 positive and 1 negative, got 0 and 2"),
        ({"hard_share": 1.5}, r"must lie in \[0, 1\], got 1.5"),
    ],
)
def test_numbers_that_mean_nothing(rows, options, expected):
    with pytest.raises(ConfigError, match=expected):
        PairSampler(rows, **{"negatives": 2, "hard_share": 0.5, "seed": 0, **options})


def test_a_query_without_any_negative_is_named():
    with pytest.raises(DataError, match="query 'A\\?' has no negative"):
        PairSampler([row("A?", "x y"), row("A?", "z")], negatives=1, hard_share=0.5, seed=0)
    with pytest.raises(DataError, match="no query to train on"):
        PairSampler([], negatives=1, hard_share=0.5, seed=0)


# ---- mining


class Scored:
    """Finds the same passages for every query, with the scores that it was given; counts its calls."""

    def __init__(self, *scored: tuple[Passage, float]) -> None:
        self.scored, self.calls = scored, []

    def search(self, queries, *, top_k, exclude=None):
        self.calls.append((list(queries), top_k))
        return [[Hit(p, s, i) for i, (p, s) in enumerate(self.scored[:top_k], start=1)] for _ in queries]


GOLD = Passage("g", "The gold.", "Title")
OTHERS = [Passage(name, f"Text {name}.") for name in "abcd"]


def test_mining_searches_once_and_spares_the_gold():
    retriever = Scored((OTHERS[0], 0.9), (GOLD, 0.8), (Passage("copy", "title the GOLD."), 0.7), (OTHERS[1], 0.6))
    answers = [("Elm",), (), ()]
    asked = [
        Question(f"q{i}", f"Query {i}?", answers[i], ("g", "absent"), meta={"source_chunk": "c"}) for i in range(3)
    ]
    rows = mine_pairs(asked, retriever, passages=iter([*OTHERS, GOLD]), top_k=4)
    assert retriever.calls == [(["Query 0?", "Query 1?", "Query 2?"], 4)]
    assert rows[1] == PairRow(
        "Query 1?",
        (Passage("g", "Title\nThe gold."),),
        (Passage("a", "Text a."), Passage("b", "Text b.")),
        "c",
        {"qid": "q1", RETRIEVED: ["a", "g", "copy", "b"], RETRIEVED_SCORES: [0.9, 0.8, 0.7, 0.6]},
    )
    assert rows[0].meta[ANSWERS] == ["Elm"], "what a reader's reward needs; a question without answers has none"


def test_the_margin_leaves_out_what_scores_like_the_gold():
    retriever = Scored((OTHERS[0], 0.95), (GOLD, 0.8), (OTHERS[1], 0.77), (OTHERS[2], 0.75), (OTHERS[3], 0.1))
    asked = [Question("q", "Query?", (), ("g",))]
    kept = mine_pairs(asked, retriever, passages=[GOLD], top_k=5, margin=0.05)[0].negatives
    assert [p.doc_id for p in kept] == ["c", "d"], "0.95 * 0.8 = 0.76"
    # Nobody knows what scores above a gold that was not found at all.
    assert mine_pairs(asked, retriever, passages=[GOLD], top_k=1, margin=0.05)[0].negatives == ()
    negative = Scored((OTHERS[0], -1.0), (GOLD, -2.0), (OTHERS[1], -2.05), (OTHERS[2], -2.2))
    kept = mine_pairs(asked, negative, passages=[GOLD], top_k=4, margin=0.05)[0].negatives
    assert [p.doc_id for p in kept] == ["c"], "below -2 - 0.05 * 2"


def test_chunks_keep_ids_of_their_own(tmp_path):
    chunks = [Passage("g", "One.", chunk=0), Passage("g", "Two.", chunk=1)]
    retriever = Scored((chunks[1], 0.9), (Passage("a", "Three.", chunk=2), 0.8))
    rows = mine_pairs([Question("q", "Query?", (), ("g",))], retriever, passages=chunks, top_k=2)
    assert [p.doc_id for p in (*rows[0].positives, *rows[0].negatives)] == ["g", "g#1", "a#2"]
    write_pairs(tmp_path / "a.jsonl", rows)
    assert load_pairs(tmp_path / "a.jsonl") == rows


def test_questions_whose_gold_is_nowhere_are_counted(caplog):
    asked = [Question("q1", "A?", (), ("g",)), Question("q2", "B?", (), ("none",)), Question("q3", "C?", ())]
    with caplog.at_level(logging.WARNING):
        rows = mine_pairs(asked, Scored((OTHERS[0], 1.0)), passages=[GOLD], top_k=1)
    assert [r.query for r in rows] == ["A?"]
    assert "2 of 3 questions are left out" in caplog.text
    with pytest.raises(DataError, match="none of the 2 questions has a gold document in the corpus"):
        mine_pairs(asked[1:], Scored((OTHERS[0], 1.0)), passages=[GOLD], top_k=1)
    with pytest.raises(ConfigError, match="margin of false negatives"):
        mine_pairs(asked, Scored(), passages=[GOLD], top_k=1, margin=2.0)
