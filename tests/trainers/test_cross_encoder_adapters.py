"""LoRA and QLoRA of cross-encoders on the CPU: what is trained, what is saved, and what loads again."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import CrossEncoder

from rag_rl.errors import ConfigError, DataError
from rag_rl.tiny import FOLDER
from rag_rl.trainers.cross_encoder_adapters import (
    add_lora,
    head_names,
    is_quantized,
    load_cross_encoder,
    merge_adapter,
    thaw_adapter,
)
from rag_rl.trainers.pairwise_margin import PairwiseMarginLoss

START = str(FOLDER / "encoder")
QUERY = "Where does Gilpabert live?"
DOCUMENTS = ["Gilpabert lives in Walpawick.", "Waltaham is known for cheese.", "Tom lives in Oak."]


def logits(model: CrossEncoder) -> list[float]:
    pairs = [(QUERY, text) for text in DOCUMENTS]
    return model.predict(pairs, activation_fn=torch.nn.Identity()).tolist()


def learn(model: CrossEncoder, steps: int = 3) -> list[float]:
    """Loss of each step."""
    loss = PairwiseMarginLoss(model, margin=2.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        value = loss([[QUERY], [DOCUMENTS]], [torch.tensor([1.0, 0.0, 0.0])])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "qlora"])
def trained(request) -> tuple[CrossEncoder, bool, list[float]]:
    torch.manual_seed(0)
    model = load_cross_encoder(START, quantized=request.param, device="cpu")
    add_lora(model, r=4, alpha=8)
    return model, request.param, learn(model)


def test_the_body_gets_adapters_and_the_head_is_trained_whole(trained):
    model, quantized, losses = trained
    assert losses[-1] < losses[0]
    assert is_quantized(model) == quantized
    kinds = {type(m).__name__ for m in model.modules()}
    assert ("Linear4bit" in kinds) == quantized
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name or ".modules_to_save." in name for name in names)
    heads = {name for name in names if ".modules_to_save." in name}
    assert {name.split(".modules_to_save.")[0].rpartition(".")[2] for name in heads} == {"head", "classifier"}
    assert not [name for name in names if "lora_" in name and ("head" in name or "classifier" in name)]
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_kept_adapter_loads_with_plain_cross_encoder_and_goes_on(trained, tmp_path):
    model, quantized, _ = trained
    model.save_pretrained(str(tmp_path / "kept"))
    assert (tmp_path / "kept" / "adapter_model.safetensors").is_file()
    plain = CrossEncoder(str(tmp_path / "kept"), device="cpu")
    if quantized:  # the base that it loads is not: the scores are those of the adapter over other weights
        assert max(logits(plain)) == logits(plain)[0]
    else:
        assert logits(plain) == pytest.approx(logits(model), abs=1e-5)
    assert not any(p.requires_grad for n, p in plain.named_parameters() if "lora_" in n), "the trap still is one"
    thaw_adapter(plain)
    thawed = [n for n, p in plain.named_parameters() if p.requires_grad]
    assert any("lora_" in n for n in thawed)
    assert all("lora_" in n or ".modules_to_save." in n for n in thawed)
    learn(plain, 2)  # which torch refuses where nothing requires a gradient
    again = load_cross_encoder(str(tmp_path / "kept"), device="cpu")
    assert any(p.requires_grad for n, p in again.named_parameters() if "lora_" in n)
    with pytest.raises(ConfigError, match="has an adapter already"):
        add_lora(again, r=4, alpha=8)


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_merged_it_is_an_ordinary_cross_encoder_with_equal_scores(quantized, tmp_path):
    torch.manual_seed(0)
    model = load_cross_encoder(START, quantized=quantized, device="cpu")
    add_lora(model, r=4, alpha=8)
    learn(model)
    before = logits(model)
    merge_adapter(model)
    assert logits(model) == pytest.approx(before, abs=1e-4)
    assert not is_quantized(model)
    model.save_pretrained(str(tmp_path / "merged"))
    assert not list((tmp_path / "merged").glob("adapter_*"))
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    plain = CrossEncoder(str(tmp_path / "merged"), device="cpu")
    assert logits(plain) == pytest.approx(before, abs=1e-4)
    assert {name for name, _ in plain.named_parameters()} == {
        name for name, _ in load_cross_encoder(START, device="cpu").named_parameters()
    }


def test_heads_are_what_stands_beside_the_body():
    model = load_cross_encoder(START, device="cpu")
    assert head_names(model.transformers_model) == ["head", "classifier"]


def test_length_and_dtype():
    model = load_cross_encoder(START, device="cpu", max_length=32, dtype="bfloat16")
    assert model.max_seq_length == 32
    assert next(model.parameters()).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="reranker_dtype must be a dtype of torch such as bfloat16, got 'half2'"):
        load_cross_encoder(START, dtype="half2")


def test_pooling(tmp_path):
    torch.manual_seed(0)
    cls = load_cross_encoder(START, device="cpu")
    torch.manual_seed(0)
    mean = load_cross_encoder(START, device="cpu", pooling="mean")
    assert logits(cls) != pytest.approx(logits(mean), abs=1e-3)
    mean.save_pretrained(str(tmp_path))
    assert logits(CrossEncoder(str(tmp_path), device="cpu")) == pytest.approx(logits(mean), abs=1e-5), "it is kept"
    other = FOLDER / "reader"
    with pytest.raises(ConfigError, match=r"for models whose config has classifier_pooling; leave it out: .*lfm2"):
        load_cross_encoder(str(other), device="cpu", pooling="mean")


def test_what_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the cross-encoder .*empty cannot be loaded: "):
        load_cross_encoder(str(tmp_path / "empty"), device="cpu")


@pytest.mark.parametrize("options", [{"r": 0}, {"dropout": 1.0}])
def test_numbers_that_mean_nothing(options):
    model = load_cross_encoder(START, device="cpu")
    with pytest.raises(ConfigError, match="a rank of at least 1 and a dropout in"):
        add_lora(model, **{"r": 4, "alpha": 8, **options})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_qlora_computes_in_bfloat16_on_a_gpu(tmp_path):
    model = load_cross_encoder(START, quantized=True, device="cuda")
    add_lora(model, r=4, alpha=8)
    losses = learn(model)
    assert losses[-1] < losses[0]
    before = logits(model)
    merge_adapter(model)
    model.save_pretrained(str(tmp_path / "merged"))
    assert logits(CrossEncoder(str(tmp_path / "merged"), device="cuda")) == pytest.approx(before, abs=0.05)
