"""Settings of the reranker's trainer."""

from __future__ import annotations

import pytest

from rag_rl.errors import ConfigError
from rag_rl.trainers.reranker_config import RerankerConfig


def make(**options) -> RerankerConfig:
    return RerankerConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **options)


def test_defaults_are_those_of_the_method():
    args = make()
    assert (args.loss_type, args.margin, args.num_negatives, args.num_positives) == ("margin", 1.0, 7, None)
    assert (args.hard_share, args.mini_batch_size, args.remove_unused_columns) == (0.5, None, False)
    assert args.ddp_find_unused_parameters is False
    assert make(ddp_find_unused_parameters=True).ddp_find_unused_parameters is True


def test_what_is_written_down_can_be_read():
    found = make(margin=2.0).to_dict()
    assert found["margin"] == 2.0
    assert found["learning_rate"] == 5e-5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"margin": 0.0}, "margin must be above 0, got 0.0"),
        ({"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ({"num_positives": 0}, "num_positives must be at least 1, got 0"),
        ({"hard_share": 1.1}, r"hard_share must lie in \[0, 1\], got 1.1"),
        ({"mini_batch_size": 0}, "mini_batch_size must be at least 1, got 0"),
        ({"remove_unused_columns": True}, "remove_unused_columns must stay off"),
    ],
)
def test_settings_that_mean_nothing(options, expected):
    with pytest.raises(ConfigError, match=expected):
        make(**options)
