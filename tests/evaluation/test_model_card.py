"""The model card: front matter that the Hub reads, figures, and nothing of the machine that made it."""

from __future__ import annotations

import ast
import re

import pytest
import yaml

from rag_rl.evaluation.model_card import installed_versions, model_card, portable_base

SUMMARY = {
    "recipe": "grpo_generator",
    "config": "tiny",
    "seed": 3,
    "status": "complete",
    "before": {"em": 0.5, "recall@5": 0.9},
    "after": {"em": 0.75, "recall@5": 0.9, "mine": 0.1},
    "n_eval": 1200,
    "ci95": {"em": [0.2, 0.3]},
}


def card(**changes):
    given = {
        "summary": SUMMARY,
        "base_model": "Qwen/Qwen2.5-0.5B-Instruct",
        "recipe": "grpo_generator",
        "config_name": "tiny",
        "title": "Reader of the tiny world",
    }
    given |= changes
    return model_card(given.pop("summary"), **given)


def front_matter(text):
    start, front, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front)


def python_of(text):
    return re.search(r"```python\n(.*?)```", text, re.S).group(1)


def test_front_matter():
    assert front_matter(card()) == {
        "library_name": "transformers",
        "tags": ["rag-rl", "trl", "grpo_generator"],
        "base_model": "Qwen/Qwen2.5-0.5B-Instruct",
    }


def test_front_matter_is_what_the_hub_reads():
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(card()).data
    assert data.base_model == "Qwen/Qwen2.5-0.5B-Instruct"
    assert data.library_name == "transformers"


def test_figures():
    text = card()
    assert "# Reader of the tiny world" in text
    assert "On 1,200 held-out questions, exact match rose from 0.500 to 0.750 (+0.250)." in text
    assert "| `em` (exact match) | 0.500 | 0.750 | +0.250 | +0.200 to +0.300 |" in text
    assert "| `recall@5` (share of gold documents found, first 5) | 0.900 | 0.900 | +0.000 | – |" in text
    assert "| `mine` | – | 0.100 | – | – |" in text
    assert "not complete" not in text


def test_how_it_was_made():
    text = card(versions={"trl": "1.12.0", "torch": "2.13.0"})
    assert (
        "accelerate launch recipes/grpo_generator.py --config recipes/configs/grpo_generator/tiny.yaml --seed 3"
        in text
    )
    assert "- trl 1.12.0\n- torch 2.13.0" in text


def test_versions_are_those_installed():
    import trl

    assert installed_versions()["trl"] == trl.__version__
    assert f"- trl {trl.__version__}" in card()


@pytest.mark.parametrize("library", ["transformers", "peft", "sentence-transformers"])
def test_snippet_is_python(library):
    ast.parse(python_of(card(library_name=library)))
    ast.parse(python_of(card(library_name=library, base_model=None)))
    assert front_matter(card(library_name=library))["library_name"] == library


def test_given_snippet():
    assert python_of(card(usage="import rag_rl\n")) == "import rag_rl\n"


@pytest.mark.parametrize(
    "base",
    [
        "/home/ada/models/m",
        "~/models/m",
        "C:\\models\\m",
        "\\\\host\\m",
        "file:///m",
        "https://me:key@host/m",
        "$HOME/m",
    ],
)
def test_nothing_of_this_machine(base):
    assert portable_base(base) is None
    text = card(base_model=base, config_name="/home/ada/configs/tiny.yaml")
    assert base not in text
    assert "ada" not in re.sub("adapter", "", text)
    assert "base_model" not in front_matter(text)
    assert "configs/grpo_generator/tiny.yaml" in text


@pytest.mark.parametrize("base", ["gpt2", "Qwen/Qwen2.5-0.5B", "../start", "./base", "checkpoints/a/b"])
def test_portable_bases_stay(base):
    assert portable_base(base) == base
    assert front_matter(card(base_model=base))["base_model"] == base


def test_no_base():
    assert portable_base(None) is None
    assert portable_base("") is None
    assert "a local model" in card(base_model=None)


def test_unfinished_and_unmeasured():
    text = card(summary={"status": "running"})
    assert "**This run is not complete** (status: running)." in text
    assert "Nothing was measured." in text


def test_awkward_titles_and_names_break_nothing():
    text = card(title="A\n---\nB | C", recipe="mine: [x]")
    assert front_matter(text)["tags"][-1] == "mine: [x]"
    assert "# A --- B \\| C" in text
