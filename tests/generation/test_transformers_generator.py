from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch

from rag_rl.errors import ConfigError, DataError
from rag_rl.generation import TransformersGenerator
from rag_rl.generation.transformers_generator import finish
from rag_rl.types import Generator

PROMPTS = [
    "Who rules the town?",
    "river",
    "The quick party of the north was known for its history, and the king took the old road to the river.",
    [{"role": "user", "content": "What is the capital of the state?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where does the river end?"}],
    "water and life in the great city of the south",
]


@pytest.fixture
def generator(model, tokenizer):
    return TransformersGenerator(model, tokenizer)


def greedy(generator, prompts, **more):
    return generator.generate(prompts, max_new_tokens=more.pop("max_new_tokens", 12), temperature=0.0, **more)


def test_importing_the_package_loads_no_torch_and_no_openai():
    code = (
        "import sys, rag_rl.generation as g; assert not {'torch', 'openai', 'transformers'} & set(sys.modules);"
        "from rag_rl.generation import ScriptedGenerator, fit_passages;"
        "assert not {'torch', 'openai', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_can_be_loaded():
    import rag_rl.generation as package

    assert all(getattr(package, name).__name__ == name for name in package.__all__)
    with pytest.raises(AttributeError):
        _ = package.nothing


def test_is_a_generator(generator):
    assert isinstance(generator, Generator)


def test_a_padded_batch_gives_what_each_prompt_gives_alone(generator):
    together = [row[0] for row in greedy(generator, PROMPTS)]
    alone = [greedy(generator, [prompt])[0][0] for prompt in PROMPTS]
    assert together == alone
    assert len({one.token_ids for one in together}) == len(PROMPTS), "the model tells the prompts apart"


def test_left_padding_moves_logits_by_rounding_only(model, tokenizer):
    ids = tokenizer("The king took the road.")["input_ids"]
    pads = 9
    padded = torch.tensor([[tokenizer.pad_token_id] * pads + ids])
    mask = torch.tensor([[0] * pads + [1] * len(ids)])
    with torch.no_grad():
        bare = model(input_ids=torch.tensor([ids])).logits[0]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with_pads = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[0, pads:]
    torch.testing.assert_close(with_pads, bare, rtol=1e-4, atol=1e-4)


def test_greedy_is_the_argmax_of_the_bare_model(generator, model, tokenizer):
    ids = tokenizer(PROMPTS[0])["input_ids"]
    expected = []
    with torch.no_grad():
        for _ in range(12):
            expected.append(int(model(input_ids=torch.tensor([ids + expected])).logits[0, -1].argmax()))
            if expected[-1] == tokenizer.eos_token_id:
                break
    assert list(greedy(generator, [PROMPTS[0]])[0][0].token_ids) == expected


def test_small_batches_keep_the_input_order(model, tokenizer, generator):
    small = TransformersGenerator(model, tokenizer, batch_size=2)
    assert greedy(small, PROMPTS) == greedy(generator, PROMPTS)


def test_token_ids_decode_to_the_text_and_hold_no_prompt_and_no_pads(generator, tokenizer):
    for prompt, (one,) in zip(PROMPTS, greedy(generator, PROMPTS), strict=True):
        assert tokenizer.decode(one.token_ids, skip_special_tokens=True) == one.text
        assert 1 <= len(one.token_ids) <= 12
        assert one.finish_reason == ("stop" if one.token_ids[-1] == tokenizer.eos_token_id else "length")
        if isinstance(prompt, str):
            assert one.prompt_tokens == len(tokenizer(prompt)["input_ids"])


def test_chat_turns_go_through_the_template(generator, tokenizer):
    chat = PROMPTS[4]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert generator.prompt_tokens([chat, text]) == [len(tokenizer(text)["input_ids"])] * 2
    assert greedy(generator, [chat]) == greedy(generator, [text])


def test_a_base_model_gets_plain_text(model, tokenizer):
    base = TransformersGenerator(model, tokenizer, generator_type="base")
    assert greedy(base, [PROMPTS[4]]) == greedy(base, ["Be brief.\n\nWhere does the river end?"])


def test_no_chat_template_is_said_clearly(model):
    from rag_rl.tiny.tokenizer import build_tokenizer

    bare = build_tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        greedy(TransformersGenerator(model, bare), PROMPTS)


def test_n_samples_differ_and_belong_to_their_prompt(generator):
    rows = generator.generate(PROMPTS, n=4, max_new_tokens=8, temperature=1.0, seed=1)
    assert [len(row) for row in rows] == [4] * len(PROMPTS)
    lengths = generator.prompt_tokens(PROMPTS)
    assert [[one.prompt_tokens for one in row] for row in rows] == [[length] * 4 for length in lengths]
    assert all(len({one.token_ids for one in row}) > 1 for row in rows)
    near_greedy = generator.generate(PROMPTS, n=3, max_new_tokens=8, temperature=1e-4, seed=1)
    assert near_greedy == [row * 3 for row in greedy(generator, PROMPTS, max_new_tokens=8)]


def test_greedy_with_n_repeats_one_result(generator):
    assert greedy(generator, PROMPTS, n=3) == [row * 3 for row in greedy(generator, PROMPTS)]


def test_more_samples_than_a_batch_holds(model, tokenizer):
    rows = TransformersGenerator(model, tokenizer, batch_size=2).generate(
        PROMPTS[:3], n=5, max_new_tokens=3, temperature=1.0, seed=0
    )
    assert [len(row) for row in rows] == [5, 5, 5]


def test_seeds_repeat_and_leave_the_global_state_alone(generator):
    def sampled(seed):
        return generator.generate(PROMPTS, n=2, max_new_tokens=8, temperature=1.0, seed=seed)

    before = torch.random.get_rng_state()
    first = sampled(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert sampled(5) == first
    assert sampled(6) != first
    torch.manual_seed(3)
    unseeded = sampled(None)
    assert sampled(None) != unseeded
    torch.manual_seed(3)
    assert sampled(None) == unseeded


def test_the_models_own_sampling_settings_are_set_aside(fresh_model, tokenizer):
    generator = TransformersGenerator(fresh_model, tokenizer)
    plain = generator.generate(PROMPTS, n=2, max_new_tokens=8, temperature=1.0, seed=5)
    fresh_model.generation_config.top_k = 1
    fresh_model.generation_config.repetition_penalty = 5.0
    own = fresh_model.generation_config
    assert generator.generate(PROMPTS, n=2, max_new_tokens=8, temperature=1.0, seed=5) == plain
    assert fresh_model.generation_config is own


def test_top_p_narrows_sampling(generator):
    narrow = generator.generate(PROMPTS, n=2, max_new_tokens=8, temperature=1.0, top_p=1e-6, seed=5)
    assert narrow == [row * 2 for row in greedy(generator, PROMPTS, max_new_tokens=8)]


def test_stop_strings_cut_text_and_ids(generator, tokenizer):
    free = [row[0] for row in greedy(generator, PROMPTS, max_new_tokens=16)]
    # Stop at what the third token of the second prompt adds: ends that row, and others where it happens to occur.
    ids = free[1].token_ids
    stop = tokenizer.decode(ids[2:4])
    assert stop
    stopped = [row[0] for row in greedy(generator, PROMPTS, max_new_tokens=16, stop=[stop, "never written"])]
    for one, whole in zip(stopped, free, strict=True):
        if stop in whole.text:
            assert one.text == whole.text[: whole.text.index(stop)]
            assert one.finish_reason == "stop"
            assert stop in tokenizer.decode(one.token_ids)
            assert stop not in tokenizer.decode(one.token_ids[:-1])
            assert one.token_ids == whole.token_ids[: len(one.token_ids)]
        else:
            assert one == whole
    assert stopped[1].text == free[1].text[: free[1].text.index(stop)]
    assert len(stopped[1].token_ids) <= 4


def test_a_stop_string_in_the_prompt_does_not_end_a_row(generator, tokenizer):
    free = greedy(generator, ["Who rules the town?"])[0][0]
    across = "?" + free.text[:1]
    assert greedy(generator, ["Who rules the town?"], stop=[across, "town"])[0][0] == free


def test_a_stop_string_ends_the_pass_early(fresh_model, tokenizer):
    generator = TransformersGenerator(fresh_model, tokenizer)
    ids = greedy(generator, ["river"])[0][0].token_ids
    calls = []
    handle = fresh_model.register_forward_hook(lambda *_: calls.append(1))
    greedy(generator, ["river"], max_new_tokens=200, stop=[tokenizer.decode(ids[:1])])
    handle.remove()
    assert len(calls) < 10


def test_a_stop_string_that_is_a_special_token_ends_by_its_id(generator, tokenizer):
    outcomes = generator.generate(["river"], n=64, max_new_tokens=30, temperature=3.0, seed=0, stop=["<|im_start|>"])
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    for one in outcomes[0]:
        assert start not in one.token_ids[:-1]
    ids = [*tokenizer("one")["input_ids"], start, *tokenizer("two")["input_ids"]]
    cut = finish(tokenizer, generator.model, ids, ["<|im_start|>"], prompt_tokens=1)
    assert (cut.text, cut.token_ids[-1], cut.finish_reason) == ("one", start, "stop")


def test_every_end_token_of_a_list_ends_a_row(fresh_model, tokenizer):
    generator = TransformersGenerator(fresh_model, tokenizer)
    free = greedy(generator, ["river"])[0][0].token_ids
    # The first token that has not occurred before it.
    place = next(i for i in range(1, len(free)) if free[i] not in free[:i])
    fresh_model.generation_config.eos_token_id = [tokenizer.eos_token_id, free[place]]
    one = greedy(generator, ["river"])[0][0]
    assert one.token_ids == free[: place + 1]
    assert one.finish_reason == "stop"


def test_a_tokenizer_whose_pad_is_its_end_token(model, generator):
    from rag_rl.tiny.tokenizer import build_tokenizer

    same = build_tokenizer()
    same.pad_token = same.eos_token
    rows = greedy(TransformersGenerator(model, same), PROMPTS, max_new_tokens=40)
    assert rows == greedy(generator, PROMPTS, max_new_tokens=40)


def test_training_flags_and_padding_side_are_put_back(fresh_model, tokenizer):
    fresh_model.train()
    fresh_model.model.embed_tokens.eval()
    before = [module.training for module in fresh_model.modules()]
    seen = []
    handle = fresh_model.register_forward_hook(lambda module, *_: seen.append(module.training))
    greedy(TransformersGenerator(fresh_model, tokenizer), PROMPTS[:1])
    handle.remove()
    assert [module.training for module in fresh_model.modules()] == before
    assert seen
    assert not any(seen)
    fresh_model.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
    with pytest.raises(RuntimeError, match="boom"):
        greedy(TransformersGenerator(fresh_model, tokenizer), PROMPTS[:1])
    assert [module.training for module in fresh_model.modules()] == before


def test_the_cache_is_used_although_activations_are_checkpointed(fresh_model, tokenizer):
    fresh_model.gradient_checkpointing_enable()
    fresh_model.config.use_cache = False
    fresh_model.train()
    widths = []
    handle = fresh_model.model.embed_tokens.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    greedy(TransformersGenerator(fresh_model, tokenizer), PROMPTS[:1])
    handle.remove()
    assert len(widths) > 2
    assert set(widths[1:]) == {1}
    assert fresh_model.is_gradient_checkpointing
    assert fresh_model.config.use_cache is False


def test_long_and_empty_prompts_are_counted(generator, model, tokenizer):
    long = " ".join(["river"] * 250)
    with pytest.raises(DataError, match=r"2 of 3 prompts are longer than the 244 tokens"):
        greedy(generator, [long, "river", long])
    assert generator.prompt_limit(12) == 244
    with pytest.raises(DataError, match=r"1 of 2 prompts are longer than the 3 tokens"):
        greedy(TransformersGenerator(model, tokenizer, max_prompt_tokens=3), ["river", PROMPTS[0]])
    with pytest.raises(DataError, match="1 of 2 prompts are empty"):
        greedy(generator, ["river", ""])
    assert greedy(generator, []) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n must be"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop": "word"}, "stop must be a list"),
        ({"stop": [""]}, "non-empty"),
    ],
)
def test_values_out_of_range(generator, change, message):
    with pytest.raises(ConfigError, match=message):
        generator.generate(["river"], **{"max_new_tokens": 4, "temperature": 1.0, **change})


def test_settings_out_of_range(model, tokenizer):
    with pytest.raises(ConfigError, match="batch_size"):
        TransformersGenerator(model, tokenizer, batch_size=0)
    with pytest.raises(ConfigError, match="generator_type"):
        TransformersGenerator(model, tokenizer, generator_type="api")


def test_finish_cuts_what_another_engine_wrote(model, tokenizer):
    ids = [*tokenizer("one two. three")["input_ids"], tokenizer.eos_token_id]
    assert finish(tokenizer, model, ids, [], prompt_tokens=2).text == "one two. three"
    assert finish(tokenizer, model, ids, [], prompt_tokens=2).finish_reason == "stop"
    assert finish(tokenizer, model, ids[:-1], [], prompt_tokens=2).finish_reason == "length"
    assert finish(tokenizer, model, ids, ["."], prompt_tokens=2).text == "one two"


class TestFromPretrained:
    @pytest.fixture
    def folder(self, fresh_model, tokenizer, tmp_path):
        fresh_model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    @pytest.fixture
    def adapter(self, fresh_model, folder):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules=["q_proj", "in_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        tuned = get_peft_model(fresh_model, config)
        tuned.save_pretrained(folder.parent / "tuned")
        config_file = folder.parent / "tuned" / "adapter_config.json"
        settings = json.loads(config_file.read_text())
        config_file.write_text(json.dumps({**settings, "base_model_name_or_path": "../base"}))
        return tuned, folder.parent / "tuned"

    def test_a_saved_model_comes_back_the_same(self, folder, generator):
        loaded = TransformersGenerator.from_pretrained(str(folder), device="cpu", batch_size=4)
        assert greedy(loaded, PROMPTS) == greedy(generator, PROMPTS)
        assert not loaded.model.training
        assert loaded.batch_size == 4

    def test_dtype(self, folder):
        loaded = TransformersGenerator.from_pretrained(str(folder), dtype="bfloat16", device="cpu")
        assert loaded.model.dtype == torch.bfloat16

    def test_an_adapter_folder_brings_its_base(self, folder, adapter, tokenizer, generator):
        tuned, path = adapter
        own = tuned.generation_config
        expected = greedy(TransformersGenerator(tuned, tokenizer), PROMPTS)
        assert expected != greedy(generator, PROMPTS)
        assert tuned.generation_config is own
        assert tuned.get_base_model().generation_config is own
        assert greedy(TransformersGenerator.from_pretrained(str(path), device="cpu"), PROMPTS) == expected
        named = TransformersGenerator.from_pretrained(str(folder), adapter=str(path), device="cpu")
        assert greedy(named, PROMPTS) == expected

    def test_pickled_weights_are_refused(self, folder, adapter):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(DataError, match="safetensors"):
            TransformersGenerator.from_pretrained(str(folder), device="cpu")
        (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
        _, path = adapter
        (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
        with pytest.raises(DataError, match=r"no adapter_model\.safetensors"):
            TransformersGenerator.from_pretrained(str(path), device="cpu")

    def test_what_is_missing_is_named(self, folder, adapter):
        with pytest.raises(DataError, match="nowhere"):
            TransformersGenerator.from_pretrained(str(folder / "nowhere"))
        _, path = adapter
        (path / "adapter_config.json").write_text("{}")
        with pytest.raises(DataError, match="base_model_name_or_path"):
            TransformersGenerator.from_pretrained(str(path))
        (path / "adapter_config.json").write_text("{")
        with pytest.raises(DataError, match=r"adapter_config\.json"):
            TransformersGenerator.from_pretrained(str(path))
        shutil.rmtree(path)


@pytest.mark.parametrize("prompt", [PROMPTS[2] * 40, [{"role": "user", "content": PROMPTS[2] * 40}]])
def test_too_long_a_prompt_is_measured_without_a_warning_of_indexing_errors(fresh_model, tokenizer, prompt, caplog):
    from transformers.utils import logging

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 64
    tokenizer.deprecation_warnings.clear()
    logging.enable_propagation()
    try:
        assert TransformersGenerator(fresh_model, tokenizer).encode([prompt])[0][64:]
        assert "longer than the specified maximum" not in caplog.text
        # What it would say otherwise, of the same text.
        tokenizer.deprecation_warnings.clear()
        tokenizer(PROMPTS[2] * 40)
        assert "longer than the specified maximum" in caplog.text
    finally:
        logging.disable_propagation()
