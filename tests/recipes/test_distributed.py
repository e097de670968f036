"""Recipes under DeepSpeed's ZeRO and on two nodes, and how FSDP2 wraps a model: two real processes each, on the CPU.

That each recipe runs under DDP, and does there what it does alone, stands in the test of each.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from rag_rl.tiny import FOLDER
from tests.loopback import free_port
from tests.recipes.run_folders import difference, history_of, metrics_of, steps_of
from tests.recipes.two_steps import BRIEF, SUMMING

ROOT = Path(__file__).parents[2]


def flags_of(short, recipe: str) -> list[str]:
    return short(**{"headroom_samples": None, "max_steps": 2, **BRIEF[recipe]})


# ---- DeepSpeed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "config"),
    [
        *itertools.product(sorted(BRIEF), ["zero2", "zero3"]),
        ("sft_reasoner", "zero1"),
        ("sft_reasoner", "zero3_offload"),
    ],
)
def test_zero(recipe, config, launch_recipe, short, tmp_path):
    """As shipped, but on the CPU; the adapter of the tiny configs is merged into the base in the end."""
    from safetensors.torch import load_file

    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'rag-rl[dev]'")
    folder = tmp_path / "run"
    (tmp_path / "summing.py").write_text(SUMMING)
    flags = [*flags_of(short, recipe), "--output_dir", folder]
    done = launch_recipe(recipe, *flags, config=config, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    found = metrics_of(folder)
    assert (found["num_processes"], found["status"], found["n_eval"]) == (2, "complete", 3)
    assert steps_of(folder) == [1, 2]
    assert done.stdout.count("held-out questions; trained") == 1
    # Each process keeps its own part of the state; at stage 3 of the weights as well.
    parts = sorted(path.name for path in (folder / "checkpoint-2" / "global_step2").iterdir())
    assert len([name for name in parts if name.endswith("optim_states.pt")]) == 2, parts
    assert len([name for name in parts if name.endswith("model_states.pt")]) == (2 if "3" in config else 1), parts
    # Whole weights, and not those that it began with.
    start, trained = load_file(FOLDER / "reader" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert {name: weight.shape for name, weight in trained.items()} == {
        name: weight.shape for name, weight in start.items()
    }
    assert difference(FOLDER / "reader", folder) > 1e-5
    assert not (folder / "adapter_config.json").exists()


@pytest.mark.slow
def test_goes_on_under_zero3(launch_recipe, short, tmp_path):
    """From the first of three checkpoints: the steps after it have the losses that they had."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'rag-rl[dev]'")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    changes = {**BRIEF["sft_reasoner"], "max_steps": 3, "save_steps": 1, "save_total_limit": 3}
    flags = short(**{"headroom_samples": None, **changes})
    launch_recipe("sft_reasoner", *flags, "--output_dir", whole, config="zero3", cwd=tmp_path)
    # As if it had been killed in its second step.
    later = shutil.ignore_patterns("checkpoint-*", "metrics.json", "*.safetensors", "trainer_state.json")
    shutil.copytree(whole, stopped, ignore=later)
    shutil.copytree(whole / "checkpoint-1", stopped / "checkpoint-1")
    # What only the checkpoint says: the first step is not done again.
    state = json.loads((stopped / "checkpoint-1" / "trainer_state.json").read_text())
    state["log_history"][0]["loss"] = 123.0
    (stopped / "checkpoint-1" / "trainer_state.json").write_text(json.dumps(state))
    flags += ["--resume_from_checkpoint", "true"]
    launch_recipe("sft_reasoner", *flags, "--output_dir", stopped, config="zero3", cwd=tmp_path)
    assert steps_of(stopped) == [1, 2, 3]
    losses = [row["loss"] for row in history_of(whole)]
    assert [row["loss"] for row in history_of(stopped)] == pytest.approx([123.0, *losses[1:]])
    assert metrics_of(stopped)["before"] == metrics_of(whole)["before"]
    assert difference(whole, stopped) < 1e-4 * difference(FOLDER / "reader", whole)


# ---- nodes


@pytest.mark.slow
def test_two_nodes(accelerate_command, cpu_environment, short, tmp_path):
    """The same command twice, as on two machines with one process each; they meet on loopback."""
    folder, port = tmp_path / "run", free_port()
    changes = {"per_device_train_batch_size": 4, "reranker_candidates": 8, "data_eval_size": 11, "max_steps": 2}
    flags = [*short(headroom_samples=None, **changes), "--output_dir", folder]
    nodes = []
    for rank in (0, 1):
        command = accelerate_command(
            "train_reranker", *flags, config="multi_node", folder=tmp_path, machine=(rank, port)
        )
        log = (tmp_path / f"node-{rank}.log").open("wb")
        nodes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=cpu_environment))
        log.close()
    try:
        codes = [node.wait(timeout=600) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    logs = [(tmp_path / f"node-{rank}.log").read_text() for rank in (0, 1)]
    assert codes == [0, 0], logs
    found = metrics_of(folder)
    assert (found["num_processes"], found["status"], found["n_eval"]) == (2, "complete", 11)
    assert ["held-out questions; trained" in log for log in logs] == [True, False], "one writer"


# ---- FSDP2: accelerate runs it on GPUs only, so its policy is carried out with torch's own fully_shard

SHARDED = """
import json
import sys

import torch
import torch.distributed as dist
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

launch_file, folder = sys.argv[1:]
with open(launch_file, encoding="utf-8") as lines:
    settings = yaml.safe_load(lines)["fsdp_config"]
plugin = FullyShardedDataParallelPlugin(
    **{name.removeprefix("fsdp_") if name != "fsdp_version" else name: value for name, value in settings.items()
       if name not in ("fsdp_offload_params", "fsdp_auto_wrap_policy")},
    auto_wrap_policy=settings["fsdp_auto_wrap_policy"].lower(),
)
dist.init_process_group("gloo")
rank = dist.get_rank()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
plugin.set_auto_wrap_policy(model)
wrapped = fsdp2_prepare_auto_wrap_policy(plugin, model)
mesh = init_device_mesh("cpu", (2,))
layers = [module for module in model.modules() if module is not model and wrapped(module)]
names = [type(layer).__name__ for layer in layers]  # fully_shard gives them classes of its own
for layer in layers:
    fully_shard(layer, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
fully_shard(model, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
tokens = torch.randint(3, 2000, (2, 2, 16), generator=torch.Generator().manual_seed(0))
optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, alone)]
for _ in range(3):
    model(input_ids=tokens[rank], labels=tokens[rank]).loss.backward()
    both = tokens.flatten(0, 1)
    alone(input_ids=both, labels=both).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    expected = alone.state_dict()
    print("FOUND" + json.dumps({
        "processes": dist.get_world_size(),
        "layers": names,
        "sharded": all(isinstance(weight, DTensor) for weight in model.parameters()),
        "moved": max((expected[name] - start[name]).abs().max().item() for name in start),
        "apart": max((expected[name] - whole[name]).abs().max().item() for name in expected),
    }))
dist.barrier()
from rag_rl.run import end_processes

end_processes(0)
"""


@pytest.mark.slow
def test_fsdp2_wraps_each_layer(launch_recipe, tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    done = launch_recipe(script, ROOT / "accelerate_configs" / "fsdp2.yaml", FOLDER / "reader", cwd=tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if "FOUND" in line]
    found = json.loads(line.split("FOUND", 1)[1])
    assert found["processes"] == 2
    assert found["layers"] == ["Lfm2DecoderLayer"] * 4
    assert found["sharded"] is True
    assert found["moved"] > 1e-3
    assert found["apart"] < 1e-5
