"""Settings of the distillation trainer: published defaults, what is refused, and the parser reads them all."""

from __future__ import annotations

import pytest

from rag_rl.config.parsing import parse
from rag_rl.errors import ConfigError
from rag_rl.trainers.distillation_config import DistillationConfig


def test_published_defaults(tmp_path):
    config = DistillationConfig(output_dir=str(tmp_path))
    assert (config.group_size, config.num_ranked, config.ranking_temperature) == (16, None, 0.02)
    assert (config.augmentation_temperature, config.augmentation_weight, config.norm_weight) == (0.05, 1.0, 1.0)
    assert (config.augmentation_side, config.mask_known) == ("query", True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"num_ranked": 0}, r"num_ranked must be between 1 and group_size \(16\), got 0"),
        ({"num_ranked": 5, "group_size": 4}, r"between 1 and group_size \(4\), got 5"),
        ({"ranking_temperature": 0.0}, "ranking_temperature must be above 0, got 0.0"),
        ({"augmentation_temperature": -1.0}, "augmentation_temperature must be above 0"),
        ({"augmentation_weight": -1.0}, "augmentation_weight must be at least 0, got -1.0"),
        ({"norm_weight": -0.5}, "norm_weight must be at least 0, got -0.5"),
        ({"remove_unused_columns": True}, "remove_unused_columns must stay off"),
    ],
)
def test_settings_that_mean_nothing(tmp_path, options, expected):
    with pytest.raises(ConfigError, match=expected):
        DistillationConfig(output_dir=str(tmp_path), **options)


def test_it_is_read_from_a_command_line_and_written_down(tmp_path):
    recipe = tmp_path / "distill_mine.py"
    recipe.write_text('"""Mine."""\n')
    (tmp_path / "configs" / "distill_mine").mkdir(parents=True)
    (tmp_path / "configs" / "distill_mine" / "tiny.yaml").write_text("group_size: 4\nuse_cpu: true\nbf16: false\n")
    (config,) = parse(str(recipe), DistillationConfig, argv=["--num_ranked", "2"])
    assert (config.group_size, config.num_ranked) == (4, 2)
    written = config.to_dict()
    assert written["group_size"] == 4
    assert "batch_sampler" not in written
