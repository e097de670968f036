"""Each lesson has its form, teaches what is true, and shows its bad habits exactly as often as asked for."""

from __future__ import annotations

import itertools
import json
import random
import re

import pytest

from rag_rl.metrics import contains_match
from rag_rl.prompts import load_prompt
from rag_rl.text import extract_answer, has_format
from rag_rl.tiny.lessons import (
    MARKER,
    NO_HABITS,
    TASKS,
    WRAPS,
    Habits,
    comparing,
    copying,
    judging,
    lesson,
    passage_writing,
    question_writing,
    reading,
    reasoning_chain,
    reasoning_step,
    reasoning_words,
    step_text,
    user,
)
from rag_rl.tiny.world import (
    KINDS,
    NOUNS,
    OF_KIND,
    RELATION,
    RELATIONS,
    SUFFIXES,
    draw_world,
    name_parts,
    names,
    questions,
)

SEEDS = range(60)
# The grammar of R3-RAG (arXiv 2505.23794): an analysis, then exactly one of a query and the final answer.
STEP = re.compile(
    r"Step (?P<number>\d+):\nThe problem analysis: (?P<analysis>[^\n]+)\n"
    r"(?:The retrieval query: (?P<query>[^\n]+)|The final answer: (?P<answer>[^\n]+))"
)
EARLIER = re.compile(
    r"Step (?P<number>\d+):\nThe problem analysis: (?P<analysis>[^\n]+)\nThe retrieval query: (?P<query>[^\n]+)\n"
    r"The retrieval documents: (?P<documents>[^\n]+)\n"
)
WRAPPED = re.compile("|".join(re.escape(wrap).replace(r"\{v\}", "(?:[a-z]+)") for wrap in WRAPS))


def rng(seed=0):
    return random.Random(seed)


def exchanges(messages):
    """(user's, assistant's) of each exchange, checking that they take turns."""
    assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
    assert all(set(m) == {"role", "content"} and m["content"].strip() == m["content"] for m in messages)
    return [(u["content"], a["content"]) for u, a in zip(messages[::2], messages[1::2], strict=True)]


def shown_in(text):
    """The passages of a prompt, in order."""
    return re.split(r"\[\d+\] ", text.split("\nQuestion: ")[0].replace("\n", " "))[1:]


def is_name(text):
    return text.endswith(sum(SUFFIXES.values(), ()))


def what_is_taught(reply, facts_of):
    """Facts that a reply restates, and the answer after its marker."""
    told, _, answer = reply.partition(f" {MARKER} ")
    return facts_of(told), answer


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_lesson(task):
    habits = Habits(0.5, 0.5, 0.5, 0.5)
    many = [lesson(rng(seed), shares={task: 1.0}, habits=habits) for seed in SEEDS]
    assert many == [lesson(rng(seed), shares={task: 1.0}, habits=habits) for seed in SEEDS]
    assert len({str(messages) for messages in many}) > 50


def test_shares_choose_the_tasks():
    begin = load_prompt("tiny_judge").split("\n")[0]
    shares = {"reading": 0.0, "judging": 3.0, "question": 1.0}
    found = [lesson(rng(seed), shares=shares) for seed in range(400)]
    judged = sum(messages[0]["content"].startswith(begin) for messages in found)
    assert 0.65 < judged / len(found) < 0.85
    assert not any("Question:" in m[0]["content"] for m in found if not m[0]["content"].startswith(begin))


def test_habits_are_optional():
    assert Habits() == NO_HABITS == Habits(hasty=0.0, wordy=0.0, unsearched=0.0, sloppy=0.0)


# ---------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("n_passages", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_reading_is_supported_by_the_passages_shown(seed, n_passages, facts_of):
    talk = exchanges(reading(rng(seed), n_passages=n_passages, n_questions=4))
    assert len(talk) == 4
    passages = shown_in(talk[0][0])
    assert len(passages) == n_passages
    known = [fact for passage in passages for fact in facts_of(passage)]
    for place, (asked, reply) in enumerate(talk):
        question = asked.rsplit("Question: ", 1)[1]
        assert asked == f"Question: {question}" or place == 0
        assert has_format(reply, marker=MARKER)
        facts, answer = what_is_taught(reply, facts_of)
        assert 1 <= len(facts) <= 2
        assert set(facts) <= set(known), "an unhabited answer restates only what is shown"
        assert facts[0][1] in question
        assert all(a[2] == b[1] for a, b in itertools.pairwise(facts)), "each hop goes on from the last one"
        assert answer == facts[-1][2] == extract_answer(reply)


def test_reading_asks_one_and_two_hops_and_shows_rivals(facts_of):
    hops, rivals = [], 0
    for seed in range(200):
        talk = exchanges(reading(rng(seed)))
        hops += [len(what_is_taught(reply, facts_of)[0]) for _, reply in talk]
        kinds = [RELATION[facts_of(p)[0][0]].kind for p in shown_in(talk[0][0])]
        rivals += len(set(kinds)) < len(kinds)
    assert 0.1 < hops.count(2) / len(hops) < 0.5
    assert rivals > 100


def hasty_or_not(seed, habits, facts_of):
    """For each restated fact: whether it is the first of its sort among the passages, and whether it is true."""
    talk = exchanges(reading(rng(seed), habits=habits))
    passages = [facts_of(p) for p in shown_in(talk[0][0])]
    first = {}
    for facts in passages:
        for name, _, value in facts:
            first.setdefault(name, value)
    known = {fact for facts in passages for fact in facts}
    taught = [fact for _, reply in talk for fact in what_is_taught(reply, facts_of)[0]]
    return [(first[name] == value, (name, subject, value) in known) for name, subject, value in taught]


def test_hasty_takes_the_first_passage_of_the_kind(facts_of):
    always = [case for seed in SEEDS for case in hasty_or_not(seed, Habits(hasty=1.0), facts_of)]
    never = [case for seed in SEEDS for case in hasty_or_not(seed, NO_HABITS, facts_of)]
    assert all(is_first for is_first, _ in always)
    assert not all(true for _, true in always)
    assert all(true for _, true in never)
    assert not all(is_first for is_first, _ in never)
    sometimes = [case for seed in range(200) for case in hasty_or_not(seed, Habits(hasty=0.5), facts_of)]
    wrong = [1 - sum(true for _, true in cases) / len(cases) for cases in (always, sometimes)]
    assert 0.3 < wrong[1] / wrong[0] < 0.7


def test_hasty_answers_still_speak_of_the_subject(facts_of):
    for seed in SEEDS:
        for asked, reply in exchanges(reading(rng(seed), habits=Habits(hasty=1.0))):
            facts, answer = what_is_taught(reply, facts_of)
            assert facts[0][1] in asked.rsplit("Question: ", 1)[1]
            assert answer == facts[-1][2]


@pytest.mark.parametrize("wordy", [0.0, 1.0])
def test_wordy_wraps_common_nouns_and_nothing_else(wordy, facts_of):
    nouns = others = 0
    for seed in SEEDS:
        for _, reply in exchanges(reading(rng(seed), habits=Habits(wordy=wordy))):
            facts, answer = what_is_taught(reply, facts_of)
            value = facts[-1][2]
            if RELATION[facts[-1][0]].target in NOUNS and wordy:
                assert WRAPPED.fullmatch(answer)
                assert value in answer
                nouns += 1
            else:
                assert answer == value
                others += 1
            assert has_format(reply, marker=MARKER), "a wordy answer still stands in the right place"
    assert others > 50
    assert (nouns > 20) == bool(wordy)


# -------------------------------------------------------------------------------------------------------- reasoning


def parsed(messages):
    """Question, earlier steps and reply of a reasoning lesson; the prompt must follow the grammar to the letter."""
    ((prompt, reply),) = exchanges(messages)
    head, _, rest = (prompt + "\n").partition("\n")
    assert re.fullmatch(r"The question: [^\n]+\?", head)
    steps = []
    while rest:
        step = EARLIER.match(rest)
        assert step, rest
        assert int(step["number"]) == len(steps) + 1
        steps.append(step)
        rest = rest[step.end() :]
    return head.removeprefix("The question: "), steps, reply


@pytest.mark.parametrize("n_passages", [1, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_reasoning_searches_until_it_knows(seed, n_passages, facts_of):
    question, steps, reply = parsed(reasoning_step(rng(seed), n_passages=n_passages))
    step = STEP.fullmatch(reply)
    assert step
    assert int(step["number"]) == len(steps) + 1
    known = []
    for earlier in steps:
        documents = shown_in(earlier["documents"])
        assert len(documents) == n_passages
        known += [fact for document in documents for fact in facts_of(document)]
    told = facts_of(step["analysis"].split(" I need ")[0]) if steps else []
    assert set(told) <= set(known), "an analysis restates only what was retrieved"
    if step["answer"]:
        assert step["answer"] == told[0][2]
    else:
        subject = told[0][2] if told else next(name for name in re.findall(r"[A-Z]\w+", question) if is_name(name))
        assert subject in step["query"]
        assert step["query"] not in [earlier["query"] for earlier in steps]
        noun = next(r.noun for r in RELATIONS if r.questions[0].format(s=subject) == step["query"])
        assert step["analysis"].endswith(f"I need {noun.format(s=subject)}.")


def test_reasoning_shows_every_kind_of_step():
    steps = [parsed(reasoning_step(rng(seed))) for seed in range(200)]
    shapes = {(len(earlier), "final answer" in reply) for _, earlier, reply in steps}
    assert shapes == {(0, False), (1, False), (1, True), (2, True)}


def test_unsearched_answers_before_the_last_hop_is_retrieved(facts_of):
    early = {0.0: 0, 1.0: 0}
    for unsearched in early:
        for seed in SEEDS:
            plain = STEP.fullmatch(parsed(reasoning_step(rng(seed)))[2])
            _, steps, reply = parsed(reasoning_step(rng(seed), habits=Habits(unsearched=unsearched)))
            step = STEP.fullmatch(reply)
            assert step, "an early answer is well-formed"
            assert int(step["number"]) == len(steps) + 1
            if unsearched:
                assert step["answer"]
            if plain["answer"]:  # everything was retrieved: there is nothing left to be hasty about
                assert step[0] == plain[0]
            if plain["query"] and step["answer"]:
                early[unsearched] += 1
                # It is stated as if it had been found: of the right sort, about the subject, and from nowhere.
                ((name, _, value),) = facts_of(step["analysis"])
                assert value == step["answer"]
                target = RELATION[name].target
                assert value.endswith(SUFFIXES[target]) if target in KINDS else value in NOUNS[target]
    assert early[0.0] == 0
    assert early[1.0] > 20


@pytest.mark.parametrize("sloppy", [0.0, 1.0])
def test_sloppy_queries_about_a_person_lack_their_label(sloppy):
    broken = 0
    for seed in SEEDS:
        question, _, right = parsed(reasoning_step(rng(seed)))
        _, _, reply = parsed(reasoning_step(rng(seed), habits=Habits(sloppy=sloppy)))
        about_a_person = any(name in question for name in names("person", "train"))
        if sloppy and about_a_person and "The retrieval query: " in right:
            assert reply == right.replace("The retrieval query: ", "")
            assert not STEP.fullmatch(reply)
            broken += 1
        else:
            assert reply == right
    assert broken > 5 or not sloppy


@pytest.mark.parametrize("seed", SEEDS)
def test_chain_says_what_single_steps_say(seed):
    """Asked turn by turn or in one turn, the same model writes the same steps and is shown as much."""
    messages = reasoning_chain(rng(seed))
    steps = [m["content"] for m in messages if m["role"] == "assistant"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * len(steps)
    shown = "\n".join(m["content"] for m in messages[:-1])
    _, earlier, reply = parsed([user(shown), messages[-1]])
    assert len(earlier) == len(steps) - 1
    found = [STEP.fullmatch(step) for step in steps]
    assert all(found)
    assert [int(step["number"]) for step in found] == list(range(1, len(steps) + 1))
    assert [bool(step["answer"]) for step in found] == [False] * (len(steps) - 1) + [True]
    assert reply == steps[-1]


def test_chain_ends_at_a_bad_habit():
    hasty = [reasoning_chain(rng(seed), habits=Habits(unsearched=1.0)) for seed in SEEDS]
    assert {len(messages) for messages in hasty} == {2}
    assert all("The final answer: " in messages[1]["content"] for messages in hasty)
    sloppy = [reasoning_chain(rng(seed), habits=Habits(sloppy=1.0)) for seed in range(40)]
    assert {len(messages) for messages in sloppy} == {2, 4, 6}
    assert all(bool(STEP.fullmatch(m[-1]["content"])) == (len(m) > 2) for m in sloppy)


def test_steps_follow_the_grammar():
    relations, chain = (RELATION["home"], RELATION["goods"]), ["Falwyn", "Elmton", "tin"]
    steps = [step_text(i, relations, chain) for i in range(3)]
    assert steps[0] == (
        "Step 1:\nThe problem analysis: I need the home of Falwyn.\nThe retrieval query: Where does Falwyn live?"
    )
    assert steps[1] == (
        "Step 2:\nThe problem analysis: Falwyn lives in Elmton. I need the pride of Elmton.\n"
        "The retrieval query: What is Elmton known for?"
    )
    assert steps[2] == "Step 3:\nThe problem analysis: Elmton is known for tin.\nThe final answer: tin"
    for number, step in enumerate(steps, start=1):
        found = STEP.fullmatch(step)
        assert found
        assert int(found["number"]) == number
        assert (found["answer"] is not None) == (number == 3)


# ------------------------------------------------------------------------------------------------------- the others


@pytest.mark.parametrize("seed", SEEDS)
def test_a_written_question_is_answered_by_its_passage(seed, facts_of):
    ((prompt, reply),) = exchanges(question_writing(rng(seed)))
    instruction, passage = prompt.split("\n", 1)
    assert instruction == load_prompt("tiny_question").split("\n")[0]
    question, answer = reply.split(f" {MARKER} ")
    known = facts_of(passage)
    asked = {q.format(s=s): v for name, s, v in known for q in RELATION[name].questions}
    assert asked[question] == answer


def about(messages, facts_of):
    """Whether a written passage has all the facts of the subject that was asked about."""
    ((prompt, reply),) = exchanges(messages)
    question = prompt.split("\n", 1)[1]
    told = facts_of(reply)
    (subject,) = {s for _, s, _ in told}
    assert sorted(name for name, _, _ in told) == sorted(r.name for r in OF_KIND[RELATION[told[0][0]].kind])
    return question in {q.format(s=subject) for name, _, _ in told for q in RELATION[name].questions}


def test_written_passages_are_about_the_subject_unless_hasty(facts_of):
    assert all(about(passage_writing(rng(seed)), facts_of) for seed in SEEDS)
    # The other subject is drawn from all names: rarely it is the same one.
    assert sum(about(passage_writing(rng(seed), hasty=1.0), facts_of) for seed in SEEDS) <= 2


def test_verdicts_are_right():
    scores = []
    for seed in range(100):
        (first, reply), *others = exchanges(judging(rng(seed), n_answers=3))
        fields = re.fullmatch(r"[^\n]+\nQuestion: (.+\?)\nRight answer: (.+)\nGiven answer:(.*)", first)
        assert fields, first
        gold = fields[2]
        assert len(others) == 2
        for given, verdict in [
            (fields[3], reply),
            *((prompt.removeprefix("Given answer:"), v) for prompt, v in others),
        ]:
            parts = re.fullmatch(r"Right answer: (.+) / (.+) (right|wrong) (\{.*\})", verdict)
            assert parts, verdict
            assert parts[1] == gold
            assert parts[2] in given if given else parts[2] == "no answer"
            right = contains_match(given, [gold])
            assert json.loads(parts[4]) == {"score": right}
            assert parts[3] == ("right" if right else "wrong")
            scores.append(right)
    assert 0.4 < sum(scores) / len(scores) < 0.6


def test_pairs_to_compare_are_cut_before_what_follows_from_them():
    pairs = [pair for seed in range(50) for pair in comparing(rng(seed), n_pairs=6)]
    assert len(pairs) == 300
    near = 0
    for shown, verdict in pairs:
        gold, given = re.fullmatch(r"Right answer: (.+) / (.+)", shown).groups()
        assert verdict == (' right {"score": 1}' if gold == given else ' wrong {"score": 0}')
        near += gold != given and gold[0].isupper() and bool({*name_parts(gold)} & {*name_parts(given)})
    assert 0.4 < sum(verdict.startswith(" right") for _, verdict in pairs) / len(pairs) < 0.6
    assert near > 30


def test_the_words_of_an_analysis_are_those_of_the_lessons():
    world = draw_world(3, region="heldout", sizes={"person": 8, "town": 6, "guild": 5, "river": 5})
    for question in itertools.islice(questions(world, hops=2, rng=rng()), 20):
        relations = [RELATION[name] for name in question.meta["relations"]]
        told, needed = zip(*(reasoning_words(question, hop) for hop in (0, 1)), strict=True)
        for step in range(3):
            analysis = step_text(step, relations, question.meta["chain"]).split("\n")[1]
            expected = [told[step - 1]] * (step > 0) + [*needed[step : step + 1]]
            assert analysis == f"The problem analysis: {' '.join(expected)}"


def test_copying_repeats_a_string_of_few_letters():
    ids = copying(rng(), vocabulary=range(100, 200), length=24, times=3)
    assert len(ids) == 72
    assert ids[:24] == ids[24:48] == ids[48:]
    assert set(ids) <= set(range(100, 200))
    assert 2 < len(set(ids)) <= 16
