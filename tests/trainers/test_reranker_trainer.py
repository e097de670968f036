"""The reranker's trainer: what each epoch is trained on, resume, evaluation on whole lists."""

from __future__ import annotations

import pytest
import torch

from rag_rl.data import PairRow, PairSampler
from rag_rl.errors import ConfigError, RagRLError
from rag_rl.tiny import FOLDER
from rag_rl.trainers import reranker_trainer
from rag_rl.trainers.cross_encoder_adapters import add_lora, load_cross_encoder
from rag_rl.trainers.reranker_config import RerankerConfig
from rag_rl.trainers.reranker_trainer import ListEvaluator, RerankerTrainer, ranking_scores, score_lists
from rag_rl.types import Passage

START = str(FOLDER / "encoder")
LISTS = [
    ("Where does Mira live?", ["Mira lives in Elm.", "Tom lives in Oak.", "Elm lies low."], [1.0, 0.0, 0.0]),
    ("Who lives in Oak?", ["Elm lies low.", "Tom lives in Oak."], [0.0, 1.0]),
    ("Nothing to rank?", ["Elm lies low."], [1.0]),
]


def rows(count: int = 8) -> list[PairRow]:
    return [
        PairRow(
            f"Where does number {i} live?",
            (Passage("p", f"Number {i} lives in house {i}."),),
            tuple(Passage(f"n{j}", f"Number {i} once met {j}.") for j in range(6)),
        )
        for i in range(count)
    ]


class Noted:
    """Remembers what was drawn."""

    def __init__(self, sampler: PairSampler) -> None:
        self.sampler, self.drawn = sampler, []

    def __len__(self) -> int:
        return len(self.sampler)

    def draw(self, number, epoch):
        found = self.sampler.draw(number, epoch)
        self.drawn.append((number, epoch, *map(str, found)))
        return found


def trainer_of(folder, *, lora=False, quantized=False, evaluator=None, **options) -> RerankerTrainer:
    torch.manual_seed(0)
    model = load_cross_encoder(START, device="cpu", quantized=quantized)
    if lora:
        add_lora(model, r=2, alpha=4)
    args = RerankerConfig(
        output_dir=str(folder),
        **{
            "max_steps": 5,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "save_steps": 3,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "num_negatives": 2,
            "disable_tqdm": True,
            **options,
        },
    )
    pairs = Noted(PairSampler(rows(), negatives=2, hard_share=0.5, seed=3))
    return RerankerTrainer(model=model, args=args, pairs=pairs, evaluator=evaluator)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resumed_it_draws_and_ends_as_if_it_had_not_been_stopped(tmp_path, lora):
    # 8 rows, 4 a step: an epoch has 2 steps, and step 3 is in the middle of the second one.
    whole = trainer_of(tmp_path / "whole", lora=lora)
    whole.train()
    assert [epoch for _, epoch, *_ in whole.pairs.drawn] == [0] * 8 + [1] * 8 + [2] * 4
    by_epoch = [{d[0]: d[3] for d in whole.pairs.drawn if d[1] == epoch} for epoch in (0, 1)]
    assert by_epoch[0] != by_epoch[1]

    resumed = trainer_of(tmp_path / "resumed", lora=lora)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 5
    assert resumed.pairs.drawn == whole.pairs.drawn[12:]
    weights, again = (dict(t.model.named_parameters()) for t in (whole, resumed))
    for name, weight in weights.items():
        torch.testing.assert_close(again[name], weight, msg=name)


def test_an_adapter_over_a_quantised_body_resumes(tmp_path):
    whole = trainer_of(tmp_path / "whole", lora=True, quantized=True)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", lora=True, quantized=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    trained = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
    again = dict(resumed.model.named_parameters())
    for name, weight in trained.items():
        torch.testing.assert_close(again[name], weight, msg=name, rtol=1e-3, atol=1e-4)


def test_an_adapter_of_another_shape_is_not_loaded(tmp_path):
    trainer_of(tmp_path / "whole", lora=True, max_steps=3).train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "adapter_model.safetensors")
    weights["base_model.model.nowhere.lora_A.weight"] = torch.zeros(2, 2)
    save_file(weights, checkpoint / "adapter_model.safetensors")
    with pytest.raises(RagRLError, match=r"its adapter does not fit the model, first at .*nowhere"):
        trainer_of(tmp_path / "resumed", lora=True).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("loss_type", ["margin", "ranknet", "listnet", "lambda"])
def test_every_loss_trains(tmp_path, loss_type):
    trainer = trainer_of(tmp_path, loss_type=loss_type, max_steps=8, save_strategy="no", learning_rate=3e-3)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert any(not p.equal(before[name]) for name, p in trainer.model.named_parameters())


def test_a_type_error_of_the_loss_is_seen(tmp_path):
    trainer = trainer_of(tmp_path)
    calls = []

    class Broken(torch.nn.Module):
        model = trainer.model

        def forward(self, *args, **kwargs):
            calls.append(kwargs)
            raise TypeError("a mistake in the loss")

    trainer.loss = Broken()
    with pytest.raises(TypeError, match="a mistake in the loss"):
        trainer.train()
    assert len(calls) == 1


def test_a_batch_larger_than_the_data(tmp_path):
    with pytest.raises(ConfigError, match="a batch takes 16 queries, there are 8 to train on"):
        trainer_of(tmp_path, per_device_train_batch_size=16)


# ---- evaluation


def test_scores_of_a_list_worked_by_hand():
    found = ranking_scores([3.0, 1.0, 2.0, 1.0], [1, 1, 0, 0])
    # Pairs: 3-2, 3-1, 1-2, 1-1. Order: 3, 2, then of the equal ones the negative, then the positive.
    assert found["pairwise_accuracy"] == (1 + 1 + 0 + 0.5) / 4
    assert found["mean_margin"] == (1 + 2 - 1 + 0) / 4
    assert found["mrr@10"] == 1.0
    ideal = 1 + 1 / 1.584962500721156
    assert found["ndcg@10"] == pytest.approx((1 + 1 / 2.321928094887362) / ideal)


def test_what_tells_nothing_apart_earns_nothing():
    found = ranking_scores([0.0] * 12, [1] + [0] * 11)
    assert (found["pairwise_accuracy"], found["mrr@10"], found["ndcg@10"]) == (0.5, 0.0, 0.0)
    assert ranking_scores([1.0, 2.0], [1, 1]) == ranking_scores([1.0], [0]) == {}


def test_lists_are_scored_as_the_model_scores_pairs():
    torch.manual_seed(0)
    model = load_cross_encoder(START, device="cpu")
    scores = score_lists(model, [(query, texts) for query, texts, _ in LISTS], batch_size=2)
    assert [len(part) for part in scores] == [3, 2, 1]
    expected = model.predict([(LISTS[1][0], text) for text in LISTS[1][1]], activation_fn=torch.nn.Identity())
    assert scores[1] == pytest.approx(expected.tolist(), abs=1e-5)
    found = ListEvaluator(LISTS)(model)
    rows_ = [ranking_scores(part, labels) for part, (_, _, labels) in zip(scores[:2], LISTS[:2], strict=True)]
    assert found == pytest.approx({name: (rows_[0][name] + rows_[1][name]) / 2 for name in rows_[0]}, abs=1e-5)
    assert score_lists(model, [("nothing", [])], batch_size=2) == [[]]


def test_scores_that_are_no_numbers_stop_it():
    model = load_cross_encoder(START, device="cpu")
    with torch.no_grad():
        model.transformers_model.classifier.bias.fill_(float("nan"))
    with pytest.raises(RagRLError, match="not numbers for 3 of 3 pairs, first for 'Where does Mira live\\?'"):
        score_lists(model, [LISTS[0][:2]], batch_size=2)


def test_nothing_to_rank():
    with pytest.raises(ConfigError, match="no held-out query has both a positive and a negative"):
        ListEvaluator(LISTS[2:])


def test_validation_is_the_same_in_every_epoch_and_after_resume(tmp_path, monkeypatch):
    asked = []

    def noted(model, lists, **options):
        asked.append([(query, list(texts)) for query, texts in lists])
        return score_lists(model, lists, **options)

    monkeypatch.setattr(reranker_trainer, "score_lists", noted)
    often = {"eval_strategy": "steps", "eval_steps": 1}
    whole = trainer_of(tmp_path / "whole", evaluator=ListEvaluator(LISTS), **often)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", evaluator=ListEvaluator(LISTS), **often)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    # Five steps in three epochs, and two more after the resume; a list without negatives is never asked.
    assert asked == [[(query, texts) for query, texts, _ in LISTS[:2]]] * 7
    logged, again = (
        [entry for entry in trainer.state.log_history if "eval_ndcg@10" in entry] for trainer in (whole, resumed)
    )
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4, 5]
    assert len({entry["eval_mean_margin"] for entry in logged}) == 5, "the model learns, and only the model changes"
    for one, other in zip(logged, again, strict=True):
        assert other["eval_mean_margin"] == pytest.approx(one["eval_mean_margin"], rel=1e-4)
    assert logged[0].keys() >= {"eval_pairwise_accuracy", "eval_mean_margin", "eval_mrr@10", "eval_ndcg@10"}
