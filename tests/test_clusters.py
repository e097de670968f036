"""docs/clusters.md: its commands can be typed, its script is a script, its figures are those of `rag-rl doctor`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rag_rl.config.memory import GIB
from rag_rl.config.sizing import read_launch, size_config

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    words
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if "accelerate launch" in line and "$RECIPE" not in line
    for words in [shlex.split(line, comments=True)]
]
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


def test_there_is_something_to_check():
    assert len(BLOCKS) >= 8
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_is_shell(block):
    done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_batch_script():
    (script,) = [block for block in BLOCKS if block.startswith("#!")]
    assert script.startswith("#!/bin/bash\n#SBATCH ")
    head, _, body = script.partition("set -euo pipefail")
    assert all(line.startswith("#") for line in head.splitlines()), "Slurm reads no option after the first command"
    for wanted in ("--requeue", "--signal=B:USR1@", "--array=", "--open-mode=append"):
        assert f"#SBATCH {wanted}" in head
    assert "--resume_from_checkpoint true" in body
    # A child sees only what is exported.
    inner = re.search(r"bash -c '(.*?)'", body, re.DOTALL)
    assert inner is not None
    exported = set(re.findall(r"^export ([A-Z ]+)$", body, re.MULTILINE)[0].split())
    used = {name for name in re.findall(r"\$\{?\(*([A-Z_]+)", inner[1]) if not name.startswith("SLURM_")}
    assert used <= exported
    assert subprocess.run(["bash", "-n", "-c", inner[1]], check=False).returncode == 0


def load(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"of_page_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[4:8]))
def test_every_command_can_be_typed(words):
    place = next(i for i, word in enumerate(words) if word.startswith("recipes/"))
    recipe = ROOT / words[place]
    assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    name = words[words.index("--config", place) + 1]
    assert (ROOT / "recipes" / "configs" / recipe.stem / f"{name}.yaml").is_file()
    known = {one.name for kind in load(recipe).ARGUMENTS for one in dataclasses.fields(kind)} | {"config"}
    asked = {word[2:] for word in words[place:] if word.startswith("--")}
    assert asked <= known, asked - known


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
