"""Each reward against each way of gaming it: nothing may beat the short right answer, and what is seen must lose."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rag_rl.rewards import (
    RewardPart,
    citation_reward,
    contains_em,
    em,
    f1,
    format_reward,
    groundedness_reward,
    length_reward,
    score_parts,
    weighted_sum,
)

LIMIT = 160
PASSAGES = [
    "Elmton\nElmton lies on the Mirabrook. The pride of Elmton is tin. The mayor of Elmton is Falbert.",
    "Zanford\nZanford lies on the Rosflow. The pride of Zanford is silk. The mayor of Zanford is Galdric.",
    "Mirabrook\nMirabrook is full of trout. Mirabrook runs green. Mirabrook is crossed at Dunham.",
]
ENTITIES = "Mirabrook Rosflow Elmton Zanford Falbert Galdric Dunham tin silk trout green".split()
CONTEXT = " ".join(" ".join(passage.split()) for passage in PASSAGES)
NUMBERED = "\n".join(f"[{i}] {passage}" for i, passage in enumerate(PASSAGES, start=1))
FILLER = "This is what the context says about it and nothing else is known. "

# The reference cites, so that one text can stand against every reward; the answer rewards read past the citation.
SHORT_RIGHT = "Answer: Mirabrook [1]"
GAMING = {
    "list every entity": "Answer: " + ", ".join(ENTITIES),
    "list every entity without commas": "Answer: " + " ".join(ENTITIES),
    "list every entity and cite": "Answer: " + ", ".join(ENTITIES) + " [1]",
    "list two candidates": "Answer: Mirabrook, Rosflow",
    "copy the context": "Answer: " + CONTEXT,
    "copy the context without a marker": NUMBERED,
    "copy the right passage": "Answer: " + " ".join(PASSAGES[0].split()),
    "repeat the right answer": "Answer: " + "Mirabrook " * 30,
    "repeat the right answer and cite": "Answer: " + "Mirabrook [1] " * 30,
    "repeat the answer line": "Answer: Mirabrook\n" * 30,
    "one answer line for each entity, the right one last": "".join(f"Answer: {e}\n" for e in reversed(ENTITIES)),
    "fill the limit on the answer line": "Answer: Mirabrook " + FILLER * 20,
    "fill the limit after the answer": "Answer: Mirabrook [1]\n" + FILLER * 20,
    "fill the limit before the answer": FILLER * 20 + "\nAnswer: Mirabrook [1]",
    "cite everything": "Answer: Mirabrook [1][2][3]",
    "cite nothing": "Answer: Mirabrook",
    "empty": "",
    "marker alone": "Answer:",
    "citation alone": "Answer: [1]",
    "unclosed thinking": "<think>Answer: Mirabrook [1]",
    "close the thinking and say nothing": "<think>Answer: Mirabrook [1]</think>",
}

# What a reward cannot see in principle, by name. Everything not named here must score strictly lower.
RIGHT_ANSWER_LINE = {
    "repeat the answer line": "the last answer line is right",
    "one answer line for each entity, the right one last": "the last answer line is right",
    "fill the limit after the answer": "what follows the answer line is not the answer",
    "fill the limit before the answer": "what precedes the answer line is not the answer",
    "cite everything": "citations are no part of the answer",
    "cite nothing": "citations are no part of the answer",
}
CITES_RIGHT = "it cites exactly the right passage"
CANNOT_TELL = {
    "em": RIGHT_ANSWER_LINE,
    "f1": RIGHT_ANSWER_LINE,
    "contains_em": RIGHT_ANSWER_LINE,
    "groundedness": RIGHT_ANSWER_LINE,
    "citation": {
        "list every entity and cite": CITES_RIGHT,
        "repeat the right answer and cite": CITES_RIGHT,
        "fill the limit after the answer": CITES_RIGHT,
        "fill the limit before the answer": CITES_RIGHT,
    },
    "length": {
        "list two candidates": "as short as the target",
        "cite everything": "as short as the target",
        "cite nothing": "as short as the target",
    },
    "format": {
        "list every entity": "eleven words on one line are within the cap",
        "list every entity without commas": "eleven words on one line are within the cap",
        "list every entity and cite": "eleven words on one line are within the cap",
        "list two candidates": "a short line",
        "copy the right passage": "fourteen words on one line are within the cap",
        "fill the limit before the answer": "text before the marker is allowed",
        "cite everything": "a short line",
        "cite nothing": "a short line",
    },
}
# A learned reward (reward_model, a judge) can promise none of this; its docstring asks for an exact one beside it.
REWARDS = {
    "em": em(without_citations=True),
    "f1": f1(without_citations=True),
    "contains_em": contains_em(without_citations=True),
    "groundedness": groundedness_reward(without_citations=True),
    "citation": citation_reward(),
    "length": length_reward(target=12, limit=LIMIT),
    "format": format_reward(),
}

CONFIGS = sorted((Path(__file__).parents[2] / "recipes" / "configs" / "grpo_generator").glob("*.yaml"))


def weights_of(config: Path) -> dict[str, float]:
    """The rewards that a config trains with, by name."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    names = settings.get("reward_names", ["f1", "format"])
    return dict(zip(names, settings.get("reward_weights", [1.0] * len(names)), strict=True))


def columns(texts: list[str]) -> dict[str, Any]:
    """One token a word or sign, cut at the limit as the trainer does."""
    return {
        "completions": texts,
        "completion_ids": [[0] * max(1, min(LIMIT, len(re.findall(r"\w+|\S", text)))) for text in texts],
        "question": ["Which river does Elmton lie on?"] * len(texts),
        "answers": [["Mirabrook"]] * len(texts),
        "passages": [PASSAGES] * len(texts),
    }


def scores(name: str) -> dict[str, float | None]:
    values = REWARDS[name](prompts=[""] * (1 + len(GAMING)), **columns([SHORT_RIGHT, *GAMING.values()]))
    return dict(zip(["short right", *GAMING], values, strict=True))


@pytest.mark.parametrize("attempt", GAMING)
@pytest.mark.parametrize("name", REWARDS)
def test_gaming_does_not_pay(name: str, attempt: str) -> None:
    values = scores(name)
    right, gamed = values["short right"], values[attempt]
    assert right == 1.0
    assert gamed is not None
    if attempt in CANNOT_TELL[name]:
        assert gamed == right, "named as not to be told apart, but it can be: take it off the list"
    else:
        assert gamed < right


@pytest.mark.parametrize(
    "attempt",
    ["list every entity", "copy the context", "repeat the right answer", "fill the limit on the answer line", "empty"],
)
def test_the_five_attempts_that_matter_are_seen_by_nearly_all(attempt: str) -> None:
    blind = {name for name in REWARDS if attempt in CANNOT_TELL[name]}
    assert blind <= {"format"}


@pytest.mark.parametrize("attempt", GAMING)
def test_gaming_loses_against_all_of_them_together(attempt: str) -> None:
    parts = [
        RewardPart("em", REWARDS["em"], 1.0, required=True),
        *(RewardPart(name, REWARDS[name], 0.2) for name in ("format", "groundedness", "length", "citation")),
    ]
    right, gamed = weighted_sum(parts, score_parts(parts, **columns([SHORT_RIGHT, GAMING[attempt]])))
    assert right == pytest.approx(1.8)
    assert gamed is not None
    assert gamed < right


# Those with a reward that asks a service are left out.
@pytest.mark.parametrize(
    "config", [path for path in CONFIGS if weights_of(path).keys() <= REWARDS.keys()], ids=lambda path: path.stem
)
def test_no_wrong_answer_comes_near_a_right_one(config: Path) -> None:
    parts = [RewardPart(name, REWARDS[name], weight) for name, weight in weights_of(config).items()]
    texts = [SHORT_RIGHT, GAMING["fill the limit after the answer"], "Answer: Rosflow [2]"]
    right, clumsy, wrong = weighted_sum(parts, score_parts(parts, **columns(texts)))
    assert right == pytest.approx(sum(weights_of(config).values()))
    assert right > clumsy >= 2 * wrong > 0, (
        "the wrong answer is well formed, short and quoted; the clumsy one is right"
    )
