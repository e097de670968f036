"""Layers of bitsandbytes under training."""

from __future__ import annotations

from torch import nn


def keep_trainable(model: nn.Module) -> None:
    """Keeps a model's 4-bit layers from being repacked when the model is first used without gradients.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weights of a ``Linear4bit`` in the first forward pass in
    evaluation mode, for a product that has no backward pass, rounds to bfloat16, and fails for widths that are no
    multiple of 64. A model that generates before or while it is trained would then hardly learn, without an error.

    Args:
        model: changed in place; one without such layers, or on a GPU, behaves as before.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not an attribute of every module
