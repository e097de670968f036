"""Reasoning over several hops: the multi-hop environment, its readers, and the rollout loop."""

from __future__ import annotations

from rag_rl.reasoning.asking import Asker
from rag_rl.reasoning.environment import Environment, SingleSearch, known_gold, retrieval_reward
from rag_rl.reasoning.multihop import (
    Failure,
    Finish,
    HopRecord,
    Observation,
    Reader,
    RetrievalPolicy,
    Search,
    TopK,
    Trajectory,
    f1_reward,
    rollout,
    rollout_statistics,
)
from rag_rl.reasoning.readers import DecompositionReader, ReActReader

__all__ = [
    "Asker",
    "DecompositionReader",
    "Environment",
    "Failure",
    "Finish",
    "HopRecord",
    "Observation",
    "ReActReader",
    "Reader",
    "RetrievalPolicy",
    "Search",
    "SingleSearch",
    "TopK",
    "Trajectory",
    "f1_reward",
    "known_gold",
    "retrieval_reward",
    "rollout",
    "rollout_statistics",
]
