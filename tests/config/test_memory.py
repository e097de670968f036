"""Memory on paper, by numbers worked out by hand for Qwen2.5-7B."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rag_rl.config.memory import (
    CONTEXT_BYTES,
    GIB,
    NF4_BYTES,
    NF4_NESTED_BYTES,
    ModelShape,
    TrainingPlan,
    activation_bytes,
    adapter_parameters,
    cache_bytes,
    estimate_memory,
    generation_seconds,
    layer_bytes,
    optimizer_bytes,
    presets,
    training_flops,
    weight_bytes,
)

# Qwen2.5-7B: width 3584, 28 layers, 28 heads of 128 over 4 for keys and values, feed-forward 18944, vocabulary 152064.
LAYER = (
    ("q_proj", 3584, 3584), ("k_proj", 3584, 512), ("v_proj", 3584, 512), ("o_proj", 3584, 3584),
    ("gate_proj", 3584, 18944), ("up_proj", 3584, 18944), ("down_proj", 18944, 3584),
)  # fmt: skip
SEVEN = ModelShape(
    parameters=7_615_616_512,
    linear=LAYER * 28,
    hidden_size=3584,
    layers=28,
    intermediate_size=18944,
    attention_size=3584,
    cache_size=1024,
    vocab_size=152064,
)
N = SEVEN.parameters


def test_weights():
    assert SEVEN.linear_parameters == 6_525_288_448
    assert weight_bytes(SEVEN, TrainingPlan(weight_bytes=2)) == 2 * N
    assert weight_bytes(SEVEN, TrainingPlan("lora", weight_bytes=4)) == 4 * N
    # Embeddings, head, norms and biases stay as they are.
    assert weight_bytes(SEVEN, TrainingPlan("qlora")) == 1_090_328_064 * 2 + 6_525_288_448 * 0.5625
    assert (NF4_BYTES, NF4_NESTED_BYTES) == (0.5625, 0.515869140625)
    assert weight_bytes(SEVEN, TrainingPlan("qlora", nested=True)) == pytest.approx(5.5469e9, rel=1e-4)


def test_adapter():
    # 28 x 16 x (7168 + 4096 + 4096 + 7168 + 3 x 22528)
    assert adapter_parameters(SEVEN, TrainingPlan("lora", lora_r=16)) == 40_370_176
    some = TrainingPlan("lora", lora_r=8, lora_targets=("q_proj", "v_proj"))
    assert adapter_parameters(SEVEN, some) == 28 * 8 * (7168 + 4096)


@pytest.mark.parametrize(
    ("name", "bytes_", "expected"),
    [
        ("adamw_torch_fused", 4, 8.0),
        ("adamw_torch", 2, 4.0),
        ("adamw_bnb_8bit", 2, 2.03125),
        ("paged_adamw_8bit", 4, 2.03125),
        ("paged_adamw_32bit", 4, 8.0),
        ("lion_32bit", 4, 4.0),
        ("sgd", 4, 0.0),
        ("adafactor", 4, 0.0),
        ("adamw_torch_4bit", 4, 1.0625),
        ("one_of_tomorrow", 4, 8.0),
    ],
)
def test_optimizers(name, bytes_, expected):
    assert optimizer_bytes(name, bytes_) == expected


def test_full_training_on_one_card():
    found = estimate_memory(SEVEN, TrainingPlan(rows=2, length=1000, logit_tokens=100))
    # bfloat16 throughout: 2 for the weight, 2 for its gradient, 4 for Adam.
    assert found.held == {
        "weights": 2 * N, "adapter": 0, "gradients": 2 * N, "optimiser": 4 * N, "reference": 0,
    }  # fmt: skip
    assert found.training["logits"] == 2 * 100 * 152064 * 16
    assert found.training["cast weights"] == 0
    assert found.counted == sum(found.held.values()) + sum(found.training.values())
    assert found.total == found.counted * 1.1 + CONTEXT_BYTES
    # float32 weights under autocast: 4 + 4 + 8, and 2 for what autocast has cast.
    mixed = estimate_memory(SEVEN, TrainingPlan(weight_bytes=4))
    assert sum(mixed.held.values()) == 16 * N
    assert mixed.training["cast weights"] == 2 * N


def test_an_adapter_leaves_the_rest_alone():
    found = estimate_memory(SEVEN, TrainingPlan("lora", reference=True))
    trained = 40_370_176
    assert found.held == {
        "weights": 2 * N, "adapter": 4 * trained, "gradients": 4 * trained, "optimiser": 8 * trained, "reference": 0,
    }  # fmt: skip
    assert estimate_memory(SEVEN, TrainingPlan("full", reference=True)).held["reference"] == 2 * N


@pytest.mark.parametrize(
    ("stage", "expected"),
    # bfloat16 with a float32 copy, arXiv 1910.02054: 2 + 2 + 12 a parameter, shared out step by step over 8.
    [(1, 2 + 2 + 12 / 8), (2, 2 + 2 / 8 + 12 / 8), (3, 2 / 8 + 2 / 8 + 12 / 8)],
)
def test_zero(stage, expected):
    found = estimate_memory(SEVEN, TrainingPlan(processes=8, zero_stage=stage))
    assert sum(found.held.values()) == pytest.approx(expected * N)


def test_sharing_without_deepspeed_and_with_offload():
    fsdp = estimate_memory(SEVEN, TrainingPlan(processes=8, zero_stage=3, deepspeed=False))
    assert sum(fsdp.held.values()) == pytest.approx((2 + 2 + 4) / 8 * N)
    away = estimate_memory(SEVEN, TrainingPlan(processes=8, zero_stage=3, offload=True, generated_rows=1))
    assert sum(away.held.values()) == pytest.approx(2 / 8 * N)
    assert away.host == {"weights": 2 / 8 * N, "optimiser": 12 / 8 * N, "reference": 0}
    # To write samples every card has all weights.
    assert away.generating["gathered weights"] == 2 * N
    here = estimate_memory(SEVEN, TrainingPlan(processes=8, zero_stage=3, generated_rows=1))
    assert here.generating["gathered weights"] + here.held["weights"] == 2 * N


def test_ppo_has_two_models_and_a_third_one():
    found = estimate_memory(SEVEN, TrainingPlan(value_model=True, reference=True))
    assert sum(found.held.values()) == pytest.approx((2 * 8 + 2) * N)
    adapted = estimate_memory(SEVEN, TrainingPlan("lora", value_model=True, reference=True))
    assert sum(adapted.held.values()) == 2 * N + 2 * 16 * 40_370_176


def test_activations():
    # Norms 2 x 3584 x (4 + 4), attention 2 x 4 x 3584, feed-forward 2 x 4 x 18944.
    assert layer_bytes(SEVEN, 2) == 57_344 + 28_672 + 151_552
    plan = TrainingPlan(rows=4, length=512, checkpointing=False)
    assert activation_bytes(SEVEN, plan) == 4 * 512 * (28 * 237_568 + 3584 * 8)
    saved = replace(plan, checkpointing=True)
    assert activation_bytes(SEVEN, saved) == 4 * 512 * (28 * 3584 * 2 + 237_568 + 3584 * 8)
    plain = replace(SEVEN, gated=False)
    assert layer_bytes(plain, 4) == 2 * 3584 * 12 + 4 * (4 * 3584 + 2 * 18944)


def test_cache_of_generation():
    plan = TrainingPlan(generated_rows=64, generated_length=1024)
    assert cache_bytes(SEVEN, plan) == 64 * 1024 * 57_344
    found = estimate_memory(SEVEN, TrainingPlan("lora", rows=1, length=10, generated_rows=64, generated_length=1024))
    assert found.counted == sum(found.held.values()) + 64 * 1024 * 57_344, "at another moment than training"


def test_what_else_lies_on_the_card():
    plain = estimate_memory(SEVEN, TrainingPlan("qlora"))
    more = estimate_memory(SEVEN, TrainingPlan("qlora"), others={"encoder": 438e6})
    assert more.counted - plain.counted == 438e6


def test_presets_take_less_and_less():
    plan = TrainingPlan(rows=8, length=1024)
    found = presets(plan)
    assert list(found) == [
        "full", "full + checkpointing", "LoRA", "LoRA + checkpointing", "QLoRA", "QLoRA + checkpointing",
    ]  # fmt: skip
    assert found["full + checkpointing"] == plan
    some = replace(plan, lora_targets=("q_proj",))
    assert presets(some)["LoRA"].lora_targets == ()
    assert presets(replace(some, method="lora"))["QLoRA"].lora_targets == ("q_proj",)
    totals = [estimate_memory(SEVEN, one).total / GIB for one in found.values()]
    assert totals[0] > totals[2] > totals[4]
    assert totals[1] > totals[3] > totals[5]
    assert all(plain > saved for plain, saved in zip(totals[::2], totals[1::2], strict=True))


def test_time():
    plan = TrainingPlan(checkpointing=False)
    assert training_flops(SEVEN, plan, tokens=1000) == 6 * N * 1000
    assert training_flops(SEVEN, replace(plan, checkpointing=True), tokens=1000) == 8 * N * 1000
    assert training_flops(SEVEN, replace(plan, method="lora", checkpointing=True), tokens=1000) == 6 * N * 1000
    writing = TrainingPlan(generated_rows=64, generated_length=1024)
    seconds = generation_seconds(SEVEN, writing, tokens=256, bytes_per_second=1e12)
    assert seconds == pytest.approx(256 * (2 * N + 64 * 1024 * 57_344 / 2) / 1e12)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_activations_are_those_that_torch_keeps(kind, checkpointing):
    """Counts the bytes that a forward pass really keeps, on a small model in float32."""
    import torch
    from torch.autograd.graph import saved_tensors_hooks
    from transformers import BertConfig, BertModel, Qwen2Config, Qwen2Model

    from rag_rl.config.sizing import shape_of

    if kind == "gated":
        config = Qwen2Config(
            hidden_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256,
            vocab_size=128,
        )  # fmt: skip
        model = Qwen2Model(config)
    else:
        config = BertConfig(
            hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256, vocab_size=128,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = BertModel(config)
    shape = shape_of(config, "encoder")
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dtype == torch.float32:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=torch.randint(3, 100, (4, 64)), use_cache=False).last_hidden_state
    plan = TrainingPlan(weight_bytes=4, autocast=False, checkpointing=checkpointing, rows=4, length=64)
    # What is recomputed of one layer comes later, in the backward pass.
    expected = activation_bytes(shape, plan) - (4 * 64 * layer_bytes(shape, 4) if checkpointing else 0)
    assert sum(kept.values()) == pytest.approx(expected, rel=0.15)
    del output
