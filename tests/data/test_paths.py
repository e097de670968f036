from __future__ import annotations

from pathlib import Path

import pytest

from rag_rl.data.paths import data_root, resolve_data_path
from rag_rl.errors import DataError


def test_variable_names_the_root(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RL_DATA", str(tmp_path))
    (tmp_path / "a").mkdir()
    assert data_root() == tmp_path
    assert resolve_data_path("${data}/a") == tmp_path / "a"
    assert resolve_data_path("${data}") == tmp_path
    assert resolve_data_path("${data}/new.jsonl", must_exist=False) == tmp_path / "new.jsonl"


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_it_is_data_in_the_current_folder(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    if value is None:
        monkeypatch.delenv("RAG_RL_DATA", raising=False)
    else:
        monkeypatch.setenv("RAG_RL_DATA", value)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jsonl").touch()
    assert resolve_data_path("${data}/x.jsonl") == Path("data/x.jsonl")


def test_plain_paths_and_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").touch()
    assert resolve_data_path(tmp_path / "x") == tmp_path / "x"
    assert resolve_data_path("~/x") == tmp_path / "x"
    # Only whole path parts are replaced.
    assert resolve_data_path("${database}/x", must_exist=False) == Path("${database}/x")


def test_missing_without_root_says_to_set_the_variable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAG_RL_DATA", raising=False)
    with pytest.raises(DataError, match=r"\$\{data\}/scifact: no such file.*looked for data/scifact") as caught:
        resolve_data_path("${data}/scifact")
    message = str(caught.value)
    assert "set the environment variable RAG_RL_DATA" in message
    assert "(it is not set)" in message
    assert "scifact comes from https://" in message


def test_missing_root_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RL_DATA", str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"it names .*gone, which does not exist"):
        resolve_data_path("${data}/x")


def test_missing_below_the_root_shows_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RL_DATA", str(tmp_path))
    (tmp_path / "scifact").mkdir()
    with pytest.raises(DataError, match=r"beside it: scifact\); put it there, or set RAG_RL_DATA"):
        resolve_data_path("${data}/skifact")


def test_missing_plain_path(tmp_path):
    (tmp_path / "corpus.jsonl").touch()
    with pytest.raises(DataError, match=r"corpse.jsonl: no such file or folder \(beside it: corpus.jsonl\)"):
        resolve_data_path(tmp_path / "corpse.jsonl")
