"""rag_rl.trainers.step_ppo_start: who is warned, and who is refused."""

from __future__ import annotations

import json
import logging

import pytest

from rag_rl.errors import ConfigError
from rag_rl.tiny import FOLDER
from rag_rl.trainers.step_ppo_start import check_start


def run_folder(path, *, recipe="sft_reasoner", epoch=1.0):
    path.mkdir()
    (path / "metrics.json").write_text(json.dumps({"recipe": recipe}))
    (path / "trainer_state.json").write_text(json.dumps({"epoch": epoch}))
    return str(path)


@pytest.mark.parametrize(
    ("recipe", "epoch", "warning"),
    [
        ("sft_reasoner", 1.0, None),
        ("sft_reasoner", 3.0, None),
        ("sft_reasoner", 0.4, "was taught for 0.40 epochs only"),
        ("grpo_generator", 1.0, "is no run of sft_reasoner"),
    ],
)
def test_a_run_folder(tmp_path, caplog, recipe, epoch, warning):
    with caplog.at_level(logging.WARNING):
        check_start(run_folder(tmp_path / "run", recipe=recipe, epoch=epoch))
    assert len(caplog.messages) == (warning is not None)
    assert warning is None or warning in caplog.messages[0]


def test_a_name_on_the_hub(caplog):
    with caplog.at_level(logging.WARNING):
        check_start("some-group/some-model")
    assert caplog.messages == [
        "some-group/some-model is no run of sft_reasoner: a model that was not taught the form of a step collapses"
    ]


def test_the_packaged_reader_knows_the_form(caplog):
    with caplog.at_level(logging.WARNING):
        check_start(str(FOLDER / "reader"))
    assert not caplog.messages


def test_an_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an adapter: save that run with --save_merged true"):
        check_start(str(tmp_path))
