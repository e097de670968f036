from __future__ import annotations

import json

import pytest

from rag_rl.data.corpus import load_corpus
from rag_rl.data.multihop import detect_kind, read_multihop
from rag_rl.data.questions import load_questions
from rag_rl.errors import ConfigError, DataError

HOTPOT = {
    "_id": "h1",
    "question": "Which band?",
    "answer": "Rush",
    "type": "bridge",
    "level": "hard",
    "context": [
        ["Nobody's Hero", ["A song by Rush,", " released in 1994."]],
        ["Neil Peart", ["A drummer.", " In the Hall of Fame."]],
        ["Empty", []],
        ["Yes", ["Another band."]],
    ],
    "supporting_facts": [["Neil Peart", 1], ["Nobody's Hero", 0], ["Neil Peart", 9]],
}
TWOWIKI = {
    "_id": "w1",
    "question": "Same country?",
    "answer": "no",
    "answer_aliases": ["No.", "no"],
    "type": "comparison",
    "context": [["A", ["A film.", "By X."]], ["B", ["Another film."]], ["X", ["X is Czech."]]],
    "supporting_facts": [["A", 1], ["X", 0]],
    "evidences": [["A", "director", "X"], ["X", "country", "Czechia"]],
}
MUSIQUE = {
    "id": "2hop__1_2",
    "question": "Who led the publisher?",
    "answer": "G. Hall",
    "answer_aliases": ["Hall"],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "Hall", "paragraph_text": "Hall led the APA.", "is_supporting": True},
        {"idx": 1, "title": "Noise", "paragraph_text": "Nothing.", "is_supporting": False},
        {"idx": 2, "title": "Journal", "paragraph_text": "Published by the APA.", "is_supporting": True},
    ],
    "question_decomposition": [
        {"id": 1, "question": "Publisher?", "answer": "APA", "paragraph_support_idx": 2},
        {"id": 2, "question": "Who led #1 ?", "answer": "G. Hall", "paragraph_support_idx": 0},
    ],
}


def write(path, rows, form):
    path.write_text(json.dumps(rows) if form == "array" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["array", "lines"])
def test_hotpotqa(tmp_path, form):
    passages, [question] = read_multihop(write(tmp_path / "h.json", [HOTPOT], form))
    assert [(p.title, p.text) for p in passages] == [
        ("Nobody's Hero", "A song by Rush, released in 1994."),
        ("Neil Peart", "A drummer. In the Hall of Fame."),
        ("Yes", "Another band."),
    ]
    hero, peart, other = (p.doc_id for p in passages)
    assert (question.qid, question.answers, question.gold_doc_ids, question.hops) == (
        "h1",
        ("Rush",),
        (peart, hero),
        2,
    )
    assert question.meta == {
        "type": "bridge",
        "level": "hard",
        "context_doc_ids": [hero, peart, other],
        "supporting_facts": [
            {"doc_id": peart, "title": "Neil Peart", "sent_idx": 1, "sentence": "In the Hall of Fame."},
            {"doc_id": hero, "title": "Nobody's Hero", "sent_idx": 0, "sentence": "A song by Rush,"},
            {"doc_id": peart, "title": "Neil Peart", "sent_idx": 9, "sentence": None},
        ],
    }


def test_the_form_of_the_hub_is_the_same(tmp_path):
    hub = {
        **{name: value for name, value in HOTPOT.items() if name != "_id"},
        "id": "h1",
        "context": {"title": [t for t, _ in HOTPOT["context"]], "sentences": [s for _, s in HOTPOT["context"]]},
        "supporting_facts": {
            "title": [t for t, _ in HOTPOT["supporting_facts"]],
            "sent_id": [i for _, i in HOTPOT["supporting_facts"]],
        },
    }
    original = read_multihop(write(tmp_path / "a.json", [HOTPOT], "array"))
    assert read_multihop(write(tmp_path / "b.jsonl", [hub], "lines")) == original


def test_twowiki(tmp_path):
    passages, [question] = read_multihop(write(tmp_path / "w.json", [TWOWIKI], "array"))
    assert passages[0].text == "A film. By X."
    assert passages[0].doc_id.startswith("tw-")
    assert question.answers == ("no", "No.")
    assert question.gold_doc_ids == (passages[0].doc_id, passages[2].doc_id)
    assert question.meta["evidences"] == TWOWIKI["evidences"]


def test_musique(tmp_path):
    passages, [question] = read_multihop(write(tmp_path / "m.jsonl", [MUSIQUE], "lines"))
    hall, noise, journal = (p.doc_id for p in passages)
    assert question.answers == ("G. Hall", "Hall")
    assert question.gold_doc_ids == (hall, journal)
    assert question.hops == 2
    assert question.meta == {
        "type": "2hop",
        "context_doc_ids": [hall, noise, journal],
        "decomposition": [
            {"question": "Publisher?", "answer": "APA", "gold_doc_id": journal},
            {"question": "Who led #1 ?", "answer": "G. Hall", "gold_doc_id": hall},
        ],
    }


def test_unanswerable_rows_give_passages_only(tmp_path, caplog):
    twin = {**MUSIQUE, "answerable": False, "answer": "", "paragraphs": MUSIQUE["paragraphs"][:2]}
    extra = {"idx": 2, "title": "New", "paragraph_text": "New text.", "is_supporting": False}
    twin["paragraphs"] = [*twin["paragraphs"], extra]
    passages, questions = read_multihop(write(tmp_path / "m.jsonl", [MUSIQUE, twin], "lines"))
    assert [p.title for p in passages] == ["Hall", "Noise", "Journal", "New"]
    assert len(questions) == 1
    assert "1 unanswerable questions are left out" in caplog.text


def test_passages_are_shared_and_their_ids_do_not_depend_on_the_file(tmp_path):
    second = {
        **HOTPOT,
        "_id": "h2",
        "context": [["Yes", ["Another band."]], ["Yes", ["Another text."]]],
        "supporting_facts": [["Yes", 0]],
    }
    both, questions = read_multihop(write(tmp_path / "a.json", [HOTPOT, second], "array"))
    assert len(both) == len({p.doc_id for p in both}) == 4
    alone, _ = read_multihop(write(tmp_path / "b.json", [second], "array"))
    assert alone[0] == both[2]
    # A title that stands there twice: the first is meant.
    assert questions[1].gold_doc_ids == (alone[0].doc_id,)
    # The corpus loader streams the same passages, the question loader the same questions.
    assert list(load_corpus(tmp_path / "a.json")) == both
    assert load_questions(tmp_path / "a.json") == questions


def test_gold_that_is_not_in_the_context_is_counted(tmp_path, caplog):
    row = {**HOTPOT, "supporting_facts": [["Yes", 0], ["Absent", 0]]}
    _, [question] = read_multihop(write(tmp_path / "h.json", [row], "array"))
    assert len(question.gold_doc_ids) == 1
    assert question.hops == 2
    assert question.meta["missing_gold_titles"] == ["Absent"]
    assert "1 questions have a supporting title that is not in their context" in caplog.text


@pytest.mark.parametrize(
    ("row", "trouble"),
    [
        ({**HOTPOT, "answer": None}, "field 'answer' must be text, got null"),
        ({**HOTPOT, "question": ""}, "field 'question' is empty"),
        ({**HOTPOT, "context": []}, "field 'context' is empty"),
        (
            {**HOTPOT, "context": [["A", "text"]]},
            r"must hold \[title, \[sentence, ...\]\] pairs, got text 'text' under 'A'",
        ),
        ({**HOTPOT, "context": [["A"]]}, r"field 'context' must hold \[title, ...\] pairs, got a list"),
        (
            {**HOTPOT, "context": {"title": ["A"], "sentences": []}},
            "field 'context' must hold 'title' and 'sentences'",
        ),
        ({**HOTPOT, "supporting_facts": [["Yes", "0"]]}, r"must hold \[title, sentence number\] pairs, got text '0'"),
        ({**HOTPOT, "supporting_facts": "Yes"}, "field 'supporting_facts' must be a list of pairs, got text 'Yes'"),
        ({k: v for k, v in HOTPOT.items() if k != "_id"}, "field '_id' is missing"),
        ({k: v for k, v in MUSIQUE.items() if k != "answer"}, "field 'answer' is missing"),
        (
            {**MUSIQUE, "paragraphs": [{"idx": 0, "title": "x"}]},
            "holds a bad paragraph: field 'paragraph_text' is missing",
        ),
        ({**MUSIQUE, "paragraphs": []}, "field 'paragraphs' is empty"),
        ({**MUSIQUE, "paragraphs": ["x"]}, "field 'paragraphs' must be a list of objects"),
        (
            {**MUSIQUE, "paragraphs": MUSIQUE["paragraphs"][:2]},
            "holds a bad step: field 'paragraph_support_idx' names paragraph 2, which is not among 'paragraphs'",
        ),
    ],
)
def test_bad_rows(tmp_path, row, trouble):
    kind = "musique" if "paragraphs" in row else "hotpotqa"
    good = {**(MUSIQUE if kind == "musique" else HOTPOT), "id": "other", "_id": "other"}
    for form, unit in [("array", "item"), ("lines", "line")]:
        with pytest.raises(DataError, match=f"1 bad row: {unit} 2: .*{trouble}"):
            read_multihop(write(tmp_path / "x.json", [good, row], form), kind)


def test_other_trouble(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(DataError, match="item 2: id 'h1' is already on item 1"):
        read_multihop(write(path, [HOTPOT, HOTPOT], "array"))
    with pytest.raises(DataError, match="item 1: has neither 'context'"):
        read_multihop(write(path, [{"doc_id": "a", "text": "x"}], "array"))
    with pytest.raises(DataError, match="the file holds no rows"):
        read_multihop(write(path, [], "array"))
    with pytest.raises(ConfigError, match="kind must be one of hotpotqa, 2wiki, musique, got 'squad'"):
        read_multihop(path, "squad")


def test_kinds_are_recognised():
    assert [detect_kind(row) for row in (HOTPOT, TWOWIKI, MUSIQUE)] == ["hotpotqa", "2wiki", "musique"]
    assert detect_kind({"qid": "1", "question": "?", "answers": [], "context": "SQuAD has a text here"}) is None
    assert detect_kind({"qid": "1", "question": "?", "answers": []}) is None


def test_real_rows_rebuilt_into_the_native_form(data_root, tmp_path):
    # The data folder holds converted rows: put its MuSiQue questions back into the release's form and read them.
    documents = {p.doc_id: p for p in load_corpus(data_root / "musique")}
    questions = load_questions(data_root / "musique" / "train.jsonl")
    rows = []
    for question in questions:
        place = {doc_id: i for i, doc_id in enumerate(question.meta["context_doc_ids"])}
        paragraphs = [
            {
                "idx": i,
                "title": documents[d].title,
                "paragraph_text": documents[d].text,
                "is_supporting": d in question.gold_doc_ids,
            }
            for d, i in place.items()
        ]
        steps = [
            {"question": hop["question"], "answer": hop["answer"], "paragraph_support_idx": place[hop["gold_doc_id"]]}
            for hop in question.meta["decomposition"]
        ]
        rows.append({
            "id": question.qid, "question": question.question, "answer": question.answers[0],
            "answer_aliases": list(question.answers[1:]), "answerable": True, "paragraphs": paragraphs,
            "question_decomposition": steps,
        })  # fmt: skip
    passages, again = read_multihop(write(tmp_path / "m.jsonl", rows, "lines"))
    text_of = {p.doc_id: (p.title, p.text) for p in passages}
    for old, new in zip(questions, again, strict=True):
        assert (old.qid, old.question, old.answers, old.hops) == (new.qid, new.question, new.answers, new.hops)
        assert [text_of[d] for d in new.gold_doc_ids] == [
            (documents[d].title, documents[d].text) for d in old.gold_doc_ids
        ]
        assert [text_of[h["gold_doc_id"]] for h in new.meta["decomposition"]] == [
            (documents[h["gold_doc_id"]].title, documents[h["gold_doc_id"]].text) for h in old.meta["decomposition"]
        ]
