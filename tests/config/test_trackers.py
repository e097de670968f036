from __future__ import annotations

import pytest

from rag_rl.config import trackers
from rag_rl.config.trackers import TRACKERS, check_trackers
from rag_rl.errors import ConfigError, MissingPackageError


def test_the_trackers_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert sorted(TRACKERS) == sorted(INTEGRATION_TO_CALLBACK)


@pytest.mark.parametrize("names", [None, "none", [], ["none"], "all", "tensorboard", ["tensorboard"], ["kubeflow"]])
def test_what_is_there_passes(names):
    check_trackers(names)


def test_one_of_several_modules_is_enough(monkeypatch):
    monkeypatch.setattr(trackers.util, "find_spec", lambda name: object() if name == "tensorboardX" else None)
    check_trackers(["tensorboard"])


@pytest.mark.parametrize(
    ("name", "package"), [("wandb", "wandb"), ("comet_ml", "comet-ml"), ("tensorboard", "tensorboard")]
)
def test_what_is_missing_comes_with_its_command(name, package, monkeypatch):
    monkeypatch.setattr(trackers.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingPackageError, match=rf"^report_to {name}: {package} is not installed: pip install {package},"
    ):
        check_trackers(["none", name])


def test_what_there_is_not():
    with pytest.raises(ConfigError, match=r"^report_to: there is no tracker 'wandbd'; the closest one is wandb$"):
        check_trackers(["tensorboard", "wandbd"])
