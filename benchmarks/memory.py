"""Peak memory of whole recipes with the real architectures, random weights and made-up text of full length.

Each row is a recipe's own command line: its config with another model folder, the packaged tiny corpus, and questions
as long as the prompt may be. It measures, trains two steps and measures again, in a process of its own; the figure is
``peak_memory_bytes`` of its metrics.json: what was allocated on the accelerator at most, or, without one, the most
that the process had in memory, libraries and all. Random weights hardly ever end a text, so completions have full
length.

    python benchmarks/memory.py                                   the 4 GB preset: SFT, PPO and GRPO of Qwen2.5-0.5B
    python benchmarks/memory.py --recipes sft_reasoner --models qwen2.5-7b --modes lora qlora --lengths 1024:128
    python benchmarks/memory.py --models small --modes full       a small model, to try the script itself

Weights are drawn once a model, in bfloat16, below ``--folder``: 1 GB for 0.5B, 15 GB for 7B.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "rag_rl" / "tiny"
# Of the models' own config.json.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 128, "vocab_size": 4096},
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "layers": 24,
        "heads": 14,
        "kv_heads": 2,
        "intermediate": 4864,
        "vocab_size": 151_936,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "layers": 28,
        "heads": 12,
        "kv_heads": 2,
        "intermediate": 8960,
        "vocab_size": 151_936,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "layers": 28,
        "heads": 28,
        "kv_heads": 4,
        "intermediate": 18_944,
        "vocab_size": 152_064,
        "tied": False,
    },
}
CONFIG = "qwen2.5-0.5b_hotpotqa"
LIMIT = 4 * 2**30
TEMPLATE = 48  # tokens at most that a prompt has beside the question, and a step beside its analysis


def make_model(name: str, folder: Path) -> Path:
    """Draws the weights of an architecture, once; returns the folder of model and tokenizer."""
    out = folder / name
    if (out / "model.safetensors.index.json").is_file() or (out / "model.safetensors").is_file():
        return out
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    shape = ARCHITECTURES[name]
    config = Qwen2Config(
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        intermediate_size=shape["intermediate"],
        vocab_size=shape["vocab_size"],
        tie_word_embeddings=shape.get("tied", True),
        max_position_embeddings=32_768,
        dtype="bfloat16",
    )
    tokenizer = AutoTokenizer.from_pretrained(TINY / "reader")
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    return out


def make_data(folder: Path, model: Path, prompt_tokens: int, step_tokens: int) -> None:
    """Writes questions whose prompts reach the cap, and a cold-start chain of one long step to each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def words(tokens: int) -> str:
        one = " town"
        each = len(tokenizer(one * 100)["input_ids"]) / 100
        return (one * int(tokens / each)).strip()

    corpus = [json.loads(line) for line in (TINY / "data" / "corpus.jsonl").read_text().splitlines()]
    asked = words(prompt_tokens - TEMPLATE)
    questions, chains = [], []
    for number in range(64):
        document = corpus[number]["doc_id"]
        row = {"qid": f"q{number}", "question": f"{asked} {number}?", "answers": ["x"], "gold_doc_ids": [document]}
        questions.append(row)
        step = {"analysis": words(step_tokens - TEMPLATE), "answer": "x"}
        chains.append({**row, "state": "correct", "steps": [step]})
    for name, rows in (("train", questions[:60]), ("eval", questions[60:]), ("chains", chains[:60])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_config(
    recipe: str, model: Path, folder: Path, *, mode: str, batch: int, prompt: int, completion: int
) -> Path:
    """Writes the recipe's own config with what a run on made-up text needs."""
    import torch

    settings = yaml.safe_load((ROOT / "recipes" / "configs" / recipe / f"{CONFIG}.yaml").read_text())
    for name in [name for name in settings if name.startswith("judge_")]:
        del settings[name]
    settings |= {
        "model_name_or_path": str(model),
        "data_corpus": "${tiny}/data/corpus.jsonl",
        "data_train": str(folder / "train.jsonl"),
        "data_eval": str(folder / "eval.jsonl"),
        "data_eval_size": 4,
        "data_chunk_tokens": None,
        "data_chunk_overlap": 0,
        "retriever_encoder": "${tiny}/encoder",
        "per_device_train_batch_size": batch,
        "max_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_peft": mode != "full",
        "load_in_4bit": mode == "qlora",
    }
    if not torch.cuda.is_available():
        settings |= {"use_cpu": True, "bf16": False}
    if recipe == "sft_reasoner":
        settings |= {"coldstart_path": str(folder / "chains.jsonl"), "max_length": prompt + completion}
    else:
        settings |= {"step_reward": "gold_gain"} if "step_reward" in settings else {}
    if recipe == "ppo_reasoner":
        settings.pop("num_rounds", None)
    settings |= {"reasoner_max_step_tokens": completion, "reasoner_baselines": []}
    if recipe == "grpo_reasoner":
        # Random weights write no second step, so one step is as long as the longest chain of the preset, documents and
        # all. The recipe wants room for two of them.
        chain = prompt + 3 * completion
        settings |= {"reasoner_max_step_tokens": chain, "max_completion_length": 2 * chain}
        settings["gradient_accumulation_steps"] = settings["num_generations"]
    else:
        settings["reasoner_max_prompt_tokens"] = prompt
    path = folder / f"{recipe}-{mode}.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def measure(recipe: str, config: Path, folder: Path) -> tuple[float | None, str]:
    """Runs the recipe; returns its peak in bytes and, where it failed, the last line that it wrote."""
    script = ROOT / "recipes" / f"{recipe}.py"
    out = folder / "run"
    done = subprocess.run(
        [sys.executable, str(script), "--config", str(config), "--output_dir", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return None, done.stderr.strip().splitlines()[-1][:200]
    return float(json.loads((out / "metrics.json").read_text())["peak_memory_bytes"]), ""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    recipes = ["sft_reasoner", "ppo_reasoner", "grpo_reasoner"]
    parser.add_argument("--recipes", nargs="+", choices=recipes, default=recipes)
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=["qwen2.5-0.5b"])
    parser.add_argument("--modes", nargs="+", choices=["lora", "qlora", "full"], default=["lora"])
    parser.add_argument(
        "--lengths",
        nargs="+",
        default=["1024:128"],
        help="prompt:step, in tokens; a chain of grpo_reasoner has one prompt and three steps",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="of one micro-step on one device")
    parser.add_argument("--folder", type=Path, help="where models are kept (default: a temporary folder)")
    args = parser.parse_args()

    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator: memory of the process"
    print(f"{where}, torch {torch.__version__}\n")
    print(f"| recipe | model | mode | prompt : step | batch | peak GiB | under 4 GiB |\n|{'---|' * 7}")
    with tempfile.TemporaryDirectory() as temporary:
        models = args.folder or Path(temporary) / "models"
        rows = itertools.product(args.recipes, args.models, args.modes, args.lengths, args.batches)
        for recipe, name, mode, lengths, batch in rows:
            prompt, completion = map(int, lengths.split(":"))
            model = make_model(name, models)
            folder = Path(tempfile.mkdtemp(dir=temporary))
            make_data(folder, model, 128 if recipe == "grpo_reasoner" else prompt, completion)
            config = make_config(recipe, model, folder, mode=mode, batch=batch, prompt=prompt, completion=completion)
            peak, why = measure(recipe, config, folder)
            fits = ("yes" if peak and peak < LIMIT else "no") if torch.cuda.is_available() else "not told by a CPU"
            shown = f"{peak / 2**30:.2f} | {fits}" if peak else f"failed | {why}"
            print(f"| {recipe} | {name} | {mode} | {lengths} | {batch} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
