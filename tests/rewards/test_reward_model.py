from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from rag_rl.errors import BackendError, ConfigError, DataError
from rag_rl.rewards.reward_model import model_reward

QUESTIONS = ["where is Elmton", "where", "who rules Elmton", "where", "where", "who"]
COMPLETIONS = ["Answer: Mira", "Answer: Elm Mira Elm Mira", "so\nAnswer: Falbert", "Answer:", "<think>Mira", "Mira"]


def save_model(folder: Path, *, outputs: int = 1, head: bool = True) -> Path:
    """A classifier of random weights with a pair-aware word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

    words = "[PAD] [CLS] [SEP] [UNK] where who is rules Elmton Mira Elm Falbert Q A :".split()
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
        num_labels=outputs,
        initializer_range=0.5,
    )
    (BertForSequenceClassification(config) if head else BertModel(config)).save_pretrained(folder)
    return folder


def by_hand(folder: Path, *texts: str) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        # As lists: a bare "" as the second text would be taken for no second text.
        inputs = AutoTokenizer.from_pretrained(folder)(*([text] for text in texts), return_tensors="pt")
        return model(**inputs).logits[0]


def score(reward: Any, questions: list[str] = QUESTIONS, completions: list[Any] = COMPLETIONS) -> list[float | None]:
    return reward(prompts=[""] * len(questions), completions=completions, question=questions)


def test_values_are_the_models_own_whatever_the_batch(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    answers = ["Mira", "Elm Mira Elm Mira", "Falbert", None, None, "Mira"]
    expected = [
        0.0 if answer is None else float(by_hand(folder, question, answer).sigmoid())
        for question, answer in zip(QUESTIONS, answers, strict=True)
    ]
    assert len({round(value, 4) for value in expected}) == 5  # the model does tell answers apart
    for batch_size in (1, 4, 16):
        reward = model_reward(str(folder), batch_size=batch_size, device="cpu")
        assert reward.__name__ == "reward_model"
        assert score(reward) == pytest.approx(expected, abs=1e-6)


def test_raw_output_scores_the_empty_text(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    raw = score(model_reward(str(folder), sigmoid=False, device="cpu"), ["where", "where"], ["Answer: Mira", ""])
    assert raw == pytest.approx([float(by_hand(folder, "where", "Mira")), float(by_hand(folder, "where", ""))])


def test_templates(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    single = model_reward(str(folder), pair_template=("Q: $question A: $answer", None), sigmoid=False, device="cpu")
    assert score(single, ["where"], ["Answer: Mira"]) == pytest.approx([float(by_hand(folder, "Q: where A: Mira"))])
    for bad in ("$query", "a dollar $ here"):
        with pytest.raises(ConfigError, match=r"may hold \$question, \$answer and \$passages only"):
            model_reward("x", pair_template=(bad, "$answer"))
    with pytest.raises(ConfigError, match=r"no \$answer"):
        model_reward("x", pair_template=("$question", None))


def test_passages(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    reward = model_reward(str(folder), pair_template=("$question $passages", "$answer"), sigmoid=False, device="cpu")
    found = reward(
        prompts=["", ""],
        completions=["Answer: Mira"] * 2,
        question=["where", "who"],
        passages=[["Elmton is", "Elm"], []],
    )
    assert found == pytest.approx(
        [float(by_hand(folder, "where Elmton is Elm", "Mira")), float(by_hand(folder, "who ", "Mira"))], abs=1e-6
    )
    with pytest.raises(DataError, match="'passages'"):
        score(reward)


def test_what_is_cut_is_not_the_answer(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    context = " ".join(["Elmton"] * 40)
    kept = {"sigmoid": False, "device": "cpu", "max_length": 8}
    single = model_reward(str(folder), pair_template=("Q : $question A : $answer", None), **kept)
    assert score(single, [context], ["Answer: Mira"]) == pytest.approx(
        [float(by_hand(folder, "Elmton Elmton Elmton A : Mira"))], abs=1e-6
    )
    pair = model_reward(str(folder), **kept)
    assert score(pair, [f"where {context}"], ["Answer: Mira"]) == pytest.approx(
        [float(by_hand(folder, "where Elmton Elmton Elmton", "Mira"))], abs=1e-6
    )


def test_the_device_is_that_of_the_process_in_any_thread(tmp_path: Path) -> None:
    import threading

    from accelerate import PartialState

    folder = save_model(tmp_path)
    found: list[list[float | None]] = []
    thread = threading.Thread(target=lambda: found.append(score(model_reward(str(folder)))))
    thread.start()
    thread.join()
    assert found == [pytest.approx(score(model_reward(str(folder), device=str(PartialState().device))), abs=1e-6)]


def test_a_model_with_several_outputs_needs_a_label(tmp_path: Path) -> None:
    folder = save_model(tmp_path, outputs=3)
    logits = by_hand(folder, "where", "Mira")
    for label in range(3):
        for sigmoid, expected in ((True, logits.softmax(0)[label]), (False, logits[label])):
            reward = model_reward(str(folder), label=label, sigmoid=sigmoid, device="cpu")
            assert score(reward, ["where"], ["Answer: Mira"]) == pytest.approx([float(expected)], abs=1e-6)
    for label in (None, 3):
        with pytest.raises(ConfigError, match=r"has 3 outputs: set label to 0\.\.2"):
            score(model_reward(str(folder), label=label, device="cpu"))


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path, head=False)
    with pytest.raises(ConfigError, match=r"lacks weights \(classifier"):
        score(model_reward(str(folder), device="cpu"))


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a LoRA adapter: merge it into its base"):
        score(model_reward(str(tmp_path), device="cpu"))


def test_nothing_is_opened_before_it_is_needed_and_a_wrong_path_is_named(tmp_path: Path) -> None:
    reward = model_reward(str(tmp_path / "nowhere"), device="cpu")
    with pytest.raises(DataError, match="'question'"):
        reward(prompts=[""], completions=["Answer: Mira"])
    with pytest.raises(ConfigError, match=r"nowhere' cannot be opened"):
        score(reward)
    with pytest.raises(ConfigError, match="batch_size"):
        model_reward("x", batch_size=0)


def test_a_broken_model_is_not_a_score(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = save_model(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.classifier.bias.fill_(math.nan)
    model.save_pretrained(folder)
    with pytest.raises(BackendError, match="gave nan for the answer"):
        score(model_reward(str(folder), device="cpu"))


@pytest.mark.slow
def test_what_trls_script_trains_is_scored_as_it_was_trained(tmp_path: Path) -> None:
    """As docs/adapters.md says: the data's words in the template, with the end token behind them."""
    import json
    import subprocess
    import sys

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from rag_rl.tiny import FOLDER

    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "reader")
    tokenizer.save_pretrained(tmp_path / "base")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = Qwen2Config(vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    rows = [json.loads(line) for line in (FOLDER / "data" / "demo_1hop.jsonl").read_text().splitlines()]
    questions, right = [row["question"] for row in rows], [row["answers"][0] for row in rows]
    wordy = [f"I think it is {answer}, of course." for answer in right]
    (tmp_path / "pairs").mkdir()
    with (tmp_path / "pairs" / "train.jsonl").open("w") as file:
        for question, chosen, rejected in zip(questions, right, wordy, strict=True):
            prompt = f"Question: {question}\nAnswer: "
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    flags = "--model_name_or_path base --dataset_name pairs --output_dir trained --eval_strategy no --max_steps 30 "
    flags += "--per_device_train_batch_size 16 --learning_rate 1e-3 --use_cpu --bf16 false --report_to none"
    command = [sys.executable, "-m", "trl.scripts.reward", *flags.split()]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    folder = str(tmp_path / "trained")
    template = f"Question: $question\nAnswer: $answer{tokenizer.eos_token}"
    reward = model_reward(folder, pair_template=(template, None), sigmoid=False, device="cpu")
    good, bad = (score(reward, questions, [f"Answer: {answer}" for answer in answers]) for answers in (right, wordy))
    assert all(g > b for g, b in zip(good, bad, strict=True))
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    text = f"Question: {questions[0]}\nAnswer: {right[0]}{tokenizer.eos_token}"  # what TRL reads
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.inference_mode():
        assert good[0] == pytest.approx(float(model(**inputs).logits), abs=1e-5)
