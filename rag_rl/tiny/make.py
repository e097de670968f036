"""Makes the packaged tiny models again, from nothing: ``python -m rag_rl.tiny.make`` (or ``make tiny-models``).

The language model is trained in three stages: *base* (it reads well), *rivals* (also where names are alike in either
part, as those that a retriever brings) and *habits* (the same model, given the bad habits of ``lessons.Habits``); the
last one is packaged. The encoder is trained apart, twice: as it is, and stopped early; the cross-encoder begins from
it. Every stage writes a record (steps, seconds, scores on the held-out world) beside its weights.

The recipe for the base follows what was seen to work for transformers of this size: short convolutions between the
attention layers, copy drills in every second batch at first, contexts of one, then two, then three passages, several
questions a context, and hardly any loss on the context itself.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rag_rl.prompts import render, render_passages
from rag_rl.text import extract_answer
from rag_rl.tiny import FOLDER
from rag_rl.tiny.lessons import NO_HABITS, Habits, comparing, copying, lesson, reading, user
from rag_rl.tiny.make_cross_encoder import make_cross_encoder
from rag_rl.tiny.make_encoder import make_encoder
from rag_rl.tiny.tokenizer import FIRST_PIECE, build_tokenizer
from rag_rl.tiny.world import draw_world, name_parts, questions
from rag_rl.types import Message, Passage

SHARES = {"reading": 5.0, "reasoning": 1.5, "chain": 1.5, "question": 0.6, "passage": 0.6, "judging": 2.0}
# A habit that shows in a few questions only is not learnt in a few hundred steps: reasoning takes a larger share.
HABIT_SHARES = SHARES | {"reasoning": 3.0, "chain": 3.0}
PACKAGED_HABITS = Habits(hasty=0.42, wordy=0.7, unsearched=0.2, sloppy=0.85)
BATCH, CONTEXT_WEIGHT, CONTEXT_SHARE = 48, 0.05, 0.15
COPY_UNTIL, MIX_FROM = 600, 1_000
# The encoder stopped early: the start of recipes whose teacher must know better than their retriever.
YOUNG_STEPS = 100
STAGES = ("encoder", "young_encoder", "cross_encoder", "base", "rivals", "habits")
Row = tuple[list[int], list[float]]


def encode(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast) -> Row:
    """Token ids of a chat, with the weight of each in the loss.

    Args:
        messages: chat turns.
        tokenizer: with a chat template of ``<|im_start|>role`` headers.

    Returns:
        T ids and T weights: 1 on the assistant's words and its end of turn, ``CONTEXT_WEIGHT`` elsewhere.
    """
    ids: list[int] = []
    weights: list[float] = []
    for message in messages:
        spoken = message["role"] == "assistant"
        for text, weight in (
            (f"<|im_start|>{message['role']}\n", CONTEXT_WEIGHT),
            (message["content"] + "<|im_end|>", 1.0 if spoken else CONTEXT_WEIGHT),
            ("\n", CONTEXT_WEIGHT),
        ):
            part = tokenizer(text, add_special_tokens=False).input_ids
            ids += part
            weights += [weight] * len(part)
    return ids, weights


def encode_pairs(pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> Row:
    """Token ids of a drill, with the weight of each in the loss: 0 on what is random, 1 on what follows from it.

    Args:
        pairs: of text that is given and text to be learnt.
        tokenizer: of the model.

    Returns:
        T ids and T weights.
    """
    ids: list[int] = []
    weights: list[float] = []
    for pair in pairs:
        for text, weight in zip(pair, (0.0, 1.0), strict=True):
            part = tokenizer(text, add_special_tokens=False).input_ids
            ids += part
            weights += [weight] * len(part)
    return ids, weights


def collate(rows: Sequence[Row], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads rows on the right.

    Args:
        rows: ids and weights.
        pad: id of the pad token.

    Returns:
        ids (B, T) and weights (B, T); pads weigh nothing.
    """
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), pad)
    weights = torch.zeros(len(rows), longest)
    for i, (row, row_weights) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        weights[i, : len(row)] = torch.tensor(row_weights)
    return ids, weights


def weighted_loss(model: Lfm2ForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean negative log-likelihood of the next token, in bf16 autocast.

    The output layer costs more than the rest of so small a model, so only the assistant's tokens and a random share of
    the context pass through it.

    Args:
        model: the language model.
        ids: (B, T).
        weights: (B, T) in [0, 1].

    Returns:
        A scalar, in nats.
    """
    targets, weights = ids[:, 1:], weights[:, 1:]
    counted = (weights == 1.0) | ((weights > 0) & (torch.rand(weights.shape, device=weights.device) < CONTEXT_SHARE))
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[counted])
    losses = torch.nn.functional.cross_entropy(logits.float(), targets[counted], reduction="none")
    return (losses * weights[counted]).sum() / weights[counted].sum()


def new_model(tokenizer: PreTrainedTokenizerFast) -> Lfm2ForCausalLM:
    """An untrained language model of 1.1 M parameters: LFM2 blocks, convolution before each attention layer."""
    layers = ["conv", "full_attention", "conv", "full_attention"]
    config = Lfm2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=4,
        layer_types=layers,
        conv_L_cache=5,
        block_auto_adjust_ff_dim=False,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Lfm2ForCausalLM(config)


def base_batches(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[list[Row]]:
    """Endless batches of the base stage: copy drills and reading first, then all tasks."""
    step = 0
    # Words and name parts: names are what the reader will have to copy.
    words = range(FIRST_PIECE, len(tokenizer))
    while step < MIX_FROM:
        if step < COPY_UNTIL and step % 2 == 0:
            strings = (copying(rng, vocabulary=words) for _ in range(BATCH))
            yield [(ids, [0.0] * (len(ids) // 3) + [1.0] * (len(ids) - len(ids) // 3)) for ids in strings]
        else:
            n_passages = 1 if step < 250 else 2 if step < 800 else 3
            yield [encode(reading(rng, n_passages=n_passages, crowded=0.0), tokenizer) for _ in range(BATCH)]
        step += 1
    yield from mixed_batches(tokenizer, rng)


def mixed_batches(
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    *,
    shares: dict[str, float] = SHARES,
    habits: Habits = NO_HABITS,
    alike_in: str = "beginning",
    drills: int = 1,
) -> Iterator[list[Row]]:
    """Endless batches of all tasks; rows of similar length share a batch, to waste little on padding.

    To every four batches of lessons come ``drills`` batches of comparing: without them, judging is not learnt.
    """
    while True:
        rows = [
            encode(lesson(rng, shares=shares, habits=habits, alike_in=alike_in), tokenizer) for _ in range(4 * BATCH)
        ]
        rows.sort(key=lambda row: len(row[0]))
        batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        batches += [[encode_pairs(comparing(rng), tokenizer) for _ in range(BATCH)] for _ in range(drills)]
        rng.shuffle(batches)
        yield from batches


def train(
    model: Lfm2ForCausalLM,
    batches: Iterator[list[Row]],
    *,
    steps: int,
    learning_rate: float,
    decay: float,
    report: Callable[[int], None],
    every: int = 200,
) -> None:
    """AdamW with a warm-up, a long plateau and a linear decay.

    Args:
        model: trained in place.
        batches: rows of each step.
        steps: optimiser steps.
        learning_rate: of the plateau.
        decay: share of the steps, at the end, over which the rate falls to 3%.
        report: called with the number of steps done, every ``every`` steps.
        every: see ``report``.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    device, started = model.device, time.time()
    for step in range(steps):
        left = (steps - step) / (steps * decay)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 100) * max(0.03, min(1.0, left))
        ids, weights = collate(next(batches), model.config.pad_token_id)
        loss = weighted_loss(model, ids.to(device), weights.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            report(step + 1)


@torch.inference_mode()
def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str | list[Message]], *, n: int = 1
) -> list[list[str]]:
    """Replies to chats: greedy, or ``n`` samples at temperature 1.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        prompts: user turns, or chats that end with one.
        n: replies a prompt; 1 is greedy.

    Returns:
        ``n`` texts a prompt.
    """
    sampling: dict[str, Any] = (
        {"do_sample": False} if n == 1 else {"do_sample": True, "top_k": 0, "num_return_sequences": n}
    )
    found = []
    for start in range(0, len(prompts), 128):
        chats = [
            tokenizer.apply_chat_template(
                [user(p)] if isinstance(p, str) else p, tokenize=False, add_generation_prompt=True
            )
            for p in prompts[start : start + 128]
        ]
        batch = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        output = model.generate(**batch, max_new_tokens=48, **sampling)
        texts = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        found += [texts[i : i + n] for i in range(0, len(texts), n)]
    return found


def reading_cases(n: int, *, hops: int, seed: int = 11) -> list[tuple[str, str]]:
    """(prompt, answer) on the held-out world, with the gold passages among three.

    The others are rivals of the same kind and, where there are any, of similar name: what a retriever shows.

    Args:
        n: how many.
        hops: 1 or 2.
        seed: of the world and the choice.

    Returns:
        Prompts and right answers.
    """
    rng = random.Random(seed)
    world = draw_world(seed, region="heldout", sizes={"person": 100, "town": 60, "guild": 40, "river": 40})
    cases = []
    for question in list(questions(world, hops=hops, rng=rng))[:n]:
        gold = list(dict.fromkeys(question.meta["chain"][:-1]))
        rivals = [e for e in world.entities.values() if e.name not in gold and e.kind == world.entities[gold[0]].kind]
        rng.shuffle(rivals)
        parts = set(name_parts(gold[0]))
        rivals.sort(key=lambda e: not parts & set(name_parts(e.name)))  # those alike in either part first
        shown = [world.entities[name] for name in gold] + rivals[: 3 - len(gold)]
        rng.shuffle(shown)
        passages = render_passages([Passage(e.name, e.text) for e in shown])
        cases.append((render("tiny_answer", passages=passages, question=question.question), question.answers[0]))
    return cases


def reading_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n: int = 200) -> dict[str, float]:
    """Greedy exact match on the held-out world, with the gold passages among three.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        n: questions of each number of hops.

    Returns:
        Shares in [0, 1] by name.
    """
    scores = {}
    for hops in (1, 2):
        cases = reading_cases(n, hops=hops)
        replies = greedy(model, tokenizer, [prompt for prompt, _ in cases])
        right = [extract_answer(reply[0]) == answer for reply, (_, answer) in zip(replies, cases, strict=True)]
        scores[f"em_{hops}hop"] = sum(right) / len(right)
    return scores


def lesson_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n: int = 100) -> dict[str, float]:
    """Share of replies that equal the lesson's, for the tasks whose reply is determined, and of well-formed ones else.

    Of a chain the last step is scored, of the others the first reply.

    Args:
        model: the language model.
        tokenizer: its tokenizer.
        n: lessons a task.

    Returns:
        Shares in [0, 1] by task.
    """
    scores = {}
    for task in ("reasoning", "chain", "question", "judging"):
        rng = random.Random(5)
        lessons = [lesson(rng, shares={task: 1.0}) for _ in range(n)]
        turns = [len(messages) - 1 if task == "chain" else 1 for messages in lessons]
        replies = greedy(model, tokenizer, [messages[:turn] for turn, messages in zip(turns, lessons, strict=True)])
        hits = 0
        for (reply,), turn, messages in zip(replies, turns, lessons, strict=True):
            right = messages[turn]["content"]
            if task == "question":  # any question of the passage will do: its answer must stand in the passage
                hits += (extract_answer(reply) or "?") in messages[0]["content"]
            else:
                hits += reply.strip() == right
        scores[task] = hits / n
    return scores


def make_language_model(stage: str, out: Path, *, start: Path | None, steps: int, rate: float, seed: int) -> None:
    """Trains one stage of the language model and writes model, tokenizer and record.

    Args:
        stage: ``"base"``, ``"rivals"`` (names that are alike in either part) or ``"habits"``.
        out: folder to write.
        start: folder of the stage before, None for the base.
        steps: optimiser steps.
        rate: learning rate of the plateau.
        seed: of the weights and the lessons.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"{stage}/{seed}")
    tokenizer = build_tokenizer()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if start is None:
        model = new_model(tokenizer).to(device)
        batches = base_batches(tokenizer, rng)
    else:
        model = Lfm2ForCausalLM.from_pretrained(start, dtype=torch.float32).to(device)
        last = stage == "habits"
        batches = mixed_batches(
            tokenizer,
            rng,
            shares=HABIT_SHARES if last else SHARES,
            habits=PACKAGED_HABITS if last else NO_HABITS,
            alike_in="either",
            drills=1 if last else 3,  # the base has learnt to read and not yet to compare
        )
    started = time.time()
    curve = []

    def report(step: int) -> None:
        model.eval()
        scores = {**reading_scores(model, tokenizer), **lesson_scores(model, tokenizer)}
        model.train()
        curve.append({"step": step, "seconds": round(time.time() - started), **scores})
        print(json.dumps(curve[-1]), flush=True)
        out.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        earlier = json.loads((start / "record.json").read_text()) if start else None
        record = {"base": earlier} if earlier else {}
        record |= {"stage": stage, "steps": step, "learning_rate": rate, "seed": seed, "device": device}
        record["curve"] = curve
        (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")

    train(model, batches, steps=steps, learning_rate=rate, decay=0.3, report=report)


def main() -> None:
    """Reads the command line and makes what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=STAGES, nargs="+", default=STAGES, help="stages to make (default: all)")
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="where reader/ and encoder/ go (default: the package)"
    )
    parser.add_argument("--base", type=Path, default=Path("runs/tiny-base"), help="where the base is kept")
    parser.add_argument("--base_steps", type=int, default=2_400)
    parser.add_argument("--rival_steps", type=int, default=800)
    parser.add_argument("--habit_steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if "encoder" in args.only:
        make_encoder(args.out / "encoder", seed=args.seed)
    if "young_encoder" in args.only:
        make_encoder(args.out / "encoder_young", steps=YOUNG_STEPS, seed=args.seed)
    if "cross_encoder" in args.only:
        make_cross_encoder(args.out / "cross_encoder", start=args.out / "encoder", seed=args.seed)
    if "base" in args.only:
        make_language_model("base", args.base, start=None, steps=args.base_steps, rate=2.5e-3, seed=args.seed)
    rivals = args.base / "rivals"
    if "rivals" in args.only:
        make_language_model("rivals", rivals, start=args.base, steps=args.rival_steps, rate=2e-3, seed=args.seed)
    if "habits" in args.only:
        reader = args.out / "reader"
        make_language_model("habits", reader, start=rivals, steps=args.habit_steps, rate=1e-3, seed=args.seed)


if __name__ == "__main__":
    main()
