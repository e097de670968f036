"""Notices a policy that collapses: it no longer searches, breaks the form, says nothing, or repeats itself."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rag_rl.trainers.step_grpo_config import StepGRPOConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Guard:
    """A bound on something that is logged.

    Attributes:
        name: of the log.
        bound: that is not to be crossed.
        least: whether it is a lower bound.
    """

    name: str
    bound: float
    least: bool = False

    def crossed(self, value: float) -> bool:
        """Tells whether a value is beyond the bound.

        Args:
            value: logged.

        Returns:
            Whether it is.
        """
        return value < self.bound if self.least else value > self.bound


def guards_of(args: StepGRPOConfig) -> list[Guard]:
    """The guards that are set.

    Args:
        args: settings; a bound of None is no guard.

    Returns:
        The guards.
    """
    bounds = [
        ("searches", args.guard_min_searches, True),
        ("invalid_steps", args.guard_max_invalid_steps, False),
        ("analysis_words", args.guard_min_analysis_words, True),
        ("repetition", args.guard_max_repetition, False),
        ("entropy", args.guard_min_entropy, True),
        ("kl", args.guard_max_kl, False),
        ("frac_reward_zero_std", args.guard_max_zero_variance, False),
    ]
    return [Guard(name, bound, least) for name, bound, least in bounds if bound is not None]


class CollapseGuard(TrainerCallback):  # type: ignore[misc]
    """Watches the logs of ``StepGRPOTrainer``; where asked, stops the training and goes back to the best checkpoint.

    A guard is armed by the first log that keeps it: a model that starts beyond a bound is not stopped for what it has
    not lost. The best checkpoint is the one before which the mean reward was highest, of those before which nothing
    was crossed: a policy that collapses may well have found a reward.

    Args:
        args: settings.

    Attributes:
        stopped: what stopped the training; None while nothing did.
    """

    def __init__(self, args: StepGRPOConfig) -> None:
        self.guards, self.patience, self.stops = guards_of(args), args.guard_patience, args.guard_stop
        self.stopped: str | None = None
        self._armed: set[str] = set()
        self._in_a_row: dict[str, int] = {}
        self._rewards: list[float] = []
        self._clean = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Looks at a log.

        Args:
            args: settings of the trainer.
            state: of the trainer.
            control: of the trainer.
            logs: what is logged.
        """
        if not logs or "reward" not in logs:
            return
        if logs["reward"] is not None:
            self._rewards.append(float(logs["reward"]))
        for guard in self.guards:
            value = logs.get(guard.name)
            if value is None or math.isnan(value):
                continue
            if not guard.crossed(value):
                self._armed.add(guard.name)
                self._in_a_row[guard.name] = 0
            elif guard.name in self._armed:
                self._clean = False
                self._in_a_row[guard.name] += 1
                self._warn(guard, value, args, state, control)

    def _warn(self, guard: Guard, value: float, args: Any, state: Any, control: Any) -> None:
        often = self._in_a_row[guard.name]
        side = "below" if guard.least else "above"
        told = f"{guard.name} is {value:.3g}, {side} {guard.bound:g} ({often} logs in a row)"
        logger.warning("step %d: the policy may be collapsing: %s", state.global_step, told)
        if not self.stops or often < self.patience or control.should_training_stop:
            return
        self.stopped = told
        control.should_training_stop = True
        if state.best_model_checkpoint is None:
            logger.warning("stopped: %s; there is no checkpoint to go back to", told)
            return
        # Set here and not by the user, since transformers wants an evaluation within the training for it.
        args.load_best_model_at_end = True
        logger.warning("stopped: %s; going back to %s", told, state.best_model_checkpoint)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compares a checkpoint with the best one so far.

        Args:
            args: settings of the trainer.
            state: of the trainer.
            control: of the trainer.
        """
        rewards, clean = self._rewards, self._clean
        self._rewards, self._clean = [], True
        if not self.stops or not rewards or not clean:
            return
        reward = sum(rewards) / len(rewards)
        if state.best_metric is not None and reward <= state.best_metric:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        state.best_metric, state.best_model_checkpoint = reward, str(checkpoint)
        if state.is_world_process_zero:  # it was written before this was known
            state.save_to_json(str(checkpoint / "trainer_state.json"))
