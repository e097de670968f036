"""docs/adapters.md: what it shows in Python runs, with the tiny models; what it says of endpoints builds."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from rag_rl.tiny import FOLDER
from tests.scripts import load

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
# part -> the flags that its row shows, for models behind an endpoint on another machine
ENDPOINTS = {
    part: shlex.split(f"--{part}_name openai {flags}")
    for part, flags in re.findall(r"`--(\w+)_name openai` \|[^|]*\| `([^`]*node7[^`]*)`", PAGE)
}


@pytest.fixture
def without_keys(monkeypatch):
    """A machine on which no key is set."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_every_endpoint_off_this_machine_says_that_it_wants_no_key():
    shown = [line for line in PAGE.splitlines() if "_base_url http" in line]
    assert sorted(ENDPOINTS) == ["generator", "reasoner"]
    for line in shown:
        assert "_base_url http://127.0.0.1" in line or '_api_key_env ""' in line, line


@pytest.mark.parametrize("part", sorted(ENDPOINTS))
def test_a_model_behind_an_endpoint(part, without_keys):
    from rag_rl.config.assemblies import _generator, read_plan

    recipe = load(ROOT / "recipes" / "evaluate_rag.py")
    # The packaged default brings a generator, which a reasoner takes the place of.
    alone = ["--generator_model", "null"] if part == "reasoner" else []
    plan = read_plan(recipe.__file__, recipe.ARGUMENTS, argv=[*ENDPOINTS[part], *alone])
    generator = _generator(plan, part)
    assert (generator.model, generator.base_url) == ("m", "http://node7:8000/v1")
    assert generator._key() == "EMPTY", "it gets along without one"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / "data" / name).read_text(encoding="utf-8").splitlines()]


def test_query_augmentation():
    """As the page has it, but for the models and the prompt, which the tiny reader was trained with."""
    from rag_rl.generation import TransformersGenerator

    section = PAGE.split("## Query augmentation")[1].split("\n## ")[0]
    code = "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    changes = {
        'OpenAIGenerator("m", base_url="http://node7:8000/v1", api_key_env="")': "reader",
        '"facebook/contriever"': repr(str(FOLDER / "encoder_young")),
        "QueryAugmenter(generator)": 'QueryAugmenter(generator, prompt="tiny_passage", max_new_tokens=48)',
    }
    for shown, taken in changes.items():
        assert code.count(shown) == 1
        code = code.replace(shown, taken)
    questions = rows("heldout_keywords.jsonl")[:12]
    texts = {row["doc_id"]: row["text"] for row in rows("corpus.jsonl")}
    wanted = list(dict.fromkeys(row["gold_doc_ids"][0] for row in questions))
    ids = [*wanted, *[one for one in texts if one not in wanted][:50]]
    queries = [row["question"] for row in questions]
    gold = np.array([ids.index(row["gold_doc_ids"][0]) for row in questions])
    made = {
        "reader": TransformersGenerator.from_pretrained(str(FOLDER / "reader"), dtype="float32", device="cpu"),
        "corpus": [texts[one] for one in ids], "queries": queries, "known": queries, "gold": gold,
    }  # fmt: skip
    exec(code, made)
    retriever, tuned = made["retriever"], made["tuned"]
    assert made["q"].shape == (12, made["d"].shape[1])
    assert (retriever.augmented, retriever.without) == (24, 0), "once for the search, once for the weight"
    assert (made["best"] == gold).mean() >= 0.5
    assert retriever.weight == tuned.weight
    assert tuned.scores[tuned.weight] == max(tuned.scores.values())
    assert tuned.scores[0.8] >= 0.5
