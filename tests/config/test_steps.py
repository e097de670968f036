"""Steps of a run: done once, and anew when what they are made of changes."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from rag_rl.config.steps import MANIFEST, content_digest, note, open_step, read_manifest
from rag_rl.run import Run
from rag_rl.tiny import FOLDER


@dataclass
class Arguments:
    learning_rate: float = 0.1
    output_dir: str = "runs/whole"
    save_steps: int = 5
    data_corpus: str = "corpus.jsonl"


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "run", "self_boost", "tiny", 42, None, {}, ())


def opened(run: Run, *, inputs: dict | None = None, seed: int = 7, **changes: object) -> Run:
    return open_step(
        run,
        "round_1/retriever",
        recipe="distill_retriever",
        seed=seed,
        arguments=(Arguments(**changes),),
        inputs={"corpus": "abc"} if inputs is None else inputs,
        ignore={"data_corpus"},
    )


def finish(step: Run) -> Path:
    """What a finished step leaves; gives a file that must go when it is made anew."""
    (step.folder / "metrics.json").write_text('{"status": "complete"}')
    (step.folder / "deep").mkdir()
    (step.folder / "deep" / "weights").write_text("w")
    return step.folder / "deep" / "weights"


# ---- digests


def test_a_file_is_its_content(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.write_text("same")
    assert content_digest(str(one)) == content_digest(str(other))
    other.write_text("else")
    assert content_digest(str(one)) != content_digest(str(other))


def test_a_folder_is_its_files_and_their_names(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "x").write_text("1")
    before = content_digest(str(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert content_digest(str(tmp_path / "b")) == before
    (tmp_path / "b" / "deep" / "x").rename(tmp_path / "b" / "deep" / "y")
    assert content_digest(str(tmp_path / "b")) != before


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        ("model.safetensors", True),
        ("tokenizer.json", True),
        ("2_Dense/model.safetensors", True),
        ("report.html", False),
        ("checkpoint-5/model.safetensors", False),
        ("training_args.bin", False),
    ],
)
def test_of_a_model_only_what_makes_it(tmp_path, file, counts):
    (tmp_path / "config.json").write_text("{}")
    before = content_digest(str(tmp_path), model=True)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("x")
    assert (content_digest(str(tmp_path), model=True) != before) == counts


def test_what_is_no_path_stands_for_itself():
    assert content_digest("facebook/contriever-of-nobody") == "facebook/contriever-of-nobody"
    assert content_digest("") == "", "and not the current folder"
    assert content_digest("${tiny}/reader", model=True) == content_digest(str(FOLDER / "reader"), model=True)


# ---- steps


def test_a_new_step(run):
    step = opened(run)
    assert (step.folder, step.recipe, step.seed, step.checkpoint) == (
        run.folder / "round_1" / "retriever", "distill_retriever", 7, None,
    )  # fmt: skip
    assert not step.finished
    told = yaml.safe_load((step.folder / "resolved_config.yaml").read_text())
    assert (told["recipe"], told["config"], told["learning_rate"]) == ("distill_retriever", "tiny", 0.1)
    assert told["output_dir"] == str(step.folder)
    assert read_manifest(step.folder) == {
        "step": "round_1/retriever",
        "seed": 7,
        "inputs": {"corpus": "abc"},
        "settings": {"learning_rate": 0.1},
    }


def test_a_finished_step_is_left_as_it_is(run):
    weights = finish(opened(run))
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    # What says where and how it runs changes nothing, nor does the name of what is among the inputs.
    step = opened(run, save_steps=9, output_dir="elsewhere", data_corpus="moved.jsonl")
    assert step.finished
    assert weights.is_file()
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_an_unfinished_step_goes_on_from_its_checkpoint(run):
    checkpoint = opened(run).folder / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    assert opened(run).checkpoint == str(checkpoint)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"learning_rate": 0.2}, "learning_rate: 0.1 -> 0.2"),
        ({"seed": 8}, "seed: 7 -> 8"),
        ({"inputs": {"corpus": "xyz"}}, "another corpus"),
        ({"inputs": {"corpus": "abc", "augmenter": "d"}}, "another augmenter"),
        ({"inputs": {}}, "no corpus"),
    ],
)
def test_a_changed_step_is_made_anew(run, caplog, changes, why):
    weights = finish(opened(run))
    with caplog.at_level(logging.INFO):
        step = opened(run, **changes)
    assert not step.finished
    assert not weights.exists()
    assert f"round_1/retriever is made anew: {why}" in caplog.text


def test_a_folder_that_lost_its_manifest_is_not_trusted(run):
    """A kill while it was deleted: the manifest goes first, whatever else is still there."""
    weights = finish(opened(run))
    (run.folder / "round_1" / "retriever" / MANIFEST).unlink()
    assert not opened(run).finished
    assert not weights.exists()


def test_what_was_decided_is_no_input(run):
    step = opened(run)
    finish(step)
    note(step.folder, kept=False, gate={"after": 0.5})
    assert read_manifest(step.folder)["kept"] is False
    assert opened(run).finished
    note(step.folder, kept=True)
    assert json.loads((step.folder / MANIFEST).read_text())["kept"] is True
    assert read_manifest(step.folder)["gate"] == {"after": 0.5}


def test_nothing_is_known_of_a_folder_without_a_manifest(tmp_path):
    assert read_manifest(tmp_path) == {}
