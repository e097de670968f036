"""``use_vllm`` without a GPU: how far the flag gets, what is refused, and TRL's server mode over a client that echoes.

That vLLM generates is not tested: it needs a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
GENERATING = ["grpo_generator", "grpo_reasoner"]


def test_every_recipe_over_trls_grpo_has_the_flag(load_recipe):
    from trl import GRPOConfig

    found = []
    for path in sorted(RECIPES.glob("*.py")):
        arguments = getattr(load_recipe(path.stem), "ARGUMENTS", ())
        found += [path.stem for kind in arguments if issubclass(kind, GRPOConfig)]
    assert found == GENERATING


@pytest.mark.parametrize("recipe", GENERATING)
def test_the_flag_reaches_trls_settings(load_recipe, recipe):
    from trl import GRPOConfig

    from rag_rl.config import read_arguments

    module = load_recipe(recipe)
    argv = ["--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_host", "node7"]
    (training,) = [
        one for one in read_arguments(module.__file__, *module.ARGUMENTS, argv=argv) if isinstance(one, GRPOConfig)
    ]
    assert (training.use_vllm, training.vllm_mode, training.vllm_server_host) == (True, "server", "node7")


@pytest.mark.parametrize("recipe", GENERATING)
def test_without_vllm(refused, recipe, tmp_path):
    line = refused(recipe, "--use_vllm", "true", "--output_dir", tmp_path / "run")
    assert "error: use_vllm: vllm is not installed: pip install 'rag-rl[gpu]' (TRL 1.12" in line
    assert not (tmp_path / "run").exists(), "nothing was begun"


@pytest.mark.parametrize("recipe", GENERATING)
@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.30.0", "vllm 0.30.0 is installed, and TRL 1.12"), ("0.27.1", "use_vllm needs a GPU, and use_cpu is set")],
)
def test_with_a_vllm_that_cannot_be_used(refused, recipe, tmp_path, monkeypatch, version, expected):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    information = tmp_path / f"vllm-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert expected in refused(recipe, "--use_vllm", "true", "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# TRL's own code of server mode, which gathers the rows of all processes and hands slices of the replies back, over a
# client that answers each row with its last token. Processes have unequal numbers of rows, as chains of steps do.
SERVER_MODE = """
import json
from types import SimpleNamespace

from rag_rl.generation import PolicyGenerator
from rag_rl.run import end_processes
from rag_rl.tiny import FOLDER
from rag_rl.trainers.step_grpo_trainer import StepGRPOTrainer

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.generation.vllm_generation import VLLMGeneration


class Echo:
    calls = []

    def generate(self, prompts, features, n, max_tokens, **settings):
        self.calls.append((len(prompts), n, max_tokens))
        replies = [[ids[-1], 1] for ids in prompts for _ in range(n)]
        return {"prompt_ids": prompts, "completion_ids": replies, "logprobs": [[[-0.5], [-0.25]] for _ in replies]}


accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
engine = object.__new__(VLLMGeneration)
engine.__dict__.update(
    mode="server", accelerator=accelerator, temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0,
    max_completion_length=99, logprobs=0, structured_outputs_regex=None, generation_kwargs={}, vllm_client=Echo(),
    enable_sleep_mode=False, sync_weights=lambda: None,
)
tokenizer = AutoTokenizer.from_pretrained(FOLDER / "reader")
chains = object.__new__(StepGRPOTrainer)
chains.__dict__.update(
    use_vllm=True, vllm_generation=engine, accelerator=accelerator, _tokenizer=tokenizer,
    setup=SimpleNamespace(max_step_tokens=7), turns=SimpleNamespace(end_ids={1}),
)
turns = [[[5, 20 + 10 * rank + i] for i in range(count)] for count in ([3, 1][rank], [2, 0][rank])]
steps = [[(list(one.ids), list(one.log_probs)) for one in chains._continue(rows)] for rows in turns]
trainer = SimpleNamespace(
    use_vllm=True, vllm_generation=engine, accelerator=accelerator, args=SimpleNamespace(), processing_class=tokenizer,
    model_wrapped=AutoModelForCausalLM.from_pretrained(FOLDER / "reader"), state=SimpleNamespace(global_step=0),
    _last_loaded_step=-1,
)
asked = ["one two", "three four five"][: [2, 1][rank]]
generator = PolicyGenerator(trainer, generator_type="base")
written = generator.generate(asked, n=2, max_new_tokens=6, temperature=1.0)
answers = [[one.token_ids[0] for one in row] for row in written]
last = [ids[-1] for ids in generator.encode(asked)]
told = gather_object([{"steps": steps, "answers": answers, "last": last}])
if rank == 0:
    print("FOUND" + json.dumps({"told": told, "calls": Echo.calls, "budget": engine.max_completion_length}))
end_processes(0)
"""


@pytest.mark.slow
def test_each_row_gets_its_own_reply_in_server_mode(launch_recipe, tmp_path):
    script = tmp_path / "server_mode.py"
    script.write_text(SERVER_MODE)
    done = launch_recipe(script, cwd=tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if "FOUND" in line]
    found = json.loads(line.split("FOUND", 1)[1])
    first, second = found["told"]
    log_probs = [-0.5, -0.25]
    assert first["steps"] == [[[[20 + i, 1], log_probs] for i in range(count)] for count in (3, 2)]
    assert second["steps"] == [[[[30, 1], log_probs]], []], "nothing is left to ask, and it takes part"
    for one in (first, second):
        assert one["answers"] == [[token, token] for token in one["last"]]
    assert found["calls"] == [[6, 1, 7], [4, 1, 7], [8, 1, 6]], "filled up to the same number on each process"
    assert found["budget"] == 99
