"""docs/clusters.md: its commands can be typed, its script is a script, its figures are those of `rag-rl doctor`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rag_rl.config.memory import GIB
from rag_rl.config.sizing import find_config, read_launch, size_config
from tests.scripts import load

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
(SCRIPT,) = [block for block in BLOCKS if block.startswith("#!")]
TYPED = [block for block in BLOCKS if block != SCRIPT]
BERT = {"model_type": "bert", "architectures": ["BertModel"]}
QWEN = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16"}
XLM = {
    "model_type": "xlm-roberta", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "vocab_size": 250002, "max_position_embeddings": 8194, "type_vocab_size": 1,
}  # fmt: skip
# What the models' config.json say of their sizes.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": {
        **QWEN, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        **QWEN, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "meta-llama/Meta-Llama-3-8B-Instruct": {
        "model_type": "llama", "dtype": "bfloat16", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-Embedding-0.6B": {
        "model_type": "qwen3", "dtype": "bfloat16", "hidden_size": 1024, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
        "vocab_size": 151669, "tie_word_embeddings": True,
    },
    "sentence-transformers/all-MiniLM-L6-v2": {
        **BERT, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536,
    },
    "intfloat/e5-base-v2": BERT,
    "facebook/contriever": BERT,
    "BAAI/bge-m3": XLM,
    "BAAI/bge-reranker-v2-m3": XLM,
}  # fmt: skip


# Stand-ins for what a login node has: each notes how it was called, and does as little as the next line needs.
CALLED = """#!/bin/bash
{ printf '%s\\037' "${0##*/}" "$@"; printf '\\036'; } >> "$CALLS"
"""
PROGRAMS = {
    "accelerate": '[ -z "${HANG:-}" ] || { touch "$HANG"; exec sleep 30; }\nexit "${CODE:-0}"\n',
    "sbatch": "echo 4711\n",
    # Pending at first: no node yet.
    "squeue": '[ ! -f "$CALLS.pending" ] || echo node7\ntouch "$CALLS.pending"\n',
    "curl": '[ -f "$CALLS.loading" ] || { touch "$CALLS.loading"; exit 22; }\n',
    # More names than a pipe holds: a reader that leaves after the first line would end it by SIGPIPE.
    "scontrol": '[ "$1" != show ] || seq --format=node%g 1 20000\n',
    "srun": 'while [ "$1" != bash ]; do shift; done\nexec "$@"\n',
    "sleep": "",
    "rag-rl": "",
    "vllm": "",
    "hf": "",
}


class Shell:
    """A bash whose programs are the stand-ins, and nothing of this process's environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "calls"
        (folder / "bin").mkdir()
        for name, text in PROGRAMS.items():
            path = folder / "bin" / name
            path.write_text(CALLED + text.replace("exec sleep", "exec /bin/sleep"))
            path.chmod(0o755)
        path = f"{folder / 'bin'}:/usr/bin:/bin"
        self.environment = {"PATH": path, "USER": "me", "HOME": str(folder), "CALLS": str(self.log)}

    def run(self, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """As typed at a login node, but that an unset variable is an error."""
        command = ["bash", "-u", "-c", text]
        settings = {**self.environment, **environment}
        return subprocess.run(command, env=settings, capture_output=True, text=True, check=False, timeout=300)

    @property
    def calls(self) -> list[list[str]]:
        text = self.log.read_text(encoding="utf-8") if self.log.exists() else ""
        return [call.split("\037")[:-1] for call in text.split("\036")[:-1]]

    def called(self, name: str) -> list[list[str]]:
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def shell(tmp_path) -> Shell:
    (tmp_path / "shell").mkdir()
    return Shell(tmp_path / "shell")


def check_launch(words: list[str], folder: Path) -> dict[str, Any]:
    """What `accelerate` was called with: accelerate takes it, the recipe does, and what needs a key gets along."""
    from accelerate.commands.launch import launch_command_parser

    from rag_rl.config import read_arguments
    from rag_rl.config.arguments import JudgeArguments
    from rag_rl.config.parts import build_judge

    assert words[0] == "launch"
    known = launch_command_parser().parse_args(words[1:])
    assert (ROOT / known.config_file).is_file()
    recipe = ROOT / known.training_script
    arguments = load(recipe).ARGUMENTS
    config = known.training_script_args[known.training_script_args.index("--config") + 1]
    header = (ROOT / "recipes" / "configs" / recipe.stem / f"{config}.yaml").read_text(encoding="utf-8")
    keys = {
        name: "-".join(["marked", "fake", "key"]) for name in re.findall(r"^#.*?\b([A-Z]+_API_KEY)\b", header, re.M)
    }
    # Without a GPU transformers refuses bf16, unless the CPU is asked for.
    filled = read_arguments(recipe, *arguments, argv=[*known.training_script_args, "--use_cpu", "true"])
    for one in filled:
        if isinstance(one, JudgeArguments) and one.judge_name:
            one.judge_cache = str(folder / "verdicts")
            with pytest.MonkeyPatch.context() as patch:
                for name, key in keys.items():  # that the config says it needs
                    patch.setenv(name, key)
                assert build_judge(one) is not None
    settings: dict[str, Any] = {}
    for one in filled:
        settings |= vars(one)
    return settings


def check_rag_rl(words: list[str]) -> None:
    """What `rag-rl` was called with."""
    from rag_rl.cli import _parser

    known = _parser().parse_args(words)
    if getattr(known, "launch", None):
        read_launch(str(ROOT / known.launch), known.processes)
    if known.config is not None and words[0] == "doctor":
        find_config(str(known.config).removeprefix("recipes/configs/").removesuffix(".yaml"), [ROOT / "recipes"])


@pytest.fixture
def without_keys(monkeypatch):
    """A machine on which no key is set."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAG_RL_DATA", "data")


def test_there_is_something_to_check():
    assert len(BLOCKS) >= 8
    assert sum("accelerate launch" in block for block in TYPED) >= 6


@pytest.mark.parametrize("block", TYPED, ids=range(len(TYPED)))
def test_every_block_can_be_typed(block, shell, tmp_path, without_keys):
    done = shell.run(block)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(shell.called("accelerate")) == block.count("accelerate launch")
    for words in shell.called("accelerate"):
        settings = check_launch(words, tmp_path)
        for name, value in settings.items():
            if name.endswith("_url") and value and "localhost" not in str(value):
                assert "node7" in str(value), f"{name}: the node was not there yet"
    for words in shell.called("rag-rl"):
        check_rag_rl(words)
    for words in shell.called("sbatch"):
        program, *rest = shlex.split(words[words.index("--wrap") + 1])
        assert program in ("rag-rl", "vllm")
        if program == "rag-rl":
            check_rag_rl(rest)
            assert rest[rest.index("--index") + 1] == "/shared/me/indexes/wiki"
    for words in shell.called("squeue"):
        assert "--jobs=4711" in words, "of this job, not of another one of that name"


def test_a_judge_on_another_node_wants_a_key_unless_told_otherwise(shell, tmp_path, without_keys):
    from rag_rl.errors import ConfigError

    (block,) = [block for block in TYPED if "--judge_api_key_env" in block]
    shell.run(block)
    (words,) = shell.called("accelerate")
    place = words.index("--judge_api_key_env")
    assert words[place + 1] == ""
    with pytest.raises(ConfigError, match=r"no key for .* at http://node7:8001/v1: set the environment variable"):
        check_launch([*words[:place], *words[place + 2 :]], tmp_path)


# ---- the batch script


def test_the_head_of_the_batch_script():
    assert SCRIPT.startswith("#!/bin/bash\n#SBATCH ")
    head, _, body = SCRIPT.partition("set -euo pipefail")
    assert all(line.startswith("#") for line in head.splitlines()), "Slurm reads no option after the first command"
    for wanted in ("--requeue", "--signal=B:USR1@", "--array=", "--open-mode=append", "--cpus-per-task="):
        assert f"#SBATCH {wanted}" in head
    assert head.count("#SBATCH --output=%x-%A_%a.log") == 1
    assert "--output=%x-%j.log" in head, "what to take without an array"
    # A child sees only what is exported.
    inner = re.search(r"bash -c '(.*?)'", body, re.DOTALL)
    assert inner is not None
    exported = set(re.findall(r"^export ([A-Z ]+)$", body, re.MULTILINE)[0].split())
    used = {name for name in re.findall(r"\$\{?\(*([A-Z_]+)", inner[1]) if not name.startswith("SLURM_")}
    assert used <= exported


@pytest.fixture
def batch(shell) -> Callable[..., subprocess.Popen[bytes]]:
    """Starts the script as Slurm would on the first of two nodes, the checkout lying in a folder of the test's."""
    shared = shell.folder / "shared"
    (shared / "rag-rl" / ".venv" / "bin").mkdir(parents=True)
    (shared / "rag-rl" / ".venv" / "bin" / "activate").touch()
    assert SCRIPT.count("SHARED=/shared/$USER") == 1
    path = shell.folder / "train.sbatch"
    path.write_text(SCRIPT.replace("SHARED=/shared/$USER", f"SHARED={shared}"), encoding="utf-8")
    of_slurm = {
        "SLURM_JOB_ID": "4712", "SLURM_ARRAY_TASK_ID": "3", "SLURM_NNODES": "2", "SLURM_NODEID": "1",
        "SLURM_JOB_NODELIST": "node[1-20000]", "SLURM_CPUS_PER_TASK": "64",
    }  # fmt: skip

    def start(**environment: str) -> subprocess.Popen[bytes]:
        settings = {**shell.environment, **of_slurm, **environment}
        return subprocess.Popen(["bash", str(path)], env=settings, start_new_session=True)

    return start


@pytest.mark.parametrize("code", [0, 3])
def test_the_batch_script(code, batch, shell, tmp_path, without_keys):
    assert batch(CODE=str(code)).wait(300) == code
    assert shell.called("scontrol") == [["show", "hostnames", "node[1-20000]"]]
    (srun,) = shell.called("srun")
    assert srun[:4] == ["--cpus-per-task=64", "--kill-on-bad-exit=1", "bash", "-c"]
    (words,) = shell.called("accelerate")
    assert words[:13] == [
        "launch", "--config_file", "accelerate_configs/multi_node.yaml", "--num_machines", "2", "--num_processes",
        "16", "--machine_rank", "1", "--main_process_ip", "node1", "--main_process_port", "24712",
    ]  # fmt: skip
    settings = check_launch(words, tmp_path)
    assert (settings["seed"], settings["resume_from_checkpoint"]) == (3, "true")
    folder = shell.folder / "shared" / "runs" / "grpo_generator-qwen2.5-7b_hotpotqa_lora-seed3"
    assert settings["output_dir"] == str(folder)


def test_the_batch_script_goes_back_to_the_queue(batch, shell):
    begun = shell.folder / "begun"
    job = batch(HANG=str(begun))
    try:
        deadline = time.monotonic() + 300
        while not begun.exists():
            assert time.monotonic() < deadline
            assert job.poll() is None
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)  # to the script alone, as B: says
        assert job.wait(300) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)  # Slurm ends the step
    assert shell.called("scontrol")[1:] == [["requeue", "4712"]]


def test_every_file_that_it_names_is_there():
    for name in re.findall(r"`(?:accelerate_configs/)?(\w+\.yaml)`", PAGE):
        assert (ROOT / "accelerate_configs" / name).is_file(), name
    for name in re.findall(r"\]\((\w+\.md)", PAGE):
        assert (ROOT / "docs" / name).is_file(), name
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line[3:].lower()).replace(" ", "-")
        for line in PAGE.split("\n")
        if "## " in line[:3]
    }
    assert set(re.findall(r"\]\(#([a-z0-9-]+)\)", PAGE)) <= headings


# | `recipe/config` | launch | flags | GiB | seconds a step |
ROWS = re.findall(r"^\| `(\w+)/([\w.-]+)` \| ([\w ]+) \| ([^|]*?) ?\| ([\d.]+) \| ([\d.]+) \|", PAGE, re.MULTILINE)


def sized(recipe: str, config: str, launch: str, flags: str, folder: Path) -> tuple[str, str]:
    """GiB of one card and seconds of a step, as `rag-rl doctor` would say with the models' configs in reach."""
    text = (ROOT / "recipes" / "configs" / recipe / f"{config}.yaml").read_text(encoding="utf-8")
    for number, (name, content) in enumerate(MODELS.items()):
        place = folder / str(number)
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps(content))
        text = re.sub(rf": {re.escape(name)}$", f": {place}", text, flags=re.MULTILINE)
    for key, value in re.findall(r"--(\w+) (\S+?)(?=`| |$)", flags):
        text = re.sub(rf"^{key}:.*\n", "", text, flags=re.MULTILINE) + f"\n{key}: {value}\n"
    path = folder / recipe / "sized.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    name, _, processes = launch.partition(" x ")
    how = None if name == "single_gpu" else str(ROOT / "accelerate_configs" / f"{name}.yaml")
    sizing = size_config(
        path,
        ROOT / "recipes" / f"{recipe}.py",
        launch=read_launch(how, int(processes or 1)),
        gpu_bytes=80 * GIB,
    )
    assert not [note for note in sizing.notes if "not counted" in note and "judge" not in note], sizing.notes
    return f"{sizing.estimate.total / GIB:.1f}", f"{sizing.training_seconds + sizing.writing_seconds:.2g}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}/{row[1]}-{row[2]}")
def test_the_figures_are_those_of_doctor(row, tmp_path):
    *asked, memory, seconds = row
    assert sized(*asked, tmp_path) == (memory, seconds)


def test_every_real_model_has_a_row():
    assert len(ROWS) >= 12
    assert {recipe for recipe, *_ in ROWS} >= {"grpo_generator", "sft_reasoner", "ppo_reasoner", "dpo_augmenter"}
