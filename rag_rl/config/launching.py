"""What a run asks of the launcher and of the engines beside it, checked before anything is loaded."""

from __future__ import annotations

import os
from importlib import metadata, util
from typing import Any

from rag_rl.errors import ConfigError, MissingPackageError

VLLM_VERSIONS = ("0.19.0", "0.27.1")
"""The oldest and the newest that TRL 1.12 takes; of others it only warns."""


def check_vllm(training: Any) -> None:
    """Refuses ``use_vllm`` where vLLM cannot generate.

    Args:
        training: settings of a trainer; those without ``use_vllm`` are left alone.

    Raises:
        MissingPackageError: vLLM is not installed. In server mode, too, TRL's client needs it.
        ConfigError: another version than TRL takes, or no GPU.
    """
    if not getattr(training, "use_vllm", False):
        return
    from packaging.version import InvalidVersion, Version

    oldest, newest = VLLM_VERSIONS
    taken = f"TRL {metadata.version('trl')} takes vllm {oldest} to {newest}"
    if util.find_spec("vllm") is None:
        raise MissingPackageError(f"use_vllm: vllm is not installed: pip install 'rag-rl[gpu]' ({taken})")
    try:
        version = metadata.version("vllm")
        # Without the local part of builds such as 0.27.1+cu129, which sorts above the plain release.
        fits = Version(oldest) <= Version(Version(version).base_version) <= Version(newest)
    except (metadata.PackageNotFoundError, InvalidVersion):
        version, fits = "of an unknown version", False
    if not fits:
        raise ConfigError(f"use_vllm: vllm {version} is installed, and {taken}: pip install vllm=={newest}")
    import torch

    if training.use_cpu or not torch.cuda.is_available():
        why = "use_cpu is set" if training.use_cpu else "torch finds none"
        raise ConfigError(f"use_vllm needs a GPU, and {why}: leave use_vllm out, and transformers generates")


def check_sharding(training: Any, *, encoder: bool = False) -> None:
    """Refuses launch files that a trainer does not go with.

    Encoders and rerankers are saved by sentence-transformers, which takes the weights that a process has; they are
    small. TRL's PPO holds four models, and DeepSpeed and FSDP leave it without what it reads of them
    (``rag_rl.trainers.step_ppo_loop``).

    Args:
        training: settings of a trainer.
        encoder: whether the run trains an encoder beside what these settings are for.

    Raises:
        ConfigError: ZeRO-3 or FSDP for an encoder or a reranker; DeepSpeed or FSDP for PPO.
    """
    plugin = getattr(training, "deepspeed_plugin", None)
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if hasattr(training, "num_ppo_epochs") and (plugin is not None or fsdp):
        raise ConfigError(
            "PPO runs on one process or under DDP, not under DeepSpeed or FSDP: launch it with "
            "accelerate_configs/multi_gpu.yaml or multi_node.yaml, and with LoRA where the models do not fit"
        )
    encoder = encoder or hasattr(training, "router_mapping")
    if encoder and (fsdp or (plugin is not None and plugin.zero_stage == 3)):
        raise ConfigError(
            "an encoder or a reranker is not shared out over processes (ZeRO-3, FSDP): launch it with "
            "accelerate_configs/multi_gpu.yaml, zero1.yaml or zero2.yaml"
        )


def is_shared_out(trainer: Any) -> bool:
    """Whether no process holds the weights under training whole.

    Args:
        trainer: of transformers.

    Returns:
        True under ZeRO-3 and FSDP.
    """
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return bool(getattr(trainer, "is_fsdp_enabled", False) or (plugin is not None and plugin.zero_stage == 3))


def share_out_loaded_models(training: Any, on: bool) -> None:
    """Tells transformers whether the models that it loads now are to be shared out over the processes (ZeRO-3).

    The launch file says so for a whole process. Meant is the model under training only: an encoder, a reader or a
    judge that was shared out as well has no engine that would put its weights together again, and cannot be run.

    Args:
        training: settings of a trainer; nothing happens but under ZeRO-3.
        on: whether.
    """
    plugin = getattr(training, "deepspeed_plugin", None)
    if plugin is None or plugin.zero_stage != 3:
        return
    from transformers.integrations import deepspeed

    # The trainer's own, once there is one: it has the batch sizes in it.
    config = getattr(training, "hf_deepspeed_config", None) or getattr(plugin, "dschf", None)
    if on and config is not None:
        deepspeed.set_hf_deepspeed_config(config)
    else:
        deepspeed.unset_hf_deepspeed_config()
