"""The assembly: what is retrieved, shown and asked, and what is read from the reply."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from rag_rl.errors import ConfigError, DataError
from rag_rl.evaluation.assembly import Assembly, OtherModel
from rag_rl.generation import ScriptedGenerator
from rag_rl.judges import ScriptedJudge
from rag_rl.retrieval import StaticRetriever
from rag_rl.tiny import FOLDER
from rag_rl.types import Generation, Passage, Question

ELMTON = Passage("d1", "Elmton lies on the Mira.", title="Elmton")
GALTON = Passage("d2", "Galton lies on the Orl and is known for tin.", title="Galton")
BORTON = Passage("d3", "Borton lies on the Var.", title="Borton")
QUESTION = Question("q1", "Which river does Elmton lie on?", ("Mira",), ("d1",))
OTHER = Question("q2", "Which river does Galton lie on?", ("Orl",), ("d2",))
MIRA = Generation("Answer: Mira")


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "ask.txt"
    path.write_text("$passages\nQ: $question", encoding="utf-8")
    return str(path)


@pytest.fixture
def retriever():
    return StaticRetriever({QUESTION.question: [ELMTON, GALTON, BORTON], OTHER.question: [GALTON, ELMTON]})


def words(prompts):
    """Length of prompts in words, in place of a tokenizer."""
    return [len((p if isinstance(p, str) else p[0]["content"]).split()) for p in prompts]


def test_prompt_holds_question_and_numbered_passages(prompt, retriever):
    (asked,) = Assembly(retriever=retriever, prompt=prompt, top_k=2).prepare([QUESTION])
    text = (
        "[1] Elmton\nElmton lies on the Mira.\n[2] Galton\nGalton lies on the Orl and is known for tin.\n"
        "Q: Which river does Elmton lie on?"
    )
    assert asked.prompt == [{"role": "user", "content": text}]
    assert [hit.passage.doc_id for hit in asked.hits] == ["d1", "d2"]
    assert asked.cut == 0


def test_base_generator_gets_plain_text(prompt, retriever):
    (asked,) = Assembly(retriever=retriever, prompt=prompt, top_k=1, generator_type="base").prepare([QUESTION])
    assert asked.prompt == "[1] Elmton\nElmton lies on the Mira.\nQ: Which river does Elmton lie on?"


def test_without_retriever_there_are_no_passages(tmp_path):
    path = tmp_path / "closed.txt"
    path.write_text("Q: $question", encoding="utf-8")
    (asked,) = Assembly(retriever=None, prompt=str(path)).prepare([QUESTION])
    assert (asked.hits, asked.shown) == ((), ())
    assert asked.prompt == [{"role": "user", "content": "Q: Which river does Elmton lie on?"}]


def test_one_search_for_all_questions(prompt):
    class Counting:
        def __init__(self):
            self.calls = []

        def search(self, queries, *, top_k, exclude=None):
            self.calls.append(list(queries))
            return [[] for _ in queries]

    retriever = Counting()
    Assembly(retriever=retriever, prompt=prompt).prepare([QUESTION, OTHER])
    assert retriever.calls == [[QUESTION.question, OTHER.question]]


def test_orders(prompt, retriever):
    def shown(order):
        (asked,) = Assembly(retriever=retriever, prompt=prompt, order=order).prepare([QUESTION])
        # What the rest of the program is told stands in the prompt in that order, and the hits stay ranked.
        content = asked.prompt[0]["content"]
        places = [content.index(hit.passage.text) for hit in asked.shown]
        assert places == sorted(places)
        assert [hit.rank for hit in asked.hits] == [1, 2, 3]
        return [hit.passage.doc_id for hit in asked.shown]

    assert shown("ranked") == ["d1", "d2", "d3"]
    assert shown("reversed") == ["d3", "d2", "d1"]
    assert sorted(shown("shuffled")) == ["d1", "d2", "d3"]
    assert shown("shuffled") == shown("shuffled")


def test_shuffle_depends_on_the_question(prompt):
    retriever = StaticRetriever({}, default=[ELMTON, GALTON, BORTON])
    questions = [Question(f"q{i}", f"Which {i}?", ("x",)) for i in range(20)]
    asked = Assembly(retriever=retriever, prompt=prompt, order="shuffled").prepare(questions)
    assert len({tuple(hit.passage.doc_id for hit in a.shown) for a in asked}) > 1


def test_budget_takes_the_lowest_ranked_passages_and_never_the_question(prompt, retriever, caplog):
    full = words([Assembly(retriever=retriever, prompt=prompt).prepare([QUESTION])[0].prompt])[0]
    for budget in range(full - 1, 7, -1):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assembly = Assembly(retriever=retriever, prompt=prompt, max_prompt_tokens=budget, count_tokens=words)
            (asked,) = assembly.prepare([QUESTION])
        assert words([asked.prompt])[0] <= budget
        assert asked.prompt[0]["content"].endswith(f"Q: {QUESTION.question}")
        # The best ranks stay, and only the last one kept may be shortened.
        kept = [hit.passage for hit in asked.shown]
        assert [p.doc_id for p in kept] == ["d1", "d2", "d3"][: len(kept)]
        assert [p.text for p in kept[:-1]] == [ELMTON.text, GALTON.text, BORTON.text][: max(0, len(kept) - 1)]
        assert asked.cut >= 3 - len(kept)
        assert asked.cut > 0
        assert len(asked.hits) == 3  # what was retrieved is still known to the metrics
        assert "1 of 1 prompts were longer" in caplog.text


def test_budget_drops_by_rank_also_when_the_best_is_shown_last(prompt, retriever):
    (full,) = Assembly(retriever=retriever, prompt=prompt, order="reversed").prepare([QUESTION])
    budget = words([full.prompt])[0] - 7  # "[3] Borton Borton lies on the Var." and no more
    assembly = Assembly(
        retriever=retriever, prompt=prompt, order="reversed", max_prompt_tokens=budget, count_tokens=words
    )
    (asked,) = assembly.prepare([QUESTION])
    assert [hit.passage for hit in asked.shown] == [GALTON, ELMTON]
    assert asked.cut == 1


def test_prompts_that_fit_are_left_alone(prompt, retriever):
    plain = Assembly(retriever=retriever, prompt=prompt)
    limited = Assembly(retriever=retriever, prompt=prompt, max_prompt_tokens=10_000, count_tokens=words)
    assert limited.prepare([QUESTION, OTHER]) == plain.prepare([QUESTION, OTHER])


def test_question_longer_than_the_budget_is_an_error(prompt, retriever):
    assembly = Assembly(retriever=retriever, prompt=prompt, max_prompt_tokens=5, count_tokens=words)
    with pytest.raises(DataError, match=r"5 (prompt )?tokens"):
        assembly.prepare([QUESTION])


def test_a_question_that_is_too_long_is_named_by_its_id(prompt):
    retriever = StaticRetriever({}, default=[ELMTON])
    assembly = Assembly(retriever=retriever, prompt=prompt, max_prompt_tokens=9, count_tokens=words)
    short = Question("fits", "Where?", ("x",))
    long = [Question(f"long-{i}", "and where " * 9, ("x",)) for i in range(7)]
    with pytest.raises(DataError) as caught:
        assembly.prepare([short, long[0]])
    assert "1 of 2 questions do not fit into 9 prompt tokens" in str(caught.value)
    assert "long-0 (" in str(caught.value)
    assert "fits" not in str(caught.value)
    with pytest.raises(DataError, match=r"long-4 \(\d+ tokens\) and 2 more"):
        assembly.prepare([short, *long])


def test_budget_needs_a_way_to_count(prompt, retriever):
    with pytest.raises(ConfigError, match="count_tokens"):
        Assembly(retriever=retriever, prompt=prompt, max_prompt_tokens=5).prepare([QUESTION])


def test_bad_arguments(tmp_path, prompt, retriever):
    with pytest.raises(ConfigError, match="retriever_top_k must be at least 1, got 0"):
        Assembly(retriever=retriever, prompt=prompt, top_k=0)
    with pytest.raises(ConfigError, match="no-such-prompt"):
        Assembly(retriever=retriever, prompt="no-such-prompt")
    blind = tmp_path / "blind.txt"
    blind.write_text("Q: $question", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"\$passages"):
        Assembly(retriever=retriever, prompt=str(blind))
    with pytest.raises(ConfigError, match="no generator"):
        Assembly(retriever=retriever, prompt=prompt).answer([QUESTION])


def test_answers_are_read_from_the_replies(prompt, retriever):
    generator = ScriptedGenerator(["<think>Elm?</think>It is near.\nAnswer: Mira\n", "<think>never closed"])
    assembly = Assembly(retriever=retriever, prompt=prompt, generator=generator)
    ((first,), (second,)) = assembly.answer([QUESTION, OTHER])
    assert (first.answer, first.asked.question) == ("Mira", QUESTION)
    assert first.generation.text.startswith("<think>")
    assert (second.answer, second.asked.question) == (None, OTHER)
    assert generator.prompts == [first.asked.prompt, second.asked.prompt]


class Failing:
    """Answers every prompt but those about Galton, whose requests fail alone."""

    def generate(self, prompts, *, n=1, **_):
        failed = Generation("HTTP 400: Answer: refused", finish_reason="error")
        return [[failed if "Q: Which river does Galton" in p[0]["content"] else MIRA] * n for p in prompts]


@pytest.mark.parametrize("marker", ["Answer:", ""])
def test_the_reason_of_a_failure_is_no_answer(prompt, retriever, marker):
    assembly = Assembly(retriever=retriever, prompt=prompt, generator=Failing(), answer_marker=marker)
    ((first,), (second,)) = assembly.answer([QUESTION, OTHER])
    assert (first.answer, first.failure) == (MIRA.text if marker == "" else "Mira", None)
    assert (second.answer, second.failure) == (None, "HTTP 400: Answer: refused")
    row = assembly.row(second)
    assert {name: row["scores"][name] for name in ("em", "f1", "contains_em", "format")} == dict.fromkeys(
        ("em", "f1", "contains_em", "format")
    )
    assert row["scores"]["recall@5"] == 1.0, "what was retrieved is known all the same"


def test_samples_of_a_question_share_its_prompt(prompt, retriever):
    generator = ScriptedGenerator(["Answer: Mira", "Answer: Orl", "Answer: Var", "Answer: Orl"])
    assembly = Assembly(retriever=retriever, prompt=prompt, generator=generator)
    answered = assembly.answer([QUESTION, OTHER], temperature=1.0, n=2, seed=0)
    assert [[a.answer for a in group] for group in answered] == [["Mira", "Orl"], ["Var", "Orl"]]
    assert answered[0][0].asked is answered[0][1].asked


def test_with_generator_shares_everything_else(prompt, retriever):
    first = Assembly(retriever=retriever, prompt=prompt, top_k=1, order="reversed")
    second = first.with_generator(ScriptedGenerator(["Answer: Mira"]))
    assert first.generator is None
    assert second.retriever is retriever
    assert second.prepare([QUESTION]) == first.prepare([QUESTION])
    assert second.answer([QUESTION])[0][0].answer == "Mira"


# ---- judged answers


def test_answers_are_judged_but_those_that_need_no_judge(prompt, retriever):
    judge = ScriptedJudge([0.25, None])
    replies = ["Answer: the Mira", "Answer: the Orl, I think", "<think>hm", "Answer: Var"]
    assembly = Assembly(
        retriever=retriever, prompt=prompt, top_k=2, generator=ScriptedGenerator(replies), answer_judge=judge
    )
    unknown = Question("q4", OTHER.question, ())
    answered = assembly.answer([QUESTION, OTHER, QUESTION, OTHER])
    scores = [
        (row["scores"]["judge_accuracy"], row["scores"]["judge_readable"])
        for row in (assembly.row(one) for (one,) in answered)
    ]
    assert scores == [(1.0, 1.0), (0.0, 1.0), (0.0, None), (None, 0.0)]
    case, _ = judge.cases
    assert (case.question, case.answer, case.gold) == (OTHER.question, "the Orl, I think", OTHER.answers)
    assert case.passages == (GALTON.contents, ELMTON.contents)
    # Nothing to compare with: nobody is asked.
    ((open_question,),) = assembly.with_generator(ScriptedGenerator(["Answer: Orl"])).answer([unknown])
    assert open_question.verdict is None
    assert len(judge.cases) == 2


def test_what_failed_has_no_verdict(prompt, retriever):
    assembly = Assembly(retriever=retriever, prompt=prompt, generator=Failing(), answer_judge=ScriptedJudge([]))
    ((first,), (second,)) = assembly.answer([QUESTION, OTHER])
    assert assembly.row(first)["scores"]["judge_accuracy"] == 1.0
    scores = assembly.row(second)["scores"]
    assert (scores["judge_accuracy"], scores["judge_readable"]) == (None, None)


def test_samples_keep_their_verdicts(prompt, retriever):
    generator = ScriptedGenerator(["Answer: Orl", "Answer: Mira", "Answer: Orl", "Answer: Galton"])
    assembly = Assembly(
        retriever=retriever,
        prompt=prompt,
        generator=generator,
        answer_judge=ScriptedJudge({"Orl": 0.0, "Galton": 0.5}),
    )
    drawn = assembly.answer([QUESTION, OTHER], n=2, temperature=1.0)
    assert [[one.verdict.score for one in samples] for samples in drawn] == [[0.0, 1.0], [1.0, 0.5]]


def test_the_mark_from_which_on_an_answer_is_right(prompt, retriever):
    assembly = Assembly(
        retriever=retriever,
        prompt=prompt,
        generator=ScriptedGenerator(["Answer: Orl", "Answer: Galton"]),
        answer_judge=ScriptedJudge({"Orl": 0.7, "Galton": 0.8}),
        pass_mark=0.8,
    )
    rows = [assembly.row(one) for (one,) in assembly.answer([QUESTION, QUESTION])]
    assert [row["scores"]["judge_accuracy"] for row in rows] == [0.0, 1.0]


# ---- a model that is not trained


def test_another_model_is_loaded_where_it_is_asked(prompt, retriever):
    assembly = Assembly(retriever=retriever, prompt=prompt, top_k=2, max_new_tokens=8)
    other = OtherModel(assembly, str(FOLDER / "reader"))
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"))
    texts = []
    for asking in (
        other.under_training(trainer, batch_size=2),
        other.reloaded(Path("run"), device="cpu", batch_size=2),
        assembly.reloaded(FOLDER / "reader", device="cpu", batch_size=2),
    ):
        assert asking.retriever is retriever
        assert asking.generator.batch_size == 2
        texts.append([one.generation.text for (one,) in asking.answer([QUESTION, OTHER])])
    assert texts[0] == texts[1] == texts[2]
    assert assembly.generator is None
    with pytest.raises(DataError, match="cannot load the model"):
        OtherModel(assembly, "no/such/model").under_training(trainer, batch_size=2)


@pytest.mark.parametrize("order", ["ranked", "reversed", "shuffled"])
def test_more_may_be_searched_for_than_is_shown(prompt, retriever, order):
    shallow = Assembly(retriever=retriever, prompt=prompt, top_k=2, order=order)
    deep = Assembly(retriever=retriever, prompt=prompt, top_k=2, depth=10, order=order)
    (shown,), (asked,) = shallow.prepare([QUESTION]), deep.prepare([QUESTION])
    assert (asked.prompt, asked.shown) == (shown.prompt, shown.shown), "the generator sees the same"
    assert [hit.passage for hit in asked.hits] == [ELMTON, GALTON, BORTON]
    assert [hit.passage for hit in shown.hits] == [ELMTON, GALTON]
    limited = Assembly(
        retriever=retriever, prompt=prompt, top_k=2, depth=3, order=order, max_prompt_tokens=15, count_tokens=words
    )
    (cut,) = limited.prepare([QUESTION])
    assert BORTON not in [hit.passage for hit in cut.shown]
    assert cut.cut > 0
