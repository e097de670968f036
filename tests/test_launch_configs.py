"""The files of accelerate_configs/ and deepspeed_configs/ start what they say, from any folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
ACCELERATE = ROOT / "accelerate_configs"
DEEPSPEED = ROOT / "deepspeed_configs"
# name -> (distributed_type, processes, on the CPU)
EXPECTED = {
    "cpu": ("NO", 1, True),
    "cpu_2proc": ("MULTI_GPU", 2, True),
    "single_gpu": ("NO", 1, False),
    "multi_gpu": ("MULTI_GPU", 8, False),
    "multi_node": ("MULTI_GPU", 16, False),
    "fsdp2": ("FSDP", 8, False),
    "zero1": ("DEEPSPEED", 8, False),
    "zero2": ("DEEPSPEED", 8, False),
    "zero3": ("DEEPSPEED", 8, False),
    "zero3_offload": ("DEEPSPEED", 8, False),
}
ZERO = sorted(name for name in EXPECTED if name.startswith("zero"))
# As the Trainer does it: its arguments set up the process group, and only then comes the Accelerator.
PROBE = """
import json
from accelerate import Accelerator
from transformers import TrainingArguments

world_size = TrainingArguments("out", use_cpu=True, bf16=False, report_to="none").world_size
accelerator = Accelerator()
plugin = accelerator.state.deepspeed_plugin
found = {"processes": accelerator.num_processes, "stage": plugin.zero_stage if plugin else None}
assert world_size == accelerator.num_processes
accelerator.wait_for_everyone()
if accelerator.is_main_process:
    print("FOUND" + json.dumps(found))
from rag_rl.run import end_processes

end_processes(0)
"""


def launch(config: Path, folder: Path, *, timeout: float) -> dict[str, int | None]:
    """Runs the probe through `accelerate launch` from `folder` and returns what it saw."""
    script = folder / "probe.py"
    script.write_text(PROBE)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(script)]
    # So that the compiler which DeepSpeed calls finds ninja, even where the environment is not activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if "FOUND" in line]
    assert len(found) == 1, done.stdout + done.stderr
    return json.loads(found[0].split("FOUND", 1)[1])


def test_every_file_is_expected():
    assert sorted(path.stem for path in ACCELERATE.iterdir()) == sorted(EXPECTED)
    assert sorted(path.stem for path in DEEPSPEED.iterdir()) == ZERO


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_accelerate_reads_it(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ACCELERATE / f"{name}.yaml"))
    kind, processes, on_cpu = EXPECTED[name]
    assert (config.distributed_type.value, config.num_processes, config.use_cpu) == (kind, processes, on_cpu)
    # A precision in the launch file would win over the recipe's own flag; beside a DeepSpeed config it is an error.
    assert config.mixed_precision == (None if kind == "DEEPSPEED" else "no")


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_it_says_how_it_is_launched(name):
    text = (ACCELERATE / f"{name}.yaml").read_text()
    assert f"accelerate launch --config_file accelerate_configs/{name}.yaml" in text.split("compute_environment")[0]


@pytest.mark.parametrize("name", ZERO)
def test_zero_yaml_holds_its_json(name):
    settings = yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text())["deepspeed_config"]
    expected = json.loads((DEEPSPEED / f"{name}.json").read_text())
    assert json.loads(settings["deepspeed_config_file"]) == expected, (
        f"copy deepspeed_configs/{name}.json into the yaml"
    )
    assert f"deepspeed_configs/{name}.json" in (ACCELERATE / f"{name}.yaml").read_text()
    stage = expected["zero_optimization"]["stage"]
    assert stage == int(name[4])
    assert settings["zero3_init_flag"] == (stage == 3)
    if stage == 3:  # without it save_model writes no weights
        assert expected["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize("name", ZERO)
def test_zero_yaml_is_understood_from_any_folder(name, tmp_path, monkeypatch):
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text())["deepspeed_config"]
    config = HfDeepSpeedConfig(settings["deepspeed_config_file"])
    assert config.is_zero3() == name.startswith("zero3")
    assert config.is_offload() == name.endswith("offload")


@pytest.mark.slow
def test_two_cpu_processes_are_two(tmp_path):
    assert launch(ACCELERATE / "cpu_2proc.yaml", tmp_path, timeout=180) == {"processes": 2, "stage": None}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_zero_starts_from_another_folder(name, tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'rag-rl[dev]'")
    # As shipped, but with two processes on the CPU (gloo). The first start compiles a DeepSpeed kernel (1-2 minutes).
    config = yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text())
    config.update(use_cpu=True, num_processes=2, main_process_port=0)
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    assert launch(path, tmp_path, timeout=400) == {"processes": 2, "stage": int(name[4])}
