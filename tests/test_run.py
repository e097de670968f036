from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from torch import nn

from rag_rl import run as runs
from rag_rl.config.arguments import JudgeArguments
from rag_rl.errors import BackendError, ConfigError, DataError, RunFolderError
from rag_rl.evaluation.assembly import Assembly
from rag_rl.evaluation.scoring import evaluate
from rag_rl.generation import ScriptedGenerator
from rag_rl.judges import BudgetExceededError
from rag_rl.prompts import load_prompt
from rag_rl.retrieval import StaticRetriever
from rag_rl.run import (
    disk_trouble,
    evaluate_sharded,
    keep_prompts,
    keep_settings,
    last_checkpoint,
    launch,
    make_base_relative,
    open_folder,
    report_index,
    results_table,
    save_trained,
    start_data_run,
    start_run,
    versions,
    write_whole,
)
from rag_rl.types import Passage, Question


def exit_of(main, capsys) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as stop:
        launch(main)
    return stop.value.code, [line for line in capsys.readouterr().err.splitlines() if line]


def failing(error: Exception):
    def main():
        raise error

    return main


# ---- launch


@pytest.fixture(autouse=True)
def _program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/recipe.py", "--seed", "1"])


def test_an_error_of_the_user_is_one_line(capsys):
    code, lines = exit_of(failing(DataError("a.jsonl: 1 bad row:\nline 3")), capsys)
    assert (code, lines) == (2, ["recipe.py: error: a.jsonl: 1 bad row: line 3"])


def test_a_dead_backend_is_one_line_and_another_code(capsys):
    code, lines = exit_of(failing(BackendError("the judge at http://x is gone\n")), capsys)
    assert (code, lines) == (1, ["recipe.py: stopped: the judge at http://x is gone"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "runs/x/model.safetensors"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1992256 vs 1992148"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line(capsys, error):
    code, lines = exit_of(failing(error), capsys)
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("recipe.py: stopped: ")
    assert lines[0].endswith("; make room and go on with --resume_from_checkpoint true")


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EACCES, "Permission denied"), KeyError("x")])
def test_a_bug_keeps_its_traceback(error):
    assert disk_trouble(error) is None
    with pytest.raises(type(error)):
        launch(failing(error))


def test_a_recipe_that_ends_well():
    done = []
    launch(lambda: done.append(1))
    assert done == [1]


def test_importing_trl_after_us_is_silent(tmp_path):
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", "import rag_rl.run, trl; from trl import GRPOConfig"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


# ---- the folder


SETTINGS = {"recipe": "grpo_generator", "learning_rate": 0.1, "seed": 1, "report_to": "none"}


def make_run(folder: Path, *, begun: bool = True, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"recipe": "grpo_generator", "config": "tiny", "made_with": {"trl": "0"}, **SETTINGS, **changes}
    (folder / "resolved_config.yaml").write_text(yaml.safe_dump(record))
    if begun:
        (folder / "before.json").write_text("{}")
    return folder


def make_checkpoint(folder: Path, step: int, state: str | None = None) -> str:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    if state != "missing":
        (checkpoint / "trainer_state.json").write_text(state or json.dumps({"global_step": step}))
    return str(checkpoint)


@pytest.mark.parametrize("resume", [False, True])
def test_new_and_empty_folders_begin(tmp_path, resume):
    assert open_folder(tmp_path / "new", SETTINGS, resume=resume) is None
    assert open_folder(tmp_path, SETTINGS, resume=resume) is None
    (tmp_path / ".resolved_config.yaml.part").write_text("half")
    assert open_folder(tmp_path, SETTINGS, resume=resume) is None


def test_folder_of_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match="is not empty and holds no run: give another --output_dir"):
        open_folder(tmp_path, SETTINGS, resume=True)
    with pytest.raises(RunFolderError, match="is a file"):
        open_folder(tmp_path / "thesis.tex", SETTINGS, resume=False)


def test_folder_of_another_run(tmp_path):
    folder = make_run(tmp_path / "run", learning_rate=0.2, a=1, b=2, c=3)
    expected = r"another run \(a: 1 -> \(absent\); b: 2 -> \(absent\); c: 3 -> \(absent\) and 1 more\)"
    with pytest.raises(RunFolderError, match=expected):
        open_folder(folder, SETTINGS, resume=True)


def test_what_does_not_change_a_run(tmp_path):
    # Where it reports to, which versions it was begun with, and the name of its config.
    folder = make_run(tmp_path / "run", report_to="trackio", made_with={"trl": "0.1"}, config="mine")
    assert open_folder(folder, SETTINGS, resume=True) is None


def test_a_setting_of_a_later_version_does_not_change_a_run_while_it_has_its_default(tmp_path):
    folder = make_run(tmp_path / "run")
    defaults = {"depth": 20, "secret_token": None, "learning_rate": 7.0}
    assert open_folder(folder, {**SETTINGS, "depth": 20}, resume=True, defaults=defaults) is None
    with pytest.raises(RunFolderError, match=r"another run \(depth: 20 -> 30\)"):
        open_folder(folder, {**SETTINGS, "depth": 30}, resume=True, defaults=defaults)


def test_what_of_a_judge_may_change(tmp_path):
    judge = JudgeArguments(judge_name="openai", judge_model="m")
    settings = {**SETTINGS, **dataclasses.asdict(judge)}
    folder = make_run(tmp_path / "run", **dataclasses.asdict(judge))
    more = {
        "judge_max_calls": 500,
        "judge_max_usd": 2.0,
        "judge_base_url": "http://elsewhere/v1",
        "judge_timeout_s": 9.0,
    }
    assert open_folder(folder, {**settings, **more}, resume=True) is None
    with pytest.raises(RunFolderError, match="judge_rubric: answer_correctness -> style"):
        open_folder(folder, {**settings, "judge_rubric": "style"}, resume=True)
    ours = {key for key in runs.RUNTIME_KEYS if key.startswith("judge_")}
    assert ours < {field.name for field in dataclasses.fields(JudgeArguments)}


def test_unfinished_run_names_the_flag(tmp_path):
    folder = make_run(tmp_path / "run")
    with pytest.raises(RunFolderError, match="unfinished: go on with --resume_from_checkpoint true, or give another"):
        open_folder(folder, SETTINGS, resume=False)
    assert open_folder(folder, SETTINGS, resume=True) is None
    checkpoint = make_checkpoint(folder, 30)
    assert open_folder(folder, SETTINGS, resume=True) == checkpoint


def test_a_run_in_steps_goes_on_with_other_settings_where_that_is_asked_for(tmp_path):
    folder = make_run(tmp_path / "run", learning_rate=0.2)
    with pytest.raises(RunFolderError, match=r"with other settings \(learning_rate: 0.2 -> .*the steps anew"):
        open_folder(folder, SETTINGS, resume=False, in_steps=True)
    (folder / "metrics.json").write_text('{"status": "complete"}')
    assert open_folder(folder, SETTINGS, resume=True, in_steps=True) is None
    with pytest.raises(RunFolderError, match="another run"):
        open_folder(folder, {**SETTINGS, "recipe": "another"}, resume=True, in_steps=True)


def test_run_that_never_began_does_not_block_its_folder(tmp_path):
    folder = make_run(tmp_path / "run", begun=False, learning_rate=0.2)
    assert open_folder(folder, SETTINGS, resume=False) is None


def test_finished_run_says_so(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.json").write_text('{"status": "complete"}')
    for resume in (False, True):
        with pytest.raises(SystemExit) as stop:
            open_folder(folder, SETTINGS, resume=resume)
        assert stop.value.code == 0
        assert f"{folder} is already finished: see {folder / 'report.html'}" in capsys.readouterr().out


def test_last_whole_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path) is None
    make_checkpoint(tmp_path, 9)
    ten = make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 20, "missing")
    make_checkpoint(tmp_path, 30, '{"global_st')
    make_checkpoint(tmp_path, 40, "{}")
    assert last_checkpoint(tmp_path) == ten


# ---- starting


@dataclass
class Output:
    """Flags of this test."""

    output_dir: str = field(default="", metadata={"help": "where to"})


@dataclass
class Prompted:
    """Flags of this test."""

    generator_prompt: str = "answer"


def recipe_in(folder: Path) -> str:
    (folder / "configs" / "mine").mkdir(parents=True)
    (folder / "configs" / "mine" / "tiny.yaml").write_text("use_cpu: true\nbf16: false\n")
    (folder / "mine.py").write_text('"""A recipe."""\n')
    return str(folder / "mine.py")


def test_start_run(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.chdir(tmp_path)
    recipe = recipe_in(tmp_path / "recipes")
    run = start_run(recipe, (Prompted, TrainingArguments), ["--seed", "7", "--hub_token", "hf_secret"])
    assert (run.recipe, run.config, run.seed, run.checkpoint) == ("mine", "tiny", 7, None)
    assert run.folder == Path("runs/mine-tiny-seed7")
    assert run.arguments[1].output_dir == "runs/mine-tiny-seed7"
    recorded = yaml.safe_load((run.folder / "resolved_config.yaml").read_text())
    assert recorded["recipe"] == "mine"
    assert recorded["made_with"]["torch"]
    assert "hf_secret" not in (run.folder / "resolved_config.yaml").read_text()
    assert (run.folder / "prompts" / "answer.txt").is_file()

    # The same again: nothing has begun, so nothing is in the way; then it has.
    start_run(recipe, (Prompted, TrainingArguments), ["--seed", "7"])
    (run.folder / "before.json").write_text("{}")
    with pytest.raises(RunFolderError, match="--resume_from_checkpoint true"):
        start_run(recipe, (Prompted, TrainingArguments), ["--seed", "7"])
    checkpoint = make_checkpoint(run.folder, 5)
    again = start_run(recipe, (Prompted, TrainingArguments), ["--seed", "7", "--resume_from_checkpoint", "true"])
    assert again.checkpoint == again.arguments[1].resume_from_checkpoint == checkpoint
    with pytest.raises(ConfigError, match=r"must be true or false .* got 'runs/x'"):
        start_run(recipe, (Prompted, TrainingArguments), ["--resume_from_checkpoint", "runs/x"])


def test_start_data_run(tmp_path):
    recipe = recipe_in(tmp_path)
    (tmp_path / "configs" / "mine" / "tiny.yaml").write_text("{}\n")
    (output,) = start_data_run(recipe, (Output,), parent="indexes", argv=[])
    assert output.output_dir == "indexes/tiny"
    (output,) = start_data_run(recipe, (Output,), parent="indexes", argv=["--output_dir", "here"])
    assert output.output_dir == "here"


def test_prompts_are_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("Say $question\n")
    keep_prompts(tmp_path, {"generator_prompt": str(tmp_path / "mine.txt")})
    assert (tmp_path / "prompts" / "mine.txt").read_text() == "Say $question\n"
    keep_prompts(tmp_path / "nowhere", {})
    with pytest.raises(ConfigError, match="generator_prompt: "):
        keep_prompts(tmp_path, {"generator_prompt": "no_such_prompt"})


@pytest.mark.parametrize("rubric", ["style", "comparison"])
def test_rubrics_are_kept(tmp_path, rubric):
    keep_prompts(tmp_path, {"judge_name": "oracle", "judge_rubric": rubric})
    assert not (tmp_path / "prompts").exists(), "nobody reads it"
    keep_prompts(tmp_path, {"judge_name": "openai", "judge_rubric": rubric})
    assert (tmp_path / "prompts" / f"rubric_{rubric}.txt").read_text() == f"{load_prompt(f'judge_{rubric}')}\n"
    with pytest.raises(ConfigError, match="'no such rubric' is neither one of"):
        keep_prompts(tmp_path, {"judge_name": "local", "judge_rubric": "no such rubric"})


REASONER = {"reasoner_baselines": ["one_shot", "no_retrieval"], "reasoner_baseline_prompt": "tiny_answer"}


def test_prompts_of_a_reasoner_are_kept(tmp_path):
    settings = {**REASONER, "reasoner_baseline_closed_prompt": "tiny_closed_book", "step_reward": "coherence"}
    keep_prompts(tmp_path, settings)
    assert {path.stem for path in (tmp_path / "prompts").iterdir()} == {"tiny_answer", "tiny_closed_book"}
    keep_prompts(tmp_path, {**settings, "judge_name": "openai", "judge_rubric": "answer_correctness"})
    rubrics = {"answer_correctness", "document_relevance", "query_rationality", "reasoning_coherence"}
    assert {path.stem for path in (tmp_path / "prompts").glob("rubric_*")} == {f"rubric_{name}" for name in rubrics}
    keep_prompts(tmp_path / "none", {**settings, "reasoner_baselines": []})
    assert not (tmp_path / "none").exists(), "nobody reads them"
    with pytest.raises(ConfigError, match="reasoner_baseline_prompt: "):
        keep_prompts(tmp_path, {**REASONER, "reasoner_baseline_prompt": "no_such_prompt"})


def test_rubrics_of_steps_are_kept_where_they_are_asked(tmp_path):
    judge = {"judge_name": "openai", "judge_rubric": "answer_correctness"}
    keep_prompts(tmp_path, {**judge, "step_reward": "gold_gain", "step_coherence": True})
    found = {path.stem for path in (tmp_path / "prompts").iterdir()}
    assert found == {"rubric_answer_correctness", "rubric_reasoning_coherence"}


# ---- measuring, saving, showing


QUESTIONS = [Question(f"q{i}", f"Who is {i}?", ("Mira",), gold_doc_ids=("d1",)) for i in range(3)]
TRAINER = SimpleNamespace(model=nn.Linear(1, 1))
RETRIEVER = StaticRetriever({}, default=[Passage("d2", "Rain."), Passage("d1", "Mira.")])


def test_one_process_evaluates_everything():
    def assembly():
        generator = ScriptedGenerator({"Who is 0?": "Answer: Mira", "Who is 1?": "Mira", "Who is 2?": "Answer: Otto"})
        generator._reply = lambda prompt, number: ["Answer: Mira", "Mira", "Answer: Otto"][number]
        return Assembly(retriever=RETRIEVER, generator=generator, top_k=2)

    found = evaluate_sharded(assembly(), QUESTIONS)
    assert [row["qid"] for row in found.rows] == ["q0", "q1", "q2"]
    assert found.metrics == evaluate(assembly(), QUESTIONS).metrics


class Saying:
    """An assembly whose answers are given; it counts how often it is asked."""

    def __init__(self, *answers: str):
        self.answers, self.asked = answers, 0

    def under_training(self, trainer, *, batch_size):
        assert (trainer, batch_size) == (TRAINER, 8)
        self.asked += 1
        generator = ScriptedGenerator([f"Answer: {answer}" for answer in self.answers])
        return Assembly(retriever=RETRIEVER, generator=generator, top_k=2)


class FailingPart(Saying):
    """The service behind it is gone."""

    def under_training(self, trainer, *, batch_size):
        raise BackendError("gone")


def test_baselines_are_measured_once_and_compared(tmp_path, capsys):
    run = runs.Run(tmp_path, "r", "c", 1, None, {}, ())
    start, good, bad = Saying("Mira", "Otto", "Otto"), Saying("Mira", "Mira", "Otto"), Saying("Otto", "Otto", "Otto")
    with pytest.raises(BackendError, match="gone"):
        run.measure_before(TRAINER, start, QUESTIONS, batch_size=8, baselines={"good": good, "bad": FailingPart()})
    # What was measured is kept, the model that training starts from included.
    run.measure_before(TRAINER, start, QUESTIONS, batch_size=8, baselines={"good": good, "bad": bad})
    run.measure_before(TRAINER, start, QUESTIONS, batch_size=8, baselines={"good": good, "bad": bad})
    assert (start.asked, good.asked, bad.asked) == (1, 1, 1)
    stored = json.loads((tmp_path / "baselines.json").read_text())
    assert {name: found["metrics"]["em"] for name, found in stored.items()} == {"good": pytest.approx(2 / 3), "bad": 0}
    rows = [json.loads(line) for line in (tmp_path / "baseline_good.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["Mira", "Mira", "Otto"]

    after = evaluate(Saying("Mira", "Mira", "Mira").under_training(TRAINER, batch_size=8), QUESTIONS)
    run._store("after", after, 2.0, {})
    summary = run.write_results([])
    assert json.loads((tmp_path / "metrics.json").read_text()) == summary
    assert {name: found["em"] for name, found in summary["baselines"].items()} == {
        "good": pytest.approx(2 / 3),
        "bad": 0,
    }
    over = summary["over_baselines"]
    assert set(over["good"]) == {"em", "f1", "contains_em"}, "only the answers can be compared"
    assert over["good"]["em"] == {"difference": pytest.approx(1 / 3), "ci95": [0.0, 1.0]}
    assert over["bad"]["em"] == {"difference": 1.0, "ci95": [1.0, 1.0]}
    assert summary["eval_seconds"] >= 2.0
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("over bad")
    assert lines[place + 1].split() == ["em", "0.000", "1.000", "+1.000", "[+1.000,", "+1.000]"]
    assert "Against baselines" in (tmp_path / "report.html").read_text()


def test_what_is_finished_is_measured_until_it_changes(tmp_path):
    run = runs.Run(tmp_path, "r", "c", 1, None, {}, ())
    asked: list[str] = []

    def opening(*answers: str):
        def opened():
            asked.append(answers[0])
            return Saying(*answers).under_training(TRAINER, batch_size=8)

        return opened

    for _ in range(2):
        run.measure("before", opening("Otto", "Otto", "Otto"), QUESTIONS, of="a")
        run.measure("bare", opening("Mira", "Otto", "Otto"), QUESTIONS, of="a")
        run.measure("after", opening("Mira", "Mira", "Otto"), QUESTIONS, of="b")
    assert asked == ["Otto", "Mira", "Mira"]
    run.measure("bare", opening("Mira", "Mira", "Mira"), QUESTIONS, of="c")
    assert len(asked) == 4
    assert not run.finished
    summary = run.write_results([], sections=["<p>all rounds</p>"], more={"rounds": []})
    assert run.finished
    assert (summary["rounds"], summary["before"]["em"], summary["baselines"]["bare"]["em"]) == ([], 0.0, 1.0)
    assert summary["after"]["em"] == pytest.approx(2 / 3)
    assert "<p>all rounds</p>" in (tmp_path / "report.html").read_text()


def test_a_run_without_baselines_says_nothing_of_them(tmp_path):
    run = runs.Run(tmp_path, "r", "c", 1, None, {}, ())
    run.measure_before(TRAINER, Saying("Mira", "Otto", "Otto"), QUESTIONS, batch_size=8)
    assert not (tmp_path / "baselines.json").exists()
    run._store(
        "after", evaluate(Saying("Mira", "Mira", "Mira").under_training(TRAINER, batch_size=8), QUESTIONS), 2, {}
    )
    summary = run.write_results([])
    assert not {"baselines", "over_baselines"} & set(summary)
    assert "baselines" not in (tmp_path / "report.html").read_text()


def test_report_of_an_index(capsys):
    from rag_rl.config.arguments import DataArguments, RetrieverArguments
    from rag_rl.config.parts import build_probe, build_retriever

    data = DataArguments("${tiny}/data/corpus.jsonl", data_train="${tiny}/data/demo_1hop.jsonl", data_train_size=50)
    retriever = build_retriever(RetrieverArguments(retriever_encoder="${tiny}/encoder"), data)
    found = report_index(retriever, build_probe(data), top_k=3, seconds=1.23)
    assert found["passages"] == 560
    assert found["questions"] == 50
    assert 0.5 < found["recall@3"] <= 1.0
    assert "seconds       1.2\n" in capsys.readouterr().out
    assert "recall@3" not in report_index(retriever, [], top_k=3, seconds=1.0)


def test_base_of_an_adapter_becomes_relative(tmp_path):
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    make_base_relative(folder)  # whole weights: nothing to do
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base"), "r": 8}))
    make_base_relative(folder)
    assert json.loads(path.read_text()) == {"base_model_name_or_path": "../../base", "r": 8}
    path.write_text('{"base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}')
    make_base_relative(folder)
    assert path.read_text() == '{"base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}'


def test_base_of_an_adapter_behind_a_link(tmp_path):
    # As on a cluster, where runs/ leads to another disk: ".." goes up from where the folder really lies.
    (tmp_path / "disk" / "deep" / "a").mkdir(parents=True)
    (tmp_path / "base").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "deep")
    folder = tmp_path / "runs" / "a"
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    make_base_relative(folder)
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert not Path(base).is_absolute()
    assert (folder / base).samefile(tmp_path / "base")


def test_checkpoints_name_their_base_relative_to_themselves_and_resume(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from rag_rl.tiny import FOLDER

    def train(steps: int, checkpoint: str | None) -> int:
        model = AutoModelForCausalLM.from_pretrained(FOLDER / "reader")
        lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        run = runs.Run(tmp_path, "r", "c", 1, checkpoint, {}, ())
        trainer = Trainer(
            get_peft_model(model, lora),
            TrainingArguments(
                str(tmp_path), max_steps=steps, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
            ),
            train_dataset=[{"input_ids": [300, 301, 302], "labels": [300, 301, 302]}] * 8,
            callbacks=run.callbacks,
        )
        run.train(trainer)
        return trainer.state.global_step

    assert train(2, None) == 2
    assert train(3, last_checkpoint(tmp_path)) == 3
    for step in (1, 2, 3):
        checkpoint = tmp_path / f"checkpoint-{step}"
        base = json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert not Path(base).is_absolute()
        assert (checkpoint / base).samefile(FOLDER / "reader")


def test_results_table(tmp_path):
    summary = {
        "before": {"em": 0.5, "f1": 0.6},
        "after": {"em": 0.75, "f1": 0.5, "new": 1.0},
        "ci95": {"em": [0.1, 0.4]},
        "n_eval": 400,
        "train_seconds": 61.7,
        "num_processes": 2,
    }
    lines = results_table(summary, tmp_path).splitlines()
    assert lines[1].split() == ["em", "0.500", "0.750", "+0.250", "[+0.100,", "+0.400]"]
    assert lines[2].split() == ["f1", "0.600", "0.500", "-0.100"]
    assert lines[3] == "400 held-out questions; trained 62 s on 2 processes"
    assert lines[4].endswith("report.html")


def test_time_of_training_adds_up(tmp_path):
    path = tmp_path / "train_seconds.json"
    run = runs.Run(tmp_path, "r", "c", 1, None, {}, ())
    clock = run.callbacks[0]
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    state.max_steps = 10
    clock.on_train_begin(None, state, None)
    clock.start -= 10
    clock.on_save(None, state, None)
    clock = run.callbacks[0]
    clock.on_train_begin(None, SimpleNamespace(global_step=5, max_steps=10), None)
    clock.start -= 5
    clock.on_train_end(None, state, None)
    assert json.loads(path.read_text())["train_seconds"] == pytest.approx(15, abs=1)
    # From the beginning again: what was counted before is gone with its steps.
    clock.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=10), None)
    clock.on_save(None, state, None)
    assert json.loads(path.read_text())["train_seconds"] < 1


def test_a_run_without_steps_left_is_only_loaded(tmp_path):
    run = runs.Run(tmp_path, "r", "c", 1, "checkpoint-10", {}, ())

    class Trainer:
        state = SimpleNamespace(global_step=10, max_steps=10, is_world_process_zero=True)

        def add_callback(self, callback):
            """What remembers the random states has nothing to do here."""

        def train(self, resume_from_checkpoint):
            assert resume_from_checkpoint == "checkpoint-10"
            run.callbacks[0].on_train_begin(None, self.state, None)
            raise AssertionError("a step too many")

    run.train(Trainer())


def failing_trainer(folder: Path, *, steps: int, fail_at: int | None, error: Exception, drawn: list[float]):
    """A trainer that draws a random number a step; the step ``fail_at`` (from 0) fails after its draw."""
    import torch
    from transformers import Trainer, TrainingArguments

    class Failing(Trainer):
        def training_step(self, *args, **kwargs):
            drawn.append(torch.rand(1).item())
            if self.state.global_step == fail_at:
                raise error
            return super().training_step(*args, **kwargs)

    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return {"loss": ((x * self.weight - 1) ** 2).mean()}

    settings = {"max_steps": steps, "save_steps": 50, "logging_steps": 1, "use_cpu": True, "report_to": "none"}
    return Failing(
        Line(),
        TrainingArguments(str(folder), per_device_train_batch_size=2, disable_tqdm=True, **settings),
        train_dataset=[{"x": torch.tensor([float(i)])} for i in range(40)],
        data_collator=lambda rows: {"x": torch.stack([row["x"] for row in rows])},
        callbacks=runs.Run(folder, "r", "c", 1, None, {}, ()).callbacks,
    )


def test_after_an_error_of_ours_the_last_step_is_kept(tmp_path):
    """The run that goes on draws what an uninterrupted one draws, the step that failed included."""
    import torch

    whole: list[float] = []
    torch.manual_seed(3)
    trainer = failing_trainer(tmp_path / "whole", steps=5, fail_at=None, error=BackendError(""), drawn=whole)
    runs.Run(tmp_path / "whole", "r", "c", 1, None, {}, ()).train(trainer)

    first: list[float] = []
    folder = tmp_path / "run"
    torch.manual_seed(3)
    trainer = failing_trainer(folder, steps=5, fail_at=3, error=BackendError("http://x is gone"), drawn=first)
    with pytest.raises(BackendError, match=r"^http://x is gone; go on with --resume_from_checkpoint true$"):
        runs.Run(folder, "r", "c", 1, None, {}, ()).train(trainer)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert json.loads((folder / "train_seconds.json").read_text())["train_seconds"] > 0
    assert first == whole[:4]

    second: list[float] = []
    spent = BudgetExceededError("the budget is used up")
    trainer = failing_trainer(folder, steps=5, fail_at=3, error=spent, drawn=second)
    with pytest.raises(BudgetExceededError, match=r"^the budget is used up$"):
        runs.Run(folder, "r", "c", 1, last_checkpoint(folder), {}, ()).train(trainer)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"], "nothing was done since"
    assert second == whole[3:4], "what was paid for is asked for again"

    third: list[float] = []
    trainer = failing_trainer(folder, steps=5, fail_at=None, error=spent, drawn=third)
    runs.Run(folder, "r", "c", 1, last_checkpoint(folder), {}, ()).train(trainer)
    assert third == whole[3:]
    logged = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [1, 2, 3, 4, 5]


def test_an_error_before_the_first_step_leaves_no_checkpoint_and_a_bug_none_at_all(tmp_path):
    trainer = failing_trainer(tmp_path, steps=5, fail_at=0, error=BackendError("gone"), drawn=[])
    with pytest.raises(BackendError, match="gone"):
        runs.Run(tmp_path, "r", "c", 1, None, {}, ()).train(trainer)
    trainer = failing_trainer(tmp_path, steps=5, fail_at=2, error=ValueError("a bug"), drawn=[])
    with pytest.raises(ValueError, match=r"^a bug$"):
        runs.Run(tmp_path, "r", "c", 1, None, {}, ()).train(trainer)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    runs.write_whole(tmp_path / "a.json", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        runs.write_whole(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_versions():
    found = versions()
    assert found["python"].count(".") == 2
    assert {"torch", "trl", "transformers", "peft"} <= set(found)


def test_command_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "recipes" / "r.py"), "--config", "my config"])
    assert runs.command_line() == "accelerate launch recipes/r.py --config 'my config'"
    monkeypatch.setattr(sys, "argv", ["r.py", "--hub_token", "hf_secret", "--judge_base_url", "http://me:pw@host/v1"])
    assert runs.command_line() == "accelerate launch r.py --hub_token ... --judge_base_url http://host/v1"


def test_peak_memory():
    assert 10**7 < runs.peak_memory() < 10**12


def test_logging_of_others_is_quiet():
    assert not logging.getLogger("bitsandbytes.anything").isEnabledFor(logging.WARNING)


# ---- saving a sentence encoder


def trained_encoder(what: str, base: str | None = None):
    """The packaged encoder with a part of it changed, as training does: in a trainer; and one of its vectors."""
    import torch

    from rag_rl.config.arguments import QueryEncoderArguments, RetrieverArguments
    from rag_rl.config.parts import build_encoder, make_trainable

    encoder = build_encoder(RetrieverArguments(retriever_encoder="${tiny}/encoder", retriever_devices=["cpu"]))
    make_trainable(encoder, QueryEncoderArguments(retriever_train=what, retriever_lora_r=4))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in encoder.model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    if base is not None:
        encoder.model.transformers_model.peft_config["default"].base_model_name_or_path = base
    trainer = SimpleNamespace(model=encoder.model, accelerator=SimpleNamespace(unwrap_model=lambda model: model))
    return trainer, encoder.encode_queries(["Where is the home?"])


@pytest.mark.parametrize("what", ["full", "lora", "head"])
@pytest.mark.parametrize("merged", [True, False])
def test_a_saved_encoder_loads_by_itself_from_anywhere(tmp_path, monkeypatch, what, merged):
    from sentence_transformers import SentenceTransformer

    trainer, vector = trained_encoder(what)
    save_trained(trainer, tmp_path / "runs" / "a", merged=merged)
    (tmp_path / "runs").rename(tmp_path / "moved")
    elsewhere = tmp_path.joinpath(*"a/deep/folder/that/is/not/the/one/it/was/saved/from".split("/"))
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    plain = SentenceTransformer(str(tmp_path / "moved" / "a"), device="cpu")
    assert plain.encode(["Where is the home?"]) == pytest.approx(vector, abs=1e-5)
    start = trained_encoder("full")[0].model
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in start.parameters()) + (
        vector.shape[1] ** 2 if what == "head" else 0
    )
    # An adapter whose base is a folder is never alone.
    assert not list((tmp_path / "moved" / "a").glob("adapter_*"))


# peft asks the Hub whether the base has other embeddings.
@pytest.mark.filterwarnings("ignore:Could not find a config file in somebody/encoder")
def test_an_adapter_of_a_model_on_the_hub_is_saved_alone(tmp_path):
    trainer, _ = trained_encoder("lora", base="somebody/encoder")
    save_trained(trainer, tmp_path, merged=False)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "somebody/encoder"
    trainer, _ = trained_encoder("lora", base="somebody/encoder")
    save_trained(trainer, tmp_path / "merged", merged=True)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert not list((tmp_path / "merged").glob("adapter_*"))


def test_merging_changes_no_vector():
    from peft.tuners.tuners_utils import BaseTunerLayer

    from rag_rl.trainers.cross_encoder_adapters import merge_adapter

    trainer, vector = trained_encoder("lora")
    names = set(trained_encoder("full")[0].model.state_dict())
    merge_adapter(trainer.model)
    assert trainer.model.encode(["Where is the home?"]) == pytest.approx(vector, abs=1e-5)
    assert not [module for module in trainer.model.modules() if isinstance(module, BaseTunerLayer)]
    assert set(trainer.model.state_dict()) == names, "nothing of the adapter is left"


def test_a_saved_adapter_is_merged_from_the_disk(tmp_path):
    """What one process does where none holds the base whole (ZeRO-3, FSDP)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from rag_rl.tiny import FOLDER

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(FOLDER / "reader"),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    ).eval()
    model.save_pretrained(tmp_path)
    runs.merge_saved_adapter(tmp_path, dtype=model.dtype)
    assert not list(tmp_path.glob("adapter_*"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[5, 17, 90, 4]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-4)
        model.unload()
        assert not torch.allclose(merged(ids).logits, model.base_model.model(ids).logits, atol=1e-2)


# ---- the end


END = """
import atexit
import subprocess
import sys

import torch.distributed as dist

from rag_rl.errors import UserError
from rag_rl.run import launch


def main():
    if sys.argv[1] == "several":
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
    atexit.register(print, "registered")
    print("done", end=" ")
    if sys.argv[3] == "unknown":
        raise RuntimeError("unknown trouble")
    if sys.argv[3] == "left":
        sys.exit()
    if sys.argv[3] == "user":
        raise UserError("a wrong value")


try:
    launch(main)
finally:
    print("taken down")
"""


@pytest.mark.parametrize(
    ("how", "printed"), [("several", "done registered\n"), ("one", "done taken down\nregistered\n")]
)
@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("good", 0, ""),
        ("left", 0, ""),
        ("user", 2, "end.py: error: a wrong value"),
        ("unknown", 1, "RuntimeError: unknown trouble"),
    ],
)
def test_one_of_several_processes_ends_without_taking_the_interpreter_down(tmp_path, how, printed, end, code, said):
    script = tmp_path / "end.py"
    script.write_text(END)
    done = subprocess.run(
        [sys.executable, str(script), how, str(tmp_path / "meet"), end], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == printed
    assert done.stderr.rstrip().endswith(said)
    assert done.stderr.count("Traceback") == (end == "unknown")


# ---- folders of data


def test_settings_are_kept_and_others_refused(tmp_path):
    path = tmp_path / "chains" / "settings.yaml"
    keep_settings(path, {"seed": 1, "output_dir": "a", "batch": 2}, holds="chains")
    assert yaml.safe_load(path.read_text())["made_with"]
    keep_settings(path, {"seed": 1, "output_dir": "b", "batch": 3}, holds="chains", ignore=["batch"])
    with pytest.raises(RunFolderError, match=r"chains holds chains that came about otherwise \(seed: 1 -> 2\): give"):
        keep_settings(path, {"seed": 2, "output_dir": "a", "batch": 2}, holds="chains")
    # A flag that came with a later version had its default.
    later = {"seed": 1, "output_dir": "a", "batch": 2, "new": 5}
    keep_settings(path, later, holds="chains", defaults={"new": 5})
    with pytest.raises(RunFolderError, match="new"):
        keep_settings(path, {**later, "new": 6}, holds="chains", defaults={"new": 5})


def test_text_is_written_whole(tmp_path):
    path = tmp_path / "text"
    write_whole(path, "half a character: \ud83d")
    assert path.read_bytes() == b"half a character: \\ud83d"
    assert os.listdir(tmp_path) == ["text"]
