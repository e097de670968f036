"""``--help`` costs what importing TRL's config costs, and little more."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "grpo_generator.py"


def cpu_seconds(*command: str) -> float:
    """CPU time, not the clock's: other tests run beside this one, and their load is none of the command's cost."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_help_is_quick():
    floor = ("-c", "from trl import GRPOConfig")
    cpu_seconds(*floor)  # warms the file cache
    pairs = [(cpu_seconds(str(RECIPE), "--help"), cpu_seconds(*floor)) for _ in range(3)]
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
