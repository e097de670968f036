"""Recipes in two real processes: those that train nothing do their work once, and PPO's processes stay together.

That the other trainers do under DDP what they do alone, stands in the test of each.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.recipes.run_folders import metrics_of, steps_of

RECIPES = Path(__file__).parents[2] / "recipes"


def check_two_processes(done: subprocess.CompletedProcess[str]) -> None:
    """A launcher that starts one process only says nothing of it."""
    assert re.findall(r"process (\d) of 2\n", done.stderr).count("1") == 1, done.stderr[-3000:]
    assert re.findall(r"process (\d) of 2\n", done.stderr).count("2") == 1, done.stderr[-3000:]


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- recipes that train nothing


@pytest.mark.slow
def test_one_of_two_builds_the_index(run_here, launch_recipe, capsys, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert run_here("build_index", "--output_dir", alone) == 0
    shown = capsys.readouterr().out
    done = launch_recipe("build_index", "--output_dir", both, cwd=tmp_path)
    check_two_processes(done)
    names = re.findall(r"^([a-z@0-9]+) ", shown, flags=re.MULTILINE)
    assert {"index", "fingerprint", "recall@3"} <= set(names)
    assert re.findall(r"^([a-z@0-9]+) ", done.stdout, flags=re.MULTILINE) == names, "one table"
    # Bars as they begin: one process embeds, the other finds it done and looks whether it is the same corpus.
    assert [done.stderr.count(f"{work}:   0%") for work in ("indexing", "comparing")] == [1, 1]
    assert content_of(both) == content_of(alone)


@pytest.mark.slow
def test_one_of_two_collects_the_chains(run_here, launch_recipe, capsys, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    flags = ["--data_train_size", 40]
    assert run_here("build_trajectories", *flags, "--output_dir", alone) == 0
    shown = capsys.readouterr().out
    done = launch_recipe("build_trajectories", *flags, "--output_dir", both, cwd=tmp_path)
    check_two_processes(done)
    assert "solved" in shown
    assert done.stdout.replace(str(both), str(alone)) == shown, "one table"
    assert done.stderr.count("chains:   0%") == 1, "one bar as it begins"
    assert content_of(both) == content_of(alone)


# ---- PPO

# The recipe as it is; around its training each process notes what it was asked, and where its weights went.
WATCHED = """
import json
import runpy
import sys

import torch
from accelerate.utils import gather_object

from rag_rl.trainers.step_ppo_trainer import StepPPOTrainer


def trained(trainer):
    models = {"policy": trainer.model, "value": trainer.loop.value_model}
    return {
        name: torch.cat([w.detach().double().flatten() for w in model.parameters() if w.requires_grad])
        for name, model in models.items()
    }


def figures(start, end):
    # The length of the way says how far, its product with a fixed direction whereto.
    found = {}
    for name, weights in start.items():
        way = end[name] - weights
        direction = torch.randn(len(way), generator=torch.Generator().manual_seed(0), dtype=torch.double)
        found[name] = [float(way.norm()), float(way @ direction)]
    return found


train, draw, asked = StepPPOTrainer.train, StepPPOTrainer._draw, []


def watched_draw(self, number):
    found = draw(self, number)
    asked.extend(question.qid for question in found)
    return found


def watched_train(self, *args, **options):
    start = trained(self)
    train(self, *args, **options)
    both = gather_object([{"asked": asked, **figures(start, trained(self))}])
    if self.accelerator.is_main_process:
        print("FOUND" + json.dumps(both))


StepPPOTrainer.train, StepPPOTrainer._draw = watched_train, watched_draw
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "peft", [(), ("--use_peft", "true", "--lora_target_modules", "all-linear")], ids=["full", "lora"]
)
def test_ppo_keeps_the_weights_of_both_processes_the_same(launch_recipe, short, tmp_path, peft):
    script, folder = tmp_path / "watched.py", tmp_path / "run"
    script.write_text(WATCHED)
    flags = short(
        headroom_samples=None, updates_per_round=2, reasoner_max_steps=2, per_device_train_batch_size=8,
        data_eval_size=4, reasoner_baselines="[]",
    )  # fmt: skip
    done = launch_recipe(script, RECIPES / "ppo_reasoner.py", *flags, *peft, "--output_dir", folder, cwd=tmp_path)
    assert (metrics_of(folder)["num_processes"], steps_of(folder, "reward")) == (2, [1, 2, 3])
    (line,) = [line for line in done.stdout.splitlines() if "FOUND" in line]
    one, two = json.loads(line.split("FOUND", 1)[1])
    assert one["asked"] != two["asked"], "each process has questions of its own"
    for model in ("policy", "value"):
        assert one[model][0] > 1e-6, f"the {model} model has learnt something"
        assert two[model] == pytest.approx(one[model], rel=1e-12), f"the {model} models have drifted apart"
