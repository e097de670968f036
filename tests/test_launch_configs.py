"""The files of accelerate_configs/ and deepspeed_configs/ start what they say, from any folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
SEVERAL_GPUS = sorted(name for name, (kind, *_, on_cpu) in EXPECTED.items() if kind != "NO" and not on_cpu)
# recipe -> its "Cluster:" line, words and all
CLUSTER = {
    path.stem: " ".join(found[1].split())
    for path in sorted((ROOT / "recipes").glob("*.py"))
    if (
        found := re.search(
            r"^Cluster: (accelerate .*?)\"{3}", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        )
    )
}
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


@pytest.fixture
def told(monkeypatch) -> Callable[..., SimpleNamespace]:
    """Runs `accelerate launch` up to the call that would start processes; gives what torch's launcher is told."""
    from accelerate.commands import launch as launching
    from accelerate.utils import launch as preparing

    seen: dict[str, Any] = {}

    def start(args):
        seen.update(vars(args), environment=dict(os.environ))

    monkeypatch.setattr("torch.distributed.run.run", start)
    monkeypatch.setattr(preparing, "is_port_in_use", lambda port: False)  # by whatever else runs on this machine

    def launch(*words: object) -> SimpleNamespace:
        seen.clear()
        launching.launch_command(launching.launch_command_parser().parse_args([str(word) for word in words]))
        return SimpleNamespace(**seen)

    return launch


@pytest.mark.parametrize("name", SEVERAL_GPUS)
def test_the_number_of_processes_is_a_flag(name, told):
    """Each file as it is: with another number, and over nodes; nothing is started."""
    if name in ZERO:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'rag-rl[dev]'")
    kind, processes, _ = EXPECTED[name]
    file = ["--config_file", ACCELERATE / f"{name}.yaml"]
    nodes = ["--num_machines", 2, "--machine_rank", 1, "--main_process_ip", "node1", "--main_process_port", 20001]
    if name != "multi_node":
        assert told(*file, "x.py").nproc_per_node == str(processes)
        found = told(*file, "--num_processes", 3, "x.py", "--config", "mine")
        assert (found.nproc_per_node, found.nnodes, found.training_script) == ("3", "1:1", "x.py")
        assert found.training_script_args == ["--config", "mine"]
    found = told(*file, *nodes, "--num_processes", 6, "x.py")
    assert (found.nproc_per_node, found.nnodes, found.node_rank) == ("3", "2", 1)
    assert (found.rdzv_endpoint, found.rdzv_backend) == ("node1:20001", "static")
    environment = found.environment
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment.get("ACCELERATE_USE_DEEPSPEED") == ("true" if kind == "DEEPSPEED" else None)
    assert environment.get("ACCELERATE_USE_FSDP") == ("true" if kind == "FSDP" else None)
    if kind == "DEEPSPEED":
        content = json.loads(environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
        assert content == json.loads((DEEPSPEED / f"{name}.json").read_text())
        assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == str(name.startswith("zero3")).lower()
    if kind == "FSDP":
        assert environment["FSDP_VERSION"] == "2"


def test_every_recipe_says_how_it_goes_over_nodes():
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    assert recipes - CLUSTER.keys() == {"build_index", "build_trajectories"}, "one process works there"


@pytest.mark.parametrize("recipe", sorted(CLUSTER))
def test_the_cluster_line_of_a_recipe(recipe, told, monkeypatch):
    monkeypatch.chdir(ROOT)
    line, _, remark = CLUSTER[recipe].partition(" (")
    assert remark == "on each node; docs/clusters.md says what the four are, and has a script for Slurm)"
    name = re.search(r"accelerate_configs/(\w+)\.yaml", line)
    assert name is not None
    assert name[1] in ("multi_node", *ZERO)
    if name[1] in ZERO:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install 'rag-rl[dev]'")
    for word, value in {"M": "3", "GPUS": "24", "RANK": "2", "HOST": "node1"}.items():
        assert len(re.findall(rf" {word}(?= )", line)) == 1
        line = line.replace(f" {word} ", f" {value} ")
    assert shlex.split(line)[:2] == ["accelerate", "launch"]
    found = told(*shlex.split(line)[2:])
    assert (found.nproc_per_node, found.nnodes, found.node_rank) == ("8", "3", 2)
    assert found.rdzv_endpoint == "node1:29500"
    assert (found.training_script, found.training_script_args) == (f"recipes/{recipe}.py", ["--config", "NAME"])


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
