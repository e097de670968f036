from __future__ import annotations

import asyncio
import inspect
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rag_rl.errors import BackendError, ConfigError
from rag_rl.rewards.answer import em, f1
from rag_rl.rewards.combine import RewardPart, combine, score_parts, weighted_sum
from rag_rl.rewards.format import format_reward


def fixed(*values: float | None) -> Any:
    return lambda **_: list(values)


def run(parts: list[RewardPart], **columns: Any) -> list[float | None]:
    columns.setdefault("completions", ["a", "b"])
    return asyncio.run(combine(parts)(prompts=[""] * len(columns["completions"]), **columns))


def test_plain_weighted_sum() -> None:
    parts = [
        RewardPart("a", fixed(1, 0), 1.0),
        RewardPart("b", fixed(0.5, 1.0), 0.2),
        RewardPart("c", fixed(1, 0), -2),
    ]
    assert run(parts) == [pytest.approx(-0.9), pytest.approx(0.2)]


def test_none_is_left_out_or_decides() -> None:
    optional = [RewardPart("a", fixed(1.0, 0.0), 1.0), RewardPart("b", fixed(None, 1.0), 0.5)]
    assert run(optional) == [1.5, 0.5]
    required = [RewardPart("a", fixed(1.0, 0.0), 1.0), RewardPart("b", fixed(None, 1.0), 0.5, required=True)]
    assert run(required) == [None, 0.5]
    assert run([RewardPart("a", fixed(None, 1.0))]) == [None, 1.0]
    assert run([RewardPart("a", fixed(None, 1.0)), RewardPart("seen", fixed(1.0, 1.0), 0.0)]) == [None, 1.0]


def test_async_parts_run_at_the_same_time_and_sync_parts_meanwhile() -> None:
    order: list[str] = []
    both = asyncio.Event()

    async def waits(**_: Any) -> list[float]:
        order.append("waits starts")
        await asyncio.wait_for(both.wait(), 10)  # ends only once the other part has run
        return [1.0, 1.0]

    class Opens:
        async def __call__(self, **_: Any) -> list[float]:
            order.append("opens starts")
            both.set()
            return [2.0, 2.0]

    def plain(**_: Any) -> list[float]:
        order.append("plain")
        return [4.0, 4.0]

    parts = [RewardPart("plain", plain), RewardPart("waits", partial(waits)), RewardPart("opens", Opens())]
    assert run(parts) == [7.0, 7.0]
    assert order == ["waits starts", "opens starts", "plain"]


def test_an_exception_is_never_a_score() -> None:
    cancelled: list[bool] = []

    async def slow(**_: Any) -> list[float]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return [1.0, 1.0]

    async def dead(**_: Any) -> list[float]:
        raise BackendError("judge at http://127.0.0.1:1 does not answer")

    def broken(**_: Any) -> list[float]:
        raise ZeroDivisionError("a bug in a reward")

    with pytest.raises(BackendError, match="does not answer"):
        run([RewardPart("slow", slow), RewardPart("dead", dead)])
    with pytest.raises(ZeroDivisionError):
        run([RewardPart("slow", slow), RewardPart("broken", broken)])
    assert cancelled == [True, True]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(BackendError, match=r"'b' returned (nan|inf) for row 1"):
        run([RewardPart("a", fixed(1, 1)), RewardPart("b", fixed(0.0, value))])


def test_a_wrong_number_of_values_is_refused() -> None:
    with pytest.raises(BackendError, match="'a' returned 1 values for 2 completions"):
        run([RewardPart("a", fixed(1.0))])


def test_refused_combinations() -> None:
    with pytest.raises(ConfigError, match="at least one part"):
        combine([])
    with pytest.raises(ConfigError, match="'a' is named twice"):
        combine([RewardPart("a", fixed()), RewardPart("a", fixed())])
    with pytest.raises(ConfigError, match="'a': the weight must be finite"):
        combine([RewardPart("a", fixed(), math.nan)])


def test_each_part_and_the_share_of_none_are_logged_under_the_same_names_in_every_batch() -> None:
    batches: list[dict[str, float]] = []
    values = iter([[0.0, 1.0], [None, 0.5], [None, None]])
    reward = combine([RewardPart("a", lambda **_: next(values)), RewardPart("b", fixed(1, 1), 0.5)])
    for _ in range(3):
        batches.append({})
        asyncio.run(reward(prompts=["", ""], completions=["", ""], log_metric=batches[-1].__setitem__))
    assert batches == [
        {"rewards/a": 0.5, "rewards/a/none": 0.0, "rewards/b": 1.0, "rewards/b/none": 0.0, "rewards/none": 0.0},
        {"rewards/a": 0.5, "rewards/a/none": 0.5, "rewards/b": 1.0, "rewards/b/none": 0.0, "rewards/none": 0.0},
        # Nothing scored: the last mean is repeated, and the share of None says so.
        {"rewards/a": 0.5, "rewards/a/none": 1.0, "rewards/b": 1.0, "rewards/b/none": 0.0, "rewards/none": 0.0},
    ]


def test_score_parts_gives_the_value_of_each_part() -> None:
    async def judge(*, prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        return [None if completion == "" else 0.5 for completion in completions]

    parts = [RewardPart("em", em(), required=True), RewardPart("f1", f1()), RewardPart("judge", judge)]
    columns = {"completions": ["Answer: the river Mira", ""], "answers": [["Mira"], ["Mira"]]}
    scores = score_parts(parts, **columns)
    assert scores == {"em": [0.0, 0.0], "f1": [pytest.approx(2 / 3), 0.0], "judge": [0.5, None]}
    assert weighted_sum(parts, scores) == run(parts, **columns)

    async def in_a_notebook() -> dict[str, list[float | None]]:
        return score_parts(parts, **columns)

    assert asyncio.run(in_a_notebook()) == scores
    with pytest.raises(ConfigError, match="completions"):
        score_parts(parts)


def tiny_model() -> tuple[Any, Any]:
    """A causal LM of random weights and its word-level tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = ["<pad>", "<eos>", "<unk>", "Answer", ":", "Mira", "Elm", "where"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config), PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def test_the_trainer_of_trl_sees_and_runs_the_combination(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    async def judge(*, completions: list[str], **_: Any) -> list[float | None]:
        return [None if "Elm" in completion else 1.0 for completion in completions]

    reward = combine(
        [RewardPart("em", em()), RewardPart("format", format_reward(), 0.5), RewardPart("judge", judge, required=True)]
    )
    assert inspect.iscoroutinefunction(reward)
    rows = [{"prompt": "where", "answers": ["Mira"], "passages": ["the Mira"]}] * 4
    model, tokenizer = tiny_model()
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=4,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
    )
    assert trainer._has_async_funcs
    assert trainer.reward_func_names == ["reward"]
    completions = ["Answer : Mira", "Answer: Mira", "Answer: Elm", "Mira"]
    values = trainer._calculate_rewards(rows, ["where"] * 4, completions, [[3]] * 4)  # (4, 1)
    assert values[:, 0].tolist() == pytest.approx([1.0, 2.5, math.nan, 2.0], nan_ok=True)
    trainer._pending_metrics.clear()

    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rewards/reward/mean" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert {"rewards/em", "rewards/format", "rewards/judge", "rewards/none", "rewards/unanswerable"} <= set(entry)
    json.dumps(logged)
