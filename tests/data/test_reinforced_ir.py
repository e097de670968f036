"""The published files of Reinforced-IR: what is read is written again, and bad rows are named."""

from __future__ import annotations

import json

import pytest

from rag_rl.data import reinforced_ir as files
from rag_rl.data.reinforced_ir import (
    AUGMENTATION_PREFIX,
    AugmentedQuery,
    Candidate,
    PreferencePair,
    RetrieverExample,
    SyntheticQuery,
)
from rag_rl.errors import DataError
from rag_rl.types import Passage

QUERIES = [
    SyntheticQuery("who rules Elmton?", "Mira rules Elmton."),
    SyntheticQuery("größe – 東京?", 'q "quoted"\nline'),
]
PAIRS = [PreferencePair("Write.\nQuery: who?", "Mira rules.", "", 1.25, 0.5), PreferencePair("p", "c", "r", 2, -0.125)]
BEFORE = RetrieverExample("who?", AUGMENTATION_PREFIX + "Mira", ("Mira rules.",), ("a", "b", "b"), ("c",))
AFTER = RetrieverExample("who?", "x", ("b",), ("Mira rules.", "a"), (), (1.0,), (0.5, 1 / 3))


def candidate(query: str, number: int) -> Candidate:
    return Candidate(query, f"passage of {query}", f"guess {number}", f"{AUGMENTATION_PREFIX}guess {number}")


def array(path, *items):
    path.write_text(json.dumps(items))
    return path


CASES = {
    "queries": ("queries.json", QUERIES),
    "candidates": ("answers.json", [[candidate(q, n) for n in range(5)] for q in ("a", "b", "c")]),
    "preferences": ("train.jsonl", PAIRS),
    "llamafactory": ("train_llamafactory.jsonl", PAIRS),
    "augmented": ("answers.json", [AugmentedQuery("q", "p", AUGMENTATION_PREFIX + "a")]),
    "examples": ("train.jsonl", [BEFORE, AFTER]),
}


@pytest.mark.parametrize("kind", CASES)
def test_round_trip(tmp_path, kind):
    name, values = CASES[kind]
    read, write = getattr(files, f"read_{kind}"), getattr(files, f"write_{kind}")
    first, second = tmp_path / name, tmp_path / "again" / name
    assert write(first, values) == len(values)
    assert read(first) == values
    write(second, read(first))
    assert second.read_bytes() == first.read_bytes()
    assert [path.name for path in second.parent.iterdir()] == [name]  # no half file is left


# The published forms, written by hand; numbers and order of fields included.
PUBLISHED = {
    "queries": [{"query": "q", "passage": "p"}],
    "candidates": [
        [{"query": "q", "passage": "p", "answer": "a", "new_query": AUGMENTATION_PREFIX + "a"}],
        [{"query": "q", "passage": "p", "answer": "b", "new_query": AUGMENTATION_PREFIX + "b"}],
    ],
    "llamafactory": [
        {
            "conversations": [{"from": "human", "value": "prompt"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
            "chosen_score": 1.2,
            "rejected_score": 1,
        }
    ],
    "augmented": [{"query": "q", "passage": "p", "answer": AUGMENTATION_PREFIX + "a"}],
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_arrays_come_back_equal(tmp_path, kind):
    path = array(tmp_path / "in.json", *PUBLISHED[kind])
    getattr(files, f"write_{kind}")(tmp_path / "out.json", getattr(files, f"read_{kind}")(path))
    assert json.loads((tmp_path / "out.json").read_text()) == PUBLISHED[kind]


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "answer": "a", "pos": ["p"], "neg": ["m", "n"], "neg_answer": ["o"]},
        {
            "query": "q",
            "answer": "a",
            "pos": ["n"],
            "neg": ["p", "m"],
            "neg_answer": [],
            "pos_scores": [1],
            "neg_scores": [1.0, 0.5],
        },
    ],
    ids=["before", "after"],
)
def test_examples_before_and_after_distillation(tmp_path, row):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (example,) = files.read_examples(path)
    assert example.is_distilled == ("pos_scores" in row)
    files.write_examples(path, [example])
    assert json.loads(path.read_text()) == row


def test_preferences_are_columns_of_the_dpo_trainer(tmp_path):
    files.write_preferences(tmp_path / "train.jsonl", PAIRS)
    first = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert list(first) == ["prompt", "chosen", "rejected", "chosen_score", "rejected_score"]


def test_corpus_of_texts(tmp_path):
    path = array(tmp_path / "corpus.json", "Elmton lies on the Mira.", "  ", "A title\nand a text")
    assert files.is_text_array(path)
    found = files.read_corpus_texts(path)
    assert found == [Passage("0", "Elmton lies on the Mira."), Passage("2", "A title\nand a text")]
    files.write_corpus_texts(tmp_path / "out.json", [found[0], Passage("x", "and a text", "A title")])
    assert json.loads((tmp_path / "out.json").read_text()) == ["Elmton lies on the Mira.", "A title\nand a text"]


@pytest.mark.parametrize(
    ("text", "expected"), [('  [\n "a"]', True), ('[{"a": 1}]', False), ("{}", False), ("", False)]
)
def test_text_array_is_told_from_others(tmp_path, text, expected):
    path = tmp_path / "corpus.json"
    path.write_text(text)
    assert files.is_text_array(path) is expected


def test_an_empty_array_is_written(tmp_path):
    assert files.write_queries(tmp_path / "queries.json", []) == 0
    assert files.read_queries(tmp_path / "queries.json") == []


def test_dataset_info(tmp_path):
    published = {
        "mine": {
            "file_name": "train_llamafactory.jsonl",
            "ranking": True,
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "reject_score": "x"},
        }
    }
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps(published))
    assert files.read_dataset_info(path) == published
    both = {**published, "own": files.llamafactory_entry("own.jsonl")}
    files.write_dataset_info(path, both)
    assert files.read_dataset_info(path) == both
    # The names of columns are fields that the data really have.
    files.write_llamafactory(tmp_path / "own.jsonl", PAIRS)
    assert set(both["own"]["columns"].values()) == set(json.loads((tmp_path / "own.jsonl").read_text())[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be an object of entries"),
        ({"a": 1}, "entry 'a': must be an object"),
        ({"a": {"ranking": True}}, "entry 'a': field 'file_name' is missing"),
        ({"a": {"file_name": "x", "columns": []}}, "field 'columns' must be an object"),
    ],
)
def test_bad_dataset_info(tmp_path, content, message):
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        files.read_dataset_info(path)


QUERY = {"query": "q", "passage": "p", "answer": "a", "new_query": "na"}
BAD = [
    ("queries", [{"query": "q"}], "item 1: field 'passage' is missing"),
    ("queries", [{"query": "q", "passage": " "}], "item 1: field 'passage' is empty"),
    ("queries", [{"query": "q", "passage": "p"}, 7], "item 2: must be an object"),
    ("augmented", [{"query": "q", "passage": "p", "answer": 3}], "item 1: field 'answer' must be text, got number 3"),
    ("candidates", [{"query": "q"}], "item 1: must be a list of answers, got an object"),
    ("candidates", [[QUERY], [QUERY, QUERY]], "item 2: has 2 answers, the first item has 1"),
    ("candidates", [[QUERY], [{**QUERY, "query": "other"}]], "item 2: answer 1: its query is not the one"),
    ("candidates", [[QUERY, {"query": "q"}]], "item 1: answer 2: field 'passage' is missing"),
    ("candidates", [["q"]], "item 1: answer 1: must be an object"),
    ("llamafactory", [{**PUBLISHED["llamafactory"][0], "chosen": "good"}], "field 'chosen' must be a turn"),
    ("llamafactory", [{**PUBLISHED["llamafactory"][0], "conversations": []}], "must be a list of one turn"),
    ("llamafactory", [{**PUBLISHED["llamafactory"][0], "chosen_score": True}], "must be a number, got true"),
]


@pytest.mark.parametrize(("kind", "items", "message"), BAD)
def test_bad_items_are_named(tmp_path, kind, items, message):
    path = array(tmp_path / "in.json", *items)
    with pytest.raises(DataError, match=message) as caught:
        getattr(files, f"read_{kind}")(path)
    assert str(caught.value).startswith(str(path))


EXAMPLE = {"query": "q", "answer": "a", "pos": ["p"], "neg": ["m", "n"], "neg_answer": []}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**EXAMPLE, "pos": []}, "line 1: field 'pos' is empty"),
        ({**EXAMPLE, "neg": "m"}, "line 1: field 'neg' must be a list of texts, got text 'm'"),
        ({**EXAMPLE, "neg": [1]}, "field 'neg' must be a list of texts, got number 1 at place 1"),
        ({**EXAMPLE, "pos_scores": [1]}, "field 'neg_scores' is missing"),
        ({**EXAMPLE, "pos_scores": [1], "neg_scores": [0.5]}, "field 'neg_scores' has 1 numbers for 2 passages"),
        ({**EXAMPLE, "pos_scores": ["1"], "neg_scores": [1, 2]}, "field 'pos_scores' must be a list of numbers"),
    ],
)
def test_bad_examples_are_named(tmp_path, row, message):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        files.read_examples(path)


def test_bad_preferences_are_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "p", "chosen": "c", "rejected": "r", "chosen_score": NaN}\n')
    with pytest.raises(DataError, match=r"line 1: field 'chosen_score' must be a number.*'rejected_score' is missing"):
        files.read_preferences(path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON: .* at line 1"), ('{"a": 1}', "must be one JSON array")]
)
def test_no_array(tmp_path, text, message):
    path = tmp_path / "answers.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        files.read_candidates(path)


def test_bad_corpus_items_are_named(tmp_path):
    with pytest.raises(DataError, match="item 2: must be text, got number 3"):
        files.read_corpus_texts(array(tmp_path / "corpus.json", "a", 3))


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        files.read_queries(tmp_path / "queries.json")


def test_ragged_candidates_are_not_written(tmp_path):
    with pytest.raises(DataError, match="got 1 to 2"):
        files.write_candidates(
            tmp_path / "answers.json", [[candidate("a", 0)], [candidate("b", 0), candidate("b", 1)]]
        )
    assert not (tmp_path / "answers.json").exists()


def test_teacher_may_replace_the_source_passage():
    example = RetrieverExample("q", "a", ("source",), ("b", "c", "d"), ("x",))
    found = example.reordered([2, 1, 0, 3])
    assert (found.pos, found.neg) == (("c",), ("b", "source", "d"))
    assert (found.pos_scores, found.neg_scores) == ((1.0,), (1 / 2, 1 / 3, 1 / 4))
    assert found.neg_answer == ("x",)
    kept = example.reordered([2, 1, 0, 3], keep_source=True)
    assert (kept.pos, kept.neg) == (("source",), ("c", "b", "d"))


@pytest.mark.parametrize("order", [[0, 1], [0, 0, 1], [1, 2, 3]])
def test_an_order_names_each_passage_once(order):
    with pytest.raises(ValueError, match="each of 3 passages once"):
        RetrieverExample("q", "a", ("p",), ("m", "n")).reordered(order)


def test_scores_fit_the_passages():
    with pytest.raises(ValueError, match="neg_scores has 1 numbers for 2 passages"):
        RetrieverExample("q", "a", ("p",), ("m", "n"), (), (1.0,), (0.5,))
