from __future__ import annotations

import asyncio
import json
import logging
import random
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import pytest

from rag_rl.errors import BackendError, ConfigError
from rag_rl.judges import (
    Budget,
    BudgetExceededError,
    ChatError,
    LLMJudge,
    OpenAIChat,
    Reply,
    Rubric,
    VerdictCache,
    VerdictLog,
)
from rag_rl.types import Judge, JudgeCase, Verdict


class OneScore:
    """Asks for each case alone: ``{"score": ...}``."""

    name = "one_score"

    def __init__(self, version="1"):
        self.version = version

    def group(self, cases):
        return [[i] for i in range(len(cases))]

    def prompt(self, cases):
        return f"{cases[0].question}|{cases[0].answer}"

    def parse(self, reply, cases):
        return [Verdict(json.loads(reply)["score"], "read")]


class Ranking(OneScore):
    """Asks for all answers to a question together: ``{"scores": [...]}``."""

    name = "ranking"

    def group(self, cases):
        groups = {}
        for i, case in enumerate(cases):
            groups.setdefault(case.question, []).append(i)
        return list(groups.values())

    def prompt(self, cases):
        return f"{cases[0].question}|{','.join(case.answer for case in cases)}"

    def parse(self, reply, cases):
        return [Verdict(score) for score in json.loads(reply)["scores"]]


class Scripted:
    """A chat in this process: ``reply(prompt, number)`` gives a text, a Reply or an error; it may be a coroutine."""

    model = "script"

    def __init__(self, reply, name="script at nowhere"):
        self.name = name
        self.prompts = []
        self._reply = reply

    async def complete(self, prompt):
        self.prompts.append(prompt)
        reply = self._reply(prompt, len(self.prompts) - 1)
        if asyncio.iscoroutine(reply):
            reply = await reply
        if isinstance(reply, Exception):
            raise reply
        return reply if isinstance(reply, Reply) else Reply(reply, 10, 5)


def right_score(prompt):
    return zlib.crc32(prompt.encode()) % 11 / 10


def scored(prompt, number=0):
    return json.dumps({"score": right_score(prompt)})


def cases_of(count, question="q"):
    return [JudgeCase(question, f"a{i}") for i in range(count)]


def expected(cases):
    return [Verdict(right_score(f"{case.question}|{case.answer}"), "read") for case in cases]


@pytest.fixture
def judge_of():
    judges = []

    def make(chat, rubric=None, **settings):
        judges.append(LLMJudge(chat, rubric or OneScore(), **settings))
        return judges[-1]

    yield make
    for judge in judges:
        judge.close()


def run(judge, cases):
    return asyncio.run(judge.judge(cases))


def served(server, **settings):
    async def no_pause(seconds):
        await asyncio.sleep(0)

    return OpenAIChat("m", base_url=server.url, **{"sleep": no_pause, "seed": 0, **settings})


def test_verdicts_come_in_the_order_of_the_cases(chat_server, judge_of):
    async def some_late(request):
        await asyncio.sleep(0.03 if request.number % 3 == 0 else 0.0)
        return scored(request.text)

    judge = judge_of(served(chat_server(some_late)))
    assert isinstance(judge, Judge)
    assert isinstance(judge.rubric, Rubric)
    cases = cases_of(60)
    assert run(judge, cases) == expected(cases)
    assert run(judge, []) == []
    assert judge.asked == 60


def test_several_loops_at_once_and_one_after_another(chat_server, judge_of):
    """As under TRL: rewards awaited together on the loop of a daemon thread, and evaluation from other loops."""
    judge = judge_of(served(chat_server(lambda request: scored(request.text))))
    rows = [cases_of(20, question=f"q{i}") for i in range(6)]

    async def together(some):
        return await asyncio.gather(*(judge.judge(row) for row in some))

    daemon = asyncio.new_event_loop()
    thread = threading.Thread(target=daemon.run_forever, daemon=True)
    thread.start()
    pending = asyncio.run_coroutine_threadsafe(together(rows[:2]), daemon)
    found = asyncio.run(together(rows[2:4]))
    found = pending.result(30.0) + found + asyncio.run(together(rows[4:]))
    daemon.call_soon_threadsafe(daemon.stop)
    thread.join()
    daemon.close()
    assert found == [expected(row) for row in rows]
    assert len([one for one in threading.enumerate() if one.name == "llm-judge"]) == 1


def test_a_closed_judge_starts_anew(chat_server, judge_of):
    judge = judge_of(served(chat_server(lambda request: scored(request.text))), concurrency=2)
    cases = cases_of(8)
    for _ in range(2):
        assert run(judge, cases) == expected(cases)
        judge.close()
        assert not [one for one in threading.enumerate() if one.name == "llm-judge"]


@pytest.mark.parametrize("left", ["", "asyncio.run(impatient(judge, [JudgeCase('hang', 'a')]))"])
def test_the_interpreter_ends_without_a_word(chat_server, left):
    async def answer(request):
        if request.text.startswith("hang"):
            await asyncio.sleep(60.0)
        return '{"score": 1}'

    program = f"""
    import asyncio, json
    from rag_rl.judges import LLMJudge, OpenAIChat
    from rag_rl.types import JudgeCase, Verdict

    class OneScore:
        name, version = "one_score", "1"
        def group(self, cases): return [[i] for i in range(len(cases))]
        def prompt(self, cases): return cases[0].question
        def parse(self, reply, cases): return [Verdict(json.loads(reply)["score"])]

    async def impatient(judge, cases):
        future = judge._thread.submit(judge._judge(cases))
        await asyncio.sleep(0.2)

    judge = LLMJudge(OpenAIChat("m", base_url={chat_server(answer).url!r}), OneScore())
    print(asyncio.run(judge.judge([JudgeCase("q", "a")] * 2)))
    {left}
    """
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert (done.returncode, done.stdout) == (0, f"{[Verdict(1, '')] * 2}\n")


def test_the_cap_is_reached_and_never_exceeded(chat_server, judge_of):
    """No answer before ``concurrency`` requests are in flight; later ones come as soon as a place is free."""
    full = asyncio.Event()

    async def answer(request):
        if request.number == 7:
            full.set()
        await asyncio.wait_for(full.wait(), 10.0)
        await asyncio.sleep(0.005)
        return scored(request.text)

    server = chat_server(answer)
    judge = judge_of(served(server), concurrency=8)
    rows = [cases_of(40, question=f"q{i}") for i in range(3)]

    async def together():
        return await asyncio.gather(*(judge.judge(row) for row in rows))

    assert asyncio.run(together()) == [expected(row) for row in rows]
    assert server.most_in_flight == 8


def test_a_slow_case_holds_up_no_other(chat_server, judge_of):
    """The first case is answered last of all: no waiting in step."""
    answered = 0
    last = asyncio.Event()

    async def answer(request):
        nonlocal answered
        if request.text == "q|a0":
            await asyncio.wait_for(last.wait(), 10.0)
        else:
            answered += 1
            if answered == 99:
                last.set()
        return scored(request.text)

    cases = cases_of(100)
    assert run(judge_of(served(chat_server(answer)), concurrency=4), cases) == expected(cases)


def test_an_unreadable_reply_is_asked_again(judge_of, tmp_path):
    log = VerdictLog(tmp_path / "log.jsonl")
    chat = Scripted(lambda prompt, number: ["well...", '{"score": 7}', '{"score": 0.5}'][number])
    judge = judge_of(chat, log=log)
    assert run(judge, cases_of(1)) == [Verdict(0.5, "read")]
    assert (judge.asked, judge.unreadable) == (3, 0)
    (row,) = map(json.loads, log.path.read_text().splitlines())
    assert (row["attempts"], row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (3, 3, 30, 15)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no idea", "unreadable after 2 replies: Expecting value"),
        ('{"score": 1.5}', r"unreadable after 2 replies: the score 1.5 is not in [0, 1]"),
        ('{"score": NaN}', r"unreadable after 2 replies: the score nan is not in [0, 1]"),
    ],
)
def test_what_stays_unreadable_has_no_score_and_a_reason(judge_of, text, reason):
    cache = VerdictCache()
    chat = Scripted(lambda prompt, number: text if prompt == "q|a1" else scored(prompt))
    judge = judge_of(chat, attempts=2, cache=cache)
    cases = cases_of(3)
    verdicts = run(judge, cases)
    assert [verdicts[0], verdicts[2]] == [expected(cases)[0], expected(cases)[2]]
    assert verdicts[1].score is None
    assert verdicts[1].reason.startswith(reason)
    assert Counter(chat.prompts) == {"q|a0": 1, "q|a1": 2, "q|a2": 1}
    assert len(cache) == 2
    assert run(judge, cases) == verdicts
    assert Counter(chat.prompts) == {"q|a0": 1, "q|a1": 4, "q|a2": 1}
    assert judge.unreadable == 2


def test_a_reply_that_was_cut_is_told_as_such(judge_of):
    judge = judge_of(Scripted(lambda *_: Reply('{"sco', finish_reason="length")), attempts=1)
    assert run(judge, cases_of(1))[0].reason.endswith("(the reply was cut at its token limit)")


def test_many_unreadable_replies_in_a_row_are_told_once(judge_of, caplog):
    judge = judge_of(Scripted(lambda *_: "no"), attempts=1)
    with caplog.at_level(logging.WARNING, logger="rag_rl"):
        verdicts = run(judge, cases_of(50))
    assert {verdict.score for verdict in verdicts} == {None}
    assert caplog.text.count("the replies on 20 cases in a row could not be read by rubric one_score") == 1


def test_a_failed_call_has_no_score_and_the_cause(chat_server, judge_of):
    def answer(request):
        if request.text == "q|a1":
            return {"status": 500, "body": {"error": {"message": "overloaded"}}}
        return scored(request.text)

    server = chat_server(answer)
    judge = judge_of(served(server, max_retries=2))
    cases = cases_of(3)
    first, failed, last = run(judge, cases)
    assert [first, last] == [expected(cases)[0], expected(cases)[2]]
    assert failed == Verdict(None, f"m at {server.url}: no answer after 3 requests: HTTP 500: overloaded")
    assert (judge.failed, judge.unreadable) == (1, 0)


def test_failures_in_a_row_stop_the_run_with_endpoint_and_cause(judge_of):
    chat = Scripted(lambda prompt, number: ChatError("m at http://host/v1: no answer: HTTP 503"))
    judge = judge_of(chat, concurrency=1)
    assert {verdict.score for verdict in run(judge, cases_of(19))} == {None}
    with pytest.raises(BackendError) as caught:
        run(judge, cases_of(100))
    assert (
        str(caught.value)
        == "20 calls of the judge in a row failed, the last: m at http://host/v1: no answer: HTTP 503"
    )
    assert not isinstance(caught.value, ChatError)
    assert len(chat.prompts) == 20


def test_a_success_between_starts_the_count_anew(judge_of):
    def every_fifth(prompt, number):
        return scored(prompt) if number % 5 == 4 else ChatError("no answer")

    chat = Scripted(every_fifth)
    verdicts = run(judge_of(chat, concurrency=1, max_failed_in_a_row=5), cases_of(100))
    assert sum(verdict.score is None for verdict in verdicts) == 80


def test_an_endpoint_that_goes_away_stops_the_run(chat_server, judge_of):
    server = chat_server(lambda request: scored(request.text))
    judge = judge_of(served(server, max_retries=1))
    cases = cases_of(5)
    assert run(judge, cases) == expected(cases)
    server.close()
    with pytest.raises(
        BackendError, match=rf"20 calls .* m at {server.url}: no answer after 2 requests: the connection"
    ):
        run(judge, cases_of(100, "later"))


def test_a_fatal_answer_stops_at_once_and_calls_the_others_off(chat_server, judge_of):
    async def answer(request):
        if request.number == 3:
            return {"status": 401, "body": {"error": {"message": "who are you?"}}}
        await asyncio.sleep(60.0)
        return ""

    server = chat_server(answer)
    started = time.monotonic()
    with pytest.raises(BackendError, match=rf"m at {server.url}: HTTP 401: who are you\?; check the key"):
        run(judge_of(served(server), concurrency=8), cases_of(200))
    assert time.monotonic() - started < 10.0
    assert len(server.requests) <= 9
    end = time.monotonic() + 5.0
    while server.in_flight and time.monotonic() < end:
        time.sleep(0.01)
    assert server.in_flight == 0


def test_a_rubric_that_forgets_a_case_is_a_bug_and_no_verdict(judge_of):
    class Forgetful(OneScore):
        def group(self, cases):
            return [[0]]

    with pytest.raises(ValueError, match=r"'one_score' must put each of 2 cases into one group, got \[\[0\]\]"):
        run(judge_of(Scripted(scored), Forgetful()), cases_of(2))


@pytest.mark.parametrize("setting", ["concurrency", "attempts", "max_failed_in_a_row"])
def test_settings_out_of_range(setting):
    with pytest.raises(ConfigError, match=f"judge_{setting} must be at least 1, got 0"):
        LLMJudge(Scripted(scored), OneScore(), **{setting: 0})


def test_nothing_is_asked_twice(judge_of, tmp_path):
    chat = Scripted(scored)
    path = tmp_path / "verdicts.sqlite3"
    cases = cases_of(10)
    judge = judge_of(chat, cache=VerdictCache(path))
    assert run(judge, cases + cases[:5] + cases) == expected(cases + cases[:5] + cases)
    assert Counter(chat.prompts) == {f"q|a{i}": 1 for i in range(10)}
    again = judge_of(Scripted(scored), cache=VerdictCache(path))
    assert run(again, cases_of(12)) == expected(cases_of(12))
    assert sorted(again.chat.prompts) == ["q|a10", "q|a11"]
    assert (again.asked, again.from_cache) == (2, 10)


def test_identical_cases_of_a_batch_are_asked_once_without_a_cache_too(judge_of):
    chat = Scripted(scored)
    judge = judge_of(chat)
    assert run(judge, cases_of(2) * 3) == expected(cases_of(2) * 3)
    assert len(chat.prompts) == 2


@pytest.mark.parametrize("changed", ["model", "version", "name", "fingerprint"])
def test_another_judge_or_rubric_asks_anew(judge_of, changed):
    cache = VerdictCache()
    run(judge_of(Scripted(scored), cache=cache), cases_of(3))
    chat, rubric = Scripted(scored), OneScore()
    setattr(rubric if changed == "version" else chat, changed, "another")
    run(judge_of(chat, rubric, cache=cache), cases_of(3))
    assert len(chat.prompts) == 3
    assert len(cache) == 6


def test_a_name_of_its_own_outlives_a_change_of_address(judge_of):
    cache = VerdictCache()
    run(judge_of(Scripted(scored, name="m at port 1"), cache=cache, name="mine"), cases_of(3))
    chat = Scripted(scored, name="m at port 2")
    assert run(judge_of(chat, cache=cache, name="mine"), cases_of(3)) == expected(cases_of(3))
    assert chat.prompts == []


def test_cases_that_are_asked_together_are_one_call_and_one_entry(judge_of):
    def ranked(prompt, number):
        answers = prompt.split("|")[1].split(",")
        return json.dumps({"scores": [int(answer) / 10 for answer in answers]})

    cache = VerdictCache()
    chat = Scripted(ranked)
    judge = judge_of(chat, Ranking(), cache=cache)
    cases = [JudgeCase(question, answer) for answer in "135" for question in ("x", "y")]
    assert [verdict.score for verdict in run(judge, cases)] == [0.1, 0.1, 0.3, 0.3, 0.5, 0.5]
    assert sorted(chat.prompts) == ["x|1,3,5", "y|1,3,5"]
    assert len(cache) == 2
    run(judge, cases)
    assert len(chat.prompts) == 2
    run(judge, cases[:4])
    assert sorted(chat.prompts[2:]) == ["x|1,3", "y|1,3"], "another group is another question"


def test_a_group_with_too_few_verdicts_is_unreadable(judge_of):
    judge = judge_of(Scripted(lambda *_: '{"scores": [1]}'), Ranking(), attempts=1)
    assert run(judge, cases_of(2)) == [Verdict(None, "unreadable after 1 reply: 1 verdicts were read for 2 cases")] * 2


def test_a_budget_stops_before_the_next_call_and_keeps_what_is_in_flight(chat_server, judge_of, tmp_path):
    """Two calls are in flight when the budget is empty: they are waited for, and cached."""
    waiting = asyncio.Event()

    async def answer(request):
        if request.number >= 10:
            waiting.set()
            await asyncio.sleep(0.3)
        return scored(request.text)

    server = chat_server(answer)
    spent, kept = tmp_path / "budget.sqlite3", tmp_path / "verdicts.sqlite3"
    cases = cases_of(40)
    judge = judge_of(served(server), concurrency=4, budget=Budget(max_calls=12, path=spent), cache=VerdictCache(kept))
    with pytest.raises(BudgetExceededError, match="12 calls of judge_max_calls=12"):
        run(judge, cases)
    assert waiting.is_set()
    assert len(server.requests) == 12
    assert len(VerdictCache(kept)) == 12
    # Resumed with the same limit: what is cached is still to be had, and not one call is made.
    again = judge_of(served(server), budget=Budget(max_calls=12, path=spent), cache=VerdictCache(kept))
    assert run(again, cases[:8]) == expected(cases[:8])
    with pytest.raises(BudgetExceededError):
        run(again, cases)
    assert len(server.requests) == 12
    # Resumed with a higher one: only what is missing is asked.
    more = judge_of(served(server), budget=Budget(max_calls=40, path=spent), cache=VerdictCache(kept))
    assert run(more, cases) == expected(cases)
    assert len(server.requests) == 40
    assert Budget(path=spent).spent.calls == 40


def test_a_budget_in_money_stops_the_run(judge_of):
    prices = {"usd_per_million_prompt_tokens": 1000.0, "usd_per_million_completion_tokens": 2000.0}
    budget = Budget(max_usd=0.1, **prices)
    chat = Scripted(scored)  # 10 tokens in, 5 out: 0.02 USD a call
    with pytest.raises(BudgetExceededError, match=r"USD of judge_max_usd=0\.1"):
        run(judge_of(chat, budget=budget, concurrency=1), cases_of(40))
    assert len(chat.prompts) == 5
    assert budget.spent.usd == pytest.approx(0.1)


def test_repeats_are_paid_for(chat_server, judge_of):
    def answer(request):
        return scored(request.text) if request.number % 2 else {"status": 503, "body": ""}

    server = chat_server(answer)
    budget = Budget(max_calls=100)
    run(judge_of(served(server), budget=budget, concurrency=1), cases_of(5))
    assert budget.spent.calls == len(server.requests) == 10
    failing = judge_of(Scripted(lambda *_: ChatError("no answer", requests=3)), budget=budget)
    run(failing, cases_of(2))
    assert budget.spent.calls == 16


def test_every_verdict_is_logged(judge_of, tmp_path):
    log = VerdictLog(tmp_path / "verdicts.jsonl")

    def reply(prompt, number):
        return {"q|a1": "hm", "q|a2": ChatError("script: no answer", requests=4)}.get(prompt) or scored(prompt)

    judge = judge_of(Scripted(reply), cache=VerdictCache(), log=log, attempts=2, name="mine")
    cases = [*cases_of(3), cases_of(3)[0]]
    verdicts = run(judge, cases)
    rows = {row["answer"]: row for row in map(json.loads, log.path.read_text().splitlines())}
    assert [(rows[case.answer]["score"], rows[case.answer]["reason"]) for case in cases] == [
        (verdict.score, verdict.reason) for verdict in verdicts
    ]
    time_, case_ = rows["a0"].pop("time"), rows["a0"].pop("case")
    assert time_.endswith("+00:00")
    assert len(case_) == 16
    assert rows["a0"] == {
        "judge": "mine",
        "model": "script",
        "rubric": "one_score",
        "version": "1",
        "question": "q",
        "answer": "a0",
        "score": right_score("q|a0"),
        "reason": "read",
        "cached": False,
        "count": 2,
        "asked_together": 1,
        "attempts": 1,
        "requests": 1,
        "prompt_tokens": 10,
        "completion_tokens": 5,
    }
    assert [(row["attempts"], row["requests"]) for row in (rows["a1"], rows["a2"])] == [(2, 2), (1, 4)]
    run(judge, cases[:1])
    last = json.loads(log.path.read_text().splitlines()[-1])
    assert (last["cached"], last["attempts"], last["score"]) == (True, 0, right_score("q|a0"))


def test_the_key_is_left_nowhere(chat_server, judge_of, monkeypatch, tmp_path, caplog, capfd, fake_key):
    """A server that repeats the key in all it says: no file, log or exception has it afterwards."""

    def echo(request):
        told = request.headers["authorization"]
        if request.text == "q|a1":
            return {"status": 500, "body": {"error": {"message": told}}}
        if request.text == "stop|a0":
            return {"status": 401, "body": {"error": {"message": told}}}
        return told if request.text == "q|a2" else json.dumps({"score": 0.5, "reason": told})

    class WithReason(OneScore):
        def parse(self, reply, cases):
            if not reply.startswith("{"):
                raise ValueError(f"this is no JSON: {reply}")
            return [Verdict(json.loads(reply)["score"], json.loads(reply)["reason"])]

    monkeypatch.setenv("MY_KEY", fake_key)
    caplog.set_level(logging.DEBUG)
    judge = judge_of(
        served(chat_server(echo), api_key_env="MY_KEY", max_retries=1),
        WithReason(),
        cache=VerdictCache(tmp_path / "verdicts.sqlite3"),
        budget=Budget(path=tmp_path / "budget.sqlite3"),
        log=VerdictLog(tmp_path / "verdicts.jsonl"),
    )
    verdicts = run(judge, cases_of(3))
    assert [verdict.score for verdict in verdicts] == [0.5, None, None]
    assert all("Bearer ***" in verdict.reason for verdict in verdicts)
    with pytest.raises(BackendError, match=r"HTTP 401: Bearer \*\*\*") as caught:
        run(judge, cases_of(1, "stop"))
    files = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"verdicts.sqlite3", "budget.sqlite3", "verdicts.jsonl"}
    told = [path.read_bytes().decode(errors="replace") for path in files]
    told += [str(verdicts), str(caught.value), repr(caught.value), repr(judge), str(vars(judge)), caplog.text]
    told += [*capfd.readouterr(), *(str(vars(record)) for record in caplog.records)]
    assert "***" in "".join(told)
    assert not [text for text in told if fake_key in text]


class Faulty:
    """Draws from a fixed seed: a fault for each attempt at a case, and whether a case is ever answered in JSON."""

    def __init__(self, seed=4):
        self.seed = seed
        self.attempts = Counter()
        self.in_a_row = Counter()
        self.drawn = Counter()

    def never_json(self, text):
        return random.Random(f"{self.seed} {text}").random() < 0.1

    def without_faults(self, text, number=0):
        return "This answer deserves no number." if self.never_json(text) else scored(text)

    def __call__(self, request):
        text = request.text
        self.attempts[text] += 1
        draw = random.Random(f"{self.seed} {text} {self.attempts[text]}").random()
        if draw >= 0.4 or self.in_a_row[text] == 2:
            self.in_a_row[text] = 0
            return self.without_faults(text)
        self.in_a_row[text] += 1
        fault = ("429", "500", "hang", "cut")[int(draw * 10)]
        self.drawn[fault] += 1
        if fault == "hang":
            return asyncio.sleep(60.0, "")
        if fault == "cut":
            return {"text": scored(text), "cut_at": 30}
        # What would be a score, if a fault were read.
        return {"status": int(fault), "body": {"error": {"message": '{"score": 0}'}}}


def test_no_fault_becomes_a_score(chat_server, judge_of, tmp_path):
    cases = cases_of(1000)
    faulty = Faulty()
    settings = {"concurrency": 64, "attempts": 2}
    # On a busy machine a request may take too long without having been drawn for it: more repeats, same verdicts.
    chat = served(chat_server(faulty), timeout_s=1.0, max_retries=10)
    verdicts = run(judge_of(chat, cache=VerdictCache(tmp_path / "verdicts.sqlite3"), **settings), cases)

    never = [faulty.never_json(f"q|{case.answer}") for case in cases]
    assert 60 < sum(never) < 140
    for verdict, right, unreadable in zip(verdicts, expected(cases), never, strict=True):
        if unreadable:
            assert verdict.score is None
            assert verdict.reason.startswith("unreadable after 2 replies")
        else:
            assert verdict == right
    assert sorted(faulty.drawn) == ["429", "500", "cut", "hang"]
    assert min(faulty.drawn.values()) > 100, faulty.drawn
    assert verdicts == run(judge_of(Scripted(faulty.without_faults), **settings), cases)

    # Again: what was readable is in the cache, and only the rest is asked.
    cache = VerdictCache(tmp_path / "verdicts.sqlite3")
    assert len(cache) == 1000 - sum(never)
    faulty.attempts.clear()
    assert run(judge_of(chat, cache=cache, **settings), cases) == verdicts
    assert set(faulty.attempts) == {f"q|{case.answer}" for case, one in zip(cases, never, strict=True) if one}
