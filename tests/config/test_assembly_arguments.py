from __future__ import annotations

import pytest

from rag_rl.config.assembly_arguments import BASELINES, AssemblyArguments, EvaluationArguments
from rag_rl.errors import ConfigError


def test_known_baselines():
    assert EvaluationArguments(evaluation_baselines=list(BASELINES)).evaluation_baselines == [*BASELINES]
    with pytest.raises(ConfigError, match="evaluation_baselines are no_retrieval, one_shot, bm25, got bm52"):
        EvaluationArguments(evaluation_baselines=["bm25", "bm52"])


@pytest.mark.parametrize("name", ["evaluation_batch_size", "evaluation_one_shot_top_k"])
def test_numbers_below_one(name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        EvaluationArguments(**{name: 0})


def test_budget_of_an_answer():
    with pytest.raises(ConfigError, match="generator_max_new_tokens must be at least 1, got 0"):
        AssemblyArguments(generator_max_new_tokens=0)


def test_all_is_absent_that_nobody_names():
    parts = AssemblyArguments()
    assert (parts.retriever_run, parts.generator_model, parts.reasoner_model) == (None, None, None)
