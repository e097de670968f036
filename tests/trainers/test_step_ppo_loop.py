"""rag_rl.trainers.step_ppo_loop: what it relies on in TRL, and what it adds."""

from __future__ import annotations

import inspect

import pytest
import torch

from rag_rl.errors import DataError
from rag_rl.tiny import FOLDER
from rag_rl.trainers.step_ppo_config import StepPPOConfig
from rag_rl.trainers.step_ppo_loop import PPOLoop, _by_width

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
PAD, END = 0, 1


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER / "reader")


def reader():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER / "reader")


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture
def make_loop(tokenizer, tmp_path):
    """Makes loops over given (prompts, completions, rewards); tokens stand for themselves."""

    def make(prompts, completions, rewards, *, peft_config=None, **settings):
        logs = []
        values = {
            "per_device_train_batch_size": len(prompts), "max_steps": 1, "learning_rate": 0.1, "optim": "sgd",
            "value_learning_rate": 0.1, "kl_coef": 0.0, "max_grad_norm": 0.0, "use_cpu": True, "bf16": False,
            "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip
        args = StepPPOConfig(output_dir=str(tmp_path / "run"), **{**values, **settings})
        left = torch.nn.utils.rnn.pad_sequence(map(torch.tensor, prompts), True, PAD, padding_side="left")
        right = torch.nn.utils.rnn.pad_sequence([torch.tensor(c).long() for c in completions], True, PAD)

        def complete(queries):
            return torch.cat([queries, right], dim=1), torch.tensor(rewards)

        loop = PPOLoop(
            args=args, policy=reader(), tokenizer=tokenizer, peft_config=peft_config, callbacks=[],
            batches=[left] * args.total_updates, complete=complete, on_log=lambda found: logs.append(found),
            progress=dict,
        )  # fmt: skip
        loop.logs = logs
        return loop

    return make


PROMPTS = [[20, 21, 22, 23, 24, 25, 26, 27], [30, 31], [40, 41, 42], [50, 51, 52, 53, 54]]
COMPLETIONS = [[60, 61, END], [62, END], [63, 64, 65, END], [66, 67, END]]
REWARDS = [1.0, 0.0, 0.5, -0.9]


def weights_of(loop):
    return {name: weight.detach().clone() for name, weight in loop.policy.named_parameters()}


def test_what_trl_calls_is_what_is_replaced():
    from trl.experimental.ppo import PPOTrainer, ppo_trainer

    def parameters(function):
        return list(inspect.signature(function).parameters)

    assert parameters(ppo_trainer.batch_generation) == [
        "model", "queries", "local_rollout_forward_batch_size", "pad_token_id", "generation_config",
    ]  # fmt: skip
    assert parameters(ppo_trainer.get_reward) == ["model", "query_responses", "pad_token_id", "context_length"]
    assert parameters(ppo_trainer.forward) == ["model", "query_responses", "pad_token_id"]
    assert parameters(ppo_trainer.PolicyAndValueWrapper) == ["policy", "value_model"]
    source = inspect.getsource(PPOTrainer.train)
    for name, times in (("batch_generation(", 1), ("get_reward(", 2), ("forward(", 3), ("model.generate(", 0)):
        assert source.count(name) == times, f"{name} is called {source.count(name)} times"
    assert source.count(".logits[:, context_length - 1 : -1]") == 2
    assert "value = full_value[:, context_length - 1 : -1]" in source
    assert "dataloader = self.dataloader" in source
    assert "self.callback_handler.on_train_begin" in source
    assert "range(1, args.num_total_batches + 1)" in source


@pytest.mark.parametrize("keep", [3, None])
def test_rows_without_their_padding(tokenizer, keep):
    """The same as one pass over all rows with all padding."""
    from rag_rl.trainers.step_ppo_models import ValueModel

    policy = reader().eval()
    rows = torch.full((5, 40), PAD)
    generator = torch.Generator().manual_seed(0)
    for row, length in zip(rows, (40, 5, 30, 12, 38), strict=True):
        row[40 - length :] = torch.randint(10, 2000, (length,), generator=generator)
    rows[1, -2:] = PAD  # a completion that is shorter than the others
    mask = rows != PAD
    inputs = {
        "input_ids": rows, "attention_mask": mask, "position_ids": mask.cumsum(1) - mask.long(),
    }  # fmt: skip
    with torch.no_grad():
        if keep:
            found, plain = _by_width(policy, rows, mask, keep), policy(**inputs).logits[:, -keep:]
            shown = mask[:, -keep:]
        else:
            value = ValueModel(policy)
            torch.nn.init.normal_(value.score.linear.weight)
            found = _by_width(value, rows, mask)
            plain, shown = value.score(value.backbone(**inputs).last_hidden_state), mask
    assert found.shape == plain.shape
    assert torch.allclose(found[shown], plain[shown], atol=1e-4)


def test_the_first_ratio_is_one_and_the_reward_arrives(make_loop):
    loop = make_loop(PROMPTS, COMPLETIONS, REWARDS, local_rollout_forward_batch_size=2)
    before = weights_of(loop)
    loop.train_from(None)
    (logs,) = loop.logs
    assert logs["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert logs["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert logs["objective/scores"] == pytest.approx(sum(REWARDS) / 4)
    assert any(not torch.equal(before[name], weight) for name, weight in weights_of(loop).items())


def test_a_better_reward_makes_a_completion_more_likely(make_loop):
    def log_prob(loop):
        row = torch.tensor([PROMPTS[0] + COMPLETIONS[0]])
        with torch.no_grad():
            found = loop.policy(row).logits.log_softmax(-1)[0, -4:-1]
        return found.gather(1, row[0, -3:, None]).sum().item()

    loop = make_loop(PROMPTS, COMPLETIONS, [1.0, 0.0, 0.0, 0.0], learning_rate=1e-3)
    before = log_prob(loop)
    loop.train_from(None)
    assert log_prob(loop) > before


def test_a_reward_that_is_always_zero_changes_nothing(make_loop):
    loop = make_loop(PROMPTS, COMPLETIONS, [0.0] * 4, max_steps=2)
    before = weights_of(loop)
    loop.train_from(None)
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(loop).items())


@pytest.mark.parametrize("micro", [8, 1])
def test_an_empty_completion_takes_no_part(make_loop, micro):
    """Four steps and four without a reward teach the policy what the four alone do."""
    alone = make_loop(PROMPTS, COMPLETIONS, REWARDS, per_device_train_batch_size=4 if micro == 8 else 1,
                      gradient_accumulation_steps=1 if micro == 8 else 4)  # fmt: skip
    alone.train_from(None)
    others = [[70, 71], [72], [73, 74, 75, 76, 77, 78, 79, 80, 81], [82]]
    both = make_loop(
        PROMPTS + others, COMPLETIONS + [[]] * 4, REWARDS + [0.0] * 4, per_device_train_batch_size=micro,
        gradient_accumulation_steps=8 // micro,
        # Micro-batches are averaged, those of nothing too.
        learning_rate=0.1 if micro == 8 else 0.2,
    )  # fmt: skip
    start = weights_of(both)
    both.train_from(None)
    moved = max((weight - start[name]).abs().max().item() for name, weight in weights_of(both).items())
    for name, weight in weights_of(alone).items():
        assert torch.isfinite(weight).all()
        assert (weights_of(both)[name] - weight).abs().max().item() < 1e-3 * moved, name
    assert all(torch.isfinite(weight).all() for weight in both.value_model.parameters())


def test_only_the_completion_has_a_gradient(make_loop):
    loop = make_loop(PROMPTS, COMPLETIONS, REWARDS)
    seen = []

    def keep(module, inputs, output):
        if output.requires_grad:
            output.retain_grad()
            seen.append(output)

    loop.policy.lm_head.register_forward_hook(keep)
    loop.train_from(None)
    # Of a prompt only the last position has logits at all; a group has the rows of one length.
    assert {output.shape[1] for output in seen} == {5}
    lengths = sorted(len(c) for c in COMPLETIONS)
    found = sorted(int((row.abs().sum(-1) > 0).sum()) for output in seen for row in output.grad)
    assert found == lengths
    for output in seen:
        for row in output.grad:
            used = row.abs().sum(-1) > 0
            assert used[: used.sum()].all(), "from the first token of the completion to its end token"


def test_each_model_has_its_rate_and_its_norm(make_loop):
    loop = make_loop(PROMPTS, COMPLETIONS, REWARDS, learning_rate=0.5, value_learning_rate=0.25, max_grad_norm=1e-3)
    start, head = weights_of(loop), loop.value_model.score.linear.bias.detach().clone()
    groups = {group["part"]: group["lr"] for group in loop.optimizer.param_groups}
    assert groups == {"policy": 0.5, "value": 0.25}
    loop.train_from(None)
    moved = sum(((w - start[n]) ** 2).sum() for n, w in weights_of(loop).items()) ** 0.5
    assert moved.item() == pytest.approx(0.5 * 1e-3, rel=1e-2)
    assert set(loop.grad_norms) == {"policy", "value"}
    assert all(norm > 1e-3 for norm in loop.grad_norms.values()), "of the gradients as they were"
    assert not torch.equal(head, loop.value_model.score.linear.bias)


def test_one_optimiser_step_an_update_where_gradients_are_accumulated(make_loop):
    loop = make_loop(PROMPTS, COMPLETIONS, REWARDS, per_device_train_batch_size=1, gradient_accumulation_steps=4,
                     max_steps=2)  # fmt: skip
    steps = []
    loop.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    loop.train_from(None)
    assert len(steps) == 2


def test_with_an_adapter_the_reference_is_the_base(make_loop):
    loop = make_loop(PROMPTS, COMPLETIONS, REWARDS, peft_config=lora(), max_steps=2, gradient_checkpointing=True)
    assert loop.ref_model is None
    start = weights_of(loop)
    loop.train_from(None)
    first, second = loop.logs
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert abs(second["objective/kl"]) > 1e-4
    changed = {name for name, weight in weights_of(loop).items() if not torch.equal(start[name], weight)}
    assert changed
    assert all("lora_" in name for name in changed)


def test_a_callback_can_stop_it(make_loop):
    from transformers import TrainerCallback

    class Enough(TrainerCallback):
        ended = 0

        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

        def on_train_end(self, *_, **__):
            self.ended += 1

    loop, enough = make_loop(PROMPTS, COMPLETIONS, REWARDS, max_steps=5), Enough()
    loop.add_callback(enough)
    loop.train_from(None)
    assert (loop.state.global_step, len(loop.logs), enough.ended) == (2, 2, 1)


def test_mixed_precision_is_what_was_asked_for(make_loop, monkeypatch):
    import os

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    make_loop(PROMPTS, COMPLETIONS, REWARDS)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "fp16", "put back"


def test_another_checkpoint_is_refused(make_loop, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(DataError, match=r"is no checkpoint of PPO over steps: it has no value_model\.safetensors"):
        make_loop(PROMPTS, COMPLETIONS, REWARDS).load(str(tmp_path / "checkpoint-3"))
