"""Recipes that train a language model, with its base in 4 bits: what they train, and what they leave.

bitsandbytes does it on the CPU as well. What is trained there is an adapter over rounded weights; what is left must be
of use without them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rag_rl.tiny import FOLDER
from tests.recipes.run_folders import largest_difference, leftovers_in, metrics_of, names_in, weights_in
from tests.recipes.two_steps import BRIEF as TWO_STEPS
from tests.recipes.two_steps import SUMMING

START = FOLDER / "reader"
RANK = 4
BRIEF: dict[str, dict[str, Any]] = {
    **TWO_STEPS,
    "grpo_generator": {**TWO_STEPS["grpo_generator"], "per_device_train_batch_size": 8},
    "ppo_reasoner": {
        "data_train_size": 8, "data_eval_size": 3, "per_device_train_batch_size": 4, "updates_per_round": 2,
        "reasoner_max_steps": 2, "reasoner_baselines": "[]", "lora_target_modules": "all-linear",
        "save_merged": "true",
    },
}  # fmt: skip


@pytest.fixture
def trained(run_here, short, monkeypatch, tmp_path) -> Callable[..., Path]:
    """Runs a recipe with a quantised base, looks whether it was one, and gives the run folder."""
    import bitsandbytes

    import rag_rl.run

    save, layers = rag_rl.run.save_trained, []

    def look_and_save(trainer: Any, folder: Path, **options: Any) -> None:
        layers.extend(module for module in trainer.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit))
        save(trainer, folder, **options)

    def run(recipe: str, *flags: object, **changes: object) -> Path:
        folder = tmp_path / "run"
        words = short(**{"headroom_samples": None, "max_steps": 2, **BRIEF[recipe], **changes})
        words += ["--use_peft", "true", "--load_in_4bit", "true", "--lora_r", str(RANK)]
        assert run_here(recipe, *words, *flags, "--output_dir", folder) == 0
        found = metrics_of(folder)
        assert (found["status"], found["n_eval"]) == ("complete", 3)
        assert layers, "the base was not in 4 bits"
        assert {str(layer.weight.dtype) for layer in layers} == {"torch.uint8"}
        return folder

    (tmp_path / "summing.py").write_text(SUMMING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(rag_rl.run, "save_trained", look_and_save)
    return run


def check_merged(folder: Path) -> None:
    """Asserts that the weights of a run are those of the whole base and of an adapter, and load as such."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    assert not [name for name in names_in(folder) if name.startswith("adapter")]
    assert leftovers_in(folder) == []
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    plain, start = weights_in(folder), load_file(START / "model.safetensors")
    assert {name: (weight.shape, weight.dtype) for name, weight in plain.items()} == {
        name: (weight.shape, torch.float32) for name, weight in start.items()
    }
    moved = {name: plain[name] - weight for name, weight in start.items() if not plain[name].equal(weight)}
    assert set(moved) == {name for name, weight in start.items() if weight.dim() == 2 and "embed" not in name}
    # What was added is an adapter's: rounding the base to 4 bits would have changed it in every direction.
    for name, change in moved.items():
        assert change.abs().max() > 1e-5, name
        assert torch.linalg.matrix_rank(change, rtol=1e-3) <= RANK, name
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert not getattr(loaded, "is_loaded_in_4bit", False)
    assert largest_difference(loaded.state_dict(), plain) == 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(BRIEF))
def test_merged_weights_are_those_of_the_whole_base_and_the_adapter(recipe, trained):
    check_merged(trained(recipe))


# The reward runs in the processes of the recipe: it tells how their layers are stored.
LOOKING = """
import gc
import os

import bitsandbytes


def look(*, completion_ids, **_):
    layers = [one for one in gc.get_objects() if isinstance(one, bitsandbytes.nn.Linear4bit)]
    kinds = {(str(one.weight.dtype), hasattr(one.weight, "ds_id")) for one in layers}
    with open(f"layers-{os.environ['RANK']}", "w") as file:
        print(len(layers), sorted(kinds), file=file)
    return [float(sum(ids) % 7) for ids in completion_ids]
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(stage, launch_recipe, short, tmp_path):
    """Two processes under DeepSpeed; at stage 3 they share out the 4-bit weights as well."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'rag-rl[dev]'")
    folder = tmp_path / "run"
    (tmp_path / "looking.py").write_text(LOOKING)
    brief = {**BRIEF["grpo_generator"], "per_device_train_batch_size": 4, "reward_names": "looking:look"}
    flags = [*short(**{"max_steps": 2, **brief}), "--load_in_4bit", "true", "--lora_r", RANK]
    environment = {"PYTHONPATH": str(tmp_path)}
    launch_recipe(
        "grpo_generator", *flags, "--output_dir", folder, config=f"zero{stage}", cwd=tmp_path, env=environment
    )
    found = metrics_of(folder)
    assert (found["num_processes"], found["status"], found["n_eval"]) == (2, "complete", 3)
    for rank in (0, 1):
        number, kinds = (tmp_path / f"layers-{rank}").read_text().split(maxsplit=1)
        assert int(number) > 0
        assert kinds == f"[('torch.uint8', {stage == 3})]\n"
    check_merged(folder)


@pytest.mark.slow
def test_an_adapter_goes_onto_the_whole_base(trained):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = trained("sft_reasoner", save_merged="false")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names_in(folder)
    assert not {"model.safetensors", "config.json"} & names_in(folder)
    base = AutoModelForCausalLM.from_pretrained(START)
    model = PeftModel.from_pretrained(base, str(folder))
    added = {name: weight for name, weight in model.named_parameters() if "lora_B" in name}
    assert added
    assert all(weight.is_floating_point() for weight in model.parameters())
    assert all(weight.any() for weight in added.values()), "an adapter begins with nothing in its second half"
    assert torch.isfinite(model(input_ids=torch.arange(3, 9)[None]).logits).all()
