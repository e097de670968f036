from __future__ import annotations

import inspect
import logging
import math
import re
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed")

import torch

from rag_rl.errors import ConfigError, DataError, RagRLError
from rag_rl.reasoning import END_STATES, StepRewardRule, StepScorer, StepSetup, step_reward_rule
from rag_rl.tiny import FOLDER
from rag_rl.trainers.step_grpo_config import StepGRPOConfig
from rag_rl.trainers.step_grpo_trainer import (
    StepGRPOTrainer,
    chain_return,
    returns_to_go,
    step_advantages,
    without_padding,
)
from rag_rl.types import Question, Verdict

# What the packaged reader finds hard is easy here: a step that searches earns 1, the last one nothing.
SEARCHING = StepRewardRule(weights={}, scale={}, base=dict.fromkeys(END_STATES, 1.0), final={})


@pytest.fixture
def make(searching, tmp_path):
    """Makes trainers of a fresh copy of the packaged reader: 4 questions x 4 chains a step."""

    def make_(*, rule=SEARCHING, questions=None, scorer=None, setup=None, **settings):
        torch.manual_seed(0)
        values = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_completion_length": 256,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "max_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "seed": 3,
        }
        played = {"top_k": 2, "max_steps": 3, "max_step_tokens": 40, "layout": "chat"}
        return StepGRPOTrainer(
            str(FOLDER / "reader"),
            args=StepGRPOConfig(**{**values, **settings}),
            setup=StepSetup(searching.index, **{**played, **(setup or {})}),
            scorer=scorer or StepScorer(rule),
            questions=questions or searching.two_hops[:16],
        )

    return make_


def rollout(trainer, *, numbers=(0, 0, 0, 0, 1, 1, 1, 1)):
    """Plays and scores one batch, as a training step does."""
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": "", "number": number} for number in numbers])


def greedy(trainer):
    trainer.generation_config.do_sample = False
    return trainer


def history(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# ---- chains of the policy


@pytest.mark.smoke
def test_the_loss_sees_what_the_policy_saw(make):
    """Greedy tokens are the most likely ones of the whole sequence in one pass, padding and documents included."""
    trainer = greedy(make())
    output = rollout(trainer)
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    width = output["completion_ids"].shape[1]
    with torch.no_grad():
        logits = trainer.model.eval()(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
    log_probs = logits.log_softmax(dim=-1)
    sampled = output["step_numbers"] > 0
    own = log_probs.gather(-1, output["completion_ids"][..., None])[..., 0][sampled]
    assert (output["step_numbers"] == 2).any(), "some chain must have gone on behind its documents"
    assert (log_probs.max(dim=-1).values[sampled] - own).max() < 1e-4


@pytest.mark.smoke
def test_what_goes_to_trl(make):
    trainer = make()
    output = rollout(trainer)
    assert output["tool_mask"].shape == output["completion_ids"].shape
    real = output["completion_mask"].bool()
    assert torch.equal(output["tool_mask"][real], (output["step_numbers"][real] > 0).long())
    for row, chain, trajectory in zip(output["completion_ids"], trainer._tokens, trainer._played, strict=True):
        assert row[: len(chain.completion_ids)].tolist() == chain.completion_ids
        assert 0 < len(chain.completion_ids) <= 256
        assert max(chain.steps) == len(trajectory.steps)
    # TRL takes log-probabilities for vLLM only; none are made up.
    assert "sampling_per_token_logps" not in output
    assert {"searches", "invalid_steps", "repetition", "unscored", "injected", "analysis_words", "format"} <= set(
        trainer._metrics["train"]
    )


def test_questions_with_the_same_words_are_told_apart(make, searching):
    first = searching.two_hops[0]
    twin = Question("twin", first.question, ("nothing of the kind",), ("no-such-document",))
    trainer = make(questions=[first, twin], rule=step_reward_rule("gold_gain"))
    rollout(trainer)
    assert [t.question.qid for t in trainer._played] == [first.qid] * 4 + ["twin"] * 4
    found = [record.scores["gold_gain"] for t in trainer._played[4:] for record in t.searches]
    assert not any(found)
    assert not any(t.state == "correct" for t in trainer._played[4:])


def test_the_question_alone_is_too_long(make, searching):
    with pytest.raises(DataError, match=r"16 of 16 questions have no room in the model's context of 2048 tokens"):
        make(max_completion_length=2040)


def test_settings_that_make_no_sequence(make):
    with pytest.raises(ConfigError, match="reasoner_layout: chat"):
        make(setup={"layout": "turn"})
    with pytest.raises(ConfigError, match=r"max_completion_length \(79\) is the budget of a whole chain"):
        make(max_completion_length=79)


# ---- rewards and credit


class Undecided:
    """A judge of relevance that has no verdict on one step; which one is up to the test."""

    def __init__(self):
        self.cases = 0

    async def judge(self, cases):
        self.cases += len(cases)
        return [Verdict(None, "unreadable") if i == 0 else Verdict(0.5) for i in range(len(cases))]


def test_a_chain_without_a_reward_is_dropped_and_counted(make):
    judge = Undecided()
    trainer = make(scorer=StepScorer(step_reward_rule("paper"), {"document_relevance": judge}))
    output = rollout(trainer)
    missing = [i for i, rewards in enumerate(trainer._rewards) if None in rewards]
    assert judge.cases > 1
    assert len(missing) == 1
    assert output["advantages"][missing[0]] == 0.0
    assert trainer._metrics["train"]["unscored"] == [1 / 8]
    start = missing[0] // 4 * 4
    others = [i for i in range(start, start + 4) if i != missing[0]]
    kept = torch.tensor([chain_return(trainer._rewards[i]) for i in others])
    wanted = (kept - kept.mean()) / (kept.std() + 1e-4)
    assert output["advantages"][others].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


@pytest.mark.parametrize("credit", ["step", "return_to_go"])
def test_each_step_is_compared_with_the_same_step(make, credit):
    trainer = make(step_credit=credit, rule=step_reward_rule("gold_gain"))
    output = rollout(trainer)
    assert output["advantages"].shape == output["completion_ids"].shape
    assert (output["advantages"][output["step_numbers"] == 0] == 0).all()
    values = [returns_to_go(rewards) if credit == "return_to_go" else rewards for rewards in trainer._rewards]
    for start in (0, 4):
        for number in (1, 2, 3):
            having = [i for i in range(start, start + 4) if len(values[i]) >= number]
            own = torch.tensor([values[i][number - 1] for i in having])
            wanted = (own - own.mean()) / (own.std() + 1e-4) if len(own) > 1 else torch.zeros(len(own))
            for i, advantage in zip(having, wanted.tolist(), strict=True):
                tokens = output["advantages"][i][output["step_numbers"][i] == number]
                assert tokens.tolist() == pytest.approx([advantage] * len(tokens), abs=1e-5)


@pytest.mark.parametrize(
    ("scale", "first", "second"),
    [
        ("none", [-1.0, 1.0, 0.0, 0.0], [0.0, 0.0, -2.0, 2.0]),
        ("group", [-1 / math.sqrt(2), 1 / math.sqrt(2), 0.0, 0.0], [0.0, 0.0, -1 / math.sqrt(2), 1 / math.sqrt(2)]),
    ],
)
def test_step_advantages(scale, first, second):
    nan = math.nan
    values = torch.tensor([[1.0, nan], [3.0, 5.0], [2.0, 0.0], [nan, 4.0]])
    found = step_advantages(values, group=2, scale=scale)
    assert found[:, 0].tolist() == pytest.approx(first, abs=1e-3)
    assert found[:, 1].tolist() == pytest.approx(second, abs=1e-3)


def test_step_advantages_over_the_batch():
    values = torch.tensor([[1.0], [3.0], [2.0], [6.0]])
    found = step_advantages(values, group=2, scale="batch")
    assert found[:, 0].tolist() == pytest.approx([-1 / 2.1602, 1 / 2.1602, -2 / 2.1602, 2 / 2.1602], abs=1e-3)


def test_equal_rewards_in_a_group_give_nothing():
    assert not step_advantages(torch.full((8, 3), 1.5), group=4, scale="group").any()


@pytest.mark.parametrize(
    ("rewards", "mean", "sums"),
    [
        ([1.0, 2.0, 4.5], 2.5, [7.5, 6.5, 4.5]),
        ([-0.9], -0.9, [-0.9]),
        ([1.0, None], None, [None, None]),
        ([None, 1.0], None, [None, 1.0]),
        ([], None, []),
    ],
)
def test_return_of_a_chain(rewards, mean, sums):
    assert chain_return(rewards) == mean
    assert returns_to_go(rewards) == sums


# ---- gradients


def test_equal_rewards_change_nothing(make):
    trainer = make(rule=step_reward_rule("constant"))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    (entry,) = history(trainer)
    assert (entry["reward_std"], entry["frac_reward_zero_std"], entry["grad_norm"]) == (0.0, 1.0, 0.0)
    assert all(torch.equal(before[name], value) for name, value in trainer.model.named_parameters())


@pytest.mark.smoke
def test_the_mask_is_audited(make, caplog):
    caplog.set_level(logging.INFO)
    trainer = make(max_steps=2)
    trainer.train()
    (told,) = [record.getMessage() for record in caplog.records if "mask audit" in record.getMessage()]
    found = re.fullmatch(r"mask audit: (\d+) injected tokens of (\d+), no gradient", told)
    assert found, told
    assert 0 < int(found[1]) < int(found[2])


@pytest.mark.parametrize(
    ("mask", "message"),
    [(1, "injected tokens carry a gradient"), (0, "sampled tokens that have an advantage carries a gradient")],
)
def test_an_audit_that_fails_stops_the_run(make, monkeypatch, mask, message):
    trainer = make()
    played = trainer.rollout_func

    def tampered(prompts, trainer_):
        output = played(prompts, trainer_)
        # The first token stays as it is: TRL divides by the number of sampled tokens.
        output["env_mask"] = [[1] + [mask] * (len(row) - 1) for row in output["env_mask"]]
        return output

    trainer.rollout_func = tampered
    if mask == 0:
        monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", without_first_token(trainer), raising=True)
    with pytest.raises(RagRLError, match=message):
        trainer.train()


def without_first_token(trainer):
    """Stands for a loss that has lost its gradient."""
    whole = type(trainer)._get_per_token_logps_and_entropies

    def given(*args, **kwargs):
        found = whole(trainer, *args, **kwargs)
        keep = torch.zeros_like(found[0])
        return (found[0] * keep, *found[1:]) if trainer._audited is not None else found

    return given


def test_documents_carry_no_gradient_to_the_weights(make):
    """What is injected counts as context alone: the gradient is that of the sampled tokens' log-probabilities."""
    trainer = make(beta=0.0, loss_type="dapo")
    output = rollout(trainer)
    output["advantages"] = torch.ones_like(output["advantages"])
    trainer.current_gradient_accumulation_steps = 1
    trainer._audit_done = True
    trainer.compute_loss(trainer.model, output).backward()
    found = trainer.model.get_output_embeddings().weight.grad.clone()
    trainer.model.zero_grad()
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    width = output["completion_ids"].shape[1]
    log_probs = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1].log_softmax(dim=-1)
    sampled = output["step_numbers"] > 0
    own = log_probs.gather(-1, output["completion_ids"][..., None])[..., 0][sampled]
    (-own.mean()).backward()
    assert torch.allclose(found, trainer.model.get_output_embeddings().weight.grad, atol=1e-5)


def test_parts_of_a_step_add_up_to_the_same_update(make):
    weights = []
    for parts in (1, 4):
        trainer = make(
            per_device_train_batch_size=16 // parts,
            gradient_accumulation_steps=parts,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
        )
        trainer.train()
        weights.append(torch.cat([value.detach().flatten() for value in trainer.model.parameters()]))
        start = trainer.model.from_pretrained(FOLDER / "reader")
    moved = (weights[0] - torch.cat([value.flatten() for value in start.parameters()])).abs().max()
    assert moved > 1e-4
    assert (weights[0] - weights[1]).abs().max() < 1e-3 * moved


def test_without_padding():
    batch = {
        "prompt_ids": torch.tensor([[0, 0, 7], [0, 5, 6]]),
        "prompt_mask": torch.tensor([[0, 0, 1], [0, 1, 1]]),
        "completion_ids": torch.tensor([[1, 2, 0], [3, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
        "advantages": torch.tensor([0.5, -0.5]),
        "num_items_in_batch": torch.tensor(3),
    }
    found = without_padding(batch)
    assert found["prompt_ids"].tolist() == [[0, 7], [5, 6]]
    assert found["prompt_mask"].tolist() == [[0, 1], [1, 1]]
    assert found["completion_ids"].tolist() == [[1, 2], [3, 0]]
    assert found["advantages"] is batch["advantages"]
    assert found["num_items_in_batch"] is batch["num_items_in_batch"]


# ---- learning


@pytest.mark.slow
def test_an_easy_reward_is_learnt(make):
    trainer = make(max_steps=12, learning_rate=2e-3, setup={"max_steps": 2})
    trainer.train()
    searches = [entry["searches"] for entry in history(trainer)]
    assert sum(searches[-3:]) / 3 > sum(searches[:3]) / 3 + 0.3


def test_a_collapse_stops_the_run_and_keeps_the_best(make, caplog):
    trainer = make(
        max_steps=6, max_completion_length=96, save_strategy="steps", save_steps=1, save_only_model=True,
        guard_stop=True, guard_patience=2, guard_max_invalid_steps=None, guard_max_repetition=None,
    )  # fmt: skip
    measured = trainer._log_chains

    def fewer_searches():
        measured()
        trainer._metrics["train"]["searches"][-1] = 1.0 if trainer.state.global_step < 2 else 0.0

    trainer._log_chains = fewer_searches
    trainer.train()
    assert trainer.state.global_step == 4, "the fourth log is the second one without searches"
    best = trainer.state.best_model_checkpoint
    assert best in (str(Path(trainer.args.output_dir) / f"checkpoint-{number}") for number in (1, 2))
    assert f"going back to {best}" in caplog.text
    kept = trainer.model.from_pretrained(best)
    for (name, value), (_, other) in zip(trainer.model.named_parameters(), kept.named_parameters(), strict=True):
        assert torch.equal(value, other), name


# ---- what TRL must go on giving us


def test_private_parts_of_trl(make):
    """An upgrade that renames them shall fail here."""
    from trl import GRPOTrainer

    for name, first in {
        "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_compute_loss": ["self", "model", "inputs"],
        "_prepare_inputs": ["self", "generation_batch"],
        "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
    }.items():
        function = inspect.unwrap(getattr(GRPOTrainer, name))
        assert list(inspect.signature(function).parameters)[: len(first)] == first, name
    trainer = make()
    assert trainer.generation_config.max_new_tokens == 256
    with trainer._step_budget():
        assert trainer.generation_config.max_new_tokens == 40
    assert trainer.generation_config.max_new_tokens == 256
