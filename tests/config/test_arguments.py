from __future__ import annotations

import dataclasses

import pytest

from rag_rl.config import arguments
from rag_rl.config.arguments import (
    DataArguments,
    GeneratorArguments,
    JudgeArguments,
    QueryEncoderArguments,
    ReaderArguments,
    ReasonerArguments,
    RetrieverArguments,
    RewardArguments,
    RunArguments,
    StepRewardArguments,
)
from rag_rl.config.parsing import read_arguments
from rag_rl.errors import ConfigError
from rag_rl.retrieval import IndexSettings

PREFIX = {
    DataArguments: "data_",
    RetrieverArguments: "retriever_",
    QueryEncoderArguments: "retriever_",
    GeneratorArguments: "generator_",
    ReaderArguments: "reader_",
    RewardArguments: "reward_",
    JudgeArguments: "judge_",
    ReasonerArguments: "reasoner_",
    StepRewardArguments: "step_",
}
ALL = (RunArguments, *PREFIX)


def test_every_dataclass_is_looked_at():
    assert {value for value in vars(arguments).values() if dataclasses.is_dataclass(value)} == set(ALL)


@pytest.mark.parametrize("owner", ALL)
def test_every_flag_has_help(owner):
    assert owner.__doc__
    assert not owner.__doc__.startswith(f"{owner.__name__}("), "the signature is no help"
    for field in dataclasses.fields(owner):
        assert len(field.metadata.get("help", "")) > 5, field.name


@pytest.mark.parametrize("owner", PREFIX)
def test_flags_bear_the_name_of_their_part(owner):
    assert [f.name for f in dataclasses.fields(owner) if not f.name.startswith(PREFIX[owner])] == []


def test_no_flag_is_one_of_the_trainers():
    from trl import GRPOConfig, ModelConfig

    theirs = {field.name for owner in (GRPOConfig, ModelConfig) for field in dataclasses.fields(owner)}
    assert not theirs & {field.name for owner in ALL for field in dataclasses.fields(owner)}


def test_defaults_are_what_the_parser_accepts(tmp_path):
    config = tmp_path / "none.yaml"
    config.write_text("{}\n")
    (tmp_path / "recipe.py").write_text('"""A recipe."""\n')
    read = read_arguments(tmp_path / "recipe.py", *ALL, argv=["--config", str(config)])
    assert read == tuple(owner() for owner in ALL)


def test_lists_are_not_shared():
    RewardArguments().reward_names.append("em")
    assert RewardArguments().reward_names == ["f1", "format"]


@pytest.mark.parametrize("top_k", [0, -3])
def test_top_k_below_one(top_k):
    with pytest.raises(ConfigError, match=f"retriever_top_k must be at least 1, got {top_k}"):
        RetrieverArguments(retriever_top_k=top_k)


def test_kinds_of_index_are_those_of_faiss():
    with pytest.raises(ConfigError, match="retriever_index hnsw needs retriever_backend faiss, got chroma"):
        RetrieverArguments(retriever_index="hnsw", retriever_backend="chroma")


def test_every_setting_of_an_index_has_its_flag():
    names = {field.name for field in dataclasses.fields(IndexSettings)} - {"kind"}
    flags = {field.name for field in dataclasses.fields(RetrieverArguments)}
    assert {f"retriever_index_{name}" for name in names} | {"retriever_index_path"} == {
        flag for flag in flags if flag.startswith("retriever_index_")
    }


@pytest.mark.parametrize(
    ("owner", "values", "expected"),
    [
        (RewardArguments, {"reward_model_template": []}, "reward_model_template must be one text or two, got 0"),
        (JudgeArguments, {"judge_scale": [1.0]}, r"judge_scale must be the lowest and the highest score, got \[1.0\]"),
        (JudgeArguments, {"judge_pass_mark": 6.0}, r"judge_pass_mark must lie in \[0, 1\], got 6.0"),
        (ReasonerArguments, {"reasoner_max_steps": 0}, "reasoner_max_steps must be at least 1, got 0"),
        (ReasonerArguments, {"reasoner_baseline_top_k": 0}, "reasoner_baseline_top_k must be at least 1, got 0"),
        (ReasonerArguments, {"reasoner_baselines": ["oneshot"]}, "are one_shot and no_retrieval, got oneshot"),
    ],
)
def test_values_that_cannot_be(owner, values, expected):
    with pytest.raises(ConfigError, match=expected):
        owner(**values)
