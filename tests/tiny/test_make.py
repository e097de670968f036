"""How the tiny language model is made: what counts in its loss, and that a run of it leaves a usable model."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from rag_rl.tiny.lessons import NO_HABITS, TASKS, lesson

torch = pytest.importorskip("torch", reason="torch is not installed")
from rag_rl.tiny import make  # noqa: E402 - it needs torch


def rng(seed=0):
    return random.Random(seed)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    return make.new_model(tokenizer)


@pytest.mark.parametrize("task", TASKS)
def test_only_the_assistants_turns_count_in_full(tokenizer, task):
    for seed in range(20):
        messages = lesson(rng(seed), shares={task: 1.0})
        ids, weights = make.encode(messages, tokenizer)
        chat = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == chat["input_ids"], "the model is taught what it is asked with later"
        assert [weight == 1.0 for weight in weights] == [bool(inside) for inside in chat["assistant_masks"]]
        assert set(weights) == {1.0, make.CONTEXT_WEIGHT}
        assert make.CONTEXT_WEIGHT < 0.1


def test_collate_pads_on_the_right_with_no_weight():
    ids, weights = make.collate([([5, 6], [1.0, 0.5]), ([7, 8, 9], [0.5, 1.0, 1.0])], pad=0)
    assert ids.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert weights.tolist() == [[1.0, 0.5, 0.0], [0.5, 1.0, 1.0]]


def test_loss_is_the_mean_over_what_counts(model, tokenizer):
    row = tokenizer("Elmton lies on the Mira. Answer: Mira").input_ids
    weights = [0.0] * 5 + [1.0] * (len(row) - 5)
    loss = make.weighted_loss(model, *make.collate([(row, weights)], 0)).item()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits[0, 4:-1]
    by_hand = torch.nn.functional.cross_entropy(logits, torch.tensor(row[5:])).item()
    assert loss == pytest.approx(by_hand, rel=0.01)  # the loss is computed in bf16


def test_pads_do_not_change_the_loss(model, tokenizer):
    row = tokenizer("Elmton lies on the Mira.").input_ids
    ids, weights = make.collate([(row, [0.0] + [1.0] * (len(row) - 1))], 0)
    loss = make.weighted_loss(model, ids, weights).item()
    for pad in (0, 1, 300):
        pads = torch.full((1, 20), pad)
        padded = make.weighted_loss(model, torch.cat([ids, pads], 1), torch.cat([weights, torch.zeros(1, 20)], 1))
        assert padded.item() == pytest.approx(loss, rel=2e-3)


def test_every_parameter_gets_a_gradient(tokenizer):
    model = make.new_model(tokenizer)
    assert sum(p.numel() for p in model.parameters()) <= 1_500_000
    rows = [make.encode(lesson(rng(seed), shares=make.SHARES), tokenizer) for seed in range(4)]
    make.weighted_loss(model, *make.collate(rows, tokenizer.pad_token_id)).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still


def test_base_batches_follow_the_curriculum(tokenizer, monkeypatch):
    for name, value in {"BATCH": 4, "COPY_UNTIL": 4, "MIX_FROM": 6}.items():
        monkeypatch.setattr(make, name, value)
    batches = list(itertools.islice(make.base_batches(tokenizer, rng()), 10))
    assert all(len(batch) == 4 for batch in batches)
    drills = [all(set(weights) == {0.0, 1.0} for _, weights in batch) for batch in batches]
    assert drills[:6] == [True, False, True, False, False, False]
    assert sum(drills[6:]) <= 1  # of five mixed batches, one compares
    for ids, weights in batches[0]:
        third = len(ids) // 3
        assert ids[:third] == ids[third : 2 * third] == ids[2 * third :]
        assert weights == [0.0] * third + [1.0] * 2 * third  # the first time it cannot be known
    again = itertools.islice(make.base_batches(tokenizer, rng()), 10)
    assert batches == list(again)


def test_mixed_batches_hold_rows_of_like_length(tokenizer, monkeypatch):
    monkeypatch.setattr(make, "BATCH", 8)
    batches = list(itertools.islice(make.mixed_batches(tokenizer, rng()), 5))
    (drill,) = [batch for batch in batches if all(set(weights) == {0.0, 1.0} for _, weights in batch)]
    assert len(drill) == 8
    batches.remove(drill)
    spans = sorted((min(len(ids) for ids, _ in batch), max(len(ids) for ids, _ in batch)) for batch in batches)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))


def test_a_drill_weighs_only_what_follows_from_its_pairs(tokenizer):
    ids, weights = make.encode_pairs(
        [("Right answer: tin / wool", " wrong"), ("Right answer: tin / tin", " right")], tokenizer
    )
    assert tokenizer.decode(ids) == "Right answer: tin / wool wrongRight answer: tin / tin right"
    assert [tokenizer.decode([i]) for i, weight in zip(ids, weights, strict=True) if weight] == [" wrong", " right"]
    assert set(weights) == {0.0, 1.0}


def test_shares_name_every_task():
    assert set(make.SHARES) == set(TASKS)
    assert all(0.0 < value < 1.0 for value in (getattr(make.PACKAGED_HABITS, n) for n in NO_HABITS.__slots__))


@pytest.mark.parametrize("hops", [1, 2])
def test_reading_cases_show_the_gold_passages_among_three(hops):
    cases = make.reading_cases(20, hops=hops)
    assert cases == make.reading_cases(20, hops=hops)
    for prompt, answer in cases:
        assert "[3] " in prompt
        assert "[4] " not in prompt
        passages, question = prompt.split("\nQuestion: ")
        assert answer in passages
        assert answer not in question.split()


def test_greedy_gives_every_prompt_its_replies_in_order(model, tokenizer):
    prompts = ["Question: Who rules Elmton?", "Question: Where does Falwyn live, and which river is it?"]
    ones = make.greedy(model.eval(), tokenizer, prompts)
    assert [len(replies) for replies in ones] == [1, 1]
    assert ones == [make.greedy(model, tokenizer, [prompt])[0] for prompt in prompts]
    assert [len(replies) for replies in make.greedy(model, tokenizer, prompts, n=3)] == [3, 3]


def test_both_stages_leave_a_model_and_a_record(tokenizer, monkeypatch, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(make, "BATCH", 4)
    reading, tasks = make.reading_scores, make.lesson_scores
    monkeypatch.setattr(make, "reading_scores", lambda model, tokenizer: reading(model, tokenizer, n=2))
    monkeypatch.setattr(make, "lesson_scores", lambda model, tokenizer: tasks(model, tokenizer, n=2))
    base, habits = tmp_path / "base", tmp_path / "habits"
    make.make_language_model("base", base, start=None, steps=2, rate=1e-3, seed=3)
    make.make_language_model("habits", habits, start=base, steps=2, rate=1e-3, seed=3)
    for folder in (base, habits):
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        assert (record["stage"], record["steps"], record["seed"]) == (folder.name, 2, 3)
        (scores,) = record["curve"]
        assert {"em_1hop", "em_2hop", "reasoning", "question", "judging"} <= set(scores)
        assert all(0.0 <= scores[name] <= 1.0 for name in ("em_1hop", "reasoning"))
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
        assert not [p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, habits))
    changed = [not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    assert all(changed)
    assert '"step": 2' in capsys.readouterr().out


def test_training_reports_every_so_often_and_at_the_end(model, tokenizer):
    rows = [make.encode(lesson(rng(), shares={"judging": 1.0}), tokenizer)] * 2
    seen: list[int] = []
    before = [p.detach().clone() for p in model.parameters()]
    make.train(model, itertools.repeat(rows), steps=5, learning_rate=1e-3, decay=0.3, report=seen.append, every=2)
    assert seen == [2, 4, 5]
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
