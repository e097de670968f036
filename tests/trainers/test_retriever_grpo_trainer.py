"""The gradient is that of the objective, sampling and loss agree, and what must not change the result does not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from rag_rl.config.arguments import QueryEncoderArguments
from rag_rl.config.parts import make_trainable
from rag_rl.errors import ConfigError, RagRLError
from rag_rl.reasoning import DecompositionReader, Environment, SingleSearch, retrieval_reward
from rag_rl.tiny import FOLDER
from rag_rl.trainers.plackett_luce import first_pick_kl, log_prob
from rag_rl.trainers.retriever_grpo_config import RetrieverGRPOConfig
from rag_rl.trainers.retriever_grpo_trainer import advantages_of, check_pool
from rag_rl.types import Query

NAN = float("nan")


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **tolerance)


def moved(trainer, before):
    return max((p.detach() - before[name]).abs().max().item() for name, p in trainer.model.named_parameters())


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def in_one_search(**more):
    return {"environment": Environment(SingleSearch(), 1, retrieval_reward("ndcg")), **more}


# ---- advantages


def test_advantages_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.2, 0.2, 0.2, 0.8]])
    plain, varied = advantages_of(rewards, scale="none")
    torch.testing.assert_close(plain, torch.tensor([[-0.5, 0.5, 0.5, -0.5], [-0.15, -0.15, -0.15, 0.45]]))
    assert varied.tolist() == [True, True]
    scaled, _ = advantages_of(rewards, scale="group")
    torch.testing.assert_close(scaled, plain / (torch.tensor([[1 / math.sqrt(3)], [0.3]]) + 1e-4))
    others, _ = advantages_of(rewards, scale="none", baseline="leave_one_out")
    torch.testing.assert_close(others[0], torch.tensor([-2 / 3, 2 / 3, 2 / 3, -2 / 3]))
    torch.testing.assert_close(others[1, 3], torch.tensor(0.8 - 0.2))
    by_batch, _ = advantages_of(rewards, scale="batch")
    torch.testing.assert_close(by_batch, plain / (rewards.std() + 1e-4))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_rewards_that_are_alike_have_no_advantage(scale, baseline):
    rewards = torch.tensor([[0.1] * 7, [1 / 3] * 7, [0.0] * 6 + [1.0]])
    advantages, varied = advantages_of(rewards, scale=scale, baseline=baseline)
    assert varied.tolist() == [False, False, True]
    assert advantages[:2].abs().max() == 0.0
    assert advantages.sum(dim=1).abs().max() < 1e-5


def test_what_was_not_scored_is_not_in_the_mean():
    advantages, varied = advantages_of(
        torch.tensor([[0.0, 1.0, NAN, NAN], [NAN, NAN, NAN, 0.7], [NAN] * 4]), scale="none"
    )
    assert advantages.tolist() == [[-0.5, 0.5, 0.0, 0.0], [0.0] * 4, [0.0] * 4]
    assert varied.tolist() == [True, False, False]


# ---- the first update


def test_before_the_first_update_every_ratio_is_one(make_trainer):
    trainer = make_trainer(**in_one_search(), max_steps=1)
    trainer.train()
    assert logged(trainer, "clip_ratio") == [0.0]
    assert max(logged(trainer, "sampling_drift")) < 1e-4
    assert abs(logged(trainer, "loss")[0]) < 1e-5  # advantages have mean 0, and all ratios are 1


def test_an_encoder_that_is_not_deterministic_is_refused(make_trainer):
    # With one iteration there is one pass, and nothing to differ from it.
    trainer = make_trainer(**in_one_search(), num_iterations=2)
    trainer.model.register_forward_hook(
        lambda module, args, out: {**out, "sentence_embedding": out["sentence_embedding"] + torch.randn(1) * 0.3}
    )
    with pytest.raises(
        RagRLError, match=r"another log-probability in the loss than when it was sampled, by .*determin"
    ):
        trainer.train()


def test_dropout_is_off(make_trainer):
    trainer = make_trainer()
    rates = [m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates
    assert set(rates) == {0.0}


def test_loss_and_gradient_are_those_of_the_objective(make_trainer):
    """By a second, naive computation from the trajectories, for each way of taking the mean."""
    for loss_type in ("grpo", "dapo", "dr_grpo"):
        trainer = make_trainer(loss_type=loss_type, beta=0.1, learning_rate=0.0, alpha=0.02)
        asked = trainer.questions[:4]
        trajectories, states = trainer._sample(asked, step=0)
        (batch,) = trainer._prepare(trajectories, states, 1)
        assert batch.state, "no group varies: the test would show nothing"
        trainer.compute_loss(trainer.model, batch).backward()
        found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
        trainer.model.zero_grad()

        rewards = torch.tensor(trainer.environment.rewards(trajectories)).view(-1, 4)
        advantages, varied = advantages_of(rewards)
        used = [i for i in range(16) if varied[i // 4] and trajectories[i].hops]
        n_hops = sum(len(trajectories[i].hops) for i in used)
        loss = torch.zeros(())
        for i in used:
            hops = trajectories[i].hops
            for hop in hops:
                scale = {"grpo": len(used) * len(hops), "dapo": n_hops, "dr_grpo": 16 * 2}[loss_type]
                text = states.texts[hop.action.state]
                vector = trainer.model(trainer.model.preprocess([text]))["sentence_embedding"]
                rows = torch.tensor(states.rows[hop.action.state])
                pool = torch.from_numpy(trainer.index.vectors(rows[None].numpy()))[0]
                scores = pool @ torch.nn.functional.normalize(vector[0], dim=0) / 0.02
                picked = log_prob(scores, torch.tensor(hop.action.picks))
                ratio = torch.exp(picked - picked.detach())
                kl = first_pick_kl(scores, scores.detach())
                loss = loss + (-ratio * advantages.flatten()[i] + 0.1 * kl) / scale
        loss.backward()
        for name, p in trainer.model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(found[name], p.grad, rtol=2e-3, atol=2e-5)


def test_the_ratio_is_clipped_per_hop(make_trainer):
    trainer = make_trainer(**in_one_search(), epsilon=0.2, epsilon_high=0.3)
    trajectories, states = trainer._sample(trainer.questions[:4], step=0)
    (batch,) = trainer._prepare(trajectories, states, 1)
    trainer.compute_loss(trainer.model, batch)
    now = batch.old.clone()
    n = len(batch.state)
    for shift, advantage, expected in [
        (0.5, 1.0, -1.3),  # risen beyond the bound, and good: cut
        (0.5, -1.0, math.exp(0.5)),  # risen, and bad: not cut
        (-0.5, 1.0, -math.exp(-0.5)),
        (-0.5, -1.0, 0.8),
        (0.1, 1.0, -math.exp(0.1)),
    ]:
        batch.old, batch.advantage, batch.weight = now - shift, torch.full((n,), advantage), torch.full((n,), 1 / n)
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected, rel=1e-4)


# ---- what must not train, and what must


def test_a_constant_reward_changes_nothing(make_trainer):
    environment = Environment(DecompositionReader(), 2, lambda trajectory: 1.0)
    trainer = make_trainer(environment=environment, max_steps=3)
    before = weights(trainer)
    trainer.train()
    assert moved(trainer, before) == 0.0
    assert logged(trainer, "frac_reward_zero_std") == [1.0] * 3
    assert logged(trainer, "loss") == [0.0] * 3


def test_a_reward_for_one_document_raises_it(make_trainer, searching):
    asked = searching.one_hop[:8]

    def share_of_gold_first(trainer):
        texts = trainer.encoder.states([Query(q.question) for q in asked])
        _, rows = trainer.index.search_vectors(trainer.encode_to_sample(texts).detach().numpy(), top_k=1)
        return sum(
            trainer.index.passages[int(r[0])].doc_id == q.gold_doc_ids[0] for r, q in zip(rows, asked, strict=True)
        )

    def reward(trajectory):  # a document that the encoder itself would not choose
        return float(trajectory.hops[0].hits[0].passage.doc_id == wanted[trajectory.question.qid])

    trainer = make_trainer(
        environment=Environment(SingleSearch(), 1, reward),
        asked=asked,
        max_steps=60,
        num_candidates=6,
        alpha=0.1,
        learning_rate=1e-3,
        per_device_train_batch_size=32,
    )
    texts = trainer.encoder.states([Query(q.question) for q in asked])
    _, rows = trainer.index.search_vectors(trainer.encode_to_sample(texts).detach().numpy(), top_k=6)
    wanted = {q.qid: trainer.index.passages[int(row[4])].doc_id for q, row in zip(asked, rows, strict=True)}
    assert share_of_gold_first(trainer) > 4
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[:5]) / 5 < 0.2  # six candidates: chance is a sixth
    assert sum(rewards[-10:]) / 10 > 0.4


def test_trajectories_without_a_reward_are_dropped_and_counted(make_trainer):
    class Half(Environment):
        def rewards(self, trajectories):
            return [None if i % 2 else self.reward(t) for i, t in enumerate(trajectories)]

    trainer = make_trainer(environment=Half(SingleSearch(), 1, retrieval_reward("ndcg")), alpha=0.2)
    trajectories, states = trainer._sample(trainer.questions[:4], step=0)
    (batch,) = trainer._prepare(trajectories, states, 1)
    used = {id(trajectories[i].hops[0].action) for i in range(0, 16, 2)}
    kept = [t.hops[0].action for t in trajectories if id(t.hops[0].action) in used]
    assert 0 < len(batch.state) <= len(kept)
    assert batch.weight.sum().item() == pytest.approx(1.0)
    assert trainer._pending["unscored"] == [0.5]


def test_weights_of_a_batch_add_up_whatever_its_parts(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=8, alpha=0.2, **in_one_search())
    trajectories, states = trainer._sample(trainer.questions[:4], step=0)
    parts = trainer._prepare(trajectories, states, 8)
    assert len(parts) == 8
    assert sum(part.weight.sum().item() for part in parts) == pytest.approx(1.0)


# ---- the same result in other ways


def test_the_loss_uses_the_pass_that_sampled(make_trainer):
    trainer = make_trainer(alpha=0.02)
    read = []
    trainer.model.register_forward_hook(lambda module, args, out: read.append(len(out["sentence_embedding"])))
    found = []
    for again in (False, True):
        trajectories, states = trainer._sample(trainer.questions[:4], step=0)
        (batch,) = trainer._prepare(trajectories, states, 1)
        assert len(states.vectors) == len(states.texts) == sum(read)
        if again:
            states.vectors = []  # as where the loss has to read the texts once more
        read.clear()
        trainer.compute_loss(trainer.model, batch).backward()
        assert sum(read) == (len(set(batch.state)) if again else 0)
        assert not states.vectors
        read.clear()
        found.append({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})
        trainer.model.zero_grad()
    assert max(gradient.abs().max().item() for gradient in found[0].values()) > 1e-3
    assert_same(found[0], found[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "setting", [{"num_iterations": 2}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}]
)
def test_no_graph_is_kept_that_will_not_be_walked(make_trainer, setting):
    trainer = make_trainer(alpha=0.02, **setting)
    _, states = trainer._sample(trainer.questions[:4], step=0)
    assert states.texts
    assert not states.vectors


def test_parts_of_a_batch_give_the_gradient_of_the_whole(make_trainer):
    whole = make_trainer(per_device_train_batch_size=16, gradient_accumulation_steps=1, optim="sgd", alpha=0.02)
    before = weights(whole)
    whole.train()
    assert moved(whole, before) > 1e-5
    parts = make_trainer(
        per_device_train_batch_size=2, gradient_accumulation_steps=8, optim="sgd", alpha=0.02, folder="parts"
    )
    parts.train()
    assert_same(weights(parts), weights(whole), rtol=1e-3, atol=1e-5)
    assert logged(parts, "reward") == pytest.approx(logged(whole, "reward"))


def test_the_same_seed_gives_the_same_run_and_another_another(make_trainer):
    runs = []
    for i, seed in enumerate((3, 3, 4)):
        trainer = make_trainer(seed=seed, alpha=0.02, folder=f"run{i}")
        trainer.train()
        runs.append(weights(trainer))
    assert_same(runs[0], runs[1], rtol=0, atol=0)
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(make_trainer):
    settings = {"alpha": 0.02, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(**settings, folder="whole")
    whole.train()
    broken = make_trainer(**settings, folder="broken")
    broken.args.max_steps = 2
    broken.train()
    again = make_trainer(**settings, folder="broken")
    again.train(resume_from_checkpoint=True)
    assert [row["step"] for row in again.state.log_history if "loss" in row] == [1, 2, 3, 4]
    assert_same(weights(again), weights(whole), rtol=1e-4, atol=1e-6)


def test_several_iterations_use_the_same_trajectories(make_trainer):
    trainer = make_trainer(num_iterations=2, max_steps=4, alpha=0.02, learning_rate=0.05)
    trainer.train()
    assert len(logged(trainer, "reward")) == 2  # one batch of trajectories for two steps
    assert [row["step"] for row in trainer.state.log_history if "reward" in row] == [1, 3]
    assert len(logged(trainer, "loss")) == 4


# ---- what is trained


@pytest.mark.parametrize("what", ["full", "lora", "head"])
def test_what_is_trained_and_how_it_is_saved(make_trainer, tmp_path, what):
    from rag_rl.run import save_trained

    trainer = make_trainer(
        prepare=lambda encoder: make_trainable(
            encoder, QueryEncoderArguments(retriever_train=what, retriever_lora_r=4)
        ),
        alpha=0.02,
        max_steps=6,
        learning_rate=1e-3,
        beta=0.01,
    )
    text = ["Where is the home?"]
    start = SentenceTransformer(str(FOLDER / "encoder"), device="cpu").encode(text)
    assert trainer.model.encode(text) == pytest.approx(start, abs=1e-5)  # begins as the encoder itself
    total = sum(p.numel() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert {"full": trained == total, "lora": trained < 0.2 * total, "head": trained == start.shape[1] ** 2}[what]
    trainer.train()
    after = trainer.model.encode(text)
    assert abs(after - start).max() > 1e-4
    assert logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-5)
    assert logged(trainer, "kl")[-1] > 1e-6  # rounding gives 4e-8
    save_trained(trainer, tmp_path / "saved", merged=True)
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert plain.encode(text) == pytest.approx(after, abs=1e-4)
    assert not (tmp_path / "saved" / "adapter_config.json").exists()


def test_replug_moves_the_retriever_to_what_the_reader_can_use(make_trainer, searching):
    trainer = make_trainer(
        environment=Environment(SingleSearch(), 1, retrieval_reward("ndcg")),
        asked=searching.one_hop[:16],
        objective="replug",
        max_steps=12,
        learning_rate=3e-3,
        alpha=0.1,
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


# ---- logs


def test_what_is_logged(make_trainer):
    trainer = make_trainer(alpha=0.02, log_completions=True)
    trainer.train()
    row = trainer.state.log_history[0]
    assert {
        "loss", "reward", "reward_std", "success", "entropy", "effective_pool", "frac_reward_zero_std", "unscored",
        "hops", "clip_ratio", "sampling_drift",
    } <= row.keys()  # fmt: skip
    assert row["effective_pool"] == pytest.approx(math.exp(row["entropy"]), rel=0.5)
    assert 1.0 <= row["effective_pool"] <= 8.0
    assert row["hops"] == 2.0
    files = sorted(Path(trainer.args.output_dir).glob("completions/*.jsonl"))
    assert [f.name for f in files] == ["step_00000_process_0.jsonl", "step_00001_process_0.jsonl"]
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert len(lines) == 16
    assert all(len(line["hops"]) == 2 and len(line["hops"][0]["doc_ids"]) == 2 for line in lines)
    assert sum(line["reward"] for line in lines) / 16 == pytest.approx(row["reward"])


# ---- bad input


def test_sizes_that_do_not_fit(make_trainer, searching):
    with pytest.raises(ConfigError, match="retriever_top_k must be between 1 and num_candidates \\(8\\), got 9"):
        make_trainer(top_k=9)
    with pytest.raises(ConfigError, match=f"num_candidates must be at most {len(searching.index)}.*got 100"):
        make_trainer(num_candidates=100)
    with pytest.raises(ConfigError, match="the index holds no passage"):
        check_pool(0, 8, 2)
    with pytest.raises(ConfigError, match="a step asks 4 questions, data_train has 3"):
        make_trainer(asked=searching.two_hops[:3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be above 0, got 0.0"),
        ({"num_candidates": 1}, "num_candidates must be at least 2, got 1"),
        ({"per_device_train_batch_size": 6, "num_generations": 4}, "must be a multiple of num_generations \\(4\\)"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        RetrieverGRPOConfig(**{"output_dir": str(tmp_path), "per_device_train_batch_size": 8, **settings})


def test_vectors_that_are_not_numbers_are_named(make_trainer):
    trainer = make_trainer(asked=None)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(NAN)
    with pytest.raises(
        RagRLError, match=r"vectors that are not numbers for 4 of 4 states, first '.+': training has diverged"
    ):
        trainer.train()


def test_the_reference_is_what_it_was(make_trainer):
    trainer = make_trainer(beta=0.1, alpha=0.02, max_steps=2)
    before = trainer.encode_reference(["Who is in charge?"])
    assert torch.equal(before, trainer.encode_to_sample(["Who is in charge?"]))
    trainer.train()
    torch.testing.assert_close(trainer.encode_reference(["Who is in charge?"]), before)
    assert not torch.equal(before, trainer.encode_to_sample(["Who is in charge?"]))
    with pytest.raises(ConfigError, match="beta is 0"):
        make_trainer(folder="other").encode_reference(["x"])
