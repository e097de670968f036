"""``--help`` costs what importing TRL's config costs, and little more."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "grpo_generator.py"


def seconds(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.perf_counter() - started


@pytest.mark.slow
def test_help_is_quick():
    floor = ("-c", "from trl import GRPOConfig")
    seconds(*floor)  # warms the file cache
    pairs = [(seconds(str(RECIPE), "--help"), seconds(*floor)) for _ in range(3)]
    ratio = statistics.median(ours for ours, _ in pairs) / statistics.median(theirs for _, theirs in pairs)
    assert ratio <= 1.3, pairs


@pytest.mark.smoke
def test_help_names_every_flag(run_recipe):
    done = run_recipe("grpo_generator", "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "accelerate launch recipes/grpo_generator.py" in done.stdout
    for flag in ("--config", "--retriever_top_k", "--reward_names", "--num_generations", "--lora_r", "--seed"):
        assert flag in done.stdout
