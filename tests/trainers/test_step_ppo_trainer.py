"""rag_rl.trainers.step_ppo_trainer: it learns from the reward, plays with the weights as they are, and goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rag_rl.errors import BackendError, ConfigError, DataError
from rag_rl.generation import PolicyGenerator
from rag_rl.reasoning import END_STATES, STEP_REWARD_RULES, StepRewardRule, StepScorer, StepSetup
from rag_rl.tiny import FOLDER
from rag_rl.trainers.step_ppo_config import StepPPOConfig
from rag_rl.trainers.step_ppo_trainer import StepPPOTrainer
from rag_rl.types import JudgeCase, Verdict

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
SEARCHING_PAYS = StepRewardRule(weights={}, scale={}, base=dict.fromkeys(END_STATES, 1.0), final={})
LOGGED = {
    "reward", "reward_std", "kl", "entropy", "loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "val/ratio",
    "format", "searches", "dropped", "round", "weights", "rollout/weights", "rollout/correct", "rollout/searches",
    "grad_norm/policy", "grad_norm/value", "completions/mean_length", "lr", "epoch", "step",
}  # fmt: skip


class Relevance:
    """Judges queries: no verdict on those that ``refuse`` tells."""

    def __init__(self, refuse=lambda case: False) -> None:
        self.refuse, self.asked = refuse, []

    async def judge(self, cases: Sequence[JudgeCase]) -> list[Verdict]:
        self.asked += cases
        return [Verdict(None, "unreadable") if self.refuse(case) else Verdict(0.5, "half") for case in cases]


@pytest.fixture
def make_ppo(searching, tmp_path):
    """Makes trainers of the packaged reader; arguments of the config, or of the trainer."""
    from transformers import AutoTokenizer

    def make(
        rule=SEARCHING_PAYS,
        *,
        judges=None,
        asked=None,
        max_steps_a_chain=2,
        folder="run",
        peft_config=None,
        pad_token=None,
        **settings,
    ):
        tokenizer = AutoTokenizer.from_pretrained(FOLDER / "reader")
        tokenizer.pad_token = pad_token or tokenizer.pad_token
        values = {
            "per_device_train_batch_size": 16, "max_steps": 2, "updates_per_round": 1, "learning_rate": 3e-4,
            "value_learning_rate": 1e-3, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 3, "rollout_batch_size": 128,
        }  # fmt: skip
        return StepPPOTrainer(
            model=str(FOLDER / "reader"),
            args=StepPPOConfig(output_dir=str(tmp_path / folder), **{**values, **settings}),
            setup=StepSetup(searching.index, top_k=1, max_steps=max_steps_a_chain, max_step_tokens=32),
            scorer=StepScorer(rule, judges or {}),
            questions=searching.two_hops[:40] if asked is None else asked,
            processing_class=tokenizer,
            generator_class=PolicyGenerator,
            peft_config=peft_config,
        )

    return make


def lora():
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "reward" in entry]


def test_it_learns_what_is_rewarded(make_ppo):
    trainer = make_ppo(max_steps=8, max_steps_a_chain=1, per_device_train_batch_size=32)
    trainer.train()
    logs = logs_of(trainer)
    assert [entry["step"] for entry in logs] == list(range(1, 9))
    assert logs[0].keys() >= LOGGED
    first, last = (sum(entry["searches"] for entry in part) / 2 for part in (logs[:2], logs[-2:]))
    assert last >= first + 0.25
    for entry in logs:
        assert entry["reward"] == pytest.approx(entry["searches"]), "this rule pays for searches alone"


def test_without_any_reward_nothing_changes(make_ppo):
    """The value model begins at 0, so that a reward of 0 leaves no advantage to whiten; another constant does."""
    trainer = make_ppo(StepRewardRule(weights={}, scale={}, final={}), max_steps=2, max_steps_a_chain=1)
    before = trainer.weight_norm()
    trainer.train()
    assert trainer.weight_norm() == before


def test_it_plays_with_the_weights_as_they_are(make_ppo):
    """Each round's chains, and each step and its continuation, come from the weights that the last update left."""
    trainer = make_ppo(max_steps=4, updates_per_round=2)
    generate, seen = trainer.generator.generate, []

    def noting(*args, **settings):
        seen.append(trainer.weight_norm())
        return generate(*args, **settings)

    trainer.generator.generate = noting
    trainer.train()
    logs = logs_of(trainer)
    assert [entry["round"] for entry in logs] == [1, 1, 2, 2]
    norms = [entry["weights"] for entry in logs]
    assert len(set(norms)) == 4, "every update changes the weights"
    assert [entry["rollout/weights"] for entry in logs] == [norms[0], norms[0], norms[2], norms[2]]
    assert [f"{norm:.12g}" for norm in dict.fromkeys(seen)] == [f"{norm:.12g}" for norm in norms]
    assert trainer.weight_norm() not in seen, "the last update came after all of them"


def test_a_step_is_scaled_by_how_its_chain_ends(make_ppo):
    judge = Relevance()
    trainer = make_ppo(STEP_REWARD_RULES["paper"], judges={"document_relevance": judge}, max_steps=1)
    scored = []
    rewards = trainer._rewards
    trainer._rewards = lambda played, places: scored.append((played, places, rewards(played, places))) or scored[0][2]
    trainer.train()
    ((played, places, given),) = scored
    table = {"correct": 0.8, "incorrect": 0.4, "fail": 0.45, "invalid": 0.5}
    last = {"correct": 2.0, "incorrect": 0.0, "invalid": -0.9}
    assert not any(chain.is_open for chain in played)
    for chain, place, reward in zip(played, places, given, strict=True):
        assert reward == (table if chain.steps[place].searches else last)[chain.state]
    searching = sum(chain.steps[place].searches for chain, place in zip(played, places, strict=True))
    assert 0 < len(judge.asked) == searching, "only the step under training is judged"


def test_without_the_outcome_nothing_is_played_on(make_ppo):
    judge = Relevance()
    trainer = make_ppo(
        STEP_REWARD_RULES["paper"], judges={"document_relevance": judge}, max_steps=1, outcome_multiplier="none"
    )
    trainer.environment.roll_on = None
    rollout = trainer.setup.environment(trainer.generator, temperature=1.0).rollout
    trainer.environment.rollout = rollout
    trainer.train()
    (entry,) = logs_of(trainer)
    assert len(judge.asked) == round(16 * entry["searches"]) > 0
    assert -0.9 <= entry["reward"] <= 2.0


def test_a_step_without_a_verdict_is_dropped_and_counted(make_ppo):
    calls = []

    def every_second(case):
        calls.append(case)
        return len(calls) % 2 == 0

    judge = Relevance(refuse=every_second)
    trainer = make_ppo(STEP_REWARD_RULES["paper"], judges={"document_relevance": judge}, max_steps=2)
    trainer.train()
    logs = logs_of(trainer)
    assert sum(entry["dropped"] for entry in logs) == len(calls) // 2 > 0
    assert all(math.isfinite(value) for entry in logs for value in entry.values())
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())


def test_a_judge_that_says_nothing_stops_the_run(make_ppo):
    judge = Relevance(refuse=lambda case: True)
    trainer = make_ppo(
        STEP_REWARD_RULES["process_only"], judges={"document_relevance": judge}, max_dropped=0.0, max_steps=3
    )
    with pytest.raises(BackendError, match=r"of 16 steps have no reward .* max_dropped 0 allows: look at the judge"):
        trainer.train()


@pytest.mark.parametrize("config", [None, lora()], ids=["full", "lora"])
def test_it_goes_on_where_it_stopped(make_ppo, config):
    """Rounds that were finished are not done again, and the rest is what it would have been."""
    settings = {
        "max_steps": 4,
        "updates_per_round": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "peft_config": config,
    }
    whole = make_ppo(folder="whole", **settings)
    whole.train()
    checkpoint = Path(whole.args.output_dir) / "checkpoint-2"
    assert json.loads((checkpoint / "step_ppo.json").read_text())["drawn"] > 0

    resumed = make_ppo(folder="resumed", **settings)
    resumed.train(str(checkpoint))
    names = {"step", "round", "reward", "searches", "weights", "rollout/weights", "loss/value_avg", "epoch"}
    assert [{name: entry[name] for name in names} for entry in logs_of(resumed)] == [
        {name: pytest.approx(entry[name], abs=1e-5) for name in names} for entry in logs_of(whole)
    ]
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5)
    assert resumed.state.global_step == 4


def test_logs_are_means_over_their_steps(make_ppo):
    every, second = make_ppo(max_steps=2), make_ppo(max_steps=2, logging_steps=2)
    every.train()
    second.train()
    (entry,) = logs_of(second)
    assert entry["step"] == 2
    assert entry["reward"] == pytest.approx(sum(e["reward"] for e in logs_of(every)) / 2)


def test_questions_come_in_a_new_order_and_none_twice(make_ppo):
    trainer = make_ppo()
    drawn = trainer._draw(25) + trainer._draw(15) + trainer._draw(40)
    first, second = [q.qid for q in drawn[:40]], [q.qid for q in drawn[40:]]
    assert len(set(first)) == len(set(second)) == 40
    assert first != second


def test_it_saves_what_can_be_loaded(make_ppo, tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = make_ppo()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for one, two in zip(trainer.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not (tmp_path / "saved" / "value_model.safetensors").exists()


def test_no_questions(make_ppo):
    with pytest.raises(DataError, match="there are no questions to train on"):
        make_ppo(asked=[])


def test_questions_without_answers(make_ppo, searching):
    bare = [replace(searching.two_hops[0], answers=()), searching.two_hops[1]]
    with pytest.raises(DataError, match="1 of 2 questions have no answers, first"):
        make_ppo(STEP_REWARD_RULES["gold_gain"], asked=bare)
    make_ppo(STEP_REWARD_RULES["constant"], asked=bare)


def test_fewer_questions_than_a_batch_are_asked_again(make_ppo, searching):
    trainer = make_ppo(asked=searching.two_hops[:3], max_steps=1)
    trainer.train()
    assert logs_of(trainer)[0]["epoch"] > 2


@pytest.mark.parametrize("name", ["outcome_only", "return_to_go", "constant"])
def test_rules_that_are_nothing_without_the_outcome(make_ppo, name):
    with pytest.raises(ConfigError, match="outcome_multiplier none gives each search its process score alone"):
        make_ppo(STEP_REWARD_RULES[name], judges={"document_relevance": Relevance()}, outcome_multiplier="none")


def test_padding_that_is_the_end_token(make_ppo):
    with pytest.raises(ConfigError, match=r"a padding token that is another one, .* .* and '<.im_end.>'"):
        make_ppo(pad_token="<|im_end|>")
