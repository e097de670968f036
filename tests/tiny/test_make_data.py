"""The packaged corpus and questions are those that the code makes, and the loaders read them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rag_rl.data import load_corpus, load_questions
from rag_rl.tiny import FOLDER, make_data

FILES = [
    "corpus.jsonl", "demo_1hop.jsonl", "demo_2hop.jsonl", "demo_keywords.jsonl", "heldout_1hop.jsonl",
    "heldout_2hop.jsonl", "heldout_keywords.jsonl",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_data", "--out", str(folder)])
        make_data.main()
    return folder


def test_the_same_files_are_made(made):
    assert sorted(p.name for p in made.iterdir()) == sorted(p.name for p in (FOLDER / "data").iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
def test_packaged_files_are_made_again_byte_for_byte(made, name):
    assert (made / name).read_bytes() == (FOLDER / "data" / name).read_bytes()


def test_packaged_files_load_and_agree():
    passages = list(load_corpus(str(FOLDER / "data" / "corpus.jsonl")))
    known = {p.doc_id for p in passages}
    assert len(known) == len(passages) == 2 * sum(make_data.SIZES.values())
    for name in FILES[1:]:
        questions = load_questions(str(FOLDER / "data" / name))
        assert len(questions) >= 800
        assert len({q.qid for q in questions}) == len(questions)
        for question in questions:
            assert set(question.gold_doc_ids) <= known
            assert len(question.gold_doc_ids) == question.hops == (2 if "2hop" in name else 1)
            assert question.gold_doc_ids[0].startswith(name.split("_")[0])


def test_the_two_worlds_share_no_entity_and_no_question():
    demo, heldout = make_data.demo_worlds()
    assert not set(demo.entities) & set(heldout.entities)
    asked = {
        region: {q.question for n in (1, 2) for q in load_questions(str(FOLDER / "data" / f"{region}_{n}hop.jsonl"))}
        for region in ("demo", "heldout")
    }
    assert not asked["demo"] & asked["heldout"]
