"""Layers of bitsandbytes under training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rag_rl.trainers.quantized_layers import keep_trainable


def gradient(model: nn.Module) -> torch.Tensor:
    """What comes through the layers, to whatever is trained below them."""
    given = torch.linspace(-1, 1, 256).view(4, 64).requires_grad_()
    model.train()
    model(given).square().sum().backward()
    assert given.grad is not None
    return given.grad


def test_gradients_are_the_same_after_the_model_was_used():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    layers = [bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4") for _ in range(2)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1]).to("cpu")
    with torch.no_grad():
        model(torch.zeros(1, 64))
    unused = copy.deepcopy(model)
    keep_trainable(model)
    model.eval()
    with torch.no_grad():
        model(torch.ones(4, 64))
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}, "in 4 bits"
    torch.testing.assert_close(gradient(model), gradient(unused))
    assert gradient(model).abs().max() > 0
