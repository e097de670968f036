"""How the start of tiny cross-encoders is made: its lists, its measure, and that a run of it leaves a folder."""

from __future__ import annotations

import json
import random

import pytest

from rag_rl.tiny import FOLDER
from rag_rl.tiny.world import draw_world

torch = pytest.importorskip("torch", reason="torch is not installed")
from rag_rl.tiny import make_cross_encoder  # noqa: E402 - it needs torch


@pytest.fixture(scope="module")
def world():
    return draw_world(5, region="train", sizes=make_cross_encoder.SIZES, rival_share=0.5, alike_in="either")


def test_a_list_has_one_right_passage_and_mostly_others_of_its_kind(world):
    kind_of = {entity.text: entity.kind for entity in world.entities.values()}
    found = make_cross_encoder.lists(world, random.Random(1), 20)
    assert len(found) == 20
    for question, texts in found:
        (subject,) = [name for name in world.entities if name in question]
        assert texts[0] == world.entities[subject].text
        assert len(set(texts)) == 8
        alike = [kind_of[text] == kind_of[texts[0]] for text in texts[1:]]
        assert (sum(alike), len(alike)) == (5, 7)


def test_what_tells_nothing_apart_ranks_the_right_one_last(world):
    asked = make_cross_encoder.lists(world, random.Random(1), 3)

    class Equal:
        def predict(self, pairs, **options):
            return torch.zeros(len(pairs))

    class Knowing:
        def predict(self, pairs, **options):
            right = {(question, texts[0]) for question, texts in asked}
            return torch.tensor([float(pair in right) for pair in pairs])

    assert make_cross_encoder.ndcg(Equal(), asked) == pytest.approx(0.31546487678572877)  # 1 / log2(9)
    assert make_cross_encoder.ndcg(Knowing(), asked) == 1.0


def test_a_new_one_is_small_seeded_and_reads_all_tokens():
    pair = [("Who rules Elmton?", "Elmton is ruled by Mira.")]
    models = [make_cross_encoder.new_cross_encoder(FOLDER / "encoder", seed=seed) for seed in (1, 1, 2)]
    one, same, other = (model.predict(pair, show_progress_bar=False)[0] for model in models)
    assert one == same != other
    assert sum(p.numel() for p in models[0].parameters()) <= 500_000
    assert models[0].transformers_model.config.classifier_pooling == "mean"


def test_a_short_run_leaves_a_cross_encoder(tmp_path):
    from sentence_transformers import CrossEncoder

    make_cross_encoder.make_cross_encoder(tmp_path / "out", steps=2)
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [point["step"] for point in record["curve"]] == [2]
    assert 0.0 < record["curve"][0]["ndcg@10"] < 1.0
    plain = CrossEncoder(str(tmp_path / "out"), device="cpu")
    assert plain.num_labels == 1
    assert plain.transformers_model.config.classifier_pooling == "mean"
