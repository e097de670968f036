"""The flags of a reranker."""

from __future__ import annotations

import pytest

from rag_rl.config.reranker_arguments import RerankerArguments
from rag_rl.errors import ConfigError


def test_defaults():
    args = RerankerArguments()
    assert (args.train_file, args.valid_file, args.valid_size) == (None, None, 0.1)
    assert (args.reranker_train, args.reranker_candidates, args.reranker_false_negative_margin) == ("full", 20, None)
    assert (args.reranker_pooling, args.reranker_retriever_weight) == (None, 0.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"reranker_candidates": 0}, "reranker_candidates must be at least 1, got 0"),
        ({"reranker_batch_size": 0}, "reranker_batch_size must be at least 1, got 0"),
        ({"reranker_lora_r": 0}, "reranker_lora_r must be at least 1, got 0"),
        ({"valid_size": 0.0}, "valid_size must be above 0, got 0.0"),
        ({"reranker_false_negative_margin": -0.1}, r"must lie in \[0, 1\], got -0.1"),
        ({"reranker_retriever_weight": 1.1}, r"reranker_retriever_weight must lie in \[0, 1\], got 1.1"),
        ({"valid_file": "v.jsonl"}, "valid_file is set, but train_file is not"),
    ],
)
def test_settings_that_mean_nothing(options, expected):
    with pytest.raises(ConfigError, match=expected):
        RerankerArguments(**options)
