"""From queries to lists: augmentations, mined negatives, a teacher's order; what is kept, counted and refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rag_rl.config.arguments import DataArguments, QueryEncoderArguments, RetrieverArguments
from rag_rl.config.augmenter_arguments import AugmenterArguments, AugmenterModelArguments
from rag_rl.config.distillation import build_distillation_data, build_lists, build_trained_encoder
from rag_rl.config.distillation_arguments import DistillationArguments
from rag_rl.config.synthesis_arguments import SynthesisArguments
from rag_rl.data.reinforced_ir import (
    AugmentedQuery,
    RetrieverExample,
    read_augmented,
    read_examples,
    read_queries,
    write_augmented,
    write_examples,
)
from rag_rl.errors import BackendError, ConfigError, DataError
from rag_rl.generation import QueryAugmenter, ScriptedGenerator

ENCODER = {"retriever_encoder": "${tiny}/encoder", "retriever_batch_size": 256, "retriever_top_k": 5}
SYNTHESIS = SynthesisArguments(synthesis_writer="sentences", synthesis_check="none")
NAMES = ["Kelsabert", "Dunnedric", "Jorobert", "Seldaham", "Waloton", "Gilawick", "Noruward", "Beleward"]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def small(tmp_path):
    """A corpus of eight people, each twice, and a query for six of them."""
    documents = [{"doc_id": name, "text": f"{name} lives in {NAMES[i - 1]}."} for i, name in enumerate(NAMES)]
    copies = [{**one, "doc_id": one["doc_id"] + " again"} for one in documents]
    queries = [
        {"qid": name, "question": f"Where does {name} live?", "gold_doc_ids": [name], "answers": []} for name in NAMES
    ]
    return DataArguments(
        data_corpus=write_jsonl(tmp_path / "corpus.jsonl", [*documents, *copies]),
        data_train=write_jsonl(tmp_path / "train.jsonl", queries[:6]),
        data_eval=write_jsonl(tmp_path / "eval.jsonl", queries[6:]),
    )


class Talking:
    """A generator that augments, ranks by a fixed reply, and counts what it was asked."""

    def __init__(self, ranking: str = "[2] > [1]", dies_at: int | None = None) -> None:
        self.ranking, self.dies_at, self.asked = ranking, dies_at, []

    def generate(self, prompts, **options):
        if self.dies_at is not None and len(self.asked) + len(prompts) > self.dies_at:
            raise BackendError("the endpoint is gone")
        self.asked += [prompt[0]["content"] for prompt in prompts]
        reply = ScriptedGenerator(lambda prompt, n: self.ranking if "Rank all" in prompt else "He lives somewhere.")
        return reply.generate(prompts, **options)


@pytest.fixture
def lists(small, tmp_path, monkeypatch):
    """Makes the lists of a run with a generator of the test's own."""

    def make(generator=None, *, folder="run", model=None, augmenter=None, data=None, **options):
        generator = generator or Talking()
        module = SimpleNamespace(made=lambda args, model: QueryAugmenter(generator, name="talking"))
        monkeypatch.setitem(sys.modules, "talking", module)
        args = DistillationArguments(**{"distill_negatives": 3, "distill_batch_size": 2, **options})
        data = data or small
        retriever = RetrieverArguments(**ENCODER)
        target = tmp_path / folder
        found = build_distillation_data(args, data, SYNTHESIS, retriever, target, seed=1)
        made = build_lists(
            args, found, data, retriever, augmenter or AugmenterArguments(),
            model or AugmenterModelArguments(augmenter_name="talking:made"), target, seed=1,
        )  # fmt: skip
        return made, target / "retriever"

    return make


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


# ---- the whole of it


def test_lists_of_a_teacher(lists, small):
    generator = Talking("[3] > [1] > [2] > [4]")
    made, folder = lists(generator)
    (examples,) = made.values()
    assert list(made) == [small.data_corpus]
    assert len(examples) == 6
    for example in examples:
        name = example.query.split()[2]
        assert example.answer == "Generate the topic about this passage: He lives somewhere."
        texts = [*example.pos, *example.neg]
        assert len(set(texts)) == 4, "copies of documents are not there twice"
        assert sum(text.startswith(name) for text in texts) == 1
        assert (example.pos_scores, example.neg_scores) == ((1.0,), (1 / 2, 1 / 3, 1 / 4))
    # What the model saw third went first.
    asked = [prompt for prompt in generator.asked if "Rank all" in prompt]
    for prompt in asked:
        query = prompt.split("The query: ")[1].split("\n")[0]
        third = prompt.split("[3] ")[1].split("\n")[0]
        assert next(one for one in examples if one.query == query).pos == (third,)
    found = summary_of(folder)
    assert (found["queries"], found["augmented"], found["without_augmentation"]) == (6, 6, 0)
    assert (found["rankings"], found["rankings_unreadable"], found["negatives_a_query"]) == (6, 0, 3.0)
    first = sum(one.pos[0].startswith(one.query.split()[2]) for one in examples)
    assert found["source_first"] == pytest.approx(first / 6, abs=1e-4)
    assert found["copies_of_the_own_passage"] + found["repeated_passages"] > 0, "each document is there twice"
    # The published files.
    assert read_examples(folder / "train.jsonl") == examples
    before = read_examples(folder / "mined.jsonl")
    assert [one.is_distilled for one in before] == [False] * 6
    assert all(one.pos[0].startswith(one.query.split()[2]) for one in before)
    assert [one.query for one in read_queries(folder / "queries.json")] == [one.query for one in examples]
    assert [one.answer for one in read_augmented(folder / "answers.json")] == [one.answer for one in examples]
    assert {path.name for path in (folder.parent / "prompts").iterdir()} == {"augment_query.txt", "rank_passages.txt"}


def test_the_source_can_be_kept_first(lists):
    made, folder = lists(Talking("[4] > [3] > [2] > [1]"), distill_keep_source=True)
    for example in next(iter(made.values())):
        assert example.pos[0].startswith(example.query.split()[2])
        assert example.is_distilled
    assert summary_of(folder)["source_first"] < 1.0


def test_faulty_rankings_are_repaired_and_counted(lists):
    made, folder = lists(Talking("[2] > [2] > [9] > [3]"))
    found = summary_of(folder)
    assert (found["rankings_duplicates_ids"], found["rankings_foreign_ids"], found["rankings_missing_ids"]) == (
        6,
        6,
        12,
    )
    assert all(len({*one.pos, *one.neg}) == 4 for one in next(iter(made.values())))


def test_rankings_that_nobody_can_read(lists):
    with pytest.raises(ConfigError, match=r"none of 6 rankings could be read: this model cannot rank by that prompt"):
        lists(Talking("They are all fine."))


def test_some_rankings_that_nobody_can_read(lists):
    class Fickle(Talking):
        def generate(self, prompts, **options):
            self.ranking = "no" if any("does Kelsabert live" in p[0]["content"] for p in prompts) else "[4] > [1]"
            return super().generate(prompts, **options)

    made, folder = lists(Fickle(), distill_batch_size=1)
    assert summary_of(folder)["rankings_unreadable"] == 1
    examples = {one.query.split()[2]: one for one in next(iter(made.values()))}
    mined = {one.query.split()[2]: one for one in read_examples(folder / "mined.jsonl")}
    kept = examples["Kelsabert"]
    assert (kept.pos, kept.neg) == (mined["Kelsabert"].pos, mined["Kelsabert"].neg), "as the search had them"
    assert kept.is_distilled


def test_without_a_teacher_and_at_random(lists):
    made, folder = lists(distill_teacher="none")
    assert not any(one.is_distilled for one in next(iter(made.values())))
    assert read_examples(folder / "train.jsonl") == read_examples(folder / "mined.jsonl")
    assert "rankings" not in summary_of(folder)
    random_, folder = lists(distill_teacher="random", folder="other")
    again, _ = lists(distill_teacher="random", folder="third")
    assert random_ == again
    orders = {one.pos[0].startswith(one.query.split()[2]) for one in next(iter(random_.values()))}
    assert orders == {True, False}


def test_a_reranker_as_the_teacher(lists, tmp_path):
    import torch
    from sentence_transformers import CrossEncoder

    from rag_rl.tiny import FOLDER

    torch.manual_seed(0)
    scorer = CrossEncoder(str(FOLDER / "encoder"), num_labels=1, device="cpu")
    scorer.save_pretrained(str(tmp_path / "reranker"))
    made, _ = lists(distill_teacher="reranker", distill_reranker=str(tmp_path / "reranker"))
    for example in next(iter(made.values())):
        texts = [*example.pos, *example.neg]
        scores = scorer.predict([(example.query, text) for text in texts], activation_fn=torch.nn.Identity())
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)


def test_a_generator_by_likelihood(lists):
    model = AugmenterModelArguments(augmenter_name="local", augmenter_model="${tiny}/reader")
    asking = AugmenterArguments(augmenter_prompt="tiny_passage", augmenter_prefix="", augmenter_max_new_tokens=30)
    _, folder = lists(model=model, augmenter=asking, distill_ranking="likelihood", distill_prompt="tiny_question")
    assert summary_of(folder)["source_first"] >= 5 / 6, "each query names whom it is about"
    assert (folder.parent / "prompts" / "tiny_question.txt").is_file()


def test_a_teacher_whose_probabilities_are_not_seen(lists):
    with pytest.raises(ConfigError, match="the likelihood of a query needs a model in this process, not Talking"):
        lists(distill_ranking="likelihood")


def test_nobody_augments(lists):
    model = AugmenterModelArguments(augmenter_name="none")
    made, folder = lists(model=model, distill_teacher="none")
    assert {one.answer for one in next(iter(made.values()))} == {""}
    assert (summary_of(folder)["augmented"], summary_of(folder)["without_augmentation"]) == (0, 6)
    with pytest.raises(ConfigError, match="augmenter_name must not be none"):
        lists(model=model, folder="other")


# ---- augmentations


def test_augmentations_longer_than_the_encoder_reads_are_counted(lists):
    class Wordy(Talking):
        def generate(self, prompts, **options):
            found = super().generate(prompts, **options)
            if "Rank all" in prompts[0][0]["content"]:
                return found
            return ScriptedGenerator(lambda prompt, n: "word " * (600 if "Kelsabert" in prompt else 5)).generate(
                prompts, **options
            )

    _, folder = lists(Wordy())
    assert summary_of(folder)["longer_than_the_encoder_reads"] == 1


def test_augmentations_that_are_there_already(lists, small, tmp_path):
    generator = Talking()
    text = "Kelsabert lives in Beleward."
    there = [AugmentedQuery("Where does Kelsabert live?", text, "Prefixed: there."),
             AugmentedQuery("Where does Dunnedric live?", "Another passage.", "Prefixed: other.")]  # fmt: skip
    write_augmented(tmp_path / "answers.json", there)
    made, folder = lists(generator, distill_answers=str(tmp_path / "answers.json"))
    answers = {one.query.split()[2]: one.answer for one in next(iter(made.values()))}
    assert answers["Kelsabert"] == "Prefixed: there."
    assert answers["Dunnedric"].endswith("He lives somewhere."), "of another passage"
    assert summary_of(folder)["answers_read"] == 1
    assert sum("Rank all" not in prompt for prompt in generator.asked) == 5


# ---- stopped and started again


def test_what_was_done_before_a_stop_is_not_done_again(lists):
    whole, _ = lists(Talking("[3] > [1]"))
    asked = []
    for dies_at in (3, 3, 5, 100):
        generator = Talking("[3] > [1]", dies_at=dies_at)
        if dies_at < 100:
            with pytest.raises(BackendError, match="the endpoint is gone"):
                lists(generator, folder="killed")
        else:
            made, folder = lists(generator, folder="killed")
        asked += generator.asked
    assert made == whole
    assert len(asked) == len(set(asked)) == 12, "each query is augmented once and ranked once"
    lists(silent := Talking(dies_at=0), folder="killed")
    assert silent.asked == []
    (folder / "rankings.0.jsonl").write_bytes((folder / "rankings.0.jsonl").read_bytes()[:-9])
    again, _ = lists(generator := Talking("[3] > [1]"), folder="killed")
    assert again == whole
    assert len(generator.asked) == 1, "half a row is no row"


def test_a_changed_step_is_done_again_and_those_before_it_are_not(lists):
    lists(Talking("[3] > [1]"))
    changed, _ = lists(generator := Talking("[2] > [1]"), distill_max_new_tokens=17)
    assert len(generator.asked) == 6
    assert all("Rank all" in prompt for prompt in generator.asked)
    made, _ = lists(generator := Talking("[2] > [1]"), distill_negatives=2, distill_max_new_tokens=17)
    assert len(generator.asked) == 6, "other lists are ranked anew"
    assert {len(one.neg) for one in next(iter(made.values()))} == {2}
    assert made != changed


# ---- files


def test_published_files_in(lists, small, tmp_path):
    plain = [RetrieverExample(f"q{i}", "", (f"p{i}",), (f"n{i}", f"m{i}")) for i in range(3)]
    held = RetrieverExample("where does  NORUWARD live?", "", ("p",), ("n",))
    write_examples(tmp_path / "before.jsonl", [*plain, held])
    write_examples(tmp_path / "after.jsonl", [one.reordered([2, 0, 1]) for one in plain])
    small.data_train = ""
    files = [str(tmp_path / "before.jsonl"), str(tmp_path / "after.jsonl")]
    made, folder = lists(Talking("[3] > [2] > [1]"), distill_files=files)
    assert list(made) == files
    before, after = made.values()
    assert [one.query for one in before] == ["q0", "q1", "q2"], "a held-out query is left out"
    assert all(one.is_distilled for one in before)
    assert [(one.pos, one.neg) for one in after] == [((f"m{i}",), (f"p{i}", f"n{i}")) for i in range(3)]
    assert read_examples(folder / "file0" / "train.jsonl") == before
    assert not (folder / "file1").exists(), "it was ranked before"
    assert not (folder / "mined.jsonl").exists()


def test_files_beside_queries(lists, small, tmp_path):
    write_examples(tmp_path / "other.jsonl", [RetrieverExample("q", "", ("p",), ("n",))])
    made, _ = lists(distill_files=[str(tmp_path / "other.jsonl")], distill_teacher="none")
    assert list(made) == [small.data_corpus, str(tmp_path / "other.jsonl")]


def test_files_alone_need_held_out_questions(lists, small, tmp_path):
    write_examples(tmp_path / "other.jsonl", [RetrieverExample("q", "", ("p",), ("n",))])
    small.data_train, small.data_eval = "", None
    with pytest.raises(ConfigError, match="data_eval is not set"):
        lists(distill_files=[str(tmp_path / "other.jsonl")])


def test_queries_that_are_worded_like_held_out_ones(lists, small, tmp_path, caplog):
    rows = [json.loads(line) for line in Path(small.data_train).read_text().splitlines()]
    rows[2]["question"] = "where does  noruward live?"
    small.data_train = write_jsonl(tmp_path / "leaking.jsonl", rows)
    made, _ = lists(distill_teacher="none")
    assert len(next(iter(made.values()))) == 5
    assert "1 of 6 queries to learn from are left out: held-out ones are worded alike" in caplog.text


# ---- bad input


def test_a_corpus_without_documents(lists, small, tmp_path):
    small.data_corpus = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match="the corpus is empty"):
        lists()


def test_queries_without_a_passage(lists, small, tmp_path, caplog):
    rows = [json.loads(line) for line in Path(small.data_train).read_text().splitlines()]
    for row in rows[:4]:
        row["gold_doc_ids"] = ["nobody"]
    small.data_train = write_jsonl(tmp_path / "some.jsonl", rows)
    made, _ = lists()
    assert len(next(iter(made.values()))) == 2
    assert "4 of 6 queries are left out: the corpus lacks their passage" in caplog.text
    small.data_train = write_jsonl(tmp_path / "none.jsonl", rows[:4])
    with pytest.raises(DataError, match="the corpus holds no passage of any of its 4 queries"):
        lists(folder="other")


def test_a_corpus_of_one_text(lists, small, tmp_path):
    small.data_corpus = write_jsonl(
        tmp_path / "same.jsonl", [{"doc_id": name, "text": "Always the same."} for name in NAMES]
    )
    made, folder = lists(distill_teacher="none")
    assert {one.neg for one in next(iter(made.values()))} == {()}
    assert summary_of(folder)["copies_of_the_own_passage"] > 0


# ---- other parts


def test_another_encoder_mines(lists, small, tmp_path):
    made, _ = lists(distill_teacher="none")
    other, _ = lists(distill_teacher="none", folder="other", distill_miner="${tiny}/encoder_young")
    assert [one.pos for one in next(iter(made.values()))] == [one.pos for one in next(iter(other.values()))]
    assert made != other
    small.data_chunk_tokens = 40
    with pytest.raises(ConfigError, match="distill_miner would cut documents elsewhere"):
        lists(distill_teacher="none", folder="third", distill_miner="${tiny}/encoder_young")


def test_the_trained_encoder_bears_its_prompts():
    retriever = RetrieverArguments(**{**ENCODER, "retriever_query_prompt": "query: "})
    encoder = build_trained_encoder(retriever, QueryEncoderArguments(retriever_train="lora"))
    assert encoder.model.prompts["query"] == "query: "
    assert 0 < sum(p.requires_grad for p in encoder.model.parameters()) < len(list(encoder.model.parameters()))
    with pytest.raises(ConfigError, match="retriever_state_tokens is for queries with a history"):
        build_trained_encoder(retriever, QueryEncoderArguments(retriever_state_tokens=9))
