"""LoRA and QLoRA for cross-encoders: the body gets adapters, the head is trained whole and never quantised.

Loading in 4 bits would quantise the head as well, which then cannot be trained; and an adapter that is loaded from a
folder is frozen. Both is taken care of here.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from torch import nn

from rag_rl.errors import ConfigError, DataError
from rag_rl.trainers.quantized_layers import keep_trainable

# What heads are called; those of the model's own class are added.
_HEADS = ("classifier", "score", "head", "lm_head", "qa_outputs")


def load_cross_encoder(
    name: str,
    *,
    quantized: bool = False,
    max_length: int | None = None,
    pooling: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> CrossEncoder:
    """Loads a cross-encoder, or any encoder under a new head, ready to be trained.

    Args:
        name: Hub id or folder.
        quantized: body in NF4 with double quantisation; computed in bfloat16 on a GPU, in float32 on a CPU.
        max_length: override the limit of a pair, in tokens.
        pooling: override what the head reads, "cls" or "mean", in a model whose config has ``classifier_pooling``.
        dtype: of the weights, e.g. bfloat16; by default the checkpoint's, quantised that of the computation.
        device: where to; by default a GPU where there is one.

    Returns:
        A model with one output. Of one that was saved with an adapter the adapter is trainable.

    Raises:
        DataError: it cannot be loaded.
        ConfigError: no such dtype, or a model whose pooling cannot be chosen.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {}
    if dtype is not None:
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigError(f"reranker_dtype must be a dtype of torch such as bfloat16, got {dtype!r}")
        options["dtype"] = getattr(torch, dtype)
    try:
        if quantized:
            from transformers import BitsAndBytesConfig

            compute = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
            options.setdefault("dtype", compute)
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=compute,
                llm_int8_skip_modules=sorted({*_HEADS, *_declared_heads(name)}),
            )
        config: dict[str, Any] = {}
        if pooling is not None:
            _check_pooling(name)
            config["classifier_pooling"] = pooling
        model = CrossEncoder(
            name, num_labels=1, max_length=max_length, device=device, model_kwargs=options, config_kwargs=config
        )
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"the cross-encoder {name} cannot be loaded: {error}") from error
    keep_trainable(model)
    thaw_adapter(model)
    return model


def add_lora(model: CrossEncoder, *, r: int, alpha: int, dropout: float = 0.0) -> None:
    """Adds a LoRA adapter to all linear layers of the body; the head is trained whole. The rest is frozen.

    Args:
        model: without an adapter.
        r: rank, at least 1.
        alpha: scale, times 1 / rank.
        dropout: before the adapter, in [0, 1).

    Raises:
        ConfigError: the model has an adapter already, or numbers out of range.
    """
    from peft import LoraConfig, TaskType

    if r < 1 or not 0.0 <= dropout < 1.0:
        raise ConfigError(f"LoRA needs a rank of at least 1 and a dropout in [0, 1), got {r} and {dropout}")
    backbone = model.transformers_model
    if getattr(backbone, "_hf_peft_config_loaded", False):
        raise ConfigError("the cross-encoder has an adapter already, which goes on training: set reranker_train full")
    prefix = backbone.base_model_prefix
    body = getattr(backbone, prefix)
    leaves = {
        name.rpartition(".")[2] for name, module in body.named_modules() if isinstance(module, nn.Linear) and name
    }
    model.add_adapter(
        LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            # "all-linear" would adapt the inner layers of a head too, which is trained whole.
            target_modules=rf"{re.escape(prefix)}\.(?:.*\.)?(?:{'|'.join(sorted(map(re.escape, leaves)))})",
            modules_to_save=head_names(backbone) or None,
        )
    )


def head_names(backbone: nn.Module) -> list[str]:
    """The modules of a model that stand beside its body and have weights of their own.

    Args:
        backbone: a transformers model.

    Returns:
        Their names; none for a language model that scores by the logits of its words.
    """
    prefix = str(getattr(backbone, "base_model_prefix", ""))
    # An output layer over the vocabulary is large, and usually tied to the embeddings.
    return [
        name
        for name, module in backbone.named_children()
        if name not in (prefix, "lm_head") and any(True for _ in module.parameters())
    ]


def thaw_adapter(model: CrossEncoder) -> None:
    """Makes a loaded adapter trainable, and the head that was saved with it; does nothing without one.

    Args:
        model: as loaded from a folder with an adapter.
    """
    backbone = model.transformers_model
    if getattr(backbone, "_hf_peft_config_loaded", False):
        for name, parameter in backbone.named_parameters():
            if "lora_" in name or ".modules_to_save." in name:
                parameter.requires_grad_(True)


def merge_adapter(model: CrossEncoder | SentenceTransformer) -> None:
    """Merges the LoRA adapter into the weights, in place; a quantised body becomes a plain one first.

    What is saved then is an ordinary model. Merging into dequantised weights keeps the function that was
    trained; merging into the weights from before quantisation, or quantising the sum, would change it.

    Args:
        model: a cross-encoder or an encoder with an adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    backbone = model.transformers_model
    for name, module in list(backbone.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            _replace(backbone, name, module.modules_to_save[module.active_adapters[0]])
        elif isinstance(module, BaseTunerLayer):
            base: nn.Module = module.get_base_layer()
            if type(base).__name__ == "Linear4bit":
                base = plain = _plain(base)
                with torch.no_grad():
                    for adapter in module.active_adapters:
                        plain.weight += module.get_delta_weight(adapter).to(plain.weight)  # type: ignore[operator]
            else:
                module.merge()  # type: ignore[no-untyped-call]
            _replace(backbone, name, base)
    for name, module in list(backbone.named_modules()):
        if type(module).__name__ == "Linear4bit":
            _replace(backbone, name, _plain(module))
    if getattr(backbone, "hf_quantizer", None) is not None:
        backbone.hf_quantizer = None
        backbone.is_quantized = backbone.is_loaded_in_4bit = False
        if hasattr(backbone.config, "quantization_config"):
            del backbone.config.quantization_config
    backbone._hf_peft_config_loaded = False
    del backbone.peft_config


def is_quantized(model: CrossEncoder) -> bool:
    """Tells whether the body was loaded in 4 bits.

    Args:
        model: a cross-encoder.

    Returns:
        Whether it was.
    """
    return getattr(model.transformers_model, "hf_quantizer", None) is not None


def _check_pooling(name: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    if not hasattr(config, "classifier_pooling"):
        raise ConfigError(
            f"reranker_pooling is for models whose config has classifier_pooling; leave it out: {name} is a "
            f"{config.model_type}"
        )


def _declared_heads(name: str) -> list[str]:
    """Heads of a model that is not loaded yet, by building it without weights."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(name, num_labels=1)
    with torch.device("meta"):
        return head_names(AutoModelForSequenceClassification.from_config(config))


def _plain(layer: Any) -> nn.Linear:
    """The dequantised layer of a ``Linear4bit``."""
    from bitsandbytes.functional import dequantize_4bit

    state = layer.weight.quant_state
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(dequantize_4bit(layer.weight.data, state).to(layer.compute_dtype or state.dtype))
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to(plain.weight))
    return plain


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
