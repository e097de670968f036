"""A tiny random causal LM: LFM2, whose short convolutions make left padding worth a test."""

from __future__ import annotations

from typing import Any

import pytest


def make_model(tokenizer: Any, *, seed: int = 0) -> Any:
    """A model with weights wide enough apart that greedy decoding has no ties."""
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(seed)
    config = Lfm2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        conv_L_cache=3,
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention", "conv"],
        tie_word_embeddings=True,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Lfm2ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from rag_rl.tiny.tokenizer import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer: Any) -> Any:
    return make_model(tokenizer)


@pytest.fixture
def fresh_model(tokenizer: Any) -> Any:
    return make_model(tokenizer)
