"""Bad input at the command line: one clear line, exit code 2 (1 where a backend fails), no traceback, nothing lost."""

from __future__ import annotations

import logging
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rag_rl.types import Passage
from tests.loopback import free_port
from tests.recipes.run_folders import metrics_of, steps_of, times_of, write_lines

RECIPE = "grpo_generator"


def documents(count: int) -> list[dict[str, str]]:
    return [
        {"doc_id": f"d{i}", "title": f"Town {i}", "text": f"Town {i} lies on the river {i}."} for i in range(count)
    ]


def questions(count: int) -> list[dict[str, object]]:
    return [{"qid": f"q{i}", "question": f"Where does town {i} lie?", "answers": [f"river {i}"]} for i in range(count)]


@pytest.fixture
def bad(refused, short, tmp_path):
    """Runs the recipe on bad input; the output folder must hold no run afterwards that could be taken for one."""

    def run(*flags: object, code: int = 2, folder: Path | None = None) -> str:
        output = folder or tmp_path / "run"
        line = refused(RECIPE, *short(headroom_samples=0), "--output_dir", output, *flags, code=code)
        if folder is None:
            assert not (output / "metrics.json").exists()
            assert not list(output.rglob("*.part"))
        return line

    return run


# ---- keys and values


def test_misspelt_flag(bad):
    assert "unknown flag --retreiver_top_k; the closest valid one is --retriever_top_k" in bad("--retreiver_top_k", 3)


def test_abbreviated_flag(bad):
    assert "--retriever_top_k" in bad("--retriever_top", 3)


def test_misspelt_key(bad, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("data_corpus: x\nretriver_top_k: 3\n")
    line = bad("--config", config)
    assert "mine.yaml:2: unknown key retriver_top_k; the closest valid one is retriever_top_k" in line


def test_wrong_type_in_yaml(bad, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("retriever_top_k: many\n")
    assert "mine.yaml:1: retriever_top_k: expected an integer, got 'many'" in bad("--config", config)


def test_wrong_type_on_the_command_line(bad):
    assert "--retriever_top_k: expected an integer, got 'many'" in bad("--retriever_top_k", "many")


def test_top_k_below_one(bad):
    assert "retriever_top_k must be at least 1, got 0" in bad("--retriever_top_k", 0)


def test_unknown_config(bad):
    assert "tiny" in bad("--config", "tinny")


def test_trl_refuses_a_combination(bad):
    assert "GRPOConfig: " in bad("--num_generations", 7)


def test_resume_needs_no_path(bad):
    assert "resume_from_checkpoint must be true or false" in bad("--resume_from_checkpoint", "runs/x/checkpoint-3")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ("--retriever_name", "bm25"),
            "retriever_name must be dense, http, none or package.module:attribute, got 'bm25'",
        ),
        (("--reward_names", "em", "fromat"), "reward_names: 'fromat' is not one of em, f1,"),
        (("--reward_names", "em", "--reward_weights", "1", "2"), "reward_weights has 2 values for 1 reward_names"),
        (("--reward_names", "no_such_module:reward", "--reward_weights", "1"), "'no_such_module:reward' cannot be"),
        (("--generator_prompt", "no_such_prompt"), "no_such_prompt"),
        (("--model_name_or_path", "no/such/folder"), "model_name_or_path 'no/such/folder' cannot be loaded"),
        (("--retriever_encoder", "no/such/folder"), "no/such/folder"),
    ],
)
def test_names_that_mean_nothing(bad, flags, expected):
    assert expected in bad(*flags)


def test_prompt_without_a_place_for_the_question(bad, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("$passages\nAnswer the question.")
    assert "$question" in bad("--generator_prompt", prompt)


# ---- files


def test_missing_file(bad, tmp_path):
    assert str(tmp_path / "none.jsonl") in bad("--data_train", tmp_path / "none.jsonl")
    assert str(tmp_path / "none.csv") in bad("--data_corpus", tmp_path / "none.csv")


def test_missing_data_folder_says_how_to_get_it(bad, monkeypatch, tmp_path):
    monkeypatch.setenv("RAG_RL_DATA", str(tmp_path / "nowhere"))
    assert "RAG_RL_DATA" in bad("--data_corpus", "${data}/scifact")


def test_bad_json_line(bad, tmp_path):
    rows = [*questions(3), '{"qid": "q3", ']
    line = bad("--data_train", write_lines(tmp_path / "train.jsonl", rows))
    assert "train.jsonl: 1 bad row: line 4: " in line


def test_missing_fields_are_counted(bad, tmp_path):
    rows = [{"qid": f"q{i}", "answers": ["a"]} for i in range(7)]
    line = bad("--data_train", write_lines(tmp_path / "train.jsonl", rows))
    assert "train.jsonl: 7 bad rows: line 1: " in line
    assert "'question'" in line
    assert "line 5: " in line
    assert "line 6: " not in line
    assert "and 2 more" in line


def test_corpus_with_a_missing_field(bad, tmp_path):
    line = bad("--data_corpus", write_lines(tmp_path / "corpus.jsonl", [*documents(3), {"doc_id": "d9"}]))
    assert "corpus.jsonl: 1 bad row: line 4: " in line
    assert "'text'" in line


def test_empty_corpus(bad, tmp_path):
    assert "corpus.jsonl" in bad("--data_corpus", write_lines(tmp_path / "corpus.jsonl", []))


def test_duplicate_doc_ids(bad, tmp_path):
    line = bad("--data_corpus", write_lines(tmp_path / "corpus.jsonl", [*documents(5), documents(3)[2]]))
    assert "'d2'" in line


def test_question_without_answers(bad, tmp_path):
    rows = [*questions(2), {"qid": "q9", "question": "Who?", "answers": []}]
    line = bad("--data_train", write_lines(tmp_path / "train.jsonl", rows))
    assert "line 3: " in line
    assert "answers" in line


def test_question_on_both_sides(bad, tmp_path):
    both = write_lines(tmp_path / "both.jsonl", questions(4))
    other = write_lines(tmp_path / "other.jsonl", [{**questions(1)[0], "qid": "x"}])
    assert "1 held-out questions are also in" in bad("--data_train", both, "--data_eval", other)


# ---- indexes and their stores


@pytest.fixture(scope="module")
def small_index(tmp_path_factory) -> Path:
    """An index of ten documents by the tiny encoder, with its settings as they come."""
    from rag_rl.config.arguments import RetrieverArguments
    from rag_rl.config.parts import build_encoder
    from rag_rl.retrieval import build_index

    folder = tmp_path_factory.mktemp("small") / "index"
    encoder = build_encoder(RetrieverArguments(retriever_encoder="${tiny}/encoder"))
    rows = [Passage(row["doc_id"], row["text"], row["title"]) for row in documents(10)]
    build_index(rows, encoder, folder, progress=False)
    return folder


def test_index_of_another_encoder(bad, small_index):
    line = bad("--retriever_index_path", small_index, "--retriever_document_prompt", "passage: ")
    assert "was made with another encoder" in line
    assert "document_prompt '' there, 'passage: ' here" in line


def test_damaged_index(bad, small_index, tmp_path):
    import shutil

    copy = tmp_path / "index"
    shutil.copytree(small_index, copy)
    with (copy / "vectors.f32").open("r+b") as file:
        file.seek(40)
        file.write(b"\xff\xff")
    assert "vectors.f32 was changed after the index was made" in bad("--retriever_index_path", copy)
    with (copy / "vectors.f32").open("r+b") as file:
        file.truncate(100)
    assert "vectors.f32 has 100 bytes, expected" in bad("--retriever_index_path", copy)


def test_index_folder_that_holds_something_else(bad, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("irreplaceable")
    assert "is no index and is not empty (it holds thesis.txt)" in bad("--retriever_index_path", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir() if path.name != ".lock"] == ["thesis.txt"]


def test_top_k_above_the_corpus(bad, small_index):
    line = bad("--retriever_index_path", small_index, "--retriever_top_k", 11)
    assert "retriever_top_k must be between 1 and 10, the number of passages in" in line


def test_chroma_server_that_is_down(bad):
    url = f"http://127.0.0.1:{free_port()}"
    line = bad("--retriever_backend", "chroma", "--retriever_chroma_url", url, code=1)
    assert url in line


def test_server_address_without_chroma(bad):
    assert "retriever_backend chroma" in bad("--retriever_chroma_url", "http://127.0.0.1:1")


# ---- run folders


def test_folder_with_other_things(bad, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("irreplaceable")
    assert "is not empty and holds no run" in bad(folder=tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


def test_folder_that_is_a_file(bad, tmp_path):
    (tmp_path / "notes.txt").write_text("irreplaceable")
    assert "is a file" in bad(folder=tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "irreplaceable"


def test_folder_of_another_run(refused, short, finished_run):
    before = times_of(finished_run)
    line = refused(RECIPE, *short(), "--output_dir", finished_run, "--learning_rate", "0.5", "--beta", "0.1")
    assert "holds another run (learning_rate: 0.001 -> 0.5; beta: 0.0 -> 0.1): give another --output_dir" in line
    assert times_of(finished_run) == before


def test_a_mistake_does_not_block_the_folder(bad, tmp_path):
    # The first attempt fails after the folder was made; the second one, with another setting, must get further.
    assert "none.jsonl" in bad("--data_train", tmp_path / "none.jsonl")
    assert "bm25" in bad("--retriever_name", "bm25")


# ---- prompts that are too long


def test_passages_give_way_and_are_counted(run_here, short, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        flags = ["--generator_max_prompt_tokens", 60, "--output_dir", tmp_path / "run"]
        assert run_here(RECIPE, *short(max_steps=1, headroom_samples=0), *flags) == 0
    told = [record.getMessage() for record in caplog.records if "longer than 60 tokens" in record.getMessage()]
    assert told, caplog.text
    assert re.search(r"\d+ of 32 prompts were longer than 60 tokens: \d+ passages .*dropped or shortened", told[0])


def test_question_that_does_not_fit(bad):
    line = bad("--generator_max_prompt_tokens", 3)
    assert "32 of 32 questions do not fit into 3 prompt tokens even without passages: " in line
    assert "and 27 more" in line


def test_no_room_for_a_prompt(bad):
    line = bad("--max_completion_length", 2048)
    assert "max_completion_length 2048 leaves no room for a prompt" in line
    assert "a context of 2048 tokens" in line


# ---- through real processes


@pytest.mark.smoke
def test_stderr_is_one_line(run_recipe, tmp_path):
    done = run_recipe(RECIPE, "--retriever_topk", 3, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "grpo_generator.py: error: unknown flag --retriever_topk; the closest valid one is --retriever_top_k"
    ]
    assert not list(tmp_path.iterdir())


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "reached"),
    [
        pytest.param(4_000, "nothing", id="first-file"),
        pytest.param(200_000, "before.json", id="adapter-of-a-checkpoint"),
        pytest.param(2_000_000, "checkpoint-2/adapter_model.safetensors", id="optimizer-of-a-checkpoint"),
        pytest.param(3_000_000, "checkpoint-3/trainer_state.json", id="final-weights"),
    ],
)
def test_full_disk(run_recipe, short, tmp_path, limit, reached):
    if sys.platform != "linux":
        pytest.skip("file size limits behave as a full disk on Linux")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    folder = tmp_path / "run"
    recipe = str(Path(__file__).parents[2] / "recipes" / f"{RECIPE}.py")
    flags = [*short(headroom_samples=0), "--output_dir", str(folder)]
    # The index lies elsewhere and is there already, or this first run makes it.
    run_recipe("build_index", "--output_dir", tmp_path / "index", cwd=tmp_path)
    flags += ["--retriever_index_path", str(tmp_path / "index")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), recipe, *flags], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr[-3000:]
    ours = [line for line in done.stderr.splitlines() if "grpo_generator.py: stopped: " in line]
    assert len(ours) == 1
    assert "make room and go on with --resume_from_checkpoint true" in ours[0]
    assert "Traceback" not in done.stderr
    assert not (folder / "metrics.json").exists()
    assert not list(folder.rglob("*.part"))
    assert reached == "nothing" or (folder / reached).is_file()

    again = run_recipe(RECIPE, *flags, "--resume_from_checkpoint", "true", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert steps_of(folder) == [1, 2, 3]
    assert metrics_of(folder)["status"] == "complete"
