"""Writes the corpus and the questions of the tiny world: ``python -m rag_rl.tiny.make_data``.

One corpus holds two worlds that share no entity: questions of the *demo* world are trained on, questions of the
*held-out* world are evaluated on, and passages of each are distractors for the other. Beside questions in sentences
there are the one-hop questions as keywords ("Falgabert home", "pride Waltaham"): what people type, and harder to find
with.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from rag_rl.tiny.world import RELATION, World, draw_world, questions

SIZES = {"person": 120, "town": 70, "guild": 45, "river": 45}
SEED = 2026
TWO_HOP = 1_000


def demo_worlds() -> list[World]:
    """The demo world and the held-out world, as packaged.

    Returns:
        Two worlds without a common entity.
    """
    return [draw_world(SEED, region=region, sizes=SIZES) for region in ("demo", "heldout")]


def rows() -> dict[str, list[dict[str, Any]]]:
    """Everything that is written, by file name.

    Returns:
        ``corpus.jsonl`` and, for each world, files of questions over one and two hops and of keywords.
    """
    worlds = demo_worlds()
    files: dict[str, list[dict[str, Any]]] = {
        "corpus.jsonl": [{"doc_id": p.doc_id, "text": p.text} for world in worlds for p in world.passages]
    }
    for world in worlds:
        for hops in (1, 2):
            found = list(questions(world, hops=hops, rng=random.Random(SEED)))[: TWO_HOP if hops == 2 else None]
            files[f"{world.region}_{hops}hop.jsonl"] = [
                {
                    "qid": q.qid,
                    "question": q.question,
                    "answers": list(q.answers),
                    "gold_doc_ids": list(q.gold_doc_ids),
                    "hops": q.hops,
                    "chain": q.meta["chain"],
                    "relations": q.meta["relations"],
                    **({"decomposition": q.meta["decomposition"]} if hops == 2 else {}),
                }
                for q in found
            ]
        rng = random.Random(SEED)
        files[f"{world.region}_keywords.jsonl"] = [
            {**row, "qid": f"{row['qid']}-keywords", "question": keywords(row["chain"][0], row["relations"][0], rng)}
            for row in files[f"{world.region}_1hop.jsonl"]
        ]
    return files


def keywords(subject: str, relation: str, rng: random.Random) -> str:
    """What somebody types who is in a hurry.

    Args:
        subject: of whom something is asked.
        relation: what is asked.
        rng: decides what comes first.

    Returns:
        Two words.

    Example:
        >>> keywords("Waltaham", "goods", random.Random(1))
        'pride Waltaham'
    """
    words = [subject, RELATION[relation].noun.removeprefix("the ").split()[0]]
    rng.shuffle(words)
    return " ".join(words)


def main() -> None:
    """Reads the command line and writes the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, found in rows().items():
        with (args.out / name).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        print(f"{name}: {len(found)} rows")


if __name__ == "__main__":
    main()
