"""What judging may cost, in calls and in money, over all processes and resumptions of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rag_rl.errors import BackendError, ConfigError, UserError
from rag_rl.judges.database import Database

_TOKENS_PER_PRICE = 1_000_000


class BudgetExceededError(UserError):
    """The limit that the user set is reached: nothing is broken, and a higher limit lets the run go on."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What was spent so far.

    Attributes:
        calls: requests sent, repeats included.
        prompt_tokens: sent, as the endpoint counted them.
        completion_tokens: received.
        usd: by the prices of the budget that recorded them.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0


class Budget:
    """Stops judging before a call that would go over a limit.

    A call is taken from the budget before it is made, its tokens after its reply. So ``max_calls`` is exceeded by
    nothing but repeats of failed requests in flight, and ``max_usd`` by no more than the calls in flight when it is
    reached.

    Args:
        max_calls: requests, >= 0; 0 lives from the cache alone; None for no limit.
        max_usd: in US dollars, >= 0; None for no limit.
        usd_per_million_prompt_tokens: price, >= 0.
        usd_per_million_completion_tokens: price, >= 0.
        path: an sqlite file that keeps what was spent over a resume and between the processes of a run; put it into
            the run folder. None: this process only.

    Raises:
        ConfigError: a value out of range, or ``max_usd`` without prices.
        BackendError: the file cannot be opened.
    """

    def __init__(
        self,
        *,
        max_calls: int | None = None,
        max_usd: float | None = None,
        usd_per_million_prompt_tokens: float = 0.0,
        usd_per_million_completion_tokens: float = 0.0,
        path: str | Path | None = None,
    ) -> None:
        prices = (usd_per_million_prompt_tokens, usd_per_million_completion_tokens)
        if max_calls is not None and max_calls < 0:
            raise ConfigError(f"judge_max_calls must be 0 or more, got {max_calls}")
        if max_usd is not None and not max_usd >= 0.0:
            raise ConfigError(f"judge_max_usd must be 0 or more, got {max_usd}")
        if not all(0.0 <= price < float("inf") for price in prices):
            raise ConfigError(f"the judge's prices must be 0 or more, in USD per million tokens, got {prices}")
        if max_usd is not None and not any(prices):
            raise ConfigError(
                "judge_max_usd needs the prices of the judge's model, in USD per million prompt and completion tokens"
            )
        self.max_calls = max_calls
        self.max_usd = max_usd
        self.prices = prices
        self._unpriced = ""
        self._database = Database(
            path,
            "CREATE TABLE IF NOT EXISTS spent (id INTEGER PRIMARY KEY CHECK (id = 1), calls INTEGER NOT NULL, "
            "prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, usd REAL NOT NULL);"
            "INSERT OR IGNORE INTO spent VALUES (1, 0, 0, 0, 0.0)",
            what="the record of what the judge spent,",
            loss="the count: the budget starts from nothing",
        )

    @property
    def spent(self) -> Spent:
        """What all processes of the run have spent so far."""
        return Spent(*self._database.read("SELECT calls, prompt_tokens, completion_tokens, usd FROM spent")[0])

    def reserve(self) -> None:
        """Takes one call from the budget; to be called right before it is made.

        Raises:
            BudgetExceededError: a limit is reached.
            BackendError: there is a limit in dollars and the endpoint does not tell its tokens; or the file fails.
        """
        if self._unpriced and self.max_usd is not None:
            raise BackendError(
                f"{self._unpriced} does not tell how many tokens it read and wrote, so that judge_max_usd cannot be "
                f"kept: set judge_max_calls instead"
            )
        # One statement, so that no two processes take the last call.
        taken = self._database.write(
            "UPDATE spent SET calls = calls + 1 WHERE (? IS NULL OR calls < ?) AND (? IS NULL OR usd < ?)",
            (self.max_calls, self.max_calls, self.max_usd, self.max_usd),
        )
        if not taken:
            spent = self.spent
            raise BudgetExceededError(
                f"the judge's budget is used up ({self._shown(spent)}): what was judged is kept; "
                f"raise the limit and go on with --resume_from_checkpoint true"
            )

    def record_reply(self, source: str, *, prompt_tokens: int, completion_tokens: int, requests: int = 1) -> None:
        """Records what a reserved call has cost.

        Args:
            source: name of the endpoint, for messages.
            prompt_tokens: read by the model; 0 where the endpoint does not tell.
            completion_tokens: written by it, its reasoning included.
            requests: sent for it, >= 1; the first one was reserved.

        Raises:
            BackendError: the file fails.
        """
        if not prompt_tokens and not completion_tokens:
            self._unpriced = source
        usd = (prompt_tokens * self.prices[0] + completion_tokens * self.prices[1]) / _TOKENS_PER_PRICE
        self._database.write(
            "UPDATE spent SET calls = calls + ?, prompt_tokens = prompt_tokens + ?, "
            "completion_tokens = completion_tokens + ?, usd = usd + ?",
            (requests - 1, prompt_tokens, completion_tokens, usd),
        )

    def record_failure(self, *, requests: int = 1) -> None:
        """Records the repeats of a reserved call that brought no reply; they count as calls and cost nothing.

        Args:
            requests: sent for it, >= 1; the first one was reserved.

        Raises:
            BackendError: the file fails.
        """
        if requests > 1:
            self._database.write("UPDATE spent SET calls = calls + ?", (requests - 1,))

    def close(self) -> None:
        """Closes the file; the next use opens it again."""
        self._database.close()

    def _shown(self, spent: Spent) -> str:
        shown = []
        if self.max_calls is not None:
            shown.append(f"{spent.calls} calls of judge_max_calls={self.max_calls}")
        if self.max_usd is not None:
            shown.append(f"{spent.usd:.4f} USD of judge_max_usd={self.max_usd:g}")
        return ", ".join(shown)
