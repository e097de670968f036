"""A tiny world with an index, and trainers over it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rag_rl.tiny import FOLDER
from rag_rl.tiny.world import draw_world, questions
from rag_rl.types import Question


@dataclass
class Searching:
    """An index over one world, and the questions about it."""

    index: Any
    one_hop: list[Question]
    two_hops: list[Question]


@pytest.fixture(scope="session")
def searching(tmp_path_factory: pytest.TempPathFactory) -> Searching:
    pytest.importorskip("faiss", reason="faiss is not installed")
    from rag_rl.retrieval import SentenceEncoder, build_index, open_index

    world = draw_world(4, region="heldout", sizes={"person": 30, "town": 20, "guild": 12, "river": 12})
    folder = tmp_path_factory.mktemp("searching") / "index"
    encoder = SentenceEncoder(FOLDER / "encoder", devices="cpu")
    build_index(world.passages, encoder, folder, progress=False)
    one, two = (list(questions(world, hops=hops, rng=random.Random(0))) for hops in (1, 2))
    return Searching(open_index(folder, encoder), one, two)


@pytest.fixture
def make_trainer(searching: Searching, tmp_path: Path) -> Any:
    """Makes trainers of a fresh copy of the packaged encoder; arguments of the config, or of the trainer."""
    from rag_rl.reasoning import DecompositionReader, Environment
    from rag_rl.retrieval import HistoryEncoder, SentenceEncoder
    from rag_rl.trainers.retriever_grpo_config import RetrieverGRPOConfig
    from rag_rl.trainers.retriever_grpo_trainer import RetrieverGRPOTrainer

    def make(
        *,
        environment: Any = None,
        asked: list[Question] | None = None,
        top_k: int = 2,
        prepare: Any = None,
        folder: str = "run",
        **settings: Any,
    ) -> RetrieverGRPOTrainer:
        encoder = SentenceEncoder(FOLDER / "encoder", devices="cpu", batch_size=64)
        if prepare is not None:
            prepare(encoder)
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / folder),
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "num_candidates": 8,
            "alpha": 0.05,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_steps": 2,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "seed": 3,
        }
        return RetrieverGRPOTrainer(
            encoder=HistoryEncoder(encoder),
            args=RetrieverGRPOConfig(**{**values, **settings}),
            index=searching.index,
            environment=environment or Environment(DecompositionReader(), max_hops=2),
            questions=asked or searching.two_hops[:24],
            top_k=top_k,
        )

    return make
