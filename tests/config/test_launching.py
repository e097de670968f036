"""What is refused before anything is loaded, and what ZeRO-3 may share out."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest

from rag_rl.config import launching
from rag_rl.config.launching import check_sharding, check_vllm, is_shared_out, share_out_loaded_models
from rag_rl.config.self_boosting_arguments import RetrieverTrainingArguments
from rag_rl.errors import ConfigError, MissingPackageError


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts a package called vllm, of a version, where Python looks for packages."""

    def install(version: str | None) -> None:
        (tmp_path / "vllm").mkdir()
        (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('nothing may import it')\n")
        if version is not None:
            information = tmp_path / f"vllm-{version}.dist-info"
            information.mkdir()
            (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def asked(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"use_vllm": True, "use_cpu": False, **changes})


def test_nothing_is_asked_for():
    check_vllm(asked(use_vllm=False))
    check_vllm(SimpleNamespace())


def test_vllm_is_missing():
    with pytest.raises(MissingPackageError, match=r"vllm is not installed: pip install 'rag-rl\[gpu\]' \(TRL 1.12"):
        check_vllm(asked())


@pytest.mark.parametrize("version", ["0.18.2", "0.28.0", "0.27.2+cu129", None])
def test_another_version(installed, version):
    installed(version)
    shown = version or "of an unknown version"
    with pytest.raises(ConfigError) as error:
        check_vllm(asked())
    assert f"vllm {shown} is installed, and TRL 1.12" in str(error.value)
    assert str(error.value).endswith("takes vllm 0.19.0 to 0.27.1: pip install vllm==0.27.1")


@pytest.mark.parametrize("version", ["0.19.0", "0.27.1", "0.27.1+cu129"])
def test_without_a_gpu(installed, version, monkeypatch):
    installed(version)
    with pytest.raises(ConfigError, match="use_vllm needs a GPU, and use_cpu is set"):
        check_vllm(asked(use_cpu=True))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="use_vllm needs a GPU, and torch finds none"):
        check_vllm(asked())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_vllm(asked())


def test_the_versions_are_those_of_trl():
    source = inspect.getsource(importlib.import_module("trl.import_utils").is_vllm_available)
    oldest, newest = launching.VLLM_VERSIONS
    assert f'Version("{oldest}") <= _vllm_base_version <= Version("{newest}")' in source
    assert f'"vllm=={newest}"' in (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")


# ---- sharing out


class Zero3(SimpleNamespace):
    zero_stage = 3


class Config:
    """What transformers keeps a weak reference to."""

    def is_zero3(self) -> bool:
        return True


@pytest.fixture
def transformers_side():
    """transformers' own switch, back as it was."""
    from transformers.integrations import deepspeed

    yield deepspeed.is_deepspeed_zero3_enabled
    deepspeed.unset_hf_deepspeed_config()


def test_models_are_shared_out_while_it_is_on(transformers_side):
    config = Config()
    training = SimpleNamespace(deepspeed_plugin=Zero3(dschf=config), hf_deepspeed_config=None)
    assert not transformers_side()
    share_out_loaded_models(training, True)
    assert transformers_side()
    share_out_loaded_models(training, False)
    assert not transformers_side()


@pytest.mark.parametrize("plugin", [None, SimpleNamespace(zero_stage=2, dschf=Config())])
def test_nothing_is_shared_out_below_stage_3(transformers_side, plugin):
    share_out_loaded_models(SimpleNamespace(deepspeed_plugin=plugin), True)
    assert not transformers_side()
    share_out_loaded_models(None, True)
    assert not transformers_side()


def test_a_launch_file_that_shares_out_nothing_at_loading(transformers_side):
    share_out_loaded_models(SimpleNamespace(deepspeed_plugin=Zero3(dschf=None)), True)
    assert not transformers_side()


def test_encoders_stay_whole(monkeypatch):
    of_encoders = {"router_mapping": None}
    check_sharding(SimpleNamespace(**of_encoders, deepspeed_plugin=SimpleNamespace(zero_stage=2)))
    check_sharding(SimpleNamespace(deepspeed_plugin=Zero3()))
    with pytest.raises(ConfigError, match=r"is not shared out over processes .* zero1.yaml or zero2.yaml"):
        check_sharding(SimpleNamespace(**of_encoders, deepspeed_plugin=Zero3()))
    with pytest.raises(ConfigError, match="is not shared out over processes"):
        check_sharding(SimpleNamespace(deepspeed_plugin=Zero3()), encoder=RetrieverTrainingArguments.trains_encoder)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="is not shared out over processes"):
        check_sharding(SimpleNamespace(**of_encoders, deepspeed_plugin=None))


def test_ppo_goes_with_ddp_alone(monkeypatch):
    check_sharding(SimpleNamespace(num_ppo_epochs=1, deepspeed_plugin=None))
    with pytest.raises(ConfigError, match="PPO runs on one process or under DDP, not under DeepSpeed or FSDP"):
        check_sharding(SimpleNamespace(num_ppo_epochs=1, deepspeed_plugin=SimpleNamespace(zero_stage=2)))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="PPO runs on one process or under DDP"):
        check_sharding(SimpleNamespace(num_ppo_epochs=1, deepspeed_plugin=None))


@pytest.mark.parametrize(
    ("plugin", "fsdp", "expected"),
    [(None, False, False), (SimpleNamespace(zero_stage=2), False, False), (Zero3(), False, True), (None, True, True)],
)
def test_shared_out_weights_are_known(plugin, fsdp, expected):
    state = SimpleNamespace(deepspeed_plugin=plugin)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(state=state), is_fsdp_enabled=fsdp)
    assert is_shared_out(trainer) is expected
