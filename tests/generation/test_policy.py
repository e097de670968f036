from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rag_rl.errors import ConfigError, DataError
from rag_rl.generation import PolicyGenerator, TransformersGenerator
from rag_rl.types import Generator

PROMPTS = ["Who rules the town?", "river", [{"role": "user", "content": "What is the capital of the state?"}]]


def make_trainer(model, tokenizer, folder, **config):
    """A real GRPO trainer whose reward asks nothing of the model."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def id_reward(completion_ids, **_):
        return [float(sum(ids)) for ids in completion_ids]

    return GRPOTrainer(
        model=model,
        reward_funcs=id_reward,
        args=GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            num_generations=2,
            per_device_train_batch_size=2,
            max_completion_length=4,
            max_steps=1,
            learning_rate=1e-2,
            disable_tqdm=True,
            **config,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["Who rules the town?", "river", "king", "road"]}),
        processing_class=tokenizer,
    )


@pytest.fixture
def trainer(fresh_model, tokenizer, tmp_path):
    return make_trainer(fresh_model, tokenizer, tmp_path)


def greedy(generator, prompts=PROMPTS):
    return generator.generate(prompts, max_new_tokens=6, temperature=0.0)


def test_is_the_model_as_it_trains(trainer, tokenizer):
    policy = PolicyGenerator(trainer)
    assert isinstance(policy, Generator)
    untrained = greedy(policy)
    assert untrained == greedy(TransformersGenerator(copy.deepcopy(trainer.model), tokenizer))
    trainer.train()
    trained = greedy(policy)
    assert trained == greedy(TransformersGenerator(copy.deepcopy(trainer.model), tokenizer))
    before, after = (
        policy.generate(["river"], n=4, max_new_tokens=6, temperature=1.0, seed=seed)[0] for seed in (0, 1)
    )
    assert before != after


@pytest.mark.parametrize("checkpointing", [False, True])
def test_inside_a_rollout_training_goes_on(fresh_model, tokenizer, tmp_path, checkpointing):
    """Generation in mid-step: ids go straight to the loss, and gradients still flow afterwards."""
    trainer = make_trainer(fresh_model, tokenizer, tmp_path, gradient_checkpointing=checkpointing)
    policy = PolicyGenerator(trainer)
    seen = {}

    def rollout(prompts, trainer):
        assert trainer.model.training
        widths = []
        hook = trainer.model.model.embed_tokens.register_forward_hook(lambda _, a, __: widths.append(a[0].shape[1]))
        rows = policy.generate(prompts, max_new_tokens=4, temperature=1.0, seed=7)
        hook.remove()
        assert trainer.model.training
        assert trainer.model.is_gradient_checkpointing == checkpointing
        seen.update(widths=widths, rows=rows, prompts=prompts)
        return {
            "prompt_ids": policy.encode(prompts),
            "completion_ids": [list(row[0].token_ids) for row in rows],
            "logprobs": None,
        }

    trainer.rollout_func = rollout
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert set(seen["widths"][1:]) == {1}, "the cache is used"
    assert [row[0].prompt_tokens for row in seen["rows"]] == policy.prompt_tokens(seen["prompts"])
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


def test_errors_and_edges(trainer):
    policy = PolicyGenerator(trainer, max_prompt_tokens=5)
    assert greedy(policy, []) == []
    assert policy.synchronised(True) is True
    assert policy.synchronised(False) is False
    assert policy.prompt_limit(6) == 5
    with pytest.raises(DataError, match="longer than the 5 tokens"):
        greedy(policy, ["the king took the old road to the river"])
    with pytest.raises(ConfigError, match="n must be"):
        policy.generate(["river"], n=0, max_new_tokens=2, temperature=1.0)
    with pytest.raises(ConfigError, match="batch_size"):
        PolicyGenerator(trainer, batch_size=0)
    with pytest.raises(ConfigError, match="generator_type must be 'instruct' or 'base'"):
        PolicyGenerator(trainer, generator_type="api")


def test_reads_prompts_as_the_same_model_outside_training(trainer, tokenizer):
    for settings in ({}, {"generator_type": "base", "max_prompt_tokens": 9}):
        policy = PolicyGenerator(trainer, **settings)
        outside = TransformersGenerator(trainer.model, tokenizer, **settings)
        assert policy.encode(PROMPTS) == outside.encode(PROMPTS)
        assert policy.prompt_tokens(PROMPTS) == outside.prompt_tokens(PROMPTS)
        assert [policy.prompt_limit(n) for n in (6, 250)] == [outside.prompt_limit(n) for n in (6, 250)]
    assert policy.model is trainer.model


class Engine:
    """Stands in for the vLLM engine, which needs a GPU: the same call, answers from a table."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.temperature, self.top_p, self.max_completion_length = 0.9, 0.8, 77
        self.generation_kwargs = {"stop_token_ids": [5]}
        self.syncs, self.calls = 0, []

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        settings = (self.temperature, self.top_p, self.max_completion_length, self.generation_kwargs)
        self.calls.append((prompts, images, num_generations, settings))
        replies = [self.tokenizer(f"reply {i}. more")["input_ids"] for i in range(len(prompts))]
        return prompts, replies, None, None


def test_vllm_calls(trainer, tokenizer):
    engine = Engine(tokenizer)
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, engine, -1
    policy = PolicyGenerator(trainer)
    rows = policy.generate(["river", "king"], n=2, max_new_tokens=9, temperature=0.5, top_p=0.7, stop=["."])
    assert [[one.text for one in row] for row in rows] == [["reply 0", "reply 1"], ["reply 2", "reply 3"]]
    (prompts, images, num_generations, settings), *more = engine.calls
    assert not more
    assert (images, num_generations) == (None, 1)
    assert prompts == [ids for ids in policy.encode(["river", "king"]) for _ in range(2)]
    assert settings == (0.5, 0.7, 9, {"stop_token_ids": [5], "stop": ["."]})
    assert (engine.temperature, engine.top_p, engine.max_completion_length) == (0.9, 0.8, 77)
    assert engine.generation_kwargs == {"stop_token_ids": [5]}
    # A rank without prompts of its own still takes part, and the weights go over once a step.
    assert policy.generate([], max_new_tokens=9, temperature=0.5) == []
    assert len(engine.calls) == 2
    assert engine.syncs == 1


def test_the_internals_of_trl_are_as_expected():
    from trl import GRPOTrainer
    from trl.generation.vllm_generation import VLLMGeneration
    from trl.models import unwrap_model_for_generation

    assert list(inspect.signature(VLLMGeneration.generate).parameters) == [
        "self",
        "prompts",
        "images",
        "num_generations",
        "profiler",
    ]
    assert list(inspect.signature(unwrap_model_for_generation).parameters)[:3] == [
        "model",
        "accelerator",
        "gather_deepspeed3_params",
    ]
    source = inspect.getsource(VLLMGeneration)
    for name in ("temperature", "top_p", "max_completion_length", "generation_kwargs"):
        assert f"self.{name} = " in source
    assert "self._last_loaded_step" in inspect.getsource(GRPOTrainer)


TWO_RANKS = """
import torch
from types import SimpleNamespace
from accelerate import Accelerator
from rag_rl.generation.policy import PolicyGenerator
from rag_rl.tiny.tokenizer import build_tokenizer
import conftest

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
tokenizer = build_tokenizer()
model = accelerator.prepare(conftest.make_model(tokenizer))
trainer = SimpleNamespace(
    accelerator=accelerator, model_wrapped=model, processing_class=tokenizer,
    args=SimpleNamespace(ds3_gather_for_generation=True),
)
policy = PolicyGenerator(trainer, batch_size=2)
rank = accelerator.process_index
assert policy.synchronised(rank == 1) is True
assert policy.synchronised(False) is False
# Forced to go in step, as ZeRO-3 and FSDP do: 3 passes on rank 0, none of its own on rank 1.
policy._forward_is_collective = lambda: True
prompts = ["river", "king", "road", "town", "water"] if rank == 0 else []
rows = policy.generate(prompts, max_new_tokens=4 + rank, temperature=0.0)
assert len(rows) == len(prompts)
same = policy.generate(["river"], n=8, max_new_tokens=8, temperature=1.0, seed=3)
texts = accelerator.gather(torch.tensor([hash(str([one.token_ids for one in same[0]])) % 2**31]))
assert texts[0] != texts[1], "ranks sample differently"
accelerator.wait_for_everyone()
print("rank", rank, "done")
from rag_rl.run import end_processes

end_processes(0)
"""


@pytest.mark.slow
def test_two_ranks_with_unequal_work_stay_in_step(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    # The launcher's own traceback comes last and says nothing: show all there is.
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2


def test_a_trainer_like_object_is_enough(fresh_model, tokenizer):
    from accelerate import Accelerator

    like = SimpleNamespace(
        accelerator=Accelerator(cpu=True), model_wrapped=fresh_model, processing_class=tokenizer, args=None
    )
    assert greedy(PolicyGenerator(like)) == greedy(TransformersGenerator(fresh_model, tokenizer))
