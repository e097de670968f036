"""recipes/build_index.py: an index that other recipes can open."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest


def printed(text: str) -> dict[str, str]:
    lines = [line.split() for line in text.splitlines() if re.match(r"[a-z@0-9]+ +\S+$", line)]
    return dict(lines)


@pytest.mark.smoke
def test_tiny(run_recipe, tmp_path):
    done = run_recipe("build_index", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = printed(done.stdout)
    assert (found["index"], found["passages"], found["dimension"]) == ("indexes/tiny", "560", "96")
    assert re.fullmatch("[0-9a-f]{64}", found["fingerprint"])
    assert 0.6 <= float(found["recall@3"]) <= 1.0
    manifest = json.loads((tmp_path / "indexes" / "tiny" / "manifest.json").read_text())
    assert (manifest["count"], manifest["backend"]) == (560, "faiss")


@pytest.mark.parametrize("config", ["tiny", "tiny_chroma"])
def test_an_index_serves_other_recipes(run_here, short, tmp_path, capsys, config):
    folder = tmp_path / "index"
    assert run_here("build_index", "--config", config, "--output_dir", folder) == 0
    first = printed(capsys.readouterr().out)
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*.f32")}
    # Started again it finds everything as it was.
    assert run_here("build_index", "--config", config, "--output_dir", folder) == 0
    again = printed(capsys.readouterr().out)
    assert {**first, "seconds": ""} == {**again, "seconds": ""}
    assert files == {path: path.stat().st_mtime_ns for path in folder.glob("*.f32")}

    flags = [*short(max_steps=1, headroom_samples=0), "--retriever_index_path", folder]
    assert run_here("grpo_generator", "--config", config, *flags, "--output_dir", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["before"]["recall@3"] > 0.5


def test_chunks_and_no_questions(run_here, tmp_path, capsys):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "long.txt").write_text(" ".join(f"The river number {i} flows north ." for i in range(200)))
    (corpus / "short.md").write_text("Elmton is a town.")
    config = tmp_path / "mine.yaml"
    config.write_text(f"data_corpus: {corpus}\nretriever_encoder: ${{tiny}}/encoder\ndata_chunk_tokens: 64\n")
    assert run_here("build_index", "--config", config, "--output_dir", tmp_path / "index") == 0
    found = printed(capsys.readouterr().out)
    assert int(found["passages"]) > 10
    assert not [name for name in found if name.startswith("recall")]


def test_another_encoder_is_refused(refused, run_here, tmp_path):
    folder = tmp_path / "index"
    assert run_here("build_index", "--output_dir", folder) == 0
    line = refused("build_index", "--output_dir", folder, "--retriever_normalize", "false")
    assert "normalize True there, False here" in line


def test_it_takes_no_flags_of_a_trainer(refused):
    assert "unknown flag --learning_rate" in refused("build_index", "--learning_rate", 1)


def test_folder_of_something_else(refused, tmp_path):
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    assert "is not empty" in refused("build_index", "--output_dir", tmp_path)
    assert Path(tmp_path / "thesis.txt").read_text() == "irreplaceable"
