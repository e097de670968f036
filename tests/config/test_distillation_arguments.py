"""The flags of distilling a retriever."""

from __future__ import annotations

import pytest

from rag_rl.config.distillation_arguments import DistillationArguments
from rag_rl.errors import ConfigError


def test_published_defaults():
    args = DistillationArguments()
    assert (args.distill_teacher, args.distill_ranking, args.distill_keep_source) == ("generator", "listwise", False)
    assert (args.distill_negatives, args.distill_rule, args.distill_ratio) == (15, "below_positive", 0.95)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"distill_negatives": 0}, "distill_negatives must be at least 1, got 0"),
        ({"distill_negatives": 51}, "distill_negatives must be at most 50, got 51"),
        ({"distill_batch_size": 0}, "distill_batch_size must be at least 1, got 0"),
        ({"distill_passage_words": 0}, "distill_passage_words must be at least 1, got 0"),
        ({"distill_max_new_tokens": 0}, "distill_max_new_tokens must be at least 1, got 0"),
        ({"distill_depth": 0}, "distill_depth must be at least 1, got 0"),
        ({"distill_ratio": 0.0}, "distill_ratio must be above 0, got 0.0"),
        ({"distill_margin": -0.1}, "distill_margin must be at least 0, got -0.1"),
        ({"distill_teacher": "reranker"}, "distill_teacher reranker needs one: set distill_reranker"),
    ],
)
def test_settings_that_mean_nothing(options, expected):
    with pytest.raises(ConfigError, match=expected):
        DistillationArguments(**options)
