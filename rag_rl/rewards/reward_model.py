"""Reward from a sequence-classification model that reads the question and the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from rag_rl.errors import BackendError, ConfigError
from rag_rl.prompts import placeholders
from rag_rl.rewards.columns import column, final_answers, text_lists
from rag_rl.text import ANSWER_MARKER
from rag_rl.types import Reward

if TYPE_CHECKING:
    import torch

_PLACEHOLDERS = frozenset({"question", "answer", "passages"})


def model_reward(
    name_or_path: str,
    *,
    pair_template: tuple[str, str | None] = ("$question", "$answer"),
    label: int | None = None,
    sigmoid: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 16,
    max_length: int = 512,
    answer_marker: str = ANSWER_MARKER,
) -> Reward:
    """Makes the reward of any sequence-classification model of transformers (a reward model, a cross-encoder, NLI).

    The model and its tokenizer are opened when first used, in evaluation mode; code that comes with a model is never
    run. A learned reward can be gamed like any other: keep an exact reward beside it. Reads the column ``question``
    and, where the template names them, ``passages``.

    Args:
        name_or_path: a folder or a Hub id; it must bring its classification head.
        pair_template: first and second text, with ``$question``, ``$answer`` and ``$passages`` (one below the other);
            None as the second makes one text of the first. Two texts are joined as the tokenizer joins pairs.
        label: which output of a model with several; None for a model with one.
        sigmoid: whether a model's single output goes through the logistic function, and several through softmax, so
            that values lie in [0, 1]. False gives the raw output, which has no fixed range.
        device: for example ``"cuda:1"`` or ``"cpu"``; None for the one that this process trains on.
        dtype: number format of the weights, such as ``"bfloat16"``; None for the checkpoint's own.
        batch_size: pairs a forward pass, at least 1.
        max_length: tokens that are read. Of a longer pair, the longer text loses its end; one text its beginning.
        answer_marker: what precedes the answer; the model reads the answer alone.

    Returns:
        A reward, never None. A completion without an answer gets 0.0 with ``sigmoid``; without it, the model scores
        the empty text.

    Raises:
        ConfigError: an option is out of range or the template has another placeholder; at first use, when the model
            cannot be opened, has no trained head, or ``label`` does not fit it.
    """
    if batch_size < 1 or max_length < 1:
        raise ConfigError(
            f"reward model: batch_size and max_length must be at least 1, got {batch_size} and {max_length}"
        )
    templates = [Template(text) for text in pair_template if text is not None]
    for template in templates:
        try:
            template.substitute(dict.fromkeys(_PLACEHOLDERS, ""))
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"reward model: template {template.template!r} may hold $question, $answer and $passages only "
                "($$ for a dollar)"
            ) from error
    named = {name for template in templates for name in placeholders(template.template)}
    if "answer" not in named:
        raise ConfigError("reward model: no $answer in its template, so that every answer would score the same")
    opened: list[tuple[Any, Any]] = []

    def reward(*, completions: list[Any], **columns: Any) -> list[float | None]:
        questions = column("question", columns, rows=len(completions), reward="reward_model")
        passages = [""] * len(completions)
        if "passages" in named:
            shown = text_lists("passages", columns, rows=len(completions), reward="reward_model")
            passages = ["\n".join(texts) for texts in shown]
        answers = final_answers(completions, marker=answer_marker)
        if not opened:
            opened.append(_open(name_or_path, device, dtype, label))
        model, tokenizer = opened[0]
        asked = [row for row, answer in enumerate(answers) if answer is not None or not sigmoid]
        # Longest first: batches of like length waste little on padding, and a batch too large fails at once.
        asked.sort(key=lambda row: len(questions[row] + passages[row] + (answers[row] or "")), reverse=True)
        scores: list[float | None] = [0.0] * len(completions)
        for start in range(0, len(asked), batch_size):
            rows = asked[start : start + batch_size]
            texts = [
                [
                    template.substitute(question=questions[row], answer=answers[row] or "", passages=passages[row])
                    for row in rows
                ]
                for template in templates
            ]
            for row, score in zip(rows, _forward(model, tokenizer, texts, max_length, label, sigmoid), strict=True):
                if not math.isfinite(score):
                    raise BackendError(
                        f"reward model {name_or_path!r} gave {score} for the answer {answers[row]!r:.80}"
                    )
                scores[row] = score
        return scores

    reward.__name__ = "reward_model"
    return reward


def _open(name_or_path: str, device: str | None, dtype: str | None, label: int | None) -> tuple[Any, Any]:
    from accelerate import PartialState
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if device is None:
        # Not torch.cuda.current_device(): that is the thread's, and TRL calls asynchronous rewards in a thread of its
        # own, where it is 0 in every process.
        device = str(PartialState().device)
    if (Path(name_or_path) / "adapter_config.json").is_file():
        raise ConfigError(
            f"reward model {name_or_path!r} is a LoRA adapter: merge it into its base (docs/adapters.md)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name_or_path, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(f"reward model {name_or_path!r} cannot be opened: {first_line}") from error
    # transformers fills a missing head with random weights and only warns: a reward made of noise.
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ConfigError(
            f"reward model {name_or_path!r} lacks weights ({missing}): it must be a trained classification model"
        )
    outputs = model.config.num_labels
    if outputs > 1 and (label is None or not 0 <= label < outputs):
        raise ConfigError(f"reward model {name_or_path!r} has {outputs} outputs: set label to 0..{outputs - 1}")
    if outputs == 1 and label not in (None, 0):
        raise ConfigError(f"reward model {name_or_path!r} has one output: leave label out (got {label})")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Decoder models score the last token that is not padding, which they find by this id.
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


def _forward(
    model: Any, tokenizer: Any, texts: Sequence[list[str]], max_length: int, label: int | None, sigmoid: bool
) -> list[float]:
    import torch

    # One text ends in the answer, which must not be what is cut.
    tokenizer.truncation_side = "left" if len(texts) == 1 else "right"
    inputs = tokenizer(*texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    with torch.inference_mode():
        logits: torch.Tensor = model(**inputs.to(model.device)).logits.float()  # (B, outputs)
    if logits.shape[1] == 1:
        chosen = logits[:, 0].sigmoid() if sigmoid else logits[:, 0]
    else:
        chosen = (logits.softmax(dim=1) if sigmoid else logits)[:, label or 0]
    return [float(value) for value in chosen.cpu()]
