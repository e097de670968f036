"""Flags of query synthesis: published defaults, and what is refused at once."""

from __future__ import annotations

import pytest

from rag_rl.config.synthesis_arguments import SynthesisArguments
from rag_rl.errors import ConfigError


def test_published_defaults():
    args = SynthesisArguments()
    assert (args.synthesis_passages, args.synthesis_temperature, args.synthesis_max_passage_chars) == (
        15_000,
        0.5,
        8000,
    )
    assert (args.with_answers, args.synthesis_check) == (False, "relevance")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"synthesis_passages": 0}, "synthesis_passages must be at least 1, got 0"),
        ({"synthesis_per_passage": 0}, "synthesis_per_passage must be at least 1"),
        ({"synthesis_attempts": 0}, "synthesis_attempts must be at least 1"),
        ({"synthesis_batch_size": 0}, "synthesis_batch_size must be at least 1"),
        ({"synthesis_temperature": -0.1}, "at least 0, got -0.1"),
        ({"synthesis_top_p": 0.0}, "above 0 and at most 1, got 0.0"),
        ({"synthesis_check": "answer"}, "set with_answers true"),
        ({"synthesis_writer": "sentences", "with_answers": True}, "set with_answers false"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ConfigError, match=message):
        SynthesisArguments(**values)


def test_all_passages():
    assert SynthesisArguments(synthesis_passages=None).synthesis_passages is None
