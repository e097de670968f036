"""A reward as a judge: the same figures, in verdicts."""

from __future__ import annotations

import asyncio
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from rag_rl.errors import BackendError
from rag_rl.judges.reward_model import RewardModelJudge
from rag_rl.rewards.answer import f1
from rag_rl.rewards.reward_model import model_reward
from rag_rl.types import Judge, JudgeCase, Verdict


def save_model(folder: Path) -> str:
    """A classifier of random weights with a pair-aware word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = "[PAD] [CLS] [SEP] [UNK] where who is Elmton Mira Elm Falbert Answer :".split()
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        num_labels=1,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def judge(reward: Any, cases: list[JudgeCase]) -> list[Verdict]:
    return asyncio.run(RewardModelJudge(reward).judge(cases))


def test_a_reward_model_scores_the_same_as_judge_and_as_reward(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    answers = ["Mira", "Elm Mira", "Falbert Answer: Elm"]
    cases = [JudgeCase("where is Elmton", answer) for answer in answers]
    verdicts = judge(model_reward(folder, answer_marker="", device="cpu"), cases)
    expected = model_reward(folder, answer_marker="", device="cpu")(
        prompts=[""] * 3, completions=answers, question=["where is Elmton"] * 3
    )
    assert [v.score for v in verdicts] == pytest.approx(expected)
    assert {v.reason for v in verdicts} == {"reward_model"}
    assert len({v.score for v in verdicts}) == 3  # the whole answer is read, markers and all
    raw = model_reward(folder, answer_marker="", sigmoid=False, device="cpu")
    assert any(
        not 0 <= float(value or 0) <= 1 for value in raw(prompts=[], completions=answers, question=["where"] * 3)
    )
    with pytest.raises(BackendError, match=r"lies in \[0, 1\] \(of a reward model: set sigmoid to true\)"):
        judge(raw, [JudgeCase("where", answer) for answer in answers])


def test_the_reward_reads_what_the_cases_hold() -> None:
    cases = [JudgeCase("Which river?", "the Mira", ("Elm", "Mira")), JudgeCase("Who?", "Elm", ("Falbert",))]
    assert isinstance(RewardModelJudge(f1()), Judge)
    assert [v.score for v in judge(f1(answer_marker=""), cases)] == [1.0, 0.0]
    seen: dict[str, Any] = {}

    def reward(**columns: Any) -> list[float | None]:
        seen.update(columns)
        return [0.25, None]

    meta = [{"query": "q1", "question": "another", "prompts": 1}, {"query": "q2", "more": 1, "prompts": 2}]
    cases = [JudgeCase(f"Q{i}", f"A{i}", ("g",), ("p", "r"), meta[i]) for i in range(2)]
    assert judge(reward, cases) == [Verdict(0.25, "reward"), Verdict(None, "reward cannot score this")]
    assert seen == {
        "prompts": ["Q0", "Q1"],
        "completions": ["A0", "A1"],
        "question": ["Q0", "Q1"],
        "answers": [["g"], ["g"]],
        "passages": [["p", "r"], ["p", "r"]],
        "query": ["q1", "q2"],
    }


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan, math.inf])
def test_a_value_that_is_no_score_stops_the_run(value: float) -> None:
    with pytest.raises(BackendError, match=r"reward '<lambda>' gave .* for the answer 'Mira'"):
        judge(lambda **_: [value], [JudgeCase("Which river?", "Mira")])


def test_a_wrong_number_of_values_stops_the_run_and_no_case_asks_nothing() -> None:
    with pytest.raises(BackendError, match="gave 1 values for 2 cases"):
        judge(lambda **_: [1.0], [JudgeCase("q", "a")] * 2)
    assert judge(None, []) == []


def test_the_loop_goes_on_meanwhile_and_one_call_runs_at_a_time() -> None:
    go_on, running, most = threading.Event(), 0, 0

    def reward(*, completions: list[str], **_: Any) -> list[float | None]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        assert go_on.wait(10)
        running -= 1
        return [1.0] * len(completions)

    async def both() -> list[list[Verdict]]:
        slow = RewardModelJudge(reward)
        tasks = [asyncio.ensure_future(slow.judge([JudgeCase("q", "a")])) for _ in range(3)]
        while not running:
            await asyncio.sleep(0.001)
        go_on.set()  # reached only if the loop is free
        return await asyncio.gather(*tasks)

    assert [[v.score for v in verdicts] for verdicts in asyncio.run(both())] == [[1.0]] * 3
    assert most == 1
