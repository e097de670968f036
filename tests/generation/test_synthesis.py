"""Writing queries for passages: what is drawn, what is asked, how replies are read, what is kept."""

from __future__ import annotations

from collections import Counter

import pytest

from rag_rl.errors import ConfigError, DataError
from rag_rl.generation import ScriptedGenerator
from rag_rl.generation.synthesis import (
    PROBLEMS,
    AnswerCheck,
    Draft,
    GeneratorWriter,
    RelevanceCheck,
    SentenceWriter,
    Unit,
    Wish,
    choose_passages,
    content_words,
    draw_wish,
    holds,
    in_bucket,
    parse_draft,
    synthesize,
)
from rag_rl.prompts.tasks import RetrievalTask, load_task
from rag_rl.types import Generation, Passage

TASK = load_task("default")
MIRA = Passage("d1", "Mira rules Elmton since 1842.", "Elmton")
WISH = Wish("5-10", "plain")
PASSAGES = [Passage(f"d{i}", f"Town {i} lies on the river {i}.") for i in range(200)]


class Failing:
    """A generator whose every request fails for itself alone."""

    def generate(self, prompts, **options):
        return [[Generation("timed out", finish_reason="error")] for _ in prompts]


# ------------------------------------------------------------------------------------------------------------- choice


def test_choice_does_not_depend_on_the_order_of_the_corpus():
    chosen, repeated = choose_passages(PASSAGES, 20, seed=3)
    assert (len(chosen), repeated) == (20, 0)
    assert choose_passages(reversed(PASSAGES), 20, seed=3)[0] == chosen
    assert choose_passages(iter(PASSAGES), 200, seed=3)[0][:20] == chosen
    assert choose_passages(PASSAGES, None, seed=3)[0][:20] == chosen
    assert choose_passages(PASSAGES, 20, seed=4)[0] != chosen


def test_of_equal_texts_one_is_taken():
    copies = [Passage(f"x{i}", PASSAGES[0].text) for i in range(3)]
    chosen, repeated = choose_passages([*PASSAGES[:2], *copies], 10, seed=0)
    assert ({p.doc_id for p in chosen}, repeated) == ({"d0", "d1"}, 3)


def test_nothing_to_choose_from():
    with pytest.raises(DataError, match="holds no passage"):
        choose_passages([], 5, seed=0)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        choose_passages(PASSAGES, 0, seed=0)


def test_wishes_have_the_weights_of_the_task():
    wishes = [draw_wish(TASK, Unit(p, n), seed=0) for p in PASSAGES for n in range(30)]
    lengths, styles = Counter(w.length for w in wishes), Counter(w.style for w in wishes)
    for found, weights in ((lengths, TASK.lengths), (styles, TASK.styles)):
        total = sum(weights.values())
        assert {key: n / 6000 for key, n in found.items()} == pytest.approx(
            {key: weight / total for key, weight in weights.items()}, abs=0.02
        )
    assert {w.supported for w in wishes} == {None}
    assert draw_wish(TASK, Unit(MIRA), seed=1) == draw_wish(TASK, Unit(MIRA), seed=1)


def test_half_of_all_claims_are_refuted():
    task = load_task("scifact")
    wishes = [draw_wish(task, Unit(p), seed=0) for p in PASSAGES]
    assert 0.4 < sum(bool(w.supported) for w in wishes) / 200 < 0.6
    assert {w.length for w in wishes} == {"10-15", ">=15"}


# ------------------------------------------------------------------------------------------------------------ replies


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("who rules Elmton?", Draft("who rules Elmton?")),
        ('Query: "who rules Elmton?"', Draft("who rules Elmton?")),
        ("**Question:** who rules?", Draft("who rules?")),
        ("Here is a question:\n\nwho rules Elmton?\n", Draft("who rules Elmton?")),
        ("<think>hm\nwhat?</think>who rules?", Draft("who rules?")),
        ("who rules? Answer: Mira", Draft("who rules?")),
        ("", Draft("", problem="empty")),
        ("?!", Draft("", problem="empty")),
        ("<think>who rules?", Draft("", problem="empty")),
    ],
)
def test_reading_a_query(reply, expected):
    assert parse_draft(reply, with_answer=False) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Question: who rules?\nAnswer: Mira\nI hope this helps.", Draft("who rules?", "Mira")),
        ("who rules? Answer: Mira", Draft("who rules?", "Mira")),
        ("who rules?", Draft("who rules?", problem="no_answer")),
        ("who rules? Answer:", Draft("who rules?", problem="no_answer")),
        ("who rules? Answer: the", Draft("who rules?", "the", "no_answer")),
        ("Answer: Mira", Draft("", problem="empty")),
    ],
)
def test_reading_a_query_with_its_answer(reply, expected):
    assert parse_draft(reply, with_answer=True) == expected


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Mira rules.", "mira", True),
        ("Mira rules.", "rules Mira", False),
        ("Mirabel", "Mira", False),
        ("a", "a", False),
    ],
)
def test_holding_an_answer(text, answer, expected):
    assert holds(text, answer) is expected


@pytest.mark.parametrize(
    ("bucket", "inside", "outside"), [("<5", (1, 4), (5,)), ("5-10", (5, 9), (4, 10)), (">=15", (15, 40), (14,))]
)
def test_buckets(bucket, inside, outside):
    assert all(in_bucket("word " * n, bucket) for n in inside)
    assert not any(in_bucket("word " * n, bucket) for n in outside)


# ------------------------------------------------------------------------------------------------------------ writers


def test_what_is_asked():
    task = RetrievalTask("t", "Find it.", "riddle", "rhyme", examples=("what flies?", "what swims?"))
    generator = ScriptedGenerator(["who rules?"])
    writer = GeneratorWriter(generator, task, max_passage_chars=12)
    assert writer.write([MIRA], [Wish("<5", "casual", False)], seed=0) == [Draft("who rules?")]
    content = generator.prompts[0][0]["content"]
    for part in ("Find it.", "Write one riddle that this rhyme serves", "Length: fewer than 5 words", "Style: casual",
                 "The passage refutes it", "- what flies?\n- what swims?", "Elmton\nMira \n"):  # fmt: skip
        assert part in content, part


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("Question: who rules Elmton?\nAnswer: Mira", ""),
        ("Question: who rules Elmton?\nAnswer: Falbert", "answer_not_in_passage"),
        ("Question: does Mira rule Elmton?\nAnswer: Mira", "answer_in_query"),
        ("Question: who rules Elmton?", "no_answer"),
    ],
)
def test_answers_must_stand_in_the_passage(reply, problem):
    writer = GeneratorWriter(ScriptedGenerator([reply]), TASK, prompt="synthesize_query_answer", with_answers=True)
    (draft,) = writer.write([MIRA], [WISH], seed=0)
    assert draft.problem == problem
    assert problem in ("", *PROBLEMS)


def test_a_failed_request_is_a_problem_of_its_own():
    assert GeneratorWriter(Failing(), TASK).write([MIRA], [WISH], seed=0) == [Draft("", problem="failed")]
    assert RelevanceCheck(Failing(), TASK).problems([MIRA], [Draft("q")]) == ["failed"]
    assert AnswerCheck(Failing()).problems([MIRA], [Draft("q", "Mira")]) == ["failed"]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("What is the guild of Waladric?", "guild Waladric"),
        ("Where is the ferry of Tamsabeck?", "ferry Tamsabeck"),
        ("Who leads 'Dunahold', please?", "leads Dunahold please"),
        ("who is it?", "who is it?"),
        ("Café (1842)?", "Café 1842"),
    ],
)
def test_keywords(query, expected):
    assert content_words(query) == expected


def test_sentences():
    passage = Passage("d", "One two three. A sentence of six whole words! " + "long " * 30 + ".")
    found = {SentenceWriter().write([passage], [Wish("5-10", "plain")], seed=seed)[0].query for seed in range(20)}
    assert found == {"A sentence of six whole words!", " ".join(["long"] * 9)}
    # Where no sentence is long enough, any will do.
    (short,) = SentenceWriter().write([Passage("d", "One two.")], [Wish(">=15", "plain")], seed=0)
    assert short == Draft("One two.")
    assert SentenceWriter().write([Passage("d", " ")], [WISH], seed=0)[0].problem == "empty"


# ------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("1", ""),
        ("0", "irrelevant"),
        ("I looked at 10 things: 0", "irrelevant"),  # holds the character 1
        ("<think>0</think> 1.", ""),
        ("yes", "unreadable_check"),
        ("2021", "unreadable_check"),
    ],
)
def test_relevance(reply, problem):
    generator = ScriptedGenerator([reply])
    assert RelevanceCheck(generator, TASK).problems([MIRA], [Draft("who rules?")]) == [problem]
    assert "The query (question): who rules?" in generator.prompts[0][0]["content"]


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ("Answer: Mira", ""),
        ("Answer: I think it is Mira, of course.", ""),
        ("Answer: Falbert", "not_confirmed"),
        ("Answer:", "not_confirmed"),
    ],
)
def test_answers_are_confirmed_by_a_reader(reply, problem):
    generator = ScriptedGenerator([reply])
    assert AnswerCheck(generator).problems([MIRA], [Draft("who rules Elmton?", "Mira")]) == [problem]
    assert "[1] Elmton\nMira rules" in generator.prompts[0][0]["content"]


# -------------------------------------------------------------------------------------------------------- whole batch


def test_what_does_not_pass_is_written_again():
    replies = ["who rules Elmton?", "", "what?", "who sings?"]
    # Drafts of both, a verdict on the first; a second draft of the other, and its verdict.
    generator = ScriptedGenerator([replies[0], replies[1], "1", replies[3], "0"])
    units = [Unit(MIRA), Unit(PASSAGES[0])]
    found = synthesize(units, GeneratorWriter(generator, TASK), [RelevanceCheck(generator, TASK)], TASK)
    assert [(one.unit, one.draft.query, one.outcome, one.attempts) for one in found] == [
        (units[0], "who rules Elmton?", "kept", 1),
        (units[1], "who sings?", "irrelevant", 2),
    ]
    with pytest.raises(DataError, match="used up"):
        generator.generate(["more"], max_new_tokens=1, temperature=0.0)


def test_nothing_is_checked_that_has_a_problem():
    generator = ScriptedGenerator(["", ""])
    (found,) = synthesize(
        [Unit(MIRA)], GeneratorWriter(generator, TASK), [RelevanceCheck(generator, TASK)], TASK, attempts=2
    )
    assert (found.outcome, found.attempts) == ("empty", 2)


def test_attempts_are_sampled_anew_and_the_same_the_next_time():
    seeds = []

    class Noting:
        def write(self, passages, wishes, *, seed):
            seeds.append(seed)
            return [Draft("", problem="empty") for _ in passages]

    for _ in range(2):
        synthesize([Unit(MIRA)], Noting(), [], TASK, attempts=3, seed=1)
    assert len(set(seeds[:3])) == 3
    assert seeds[:3] == seeds[3:]
    assert all(0 <= seed < 2**31 for seed in seeds)  # what torch and endpoints take


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: GeneratorWriter(Failing(), TASK, prompt=path("$query_type")), r"has no \$passage"),
        (lambda path: GeneratorWriter(Failing(), TASK, prompt=path("$passage $qury")), r"asks for \$qury"),
        (lambda path: GeneratorWriter(Failing(), TASK, prompt="nothing"), "no such file"),
        (lambda path: RelevanceCheck(Failing(), TASK, prompt=path("$answer")), r"asks for \$answer"),
        (lambda path: AnswerCheck(Failing(), prompt=path("$query")), r"asks for \$query"),
        (lambda path: synthesize([], SentenceWriter(), [], TASK, attempts=0), "at least 1, got 0"),
    ],
)
def test_what_does_not_fit(tmp_path, make, message):
    def path(text):
        (tmp_path / "mine.txt").write_text(text)
        return str(tmp_path / "mine.txt")

    with pytest.raises(ConfigError, match=message):
        make(path)
