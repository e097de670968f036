"""Makes the packaged start of tiny cross-encoders again: ``python -m rag_rl.tiny.make --only cross_encoder``.

The tiny encoder under a new head has never attended from a question to a passage: trained on the few names of one
small world it learns those names by heart, and nothing that holds for others. So it first reads pairs of training
worlds, a new world each step, until it has begun to compare names across the pair; it is stopped long before it can
rank. What a reranker's recipe then teaches it holds for names that it has never seen.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.losses import ListNetLoss

from rag_rl.metrics import ndcg_of_ids
from rag_rl.tiny import FOLDER
from rag_rl.tiny.make_encoder import HELDOUT, SIZES
from rag_rl.tiny.world import World, draw_world, questions

BATCH, NEGATIVES, OF_OTHER_KINDS = 12, 7, 2


def new_cross_encoder(encoder: Path, *, seed: int) -> CrossEncoder:
    """Puts an untrained head on an encoder; it reads the mean of all tokens.

    Args:
        encoder: folder of a tiny encoder.
        seed: of the head's weights.

    Returns:
        A cross-encoder with one output.
    """
    torch.manual_seed(seed)
    return CrossEncoder(str(encoder), num_labels=1, device="cpu", config_kwargs={"classifier_pooling": "mean"})


def lists(world: World, rng: random.Random, n: int) -> list[tuple[str, list[str]]]:
    """Questions with passages, the right one first; most of the others are about the same kind of thing.

    Args:
        world: to ask about.
        rng: source of the choice.
        n: lists at most.

    Returns:
        Texts: a question and ``1 + NEGATIVES`` passages.
    """
    found: list[tuple[str, list[str]]] = []
    for question in questions(world, hops=1, rng=rng):
        if len(found) == n:
            break
        gold = world.entities[question.meta["chain"][0]]
        alike = [e for e in world.entities.values() if e.kind == gold.kind and e is not gold]
        others = [e for e in world.entities.values() if e.kind != gold.kind]
        negatives = rng.sample(alike, NEGATIVES - OF_OTHER_KINDS) + rng.sample(others, OF_OTHER_KINDS)
        found.append((question.question, [gold.text, *(e.text for e in negatives)]))
    return found


def ndcg(model: CrossEncoder, asked: Sequence[tuple[str, list[str]]]) -> float:
    """Mean nDCG@10 of lists of which the first passage is the right one.

    Args:
        model: scores them.
        asked: as from ``lists``.

    Returns:
        A value in [0, 1].
    """
    pairs = [(question, text) for question, texts in asked for text in texts]
    scores = model.predict(pairs, batch_size=256, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    total = 0.0
    for number in range(len(asked)):
        width = 1 + NEGATIVES
        part = scores[number * width : (number + 1) * width]
        order = sorted(range(width), key=lambda i: (-part[i], i == 0))  # among equals the right one comes last
        total += ndcg_of_ids(list(map(str, order)), {"0": 1.0}, k=10) or 0.0
    return total / len(asked)


def make_cross_encoder(
    out: Path,
    *,
    start: Path = FOLDER / "encoder",
    steps: int = 200,
    planned: int = 600,
    rate: float = 2e-3,
    seed: int = 1,
) -> None:
    """Trains the start of a cross-encoder and writes it with its record.

    Args:
        out: folder to write.
        start: folder of the tiny encoder that it is made of.
        steps: optimiser steps that are made.
        planned: steps after which the learning rate would have fallen to a tenth.
        rate: learning rate after a warm-up of 20 steps.
        seed: of the head and the worlds.
    """
    rng = random.Random(seed)
    model = new_cross_encoder(start, seed=seed)
    loss = ListNetLoss(model, mini_batch_size=-1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    heldout = draw_world(11, region="heldout", sizes=HELDOUT, rival_share=0.5, alike_in="either")
    asked = lists(heldout, random.Random(1), 100)
    labels = [torch.tensor([1.0] + [0.0] * NEGATIVES)] * BATCH
    started, curve = time.time(), []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / 20) * max(0.1, 1 - step / planned)
        world = draw_world(rng.getrandbits(40), region="train", sizes=SIZES, rival_share=0.5, alike_in="either")
        queries, documents = map(list, zip(*lists(world, rng, BATCH), strict=True))
        value = loss([queries, documents], labels)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps:
            curve.append({"step": step, "seconds": round(time.time() - started), "loss": value.item()})
            curve[-1]["ndcg@10"] = ndcg(model, asked)
            print(json.dumps(curve[-1]), flush=True)
    model.save_pretrained(str(out), create_model_card=False)
    record = {"steps": steps, "learning_rate": rate, "seed": seed, "curve": curve}
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
