"""recipes/sft_reasoner.py, through its real command line."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from rag_rl.reasoning import parse_step, read_trajectories
from rag_rl.tiny import FOLDER
from tests.recipes.run_folders import difference, history_of, metrics_of, read_lines, steps_of, write_lines

RECIPE = "sft_reasoner"
# It makes its own chains.
SHORT = {
    "headroom_samples": None, "per_device_train_batch_size": 4, "data_train_size": 12, "data_eval_size": 12,
    "reasoner_baselines": "[]",
}  # fmt: skip
METRICS = {"em", "f1", "contains_em", "format", "steps", "searches", "passages", "recall@3", "all_gold@3"}


@pytest.fixture(scope="module")
def chains(tmp_path_factory) -> Path:
    """Chains of the oracle about three questions."""
    from rag_rl.config.arguments import DataArguments, JudgeArguments, RetrieverArguments
    from rag_rl.config.parts import build_questions, build_retriever
    from rag_rl.config.teacher_arguments import TeacherArguments
    from rag_rl.config.teachers import collect_chains

    data = DataArguments(
        data_corpus="${tiny}/data/corpus.jsonl", data_train="${tiny}/data/demo_2hop.jsonl", data_train_size=6
    )
    search = RetrieverArguments(retriever_encoder="${tiny}/encoder", retriever_top_k=3, retriever_batch_size=256)
    questions, _ = build_questions(data, seed=1)
    folder = tmp_path_factory.mktemp("chains")
    parts = {"teacher": TeacherArguments(teacher_max_steps=5), "judge": JudgeArguments()}
    collect_chains(questions, folder, build_retriever(search, data), search=search, data=data, **parts)
    return folder / "trajectories.jsonl"


# ---- a run and what it leaves


@pytest.mark.smoke
def test_metrics(check_metrics, trained_run):
    found = check_metrics(trained_run, n_eval=12)
    assert set(found["before"]) == set(found["after"]) == METRICS
    for when in ("before", "after"):
        assert all(0.0 <= found[when][name] <= 1.0 for name in ("em", "f1", "format", "recall@3"))
        assert found[when]["em"] <= found[when]["f1"]
        assert 1.0 <= found[when]["steps"] <= 5.0


@pytest.mark.smoke
def test_run_folder(check_run_folder, trained_run):
    more = {
        "trajectories.jsonl", "trajectories_config.yaml", "model.safetensors", "config.json", "tokenizer.json",
    }  # fmt: skip
    check_run_folder(trained_run, more, portable=("config.json", "trajectories_config.yaml"))
    chains = read_trajectories(trained_run / "trajectories.jsonl")
    assert len(chains) == 12
    assert steps_of(trained_run) == [1, 2, 3]
    # ppo_reasoner looks here for how long its start was taught: 3 steps of 4 examples, one example a step of a chain.
    examples = sum(len(chain.steps) for chain in chains if chain.state == "correct")
    state = json.loads((trained_run / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(12 / examples, abs=0.02)


@pytest.mark.smoke
def test_the_trained_model_loads_by_itself(trained_run):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(trained_run)
    start = dict(AutoModelForCausalLM.from_pretrained(FOLDER / "reader").named_parameters())
    weights = dict(plain.named_parameters())
    assert weights.keys() == start.keys()
    assert any(not weights[name].equal(start[name]) for name in weights), "training must have changed something"


@pytest.mark.smoke
def test_started_again_it_says_so_and_does_nothing(check_started_again, trained_run):
    check_started_again(trained_run, own_process=True)


# ---- what is learnt, and by which weights


@pytest.fixture
def watched(monkeypatch) -> list[dict]:
    """What each training step saw: its labels and, after the step, the gradients of the weights that are trained."""
    from trl import SFTTrainer

    seen: list[dict] = []
    step = SFTTrainer.training_step

    def training_step(self, model, inputs, *more, **named):
        labels = inputs["labels"]
        told = self.processing_class.batch_decode([row[row != -100] for row in labels])
        loss = step(self, model, inputs, *more, **named)
        grads = {name: w.grad.abs().max().item() for name, w in model.named_parameters() if w.grad is not None}
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        seen.append({"told": told, "grads": grads, "trained": trained})
        return loss

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)
    return seen


@pytest.mark.smoke
@pytest.mark.parametrize("layout", ["turn", "chat"])
def test_every_adapter_learns_the_steps_and_nothing_else(run_here, brief, tmp_path, chains, watched, layout):
    """Over a frozen base with gradient checkpointing: without gradients of the inputs nothing would reach LoRA."""
    flags = brief(reasoner_layout=layout, gradient_checkpointing="true", warmup_steps=0, save_merged="false")
    assert run_here(RECIPE, *flags, "--coldstart_path", chains, "--output_dir", tmp_path / "run") == 0
    assert len(watched) == 3
    told = [text.removesuffix("\n").removesuffix("<|im_end|>") for seen in watched for text in seen["told"]]
    right = [chain for chain in read_trajectories(chains) if chain.state == "correct"]
    steps = {record.step for chain in right for record in chain.steps}
    assert len(told) == 12
    for text in told:
        number = int(text.split(":")[0].removeprefix("Step "))
        assert parse_step(text, number).step in steps, "the loss is on one whole step: no question, no documents"
    # B begins at zero and lets nothing through to A: from the second step on both move.
    last = watched[-1]
    assert last["trained"] == [name for name in last["trained"] if "lora_" in name]
    assert len(last["trained"]) >= 2 * 4 * 4, "A and B of every linear layer of four blocks"
    assert [name for name in last["trained"] if not last["grads"].get(name)] == []
    assert sorted(p.name for p in (tmp_path / "run").glob("adapter_*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not (tmp_path / "run" / "trajectories.jsonl").exists(), "chains were given"


@pytest.mark.smoke
def test_a_base_model_in_full_with_validation(run_here, brief, tmp_path, chains, watched):
    flags = brief(reasoner_type="base", use_peft="false", max_steps=2, save_steps=2, coldstart_validation=0.4)
    flags += ["--eval_strategy", "steps", "--eval_steps", "2", "--coldstart_path", str(chains)]
    assert run_here(RECIPE, *flags, "--output_dir", tmp_path / "run") == 0
    assert watched[0]["told"][0].startswith("Step ")
    assert len(watched[0]["trained"]) == len(watched[0]["grads"]) > 30
    assert steps_of(tmp_path / "run", "eval_loss") == [2]


def test_half_precision_is_loaded_as_asked(run_here, brief, tmp_path, chains, monkeypatch):
    from trl import SFTTrainer

    types = []
    train = SFTTrainer.train
    monkeypatch.setattr(
        SFTTrainer,
        "train",
        lambda self, *a, **k: (
            types.append({str(w.dtype) for n, w in self.model.named_parameters() if "lora_" not in n})
            or train(self, *a, **k)
        ),
    )
    flags = brief(max_steps=1, dtype="bfloat16", bf16="true")
    assert run_here(RECIPE, *flags, "--coldstart_path", chains, "--output_dir", tmp_path / "run") == 0
    assert types == [{"torch.bfloat16"}]


def test_what_does_not_fit_is_told(run_here, brief, tmp_path, chains, caplog):
    flags = brief(max_steps=1, max_length=160, reasoner_max_step_tokens=48)
    with caplog.at_level(logging.WARNING):
        assert run_here(RECIPE, *flags, "--coldstart_path", chains, "--output_dir", tmp_path / "run") == 0
    assert [m for m in caplog.messages if "prompts have no room for all documents: the oldest go" in m]


# ---- slow: launchers, interruptions, other folders


@pytest.mark.slow
def test_accelerate_launch_without_arguments(check_plain_launch):
    check_plain_launch()


@pytest.mark.slow
def test_copy_of_the_recipe_runs_elsewhere(check_copy_elsewhere, chains):
    check_copy_elsewhere("--coldstart_path", chains, max_steps=1)


@pytest.mark.slow
def test_killed_and_resumed(kill_and_resume, brief, tmp_path):
    folder = tmp_path / "run"
    flags = brief(max_steps=30, save_steps=3)
    once = ("before.json", "trajectories.jsonl")
    assert kill_and_resume(RECIPE, *flags, folder=folder, cwd=tmp_path, once=once) < 30
    assert steps_of(folder) == list(range(1, 31))
    assert metrics_of(folder)["status"] == "complete"


@pytest.mark.slow
def test_two_processes_do_what_one_does(run_here, launch_recipe, brief, tmp_path):
    """Five steps of 16 examples, in one process or 8 in each of two: the same examples, the same losses."""
    same = {"max_steps": 5, "data_train_size": 40, "data_eval_size": 11, "learning_rate": 1e-3}
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert run_here(RECIPE, *brief(**same, per_device_train_batch_size=16), "--output_dir", alone) == 0
    done = launch_recipe(RECIPE, *brief(**same, per_device_train_batch_size=8), "--output_dir", both, cwd=tmp_path)
    assert (metrics_of(alone)["num_processes"], metrics_of(both)["num_processes"]) == (1, 2)
    assert metrics_of(both)["n_eval"] == 11
    qids = [chain.question.qid for chain in read_trajectories(both / "trajectories.jsonl")]
    assert len(qids) == len(set(qids)) == 40, "one process wrote the chains"
    assert (both / "trajectories.jsonl").read_bytes() == (alone / "trajectories.jsonl").read_bytes()
    ours, theirs = history_of(both), history_of(alone)
    assert [entry["step"] for entry in ours] == [1, 2, 3, 4, 5]
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in theirs], abs=1e-4)
    assert [entry["grad_norm"] for entry in ours] == pytest.approx([entry["grad_norm"] for entry in theirs], rel=1e-2)
    assert difference(FOLDER / "reader", both) > 1e-3, "the weights moved"
    assert metrics_of(both)["before"] == pytest.approx(metrics_of(alone)["before"], abs=1e-9)
    assert done.stdout.count("held-out questions; trained") == 1


# ---- bad input: one line, exit code 2


def test_a_file_with_broken_steps(bad_at_once, chains, tmp_path):
    rows = read_lines(chains)[:3]
    del rows[1]["steps"][1]["analysis"]
    rows[2]["steps"][0]["query"] = "One? Two?"
    line = bad_at_once("--coldstart_path", write_lines(tmp_path / "broken.jsonl", rows))
    assert "broken.jsonl: 2 bad rows: line 2: step 2: field 'analysis' is missing; line 3: step 1: the query" in line


def test_a_file_that_is_not_there(bad_at_once, tmp_path):
    line = bad_at_once("--coldstart_path", tmp_path / "nowhere.jsonl")
    assert "nowhere.jsonl: no such file; recipes/build_trajectories.py makes one" in line


def test_chains_about_held_out_questions(bad_at_once, chains, tmp_path):
    rows = read_lines(FOLDER / "data" / "demo_2hop.jsonl")
    first = read_lines(chains)[0]["qid"]
    held_out = write_lines(tmp_path / "eval.jsonl", [row for row in rows if row["qid"] == first])
    train = write_lines(tmp_path / "train.jsonl", [row for row in rows if row["qid"] != first])
    line = bad_at_once("--coldstart_path", chains, "--data_eval", held_out, "--data_train", train)
    assert f"1 held-out questions have chains to learn from: {first}" in line


def test_a_question_without_answers(bad_at_once, tmp_path):
    rows = read_lines(FOLDER / "data" / "demo_2hop.jsonl")[:4]
    rows[2]["answers"] = []
    line = bad_at_once("--data_train", write_lines(tmp_path / "train.jsonl", rows))
    assert "train.jsonl: 1 bad row: line 3: " in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"coldstart_states": "incorrect"}, "chains ended in incorrect"),
        ({"coldstart_states": "right"}, "--coldstart_states: expected a list of one of correct"),
        ({"coldstart_validation": 1}, "coldstart_validation must lie in [0, 1), got 1"),
        ({"max_length": 64}, "reasoner_max_step_tokens 64 leaves no room for a prompt: max_length is 64"),
        ({"retriever_name": "none"}, "retriever_name must not be none"),
        ({"reasoner_type": "base", "reasoner_layout": "chat"}, "layout chat is a conversation"),
        ({"model_name_or_path": "${tiny}/nowhere"}, "cannot be loaded"),
        ({"teacher_name": "oracel"}, "teacher_name must be oracle, local, openai"),
    ],
)
def test_settings_that_mean_nothing(bad_at_once, changes, expected):
    assert expected in bad_at_once(**changes)


def test_a_run_that_was_stopped_while_its_teacher_wrote(run_here, bad_at_once, brief, tmp_path):
    """Its chains stay; with another teacher they are not mixed."""
    line = bad_at_once("--coldstart_states", "incorrect", data_train_size=4)
    assert "chains ended in incorrect" in line
    left = (tmp_path / "run" / "trajectories.jsonl").read_bytes()
    assert len(left.splitlines()) == 4
    line = bad_at_once("--teacher_max_steps", 2, data_train_size=4)
    assert "holds chains that came about otherwise (teacher_max_steps: 5 -> 2): give another --output_dir" in line
    assert run_here(RECIPE, *brief(max_steps=1), "--output_dir", tmp_path / "run") == 0
    assert os.path.getsize(tmp_path / "run" / "trajectories.jsonl") > len(left)
    assert (tmp_path / "run" / "trajectories.jsonl").read_bytes().startswith(left)
