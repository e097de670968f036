from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="trl is not installed")

from rag_rl.errors import ConfigError
from rag_rl.trainers.step_grpo_config import StepGRPOConfig

BASE = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 8}


def test_defaults(tmp_path):
    args = StepGRPOConfig(output_dir=str(tmp_path), **BASE)
    assert (args.step_credit, args.guard_stop, args.guard_patience) == ("trajectory", False, 3)
    assert (args.guard_max_kl, args.guard_min_entropy, args.guard_max_zero_variance) == (None, None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_credit": "chain"}, "step_credit must be trajectory, step or return_to_go, got 'chain'"),
        ({"guard_patience": 0}, "guard_patience must be at least 1, got 0"),
        ({"use_liger_kernel": True}, "where the mask of the documents cannot be audited: leave it off"),
        ({"guard_max_kl": 0.5}, "guard_max_kl needs a KL term: set beta above 0"),
    ],
)
def test_what_does_not_fit(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        StepGRPOConfig(output_dir=str(tmp_path), **BASE, **settings)


def test_a_bound_on_the_divergence_with_a_kl_term(tmp_path):
    args = StepGRPOConfig(output_dir=str(tmp_path), **BASE, beta=0.01, guard_max_kl=0.5)
    assert args.guard_max_kl == 0.5
