from __future__ import annotations

import json

import pytest
import yaml

from rag_rl import __version__
from rag_rl.errors import RunFolderError
from rag_rl.evaluation.run_folders import other_version, read_run

SETTINGS = {"recipe": "grpo_generator", "config": "tiny", "made_with": {"rag-rl": "0.0.9"}, "seed": 1}
SUMMARY = {"status": "complete", "before": {"em": 0.5}, "after": {"em": 0.6}, "n_eval": 4}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "resolved_config.yaml").write_text(yaml.safe_dump(SETTINGS))
    (tmp_path / "metrics.json").write_text(json.dumps(SUMMARY))
    return tmp_path


def test_reads_both(folder):
    assert read_run(folder) == (SUMMARY, SETTINGS)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("resolved_config.yaml", None, r"holds no run \(there is no resolved_config\.yaml in it\)"),
        ("metrics.json", None, "holds an unfinished run"),
        ("metrics.json", '{"status": "comp', "is damaged: metrics.json or resolved_config.yaml cannot be read"),
        ("metrics.json", json.dumps({**SUMMARY, "status": "started"}), r"unfinished run \(status: started\)"),
        (
            "metrics.json",
            json.dumps({"status": "complete", "n_eval": 4}),
            f"made by rag-rl 0.0.9, and this is {__version__}",
        ),
        ("metrics.json", json.dumps({"status": "complete", "after": {}}), "has no 'after' or no 'n_eval'"),
        ("metrics.json", "[]", "no recipe is named"),
        ("resolved_config.yaml", "config: tiny\n", "of a version that it does not name.*no recipe is named"),
        ("resolved_config.yaml", "a: [1", "is damaged"),
    ],
)
def test_what_cannot_be_read(folder, file, text, message):
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    with pytest.raises(RunFolderError, match=message) as caught:
        read_run(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_versions():
    assert other_version(None).startswith("was made by rag-rl of a version that it does not name")
