"""Makes the packaged tiny sentence encoder again: ``python -m rag_rl.tiny.make_encoder``.

A two-layer ModernBERT that is read at its last token, trained with in-batch negatives on questions and passages of
training worlds, and on questions with their history (HARR, arXiv 2602.03645), which mean another passage than the
words alone. It is stopped while it still confuses rivals of similar name, and it has a habit: half of the time it has
learnt to look for whom the question began with, and not for whom the last hop led to. A retriever that is already
perfect leaves nothing to reinforce.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import ModernBertConfig, ModernBertModel

from rag_rl.prompts import render
from rag_rl.tiny.tokenizer import build_tokenizer
from rag_rl.tiny.world import World, draw_world, questions

SIZES = {"person": 24, "town": 14, "guild": 10, "river": 10}
HELDOUT = {"person": 120, "town": 70, "guild": 45, "river": 45}
TEMPERATURE = 0.05
STATES, HASTY = 0.6, 0.5  # share of batches of questions with their history; and of those with the habit in them


def new_encoder(folder: Path, *, seed: int) -> SentenceTransformer:
    """Writes an untrained encoder to a folder and opens it.

    Args:
        folder: to write to.
        seed: of the weights.

    Returns:
        The encoder: 0.36 M parameters, width 96, unit vectors.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "right"
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        global_attn_every_n_layers=1,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        cls_token_id=None,
        sep_token_id=None,
        attention_dropout=0.0,
        embedding_dropout=0.0,
        mlp_dropout=0.0,
    )
    ModernBertModel(config).save_pretrained(folder)
    tokenizer.model_max_length = 256
    tokenizer.save_pretrained(folder)
    transformer = Transformer(str(folder))
    transformer.max_seq_length = 256
    return SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), "lasttoken"), Normalize()], device="cpu"
    )


def pairs(world: World, rng: random.Random, n: int) -> list[tuple[str, str]]:
    """(question, passage of its subject), at most one question a passage, so that in-batch negatives are true ones.

    Args:
        world: to ask about.
        rng: source of the choice.
        n: pairs at most.

    Returns:
        Texts.
    """
    found: dict[str, str] = {}
    two_hop = rng.random() < 0.3
    for question in questions(world, hops=2 if two_hop else 1, rng=rng):
        found.setdefault(question.meta["chain"][0], question.question)
        if len(found) == n:
            break
    return [(question, world.entities[name].text) for name, question in found.items()]


def state_text(question: str, query: str, history: str = "") -> str:
    """What a history-aware encoder reads, as ``rag_rl.retrieval.history`` writes it.

    Args:
        question: the question as it was asked.
        query: the sub-query of this hop.
        history: sub-query and answer of the hop before; "" for the first hop.

    Returns:
        One line a field; none for an empty history.

    Example:
        >>> print(state_text("Which river is the home of Falbert on?", "Where does Falbert live?"))
        Question: Which river is the home of Falbert on?
        Query: Where does Falbert live?
    """
    lines = render("state", question=question, history=history, query=query).split("\n")
    return "\n".join(line for line in lines if not line.endswith(": "))


def state_pairs(world: World, rng: random.Random, n: int, *, hasty: float = 0.0) -> list[tuple[str, str]]:
    """(question with its history, passage that it needs), at most one state a passage.

    Args:
        world: to ask about.
        rng: source of the choice.
        n: pairs at most.
        hasty: probability that a state of the second hop comes with the passage of the first.

    Returns:
        Texts; three states of four are of the second hop.
    """
    found: dict[str, str] = {}
    for question in questions(world, hops=2, rng=rng):
        first, second = question.meta["decomposition"]
        start, bridge, _ = question.meta["chain"]
        subject, text = start, state_text(question.question, first["question"])
        if rng.random() < 0.75:
            text = state_text(question.question, second["follow_up"], f"{first['question']} {bridge}")
            subject = start if rng.random() < hasty else bridge
        found.setdefault(subject, text)
        if len(found) == n:
            break
    return [(text, world.entities[name].text) for name, text in found.items()]


def recall(encoder: SentenceTransformer, *, hops: int, k: int, seed: int = 11) -> float:
    """Share of questions of the held-out world whose first gold passage is among the top ``k``.

    Args:
        encoder: the encoder.
        hops: 1 or 2.
        k: cut-off.
        seed: of the world.

    Returns:
        A share in [0, 1].
    """
    world = draw_world(seed, region="heldout", sizes=HELDOUT)
    names = list(world.entities)
    documents = encoder.encode([e.text for e in world.entities.values()], convert_to_tensor=True)
    asked = list(questions(world, hops=hops, rng=random.Random(1)))[:400]
    found = (encoder.encode([q.question for q in asked], convert_to_tensor=True) @ documents.T).topk(k).indices
    hits = [q.meta["chain"][0] in {names[i] for i in row} for q, row in zip(asked, found.tolist(), strict=True)]
    return sum(hits) / len(hits)


def state_recall(encoder: SentenceTransformer, *, k: int, seed: int = 11) -> float:
    """Share of second hops in the held-out world whose passage is among the top ``k``, asked with their true history.

    Args:
        encoder: the encoder.
        k: cut-off.
        seed: of the world.

    Returns:
        A share in [0, 1].
    """
    world = draw_world(seed, region="heldout", sizes=HELDOUT)
    names = list(world.entities)
    documents = encoder.encode([e.text for e in world.entities.values()], convert_to_tensor=True)
    asked = list(questions(world, hops=2, rng=random.Random(1)))[:400]
    states = []
    for question in asked:
        first, second = question.meta["decomposition"]
        history = f"{first['question']} {question.meta['chain'][1]}"
        states.append(state_text(question.question, second["follow_up"], history))
    found = (encoder.encode(states, convert_to_tensor=True) @ documents.T).topk(k).indices
    hits = [q.meta["chain"][1] in {names[i] for i in row} for q, row in zip(asked, found.tolist(), strict=True)]
    return sum(hits) / len(hits)


def make_encoder(out: Path, *, steps: int = 250, rate: float = 2e-3, seed: int = 1) -> None:
    """Trains the encoder and writes it with its record.

    Args:
        out: folder to write.
        steps: optimiser steps; so few that there is something left to reinforce.
        rate: learning rate after a warm-up of 20 steps.
        seed: of the weights and the worlds.
    """
    rng = random.Random(seed)
    encoder = new_encoder(out, seed=seed)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=rate, weight_decay=0.01)
    started, curve = time.time(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20)
        world = draw_world(rng.getrandbits(40), region="train", sizes=SIZES, rival_share=0.5)
        batch = state_pairs(world, rng, 48, hasty=HASTY) if rng.random() < STATES else pairs(world, rng, 48)
        vectors = [encoder(encoder.preprocess(list(side)))["sentence_embedding"] for side in zip(*batch, strict=True)]
        scores = vectors[0] @ vectors[1].T / TEMPERATURE
        labels = torch.arange(len(batch))
        loss = torch.nn.functional.cross_entropy(scores, labels) + torch.nn.functional.cross_entropy(scores.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            found = {f"recall@{k}_{hops}hop": recall(encoder, hops=hops, k=k) for hops in (1, 2) for k in (1, 3, 5)}
            found |= {f"recall@{k}_second_hop": state_recall(encoder, k=k) for k in (1, 3, 30)}
            curve.append({"step": step + 1, "seconds": round(time.time() - started), "loss": loss.item(), **found})
            print(json.dumps(curve[-1]), flush=True)
    encoder.save(str(out), create_model_card=False)
    record = {"steps": steps, "learning_rate": rate, "seed": seed, "curve": curve}
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
