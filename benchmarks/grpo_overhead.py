"""Step time of ``recipes/grpo_generator.py`` against the bare GRPOTrainer with a trivial reward, in one run.

Both sides have the same model, the same prompts and settings. The bare side has one trivial reward and no callback,
ours has the recipe's own rewards and callbacks. The learning rate is 0 and the seed the same, so that both sides write
the same texts: longer ones take longer, and a policy that learns changes their length. Short trainings are interleaved
in pairs; the ratio is the median over the pairs, with a bootstrap interval. Bound: 1.03 (holds where the interval's
lower end is within it).

    python benchmarks/grpo_overhead.py --pairs 7 --steps 5
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BOUND = 1.03


def build(steps: int, folder: str) -> tuple[Any, Any]:
    """A trainer as the recipe makes it, and the bare one, over the same prompts."""
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config

    from rag_rl.config.arguments import (
        DataArguments,
        GeneratorArguments,
        RetrieverArguments,
        RewardArguments,
        RunArguments,
    )
    from rag_rl.config.parts import build_assembly, build_prompts, build_questions, build_retriever, build_rewards
    from rag_rl.run import start_run

    kinds = (
        RunArguments,
        DataArguments,
        RetrieverArguments,
        GeneratorArguments,
        RewardArguments,
        GRPOConfig,
        ModelConfig,
    )
    flags = f"--max_steps {steps} --logging_steps {steps} --save_strategy no --disable_tqdm true".split()
    flags += ["--learning_rate", "0", "--output_dir", f"{folder}/ours"]
    run = start_run(str(ROOT / "recipes" / "grpo_generator.py"), kinds, argv=flags)
    _, data, retriever_args, generator_args, reward_args, training, model = run.arguments
    questions, _ = build_questions(data, seed=1)
    retriever = build_retriever(retriever_args, data)
    assembly, tokenizer = build_assembly(
        generator_args, retriever, top_k=retriever_args.retriever_top_k, training=training, model=model
    )
    dataset = build_prompts(assembly, questions)
    rewards = build_rewards(reward_args, generator_args, training)
    peft: LoraConfig | None = get_peft_config(model)
    common = {"model": model.model_name_or_path, "args": training, "processing_class": tokenizer, "peft_config": peft}
    ours = GRPOTrainer(**common, reward_funcs=rewards.combined, train_dataset=dataset, callbacks=run.callbacks)

    def trivial(completions: list[Any], **_: Any) -> list[float]:
        # Not constant: equal rewards would spare the bare side the work of a real gradient, not of the step.
        return [float(i % 2) for i in range(len(completions))]

    bare = GRPOTrainer(**common, reward_funcs=trivial, train_dataset=dataset.select_columns(["prompt"]))
    return ours, bare


def timed(trainer: Any, seed: int) -> tuple[float, float]:
    """Seconds a step of one short training, and the mean length of what it wrote, in tokens."""
    from transformers import set_seed

    set_seed(seed)
    started = time.perf_counter()
    trainer.train()
    seconds = (time.perf_counter() - started) / trainer.state.global_step
    return seconds, float(trainer.state.log_history[0]["completions/mean_length"])


def main() -> None:
    """Prints the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        ours, bare = build(args.steps, folder)
        timed(ours, 0), timed(bare, 0)  # warm up
        pairs = []
        for i in range(args.pairs):
            first, second = (ours, bare) if i % 2 == 0 else (bare, ours)
            found = {id(trainer): timed(trainer, i) for trainer in (first, second)}
            (seconds, length), (bare_seconds, bare_length) = found[id(ours)], found[id(bare)]
            pairs.append(seconds / bare_seconds)
            told = f"pair {i + 1}: ours / bare {pairs[-1]:.3f}; {length:.2f} and {bare_length:.2f} tokens an answer"
            print(told, file=sys.stderr)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(pairs, size=(10_000, len(pairs))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    verdict = "OK" if low <= BOUND else "MISS"
    print(f"recipe / bare GRPOTrainer: {np.median(pairs):.3f} [{low:.3f}, {high:.3f}] bound {BOUND} {verdict}")


if __name__ == "__main__":
    main()
