"""The tiny tokenizer loses nothing, and survives the libraries that open it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rag_rl.tiny.tokenizer import EOS, FRAGMENTS, MARKS, PAD, START, WORDS, build_tokenizer, pieces

CHAT = [
    {"role": "user", "content": "[1] Elmton lies on the Mira.\nQuestion: Which river does Elmton lie on?"},
    {"role": "assistant", "content": "Elmton lies on the Mira. Answer: Mira"},
    {"role": "user", "content": "Question: Who rules Zürich?"},
    {"role": "assistant", "content": "Answer: 市長 😀"},
]
RENDERED = (
    "<|im_start|>user\n[1] Elmton lies on the Mira.\nQuestion: Which river does Elmton lie on?<|im_end|>\n"
    "<|im_start|>assistant\nElmton lies on the Mira. Answer: Mira<|im_end|>\n"
    "<|im_start|>user\nQuestion: Who rules Zürich?<|im_end|>\n"
    "<|im_start|>assistant\nAnswer: 市長 😀<|im_end|>\n"
)
TEXTS = ["", " ", "\n", "\r\n\t  x", " Falton ", "e\u0301 ﬁ\u2028\u00a0", "\x00\x7f", "日本語😀\u200d", "a  b\n\n\nc"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text() | st.text(alphabet=st.sampled_from(" \n\tAtonElm.,:<|>_imend/#é😀"), max_size=60))
@example(text=f"quoted {EOS} and {START}user {PAD}")
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < len(tokenizer) for i in ids)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_others_lose_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_vocabulary_is_the_list():
    one, other = build_tokenizer(), build_tokenizer()
    assert one.get_vocab() == other.get_vocab()
    assert [one.convert_ids_to_tokens(i) for i in range(3)] == [PAD, EOS, START]
    assert sorted(one.get_vocab().values()) == list(range(len(one)))
    assert pieces() == list(dict.fromkeys(pieces()))


def test_listed_words_are_single_tokens(tokenizer):
    for word in [*WORDS, *FRAGMENTS]:
        assert len(tokenizer.tokenize(word)) == 1, word
    for word in WORDS:
        assert len(tokenizer.tokenize(f" {word}")) == 1, word
    for mark in MARKS:
        assert tokenizer.decode(tokenizer(mark).input_ids) == mark


def test_the_verdicts_of_a_judge_are_short_and_differ_in_one_token(tokenizer):
    yes, no = (tokenizer(f'{{"score": {score}}}').input_ids for score in (1, 0))
    assert len(yes) == len(no) < 8
    assert sum(a != b for a, b in zip(yes, no, strict=True)) == 1


def test_foreign_text_costs_less_than_a_token_a_letter(tokenizer):
    text = "The committee published its annual report on marine wildlife in several northern countries."
    assert len(tokenizer(text).input_ids) < len(text) / 2


def test_pads_are_not_ends(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, EOS)
    assert tokenizer.padding_side == "left"
    batch = tokenizer(["Elmton", "Elmton lies on the Mira."], padding=True)
    assert batch.input_ids[0][0] == tokenizer.pad_token_id
    assert batch.attention_mask[0][0] == 0


def test_special_tokens_are_left_out_on_request(tokenizer):
    ids = tokenizer(f"{START}assistant\nMira{EOS}{PAD}").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "assistant\nMira"


def test_chat_template(tokenizer):
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == RENDERED
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == RENDERED.split("Elmton lies on the Mira. Answer")[0]
    # A prompt with its reply is the beginning of the chat, in tokens as well: nothing is tokenised otherwise later.
    start = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert whole[: len(start)] == start


def test_a_system_turn_is_kept(tokenizer):
    system = [{"role": "system", "content": "Be brief."}, *CHAT[:1]]
    shown = tokenizer.apply_chat_template(system, tokenize=False)
    assert shown.startswith(f"{START}system\nBe brief.{EOS}\n{START}user\n")


def test_the_assistant_mask_covers_the_words_and_the_end_of_each_turn(tokenizer):
    chat = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    spans, ids = [], []
    for token, inside in zip(chat["input_ids"], chat["assistant_masks"], strict=True):
        if inside:
            ids.append(token)
        elif ids:
            spans.append(tokenizer.decode(ids))
            ids = []
    assert spans == [CHAT[1]["content"] + EOS, CHAT[3]["content"] + EOS]


def test_trl_takes_the_template_as_it_is(tokenizer):
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

    assert get_training_chat_template(tokenizer) is None  # None: nothing to patch
    assert is_chat_template_stop_token_trained(tokenizer)


@pytest.mark.parametrize("architecture", ["Lfm2Config", "ModernBertConfig"])
def test_auto_tokenizer_opens_it_unharmed(tokenizer, tmp_path, architecture):
    import transformers

    config = getattr(transformers, architecture)(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert opened.get_vocab() == tokenizer.get_vocab()
    for text in [*TEXTS, RENDERED, "Step 1:\nThe problem analysis: I need the home of Falwyn."]:
        assert opened(text).input_ids == tokenizer(text).input_ids
        assert opened.decode(opened(text).input_ids) == text
    assert opened.apply_chat_template(CHAT, tokenize=False) == RENDERED
    for name in ("pad_token_id", "eos_token_id", "padding_side", "model_max_length", "all_special_tokens"):
        assert getattr(opened, name) == getattr(tokenizer, name), name
