"""Settings of the trainer: their defaults are the paper's, and the parser can read them all."""

from __future__ import annotations

from rag_rl.config.parsing import parse
from rag_rl.trainers.retriever_grpo_config import RetrieverGRPOConfig


def test_defaults_are_those_of_the_paper(tmp_path):
    config = RetrieverGRPOConfig(output_dir=str(tmp_path))
    found = {
        name: getattr(config, name)
        for name in ("num_generations", "num_candidates", "alpha", "epsilon", "beta", "num_iterations", "loss_type")
    }
    assert found == {
        "num_generations": 8, "num_candidates": 30, "alpha": 0.05, "epsilon": 0.2, "beta": 0.0, "num_iterations": 1,
        "loss_type": "grpo",
    }  # fmt: skip


def test_trajectories_of_a_step(tmp_path):
    config = RetrieverGRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=32, gradient_accumulation_steps=4
    )
    assert config.trajectories_per_device == 128


def test_it_is_read_from_a_command_line_and_written_down(tmp_path):
    recipe = tmp_path / "grpo_mine.py"
    recipe.write_text('"""Mine."""\n')
    (tmp_path / "configs" / "grpo_mine").mkdir(parents=True)
    (tmp_path / "configs" / "grpo_mine" / "tiny.yaml").write_text("alpha: 0.2\nuse_cpu: true\nbf16: false\n")
    (config,) = parse(str(recipe), RetrieverGRPOConfig, argv=["--num_candidates", "12"])
    assert (config.alpha, config.num_candidates) == (0.2, 12)
    written = config.to_dict()
    assert written["alpha"] == 0.2
    assert "batch_sampler" not in written
