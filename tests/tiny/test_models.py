"""The packaged tiny models: small, safe to open, opened by the usual loaders, and described by a model card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rag_rl.tiny import FOLDER
from rag_rl.tiny.lessons import NO_HABITS

READER, ENCODER = FOLDER / "reader", FOLDER / "encoder"
YOUNG, CROSS = FOLDER / "encoder_young", FOLDER / "cross_encoder"
KNOWN = {".py", ".json", ".jsonl", ".jinja", ".md", ".safetensors"}


def packaged() -> list[Path]:
    return sorted(p for p in FOLDER.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


@pytest.fixture(scope="module")
def reader() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(READER).eval()


@pytest.fixture(scope="module")
def encoder() -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(ENCODER), device="cpu")


def test_weights_are_small_in_all():
    weights = [p for p in packaged() if p.suffix == ".safetensors"]
    assert {p.parent for p in weights} == {READER, ENCODER, YOUNG, CROSS}
    assert sum(p.stat().st_size for p in weights) < 12_000_000


def test_nothing_can_execute_code_when_opened():
    assert {p.suffix for p in packaged()} <= KNOWN
    for path in packaged():
        head = path.read_bytes()[:16]
        assert not head.startswith((b"\x80", b"PK")), f"{path.name} begins like a pickle or a zip archive"
        if path.suffix == ".safetensors":  # eight bytes of length, then a JSON header
            assert head[8:9] == b"{"
        if path.name.endswith("config.json"):
            assert "auto_map" not in json.loads(path.read_text(encoding="utf-8"))


def test_no_folder_of_the_maker_is_left_in_a_file():
    for path in packaged():
        if path.suffix in (".json", ".jinja", ".md"):
            assert not re.search(r"(/tmp|/home|/root|/work|/Users)/", path.read_text(encoding="utf-8")), path


def test_the_reader_opens_and_writes(reader, tokenizer):
    from transformers import AutoTokenizer

    assert sum(p.numel() for p in reader.parameters()) <= 1_500_000
    opened = AutoTokenizer.from_pretrained(READER)
    assert opened.get_vocab() == tokenizer.get_vocab()
    assert opened.chat_template == tokenizer.chat_template
    assert reader.config.vocab_size == len(opened)
    for config in (reader.config, reader.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (opened.pad_token_id, opened.eos_token_id)
    chat = [{"role": "user", "content": "[1] Elmton lies on the Mirbrook.\nQuestion: Which river does Elmton lie on?"}]
    prompt = opened.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert reader(**prompt).logits.isfinite().all()
    output = reader.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert opened.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_the_encoder_opens_and_finds(encoder, tokenizer):
    assert sum(p.numel() for p in encoder.parameters()) <= 500_000
    assert encoder.tokenizer.get_vocab() == tokenizer.get_vocab()
    corpus = [json.loads(line) for line in (FOLDER / "data" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = (FOLDER / "data" / "heldout_1hop.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    asked = [json.loads(line) for line in rows]
    documents = encoder.encode([row["text"] for row in corpus])
    assert documents.shape == (len(corpus), encoder.get_embedding_dimension())
    assert (documents**2).sum(axis=1) == pytest.approx(1.0, abs=1e-4)
    best = (encoder.encode([row["question"] for row in asked]) @ documents.T).argsort(axis=1)[:, ::-1]
    ids = [row["doc_id"] for row in corpus]
    found = [{ids[i] for i in ranked[:3]} >= set(row["gold_doc_ids"]) for ranked, row in zip(best, asked, strict=True)]
    # Good enough to learn to read by, and not so good that nothing is left to reinforce.
    assert 0.7 < sum(found) / len(found) < 0.99


@pytest.mark.parametrize("folder", [READER, ENCODER, YOUNG, CROSS], ids=lambda folder: folder.name)
def test_model_cards(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["license"] == "apache-2.0"
    assert meta["language"] == "en"
    assert meta["library_name"] == ("transformers" if folder == READER else "sentence-transformers")
    tags = {READER: "text-generation", CROSS: "text-ranking"}
    assert meta["pipeline_tag"] == tags.get(folder, "sentence-similarity")
    for heading in ("What it is", "How it was made", "Data", "Habits", "Limits"):
        assert f"\n## {heading}\n" in body
    assert "`make tiny-models`" in body
    assert "Scores: see record.json" in body.splitlines()
    assert (folder / "record.json").is_file()


def test_the_young_encoder_is_the_other_one_at_an_earlier_step():
    from rag_rl.tiny.make import YOUNG_STEPS

    young, grown = (json.loads((folder / "record.json").read_text(encoding="utf-8")) for folder in (YOUNG, ENCODER))
    assert young["steps"] == YOUNG_STEPS < grown["steps"]
    timed = {"seconds": None}
    for early, same in zip(young["curve"], grown["curve"], strict=False):
        assert early | timed == pytest.approx(same | timed)
    card = (YOUNG / "README.md").read_text(encoding="utf-8")
    assert f"stopped after {YOUNG_STEPS} of its {grown['steps']} steps" in card


def test_the_readers_card_states_its_habits():
    pytest.importorskip("torch", reason="torch is not installed")
    from rag_rl.tiny.make import PACKAGED_HABITS

    body = (READER / "README.md").read_text(encoding="utf-8")
    for name in NO_HABITS.__slots__:
        share = f"{100 * getattr(PACKAGED_HABITS, name):.0f}%"
        row = next(line for line in body.splitlines() if line.startswith(f"| {name} |"))
        assert share in row, f"the card's row on {name!r} does not say {share}"


def test_the_record_says_that_the_reader_read_well_before_it_was_given_habits():
    record = json.loads((FOLDER / "reader" / "record.json").read_text(encoding="utf-8"))
    before, after = record["base"]["curve"][-1], record["curve"][-1]
    assert before["em_1hop"] > 0.85
    assert before["em_2hop"] > 0.85
    assert 0.3 <= after["em_1hop"] <= 0.6
