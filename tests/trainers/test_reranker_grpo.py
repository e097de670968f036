"""Reinforced reranking: sampled orders, their rewards, and what a step makes of them."""

from __future__ import annotations

import pytest
import torch

from rag_rl.data import PairRow, PairSampler
from rag_rl.errors import ConfigError, DataError
from rag_rl.reasoning import DecompositionReader, Environment, Finish, SingleSearch, retrieval_reward
from rag_rl.tiny import FOLDER
from rag_rl.trainers.cross_encoder_adapters import load_cross_encoder
from rag_rl.trainers.reranker_grpo import (
    GivenHits,
    NDCGReward,
    Order,
    PlayedReward,
    RerankerGRPOConfig,
    RerankerGRPOTrainer,
    supervised_start,
)
from rag_rl.trainers.reranker_trainer import ListEvaluator
from rag_rl.types import Passage, Query, Question

START = str(FOLDER / "encoder")
LISTS = [
    (
        f"Where does number {i} live?",
        [f"Number {i} once met {j}." for j in range(3 + i % 2)] + [f"Number {i} lives in house {i}."],
        [0.0] * (3 + i % 2) + [1.0],
    )
    for i in range(8)
]


def trainer_of(folder, *, reward=None, lists=LISTS, top_k=2, **options) -> RerankerGRPOTrainer:
    torch.manual_seed(0)
    model = load_cross_encoder(START, device="cpu")
    args = RerankerGRPOConfig(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "num_generations": 8,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        },
    )
    return RerankerGRPOTrainer(
        model=model, args=args, lists=lists, reward=reward or NDCGReward(LISTS, k=2), top_k=top_k
    )


class Noted:
    """A reward that remembers the orders."""

    def __init__(self, values=None) -> None:
        self.reward, self.values, self.orders = NDCGReward(LISTS, k=2), values, []

    def __call__(self, orders):
        self.orders.append(list(orders))
        return self.reward(orders) if self.values is None else self.values(orders)


def history(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_ndcg_of_an_order_worked_by_hand():
    lists = [("q", ["a", "b", "c"], [1.0, 0.0, 1.0]), ("r", ["a"], [0.0])]
    reward = NDCGReward(lists, k=2)
    second = 1 / 1.584962500721156
    found = reward([Order(0, (0, 2)), Order(0, (1, 2)), Order(0, (1,)), Order(1, (0,))])
    assert found == [1.0, pytest.approx(second / (1 + second)), 0.0, None]
    with pytest.raises(ConfigError, match="k must be at least 1, got 0"):
        NDCGReward(lists, k=0)


# ---- rewards of an environment

ASKED = [
    Question(
        "q0",
        "Where does Mira live?",
        ("Elm",),
        ("a",),
        meta={"decomposition": [{"question": "Where does Mira live?", "answer": "Elm", "gold_doc_id": "a"}]},
    ),
    Question(
        "q1",
        "Who?",
        ("Tom",),
        ("c",),
        meta={"decomposition": [{"question": "Who?", "answer": "Tom", "gold_doc_id": "c"}]},
    ),
]
FOUND = [[Passage("b", "Nothing."), Passage("a", "Mira lives in Elm.")], [Passage("c", "Tom."), Passage("d", "Tim.")]]


def test_the_reader_is_shown_what_was_picked():
    reward = PlayedReward(Environment(DecompositionReader(), max_hops=1), ASKED, FOUND)
    orders = [Order(0, (0,)), Order(0, (1,)), Order(1, (1, 0)), Order(0, (0,))]
    assert reward(orders) == [0.0, 1.0, 1.0, 0.0]


def test_an_order_that_is_sampled_twice_is_played_once():
    played = []

    def noted(trajectory) -> float:
        played.append([hit.passage.doc_id for hit in trajectory.hops[0].hits])
        return float(len(played))

    reward = PlayedReward(Environment(SingleSearch(), max_hops=1, reward=noted), ASKED, FOUND)
    assert reward([Order(0, (1, 0)), Order(1, (0,)), Order(0, (1, 0)), Order(0, (0, 1))]) == [1.0, 2.0, 1.0, 3.0]
    assert played == [["a", "b"], ["c"], ["b", "a"]]


def test_judged_documents_reward_an_order_without_a_reader():
    reward = PlayedReward(Environment(SingleSearch(), max_hops=1, reward=retrieval_reward("ndcg")), ASKED, FOUND)
    assert reward([Order(0, (1, 0)), Order(0, (0, 1)), Order(1, (1,))]) == [1.0, pytest.approx(0.63092975), 0.0]


class Restless(SingleSearch):
    """Stops for one question of two."""

    def decide(self, trajectories):
        return [Finish("no"), *super().decide(trajectories[1:])]


def test_a_reader_that_does_not_search_once():
    with pytest.raises(ConfigError, match="searches once for each question: it made 1 searches for 2 questions"):
        PlayedReward(Environment(Restless(), max_hops=1), ASKED, FOUND)([Order(0, (0,)), Order(1, (0,))])
    assert [hits[0].rank for hits, _ in GivenHits(FOUND).retrieve([Query("a"), Query("b")])] == [1, 1]


# ---- supervised start


def pairs() -> PairSampler:
    rows = [
        PairRow(query, (Passage("p", texts[-1]),), tuple(Passage(f"n{i}", text) for i, text in enumerate(texts[:-1])))
        for query, texts, _ in LISTS
    ]
    return PairSampler(rows, negatives=3, hard_share=1.0, seed=1)


def test_a_supervised_start_is_taught_by_labels(tmp_path):
    trainer = trainer_of(tmp_path, start_steps=12, start_learning_rate=2e-3, num_negatives=3)
    before = ListEvaluator(LISTS)(trainer.model)
    supervised_start(trainer.model, pairs(), trainer.args)
    after = ListEvaluator(LISTS)(trainer.model)
    assert after["mean_margin"] > before["mean_margin"] + 0.5
    assert after["ndcg@10"] > before["ndcg@10"]
    assert list(tmp_path.iterdir()) == [], "it leaves nothing that could be taken for a checkpoint"


@pytest.mark.parametrize(("steps", "resumed"), [(0, False), (12, True)])
def test_without_steps_or_after_a_resume_nothing_is_taught(tmp_path, steps, resumed):
    trainer = trainer_of(tmp_path, start_steps=steps)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    supervised_start(trainer.model, pairs(), trainer.args, resumed=resumed)
    assert all(p.equal(before[name]) for name, p in trainer.model.named_parameters())


# ---- training


def test_it_learns_what_is_rewarded(tmp_path):
    trainer = trainer_of(
        tmp_path, max_steps=12, per_device_train_batch_size=8, learning_rate=2e-3, lr_scheduler_type="constant"
    )
    trainer.train()
    rewards = [entry["reward"] for entry in history(trainer)]
    assert rewards[0] < 0.6
    assert sum(rewards[-3:]) / 3 > 0.9
    assert ListEvaluator(LISTS)(trainer.model)["ndcg@10"] > 0.9
    for entry in history(trainer):
        assert entry.keys() >= {"reward", "frac_reward_zero_std", "unscored", "entropy", "effective_pool"}
        assert 0.999 <= entry["effective_pool"] <= 5.0


def test_the_loss_is_that_of_plain_loops(tmp_path):
    noted = Noted(lambda orders: [float(i % 3) for i, _ in enumerate(orders)])
    trainer = trainer_of(tmp_path, reward=noted, alpha=0.5, scale_rewards="none")
    trainer.get_train_dataloader()
    trainer.model.eval()
    inputs = trainer._prepare_inputs([0, 1, 5])
    loss = trainer.compute_loss(trainer.model, inputs)
    expected, count = 0.0, 0
    with torch.no_grad():
        for number in (0, 1, 5):
            query, texts, _ = LISTS[number]
            scores = torch.tensor(
                trainer.model.predict([(query, t) for t in texts], activation_fn=torch.nn.Identity()).tolist()
            )
            mine = [(i, o) for i, o in enumerate(noted.orders[0]) if o.number == number]
            rewards = [float(i % 3) for i, _ in mine]
            for reward, (_, order) in zip(rewards, mine, strict=True):
                left = list(range(len(texts)))
                log_p = 0.0
                for place in order.places:
                    log_p += float(torch.log_softmax(scores[left] / 0.5, dim=0)[left.index(place)])
                    left.remove(place)
                expected -= (reward - sum(rewards) / len(rewards)) * log_p
                count += 1
    assert loss.item() == pytest.approx(expected / count, abs=1e-4)


@pytest.mark.parametrize("values", [lambda orders: [1.0] * len(orders), lambda orders: [None] * len(orders)])
def test_without_a_difference_there_is_nothing_to_learn(tmp_path, values):
    trainer = trainer_of(tmp_path, reward=values, max_steps=2, weight_decay=0.0)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(p.equal(before[name]) for name, p in trainer.model.named_parameters())
    assert [entry["frac_reward_zero_std"] for entry in history(trainer)] == [1.0, 1.0]


def test_an_order_without_a_score_counts_nowhere(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=1, reward=lambda o: [None, *[float(i % 2) for i in range(len(o) - 1)]])
    trainer.train()
    (entry,) = history(trainer)
    assert entry["unscored"] == pytest.approx(1 / 32)


def test_resumed_it_samples_what_the_whole_run_did(tmp_path):
    whole, again = Noted(), Noted()
    first = trainer_of(tmp_path / "a", reward=whole, save_strategy="steps", save_steps=2)
    first.train()
    resumed = trainer_of(tmp_path / "b", reward=again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert again.orders == whole.orders[2:]
    other = Noted()
    trainer_of(tmp_path / "c", reward=other, seed=7, max_steps=1).train()
    assert other.orders[0] != whole.orders[0]


def test_bad_input(tmp_path):
    with pytest.raises(
        ConfigError, match="_top_k is 5, above the 4 candidates of query 'Where does number 0 live\\?'"
    ):
        trainer_of(tmp_path, top_k=5)
    with pytest.raises(ConfigError, match="retriever_top_k must be at least 1, got 0"):
        trainer_of(tmp_path, top_k=0)
    with pytest.raises(DataError, match="there is no query to train on"):
        trainer_of(tmp_path, lists=[])
    with pytest.raises(ConfigError, match="the reward gives 1 values for 32 orders"):
        trainer_of(tmp_path, reward=lambda orders: [1.0]).train()
    for options, expected in (
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"start_steps": -1}, "start_steps must be at least 0, got -1"),
        ({"alpha": 0.0}, "alpha must be above 0, got 0.0"),
    ):
        with pytest.raises(ConfigError, match=expected):
            trainer_of(tmp_path, **options)
