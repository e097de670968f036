from __future__ import annotations

import subprocess
import sys

import pytest

from rag_rl.errors import BackendError, ConfigError, UserError
from rag_rl.judges import Budget, BudgetExceededError, Spent

PRICES = {"usd_per_million_prompt_tokens": 0.5, "usd_per_million_completion_tokens": 2.0}


def test_no_call_beyond_the_limit():
    budget = Budget(max_calls=3)
    for _ in range(3):
        budget.reserve()
    with pytest.raises(BudgetExceededError, match=r"3 calls of judge_max_calls=3.*--resume_from_checkpoint true"):
        budget.reserve()
    assert budget.spent == Spent(calls=3)


def test_nothing_is_broken_when_it_is_used_up():
    assert issubclass(BudgetExceededError, UserError)
    assert not issubclass(BudgetExceededError, BackendError)


def test_no_calls_at_all():
    with pytest.raises(BudgetExceededError, match="0 calls of judge_max_calls=0"):
        Budget(max_calls=0).reserve()


def test_no_limit():
    budget = Budget(**PRICES)
    for _ in range(100):
        budget.reserve()
    assert budget.spent.calls == 100


def test_repeats_count_as_calls():
    budget = Budget(max_calls=4)
    budget.reserve()
    budget.record_failure(requests=2)
    budget.reserve()
    budget.record_reply("m", prompt_tokens=1, completion_tokens=1, requests=2)
    assert budget.spent.calls == 4
    with pytest.raises(BudgetExceededError):
        budget.reserve()


def test_money_is_counted_by_both_prices():
    budget = Budget(max_usd=0.01, **PRICES)
    for _ in range(2):
        budget.reserve()
        budget.record_reply("m", prompt_tokens=4_000, completion_tokens=1_500)
    # 2 * (4000 * 0.5 + 1500 * 2) / 1e6
    assert budget.spent == Spent(2, 8_000, 3_000, pytest.approx(0.01))
    with pytest.raises(BudgetExceededError, match=r"0\.0100 USD of judge_max_usd=0\.01"):
        budget.reserve()


def test_money_below_the_limit_lets_calls_through():
    budget = Budget(max_usd=0.01, **PRICES)
    budget.reserve()
    budget.record_reply("m", prompt_tokens=4_000, completion_tokens=3_999)
    assert budget.spent.usd == pytest.approx(0.009998)
    budget.reserve()


def test_both_limits_are_told():
    budget = Budget(max_calls=1, max_usd=5.0, **PRICES)
    budget.reserve()
    with pytest.raises(BudgetExceededError, match=r"1 calls of judge_max_calls=1, 0\.0000 USD of judge_max_usd=5\)"):
        budget.reserve()


def test_an_endpoint_that_tells_no_tokens_stops_a_budget_in_money():
    budget = Budget(max_usd=1.0, **PRICES)
    budget.reserve()
    budget.record_reply("m at http://host", prompt_tokens=0, completion_tokens=0)
    with pytest.raises(BackendError, match=r"m at http://host does not tell .*judge_max_calls"):
        budget.reserve()
    calls = Budget(max_calls=9)
    calls.reserve()
    calls.record_reply("m", prompt_tokens=0, completion_tokens=0)
    calls.reserve()


def test_what_was_spent_outlives_the_process(tmp_path):
    path = tmp_path / "run" / "judge_budget.sqlite3"
    first = Budget(max_calls=2, path=path, **PRICES)
    first.reserve()
    first.record_reply("m", prompt_tokens=10, completion_tokens=20)
    first.close()
    second = Budget(max_calls=2, path=path, **PRICES)
    assert second.spent == Spent(1, 10, 20, pytest.approx(45e-6))
    second.reserve()
    with pytest.raises(BudgetExceededError):
        second.reserve()
    with pytest.raises(BudgetExceededError):
        first.reserve()
    Budget(max_calls=3, path=path).reserve()


def test_processes_share_one_budget(tmp_path):
    path = tmp_path / "judge_budget.sqlite3"
    program = (
        "import sys\nfrom rag_rl.judges import Budget, BudgetExceededError\n"
        "budget, calls = Budget(max_calls=500, path=sys.argv[1]), 0\n"
        "try:\n    while True:\n        budget.reserve()\n        calls += 1\n"
        "except BudgetExceededError:\n    print(calls)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    taken = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert sum(taken) == 500
    assert Budget(path=path).spent.calls == 500


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_calls": -1}, "judge_max_calls must be 0 or more, got -1"),
        ({"max_usd": -0.5, **PRICES}, "judge_max_usd must be 0 or more"),
        ({"max_usd": float("nan"), **PRICES}, "judge_max_usd must be 0 or more"),
        ({"max_usd": 1.0}, "judge_max_usd needs the prices"),
        ({"usd_per_million_prompt_tokens": -1.0}, "prices must be 0 or more"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        Budget(**settings)
