"""How the tiny encoder is made: its shape, its pairs, and that a run of it leaves a usable folder."""

from __future__ import annotations

import json
import random

import pytest

from rag_rl.tiny.world import draw_world

torch = pytest.importorskip("torch", reason="torch is not installed")
from rag_rl.tiny import make_encoder  # noqa: E402 - it needs torch


def test_a_new_encoder_is_small_seeded_and_of_unit_length(tmp_path):
    encoders = [make_encoder.new_encoder(tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2))]
    assert sum(p.numel() for p in encoders[0].parameters()) <= 500_000
    one, same, other = (e.encode(["Elmton lies on the Mira.", "Who rules Elmton?"]) for e in encoders)
    assert one.shape == (2, 96)
    assert (one**2).sum(axis=1) == pytest.approx([1.0, 1.0], abs=1e-5)
    assert (one == same).all()
    assert not (one == other).all()
    assert encoders[0].tokenizer.padding_side == "right"
    assert encoders[0].max_seq_length == 256


def test_padding_does_not_change_a_vector(tmp_path):
    encoder = make_encoder.new_encoder(tmp_path, seed=1)
    texts = ["Who rules Elmton?", "Falwyn lives in Elmton. The guild of Falwyn is Harhold. Falwyn works as a miller."]
    alone = [encoder.encode([text])[0] for text in texts]
    for one, together in zip(alone, encoder.encode(texts), strict=True):
        assert together == pytest.approx(one, abs=1e-5)


def test_pairs_have_one_question_a_passage():
    world = draw_world(5, region="train", sizes=make_encoder.SIZES, rival_share=0.5)
    for seed in range(10):
        pairs = make_encoder.pairs(world, random.Random(seed), 12)
        assert len(pairs) == 12
        assert len({passage for _, passage in pairs}) == 12, "a negative must never be somebody's own passage"
        for question, passage in pairs:
            (subject,) = [name for name in world.entities if name in question]
            assert passage == world.entities[subject].text
    assert len(make_encoder.pairs(world, random.Random(0), 10_000)) == len(world.entities)


def test_a_state_reads_as_the_retriever_writes_it():
    from rag_rl.retrieval.history import render_state
    from rag_rl.types import Query

    question, first, bridge = "Which river is the home of Falbert on?", "Where does Falbert live?", "Elmton"
    assert make_encoder.state_text(question, first) == render_state(Query(first, question))
    later = Query("Which river is it?", question, ((first, bridge),))
    assert make_encoder.state_text(question, later.text, f"{first} {bridge}") == render_state(later)


def test_states_come_with_the_passage_that_they_need_unless_hasty():
    world = draw_world(5, region="train", sizes=make_encoder.SIZES, rival_share=0.5)
    for hasty in (0.0, 1.0):
        second = 0
        for seed in range(10):
            found = make_encoder.state_pairs(world, random.Random(seed), 12, hasty=hasty)
            assert len(found) == 12
            assert len({passage for _, passage in found}) == 12
            for text, passage in found:
                history = [line for line in text.split("\n") if line.startswith("History: ")]
                (start,) = [name for name in world.entities if name in text.split("\n")[0]]
                bridge = history[0].rsplit(" ", 1)[1] if history else start
                assert passage == world.entities[start if hasty else bridge].text
                second += bool(history)
        assert 60 < second < 120


def test_recall_of_second_hops_grows_with_the_cut_off(tmp_path):
    encoder = make_encoder.new_encoder(tmp_path, seed=1)
    found = [make_encoder.state_recall(encoder, k=k) for k in (1, 20, 280)]
    assert found == sorted(found)
    assert found[0] < 0.5
    assert found[-1] == 1.0


def test_recall_counts_first_gold_passages(tmp_path):
    encoder = make_encoder.new_encoder(tmp_path, seed=1)
    found = [make_encoder.recall(encoder, hops=1, k=k) for k in (1, 20, 280)]
    assert found == sorted(found)
    assert found[0] < 0.9
    assert found[-1] == 1.0


def test_a_short_run_learns_something_and_can_be_opened(tmp_path, monkeypatch, capsys):
    from sentence_transformers import SentenceTransformer

    monkeypatch.setattr(make_encoder, "recall", lambda encoder, *, hops, k: 0.5)
    monkeypatch.setattr(make_encoder, "state_recall", lambda encoder, *, k: 0.25)
    make_encoder.make_encoder(tmp_path / "e", steps=2, seed=4)
    record = json.loads((tmp_path / "e" / "record.json").read_text(encoding="utf-8"))
    assert (record["steps"], record["seed"]) == (2, 4)
    assert record["curve"][-1]["recall@3_2hop"] == 0.5
    assert record["curve"][-1]["recall@30_second_hop"] == 0.25
    assert record["curve"][-1] == json.loads(capsys.readouterr().out.splitlines()[-1])
    opened = SentenceTransformer(str(tmp_path / "e"), device="cpu")
    fresh = make_encoder.new_encoder(tmp_path / "fresh", seed=4)
    text = ["Who rules Elmton?"]
    assert opened.encode(text).shape == (1, 96)
    assert opened.encode(text)[0] != pytest.approx(fresh.encode(text)[0], abs=1e-4)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
