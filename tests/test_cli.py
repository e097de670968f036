from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rag_rl import cli

ROOT = Path(__file__).parents[1]


def refused(capsys, *argv: str, code: int = 2) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == code
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("rag-rl: ")]
    return line


# ---- ask


def test_ask(finished_run, capsys):
    cli.main(["ask", "--run", str(finished_run), "Who rules Elmton?"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("answer:  ")
    assert lines[1].startswith("reply:   ")
    assert [line[:3] for line in lines[2:]] == ["[1]", "[2]", "[3]"]


def test_ask_for_the_best(finished_run, capsys):
    cli.main(["ask", "--run", str(finished_run), "--best_of", "4", "--seed", "1", "Who rules Elmton?"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("scores:  ")
    assert "format " in lines[2]
    assert "agreement " in lines[2]


def test_ask_in_json(finished_run, capsys):
    cli.main(["ask", "--run", str(finished_run), "--best_of", "2", "--json", "Who rules Elmton?"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"answer", "text", "scores", "passages"}
    assert set(found["scores"]) == {"format", "agreement"}
    assert set(found["passages"][0]) == {"doc_id", "title", "text", "score"}


@pytest.mark.smoke
def test_ask_in_a_process_of_its_own(finished_run):
    command = [sys.executable, "-m", "rag_rl.cli", "ask", "--run", str(finished_run), "Who rules Elmton?"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=finished_run, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("answer:  ")
    assert done.stderr == "", "an answer comes without noise"


def test_ask_what_cannot_be_asked(finished_run, tmp_path, capsys):
    assert "the question is empty" in refused(capsys, "ask", "--run", str(finished_run), " ")
    assert "best_of must be at least 1" in refused(capsys, "ask", "--run", str(finished_run), "--best_of", "0", "Who?")
    assert "holds no run" in refused(capsys, "ask", "--run", str(tmp_path), "Who?")
    shutil.copy(finished_run / "resolved_config.yaml", tmp_path)
    assert "holds an unfinished run" in refused(capsys, "ask", "--run", str(tmp_path), "Who?")


def test_ask_an_assembly_of_a_file(finished_run, tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text(
        "data_corpus: ${tiny}/data/corpus.jsonl\nretriever_encoder: ${tiny}/encoder\nretriever_top_k: 3\n"
        f"generator_model: {finished_run}\ndata_eval: ${{tiny}}/data/heldout_1hop.jsonl\n"
    )
    question = "What is the emblem of the guild of Falledric?"
    cli.main(["ask", "--config", str(config), "--json", question])
    found = json.loads(capsys.readouterr().out)
    cli.main(["ask", "--run", str(finished_run), "--json", question])
    same = json.loads(capsys.readouterr().out)
    assert found["answer"] == same["answer"], "asked as it was trained"
    assert {p["doc_id"] for p in found["passages"]} == {p["doc_id"] for p in same["passages"]}
    config.write_text("retriver_top_k: 3\n")
    line = refused(capsys, "ask", "--config", str(config), question)
    assert "mine.yaml:1: unknown key retriver_top_k; the closest valid one is retriever_top_k" in line


def test_ask_a_retriever_alone(tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text("data_corpus: ${tiny}/data/corpus.jsonl\nretriever_name: bm25\nretriever_top_k: 2\n")
    cli.main(["ask", "--config", str(config), "Where does Falledric live?"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "answer:  (none)"
    assert "heldout/Falledric" in lines[2]
    line = refused(capsys, "ask", "--config", str(config), "--best_of", "2", "Where does Falledric live?")
    assert "best_of chooses among answers, and this assembly only searches" in line


def test_dead_backend_is_exit_code_one(monkeypatch, capsys):
    import rag_rl.ask
    from rag_rl.errors import BackendError

    def broken(folder):
        raise BackendError("Chroma is gone:\nno answer")

    monkeypatch.setattr(rag_rl.ask, "open_run", broken)
    assert refused(capsys, "ask", "--run", "x", "Who?", code=1) == "rag-rl: stopped: Chroma is gone: no answer"


# ---- show


def test_show(finished_run, capsys):
    cli.main(["show", str(finished_run)])
    text = capsys.readouterr().out
    found = json.loads((finished_run / "metrics.json").read_text())
    assert f"{'em':14}{found['before']['em']:8.3f}{found['after']['em']:8.3f}" in text
    assert "20 held-out questions; trained " in text
    assert str(finished_run / "report.html") in text


def test_show_without_a_run(tmp_path, capsys):
    assert "holds no finished run (there is no metrics.json in it)" in refused(capsys, "show", str(tmp_path))


def test_show_an_evaluation(finished_run, tmp_path, capsys):
    folder = tmp_path / "scored"
    folder.mkdir()
    shutil.copy(finished_run / "after.jsonl", folder / "rows.jsonl")
    (folder / "resolved_config.yaml").write_text("recipe: evaluate_rag\n")
    em = json.loads((finished_run / "metrics.json").read_text())["after"]["em"]
    (folder / "metrics.json").write_text(json.dumps({"status": "complete", "metrics": {"em": em}, "n_eval": 20}))
    cli.main(["show", str(folder)])
    text = capsys.readouterr().out
    assert f"{'  scored':24}{em:9.3f}" in text
    assert "20 questions." in text
    assert str(folder / "report.html") in text


# ---- compare


def test_compare(finished_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["compare", f"start={finished_run}:before", f"trained={finished_run}:after", "--title", "Mine"])
    text = capsys.readouterr().out
    found = json.loads((finished_run / "metrics.json").read_text())
    low, high = found["ci95"]["em"]
    change = found["after"]["em"] - found["before"]["em"]
    assert f"{change:+9.3f}  [{low:+.3f}, {high:+.3f}]" in text
    assert "trained against start: " in text
    assert "page    comparison.html" in text
    page = (tmp_path / "comparison.html").read_text()
    assert "<h1>Mine</h1>" in page
    assert "rag-rl compare start=" in page


def test_compare_in_json(finished_run, tmp_path, capsys):
    output = tmp_path / "page.html"
    flags = ["--json", "--output", str(output), "--metric", "f1", "--against", "previous"]
    cli.main(["compare", str(finished_run), *flags])
    found = json.loads(capsys.readouterr().out)
    assert (found["main"], found["n_eval"], found["page"]) == ("f1", 20, str(output))
    assert [side["what"] for side in found["sides"]] == ["before", "after"]
    assert output.is_file()


def test_compare_what_cannot_be_compared(finished_run, tmp_path, capsys):
    assert "holds no run" in refused(capsys, "compare", str(tmp_path))
    line = refused(capsys, "compare", str(finished_run), "--metric", "bleu", "--output", str(tmp_path / "x.html"))
    assert "--metric bleu: not all sides have it" in line
    line = refused(capsys, "compare", str(finished_run), "--output", str(tmp_path / "none" / "x.html"))
    assert "its folder does not exist" in line
    assert not (tmp_path / "x.html").exists()


# ---- doctor


def test_doctor(capsys, monkeypatch):
    monkeypatch.setenv("RAG_RL_DATA", "/some/where")
    monkeypatch.chdir(ROOT)
    cli.main(["doctor"])
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    import torch
    import trl

    assert torch.__version__.split("+")[0] in lines["torch"]
    assert trl.__version__ in lines["trl"]
    assert "missing" not in lines["transformers"]
    assert "CPU cores" in text
    assert "/some/where" in lines["RAG_RL_DATA"]
    assert "grpo_generator/tiny: 2 CPU cores" in text
    for path in (ROOT / "recipes" / "configs").rglob("*.yaml"):
        assert f"{path.parent.name}/{path.stem}: " in text
    assert "not stated" not in text, "every config says what it needs"


def test_doctor_names_what_is_missing(capsys, monkeypatch):
    real = cli.util.find_spec
    monkeypatch.setattr(cli.util, "find_spec", lambda name: None if name == "faiss" else real(name))
    cli.main(["doctor"])
    assert "faiss                  missing: pip install 'rag-rl[cpu]' or [gpu]" in capsys.readouterr().out


def test_doctor_sizes_a_config(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    cli.main(["doctor", "--config", "grpo_generator/tiny", "--gpu_memory", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("grpo_generator/tiny: ${tiny}/reader, 1.")
    assert "launch      one process" in lines[2]
    assert "presets on a card of 8.0 GiB" in "\n".join(lines)
    assert lines[-1] == "  advice      this config fits as it is"


def test_doctor_sizes_a_config_over_several_processes(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    launch = ["--launch", "accelerate_configs/zero2.yaml", "--processes", "4"]
    cli.main(["doctor", "--config", "recipes/configs/sft_reasoner/tiny.yaml", *launch])
    text = capsys.readouterr().out
    assert "launch      4 processes, ZeRO-2" in text
    assert "no GPU here" in text


def test_doctor_says_how_a_models_config_is_fetched(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = refused(capsys, "doctor", "--config", "grpo_generator/qwen2.5-7b_hotpotqa_lora")
    assert "'hf download Qwen/Qwen2.5-7B-Instruct config.json'" in line
    assert "the header of the config says: 8 GPUs of 80 GB (an estimate" in line


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--config", "grpo_generator/none"], "there is no such file"),
        (["--config", "evaluate_rag/tiny"], "evaluate_rag trains nothing"),
        (["--config", "grpo_generator/tiny", "--launch", "none.yaml"], "--launch none.yaml: there is no such file"),
        (["--config", "grpo_generator/tiny", "--gpu_memory", "0"], "--gpu_memory must be above 0, got 0"),
        (["--gpu_memory", "24"], "--gpu_memory goes with --config"),
    ],
)
def test_doctor_refuses(capsys, monkeypatch, argv, expected):
    monkeypatch.chdir(ROOT)
    assert expected in refused(capsys, "doctor", *argv)


# ---- the command itself


@pytest.mark.parametrize("argv", [[], ["dance"], ["ask", "Who?"], ["ask", "--run", "x", "--best", "4", "Who?"]])
def test_wrong_command_lines(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from rag_rl import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'faiss', 'chromadb', 'trl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for name in ("ask", "compare", "show", "doctor"):
        assert name in done.stdout
