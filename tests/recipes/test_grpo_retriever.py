"""recipes/grpo_retriever.py, through its real command line."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rag_rl.tiny import FOLDER
from tests.loopback import ChatServer, free_port
from tests.recipes.run_folders import difference, history_of, metrics_of, read_lines, rows_of, steps_of, write_lines

RECIPE = "grpo_retriever"
# With the packaged reader.
SHORT = {"headroom_samples": None}
METRICS = {"em", "f1", "contains_em", "recall@3", "all_gold@3", "success@3"}
LOGGED = {"loss", "reward", "reward_std", "success", "entropy", "effective_pool", "frac_reward_zero_std", "unscored"}
ONE_SEARCH = {"reader_name": "none", "reader_reward": "ndcg"}


# ---- a run and what it leaves


@pytest.mark.smoke
def test_metrics(check_metrics, trained_run):
    found = check_metrics(trained_run, n_eval=20)
    assert set(found["before"]) == set(found["after"]) == set(found["ci95"]) == METRICS
    for when in ("before", "after"):
        assert all(0.0 <= value <= 1.0 for value in found[when].values())
        assert found[when]["em"] <= found[when]["f1"]
        assert found[when]["all_gold@3"] <= found[when]["recall@3"]
    for name, (low, high) in found["ci95"].items():
        assert low <= found["after"][name] - found["before"][name] <= high
    assert 0 < found["train_seconds"] < 300
    assert 10**8 < found["peak_memory_bytes"] < 10**11


@pytest.mark.smoke
def test_run_folder(check_run_folder, trained_run):
    more = {
        "modules.json", "model.safetensors", "config.json", "tokenizer.json", "config_sentence_transformers.json",
    }  # fmt: skip
    check_run_folder(trained_run, more, portable=("config.json", "modules.json"))
    history = history_of(trained_run)
    assert [entry["step"] for entry in history] == [1, 2, 3]
    for entry in history:
        assert entry.keys() >= LOGGED
        # Advantages have mean 0 in each group, and all ratios are 1 before the only update of a batch.
        assert abs(entry["loss"]) < 1e-4
        assert entry["hops"] == 2.0
        assert 1.0 <= entry["effective_pool"] <= 30.0
    assert "sentence-transformers" in (trained_run / "README.md").read_text()


@pytest.mark.smoke
def test_the_trained_encoder_loads_by_itself(trained_run):
    from sentence_transformers import SentenceTransformer

    from rag_rl.retrieval import HistoryEncoder, SentenceEncoder

    plain = SentenceTransformer(str(trained_run), device="cpu")
    start = SentenceTransformer(str(FOLDER / "encoder"), device="cpu")
    weights, first = dict(plain.named_parameters()), dict(start.named_parameters())
    assert weights.keys() == first.keys()
    assert any(not weights[name].equal(first[name]) for name in weights), "training must have changed something"
    text = ["Where does somebody live?"]
    ours = HistoryEncoder(SentenceEncoder(trained_run, devices="cpu"))
    assert plain.encode(text) == pytest.approx(ours.encode_queries(text), abs=1e-6)


@pytest.mark.smoke
def test_rows_tell_hop_by_hop(trained_run):
    before, after = rows_of(trained_run, "before"), rows_of(trained_run, "after")
    assert [row["qid"] for row in before] == [row["qid"] for row in after]
    for row in after:
        assert len(row["reply"].splitlines()) == 2
        assert len(row["passages"]) == 6


@pytest.mark.smoke
def test_started_again_it_says_so_and_does_nothing(check_started_again, trained_run):
    check_started_again(trained_run, own_process=True)


@pytest.mark.smoke
def test_a_single_search_with_judged_documents(run_here, brief, tmp_path):
    one_hop = {"data_train": "${tiny}/data/demo_1hop.jsonl", "data_eval": "${tiny}/data/heldout_1hop.jsonl"}
    flags = brief(max_steps=2, **ONE_SEARCH, **one_hop)
    assert run_here(RECIPE, *flags, "--output_dir", tmp_path / "run") == 0
    found = metrics_of(tmp_path / "run")
    assert set(found["before"]) == set(found["after"]) == {"recall@3", "success@3", "mrr@10", "ndcg@10"}
    assert [entry["hops"] for entry in history_of(tmp_path / "run")] == [1.0, 1.0]


@pytest.mark.smoke
@pytest.mark.parametrize("what", ["lora", "head"])
def test_a_part_of_the_encoder_is_trained(run_here, brief, tmp_path, what):
    from sentence_transformers import SentenceTransformer

    flags = brief(max_steps=2, reader_name="scripted", retriever_train=what, warmup_steps=0)
    assert run_here(RECIPE, *flags, "--output_dir", tmp_path / "run") == 0
    plain = SentenceTransformer(str(tmp_path / "run"), device="cpu")
    start = SentenceTransformer(str(FOLDER / "encoder"), device="cpu")
    kinds = [type(module).__name__ for module in start]
    assert [type(module).__name__ for module in plain] == [*kinds[:-1], *["Dense"] * (what == "head"), kinds[-1]]
    # The base of the adapter is a folder, which nobody would find from elsewhere.
    assert not list((tmp_path / "run").glob("adapter_*"))
    text = ["Where does somebody live?"]
    assert abs(plain.encode(text) - start.encode(text)).max() > 1e-6


# ---- slow: launchers, interruptions, other folders


@pytest.mark.slow
def test_accelerate_launch_without_arguments(check_plain_launch):
    check_plain_launch()


@pytest.mark.slow
def test_copy_of_the_recipe_runs_elsewhere(check_copy_elsewhere):
    check_copy_elsewhere()


NOTING = '''
import json, os, time
from rag_rl.reasoning import f1_reward

def note(trajectory):
    """Writes down what was sampled, and takes its time, so that there is time to be killed."""
    found = [[hit.passage.doc_id for hit in hop.hits] for hop in trajectory.hops]
    with open(os.environ["NOTED"], "a") as file:
        file.write(json.dumps([trajectory.question.qid, found]) + "\\n")
    time.sleep(0.03)
    return f1_reward(trajectory)
'''


@pytest.mark.slow
def test_killed_and_resumed(run_recipe, kill_when, brief, tmp_path):
    from rag_rl.run import last_checkpoint

    (tmp_path / "noting.py").write_text(NOTING)
    noted = tmp_path / "noted.jsonl"
    env = {"PYTHONPATH": str(tmp_path), "NOTED": str(noted)}
    folder = tmp_path / "run"
    flags = brief(max_steps=12, save_steps=3, reader_name="scripted", reader_reward="noting:note", warmup_steps=0)
    flags += ["--output_dir", str(folder)]

    def happened() -> bool:
        # In mid-step after a checkpoint: steps are lost, and must come again.
        return last_checkpoint(folder) is not None and len(noted.read_text().splitlines()) >= 16 * 7 + 4

    kill_when(happened, RECIPE, *flags, cwd=tmp_path, env=env)
    checkpoint = int(Path(last_checkpoint(folder)).name.split("-")[1])
    assert checkpoint in (6, 9), "killed in the middle"
    lost = noted.read_text().splitlines()
    assert not (folder / "metrics.json").exists()
    first = (folder / "before.json").read_bytes()

    refused = run_recipe(RECIPE, *flags, env=env, cwd=tmp_path)
    assert refused.returncode == 2
    assert "--resume_from_checkpoint true" in refused.stderr.splitlines()[-1]

    noted.unlink()
    done = run_recipe(RECIPE, *flags, "--resume_from_checkpoint", "true", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"going on from {folder / f'checkpoint-{checkpoint}'}" in done.stderr
    assert steps_of(folder) == list(range(1, 13))
    again = noted.read_text().splitlines()
    assert len(again) == 16 * (12 - checkpoint), "steps that were done must not be done again"
    # The very same trajectories: same questions, same weights, same noise.
    assert again[: len(lost) - 16 * checkpoint] == lost[16 * checkpoint :]
    assert (folder / "before.json").read_bytes() == first, "before is measured once"
    assert metrics_of(folder)["status"] == "complete"


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_2proc", "zero2"])
def test_two_processes_do_what_one_does(config, alone_and_both):
    # The rewards of both processes have one standard deviation.
    alone, both, printed = alone_and_both(
        16, config, max_steps=5, alpha=0.02, data_eval_size=21, scale_rewards="batch"
    )
    assert metrics_of(both)["n_eval"] == 21
    for when in ("before", "after"):
        assert metrics_of(both)[when] == pytest.approx(metrics_of(alone)[when], abs=1e-9)
        # Scores are rounded to six places.
        assert [row["qid"] for row in rows_of(both, when)] == [row["qid"] for row in rows_of(alone, when)]
    moved, apart = difference(FOLDER / "encoder", alone), difference(alone, both)
    assert moved > 1e-3
    assert apart < 1e-3 * moved
    for ours, theirs in zip(history_of(both), history_of(alone), strict=True):
        for name in ("reward", "success", "frac_reward_zero_std", "hops", "unscored"):
            assert ours[name] == pytest.approx(theirs[name]), name
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert printed.count("held-out questions; trained") == 1


# ---- bad input: one line, exit code 2 (1 where a backend fails)


@pytest.fixture
def bad(bad) -> Callable[..., str]:
    """As everywhere, with the scripted reader where a test names no other."""
    return lambda *flags, code=2, **changes: bad(*flags, code=code, **{"reader_name": "scripted", **changes})


def test_list_longer_than_the_pool(bad):
    line = bad("--retriever_top_k", 31)
    assert "retriever_top_k must be between 1 and num_candidates (30), got 31" in line


def test_pool_larger_than_the_corpus(bad):
    assert "num_candidates must be at most 560, the passages of the index, got 561" in bad("--num_candidates", 561)


def test_index_of_another_encoder(bad, tmp_path):
    from rag_rl.retrieval import SentenceEncoder, build_index
    from rag_rl.types import Passage

    other = SentenceEncoder(FOLDER / "encoder", devices="cpu", document_prompt="passage: ")
    rows = [Passage(f"d{i}", f"Town {i} lies on the river {i}.") for i in range(40)]
    build_index(rows, other, tmp_path / "index", progress=False)
    line = bad("--retriever_index_path", tmp_path / "index")
    assert "was made with another encoder" in line
    assert "document_prompt 'passage: ' there, '' here" in line


def test_empty_corpus(bad, tmp_path):
    (tmp_path / "corpus.jsonl").write_text("")
    assert "corpus.jsonl" in bad("--data_corpus", tmp_path / "corpus.jsonl")


@pytest.fixture(scope="module")
def some_questions() -> list[dict]:
    return read_lines(FOLDER / "data" / "demo_2hop.jsonl")[:20]


def test_questions_that_the_corpus_cannot_answer_are_counted(run_here, brief, tmp_path, caplog, some_questions):
    strange = [{**row, "gold_doc_ids": ["nowhere"]} if i < 3 else row for i, row in enumerate(some_questions)]
    flags = ["--data_train", write_lines(tmp_path / "train.jsonl", strange), "--output_dir", tmp_path / "run"]
    with caplog.at_level(logging.WARNING):
        assert run_here(RECIPE, *brief(max_steps=1, reader_name="scripted"), *flags) == 0
    told = [m for m in caplog.messages if "left out" in m]
    assert told == ["3 of 20 training questions are left out: the corpus lacks their gold documents"]


def test_no_question_that_the_corpus_can_answer(bad, tmp_path, some_questions):
    strange = [{**row, "gold_doc_ids": ["nowhere"]} for row in some_questions]
    line = bad("--data_train", write_lines(tmp_path / "train.jsonl", strange))
    assert "none of the 20 questions has its gold documents in the corpus" in line
    assert some_questions[0]["qid"] in line


def test_too_few_questions_for_a_step(bad, tmp_path, some_questions):
    rows = write_lines(tmp_path / "train.jsonl", some_questions[:1])
    assert "a step asks 2 questions, data_train has 1" in bad("--data_train", rows)


def test_questions_without_a_decomposition(bad, tmp_path):
    rows = read_lines(FOLDER / "data" / "heldout_2hop.jsonl")[:20]
    for row in rows[5:]:
        del row["decomposition"]
    line = bad("--data_eval", write_lines(tmp_path / "eval.jsonl", rows))
    assert "15 of 20 questions have no decomposition with question, answer, gold_doc_id in each hop" in line
    assert f"{rows[5]['qid']!r}" in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"reader_name": "reac"}, "reader_name must be decomposition, scripted, react, none"),
        ({"reader_name": "none"}, "reader_name none answers nothing: set reader_reward to ndcg"),
        ({"reader_reward": "f2"}, "reader_reward must be one of f1, ndcg"),
        ({"retriever_name": "none"}, "needs retriever_name dense"),
        ({"num_generations": 1}, "num_generations must be at least 2, got 1"),
        ({"alpha": 0}, "alpha must be above 0, got 0"),
        ({"reader_max_hops": 0}, "reader_max_hops must be at least 1, got 0"),
        ({"retriever_state_tokens": 257}, "retriever_state_tokens must be between 1 and 256, what the encoder takes"),
        ({"retriever_state_tokens": 0}, "retriever_state_tokens must be between 1 and 256"),
        ({"retriever_train": "half"}, "retriever_train"),
    ],
)
def test_settings_that_mean_nothing(bad, changes, expected):
    assert expected in bad(**changes)


# ---- a reader's endpoint


# Read by all three prompts of the ReAct reader, and by none as a second hop.
REPLY = 'SEARCH: Where does it lie?\n{"status": "FOUND", "answer": "Elmton"}\nAnswer: Elmton'


class Served(ChatServer):
    """Answers so many requests with the same text, and refuses all others."""

    def __init__(self) -> None:
        self.answers, self.asked = 10**9, 0
        super().__init__()

    def reply(self, body: dict) -> tuple[int, str]:
        self.asked += 1
        return (403, "gone") if self.asked > self.answers else (200, REPLY)


@pytest.fixture
def served() -> Iterator[Served]:
    with Served() as found:
        yield found


@pytest.fixture
def _impatient(monkeypatch) -> None:
    """Repeats failed requests without pauses."""
    monkeypatch.setattr("rag_rl.generation.openai_generator._LONGEST_BACKOFF_S", 0.01)


def test_a_served_reader_plans_reads_and_answers(run_here, brief, tmp_path, served):
    react = {"reader_name": "react", "reader_model": "m", "reader_base_url": served.url, "reader_max_hops": 2}
    assert run_here(RECIPE, *brief(max_steps=1, **react), "--output_dir", tmp_path / "run") == 0
    rows = rows_of(tmp_path / "run", "after")
    assert {row["answer"] for row in rows} == {"Elmton"}
    assert {row["reply"] for row in rows} == {"Where does it lie? -> Elmton\nWhere does it lie? -> Elmton"}
    (entry,) = history_of(tmp_path / "run")
    assert (entry["hops"], entry["unscored"]) == (2.0, 0.0)


@pytest.mark.usefixtures("_impatient")
def test_a_dead_reader_stops_the_run_and_is_named(bad):
    url = f"http://127.0.0.1:{free_port()}/v1"
    line = bad(reader_name="react", reader_model="m", reader_base_url=url, code=1)
    assert line.startswith(f"{RECIPE}.py: stopped: {url}: ")
    assert "cannot connect" in line


@pytest.mark.usefixtures("_impatient")
def test_a_reader_that_dies_in_training_stops_the_run_and_is_named(bad, served, tmp_path):
    flags = {"reader_name": "react", "reader_model": "m", "reader_base_url": served.url, "max_steps": 50}
    start = threading.Event()

    def watch() -> None:
        # Every question is asked in each step: there is no end before the server refuses.
        while not (tmp_path / "run" / "before.json").is_file() and not start.wait(0.01):
            pass
        served.answers = served.asked + 40

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        line = bad(**flags, code=1)
    finally:
        start.set()
        watcher.join()
    assert served.url in line
    assert "HTTP 403" in line
    assert (tmp_path / "run" / "before.json").is_file(), "it got into training"
