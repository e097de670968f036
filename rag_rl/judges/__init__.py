"""Judges: cases in, verdicts out (``rag_rl.types.Judge``).

Importing this package loads neither torch nor openai: each name is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_rl.judges.budget import Budget, BudgetExceededError, Spent
    from rag_rl.judges.cache import VerdictCache
    from rag_rl.judges.llm import Chat, ChatError, LLMJudge, Reply, Rubric
    from rag_rl.judges.local_chat import LocalChat
    from rag_rl.judges.log import VerdictLog
    from rag_rl.judges.openai_chat import OpenAIChat
    from rag_rl.judges.reward_model import RewardModelJudge
    from rag_rl.judges.rubrics import ComparisonRubric, ScoreRubric, load_rubric, rubric_names
    from rag_rl.judges.scripted import ScriptedJudge

_MODULE_OF = {
    "Budget": "budget",
    "BudgetExceededError": "budget",
    "Chat": "llm",
    "ChatError": "llm",
    "ComparisonRubric": "rubrics",
    "LLMJudge": "llm",
    "LocalChat": "local_chat",
    "OpenAIChat": "openai_chat",
    "Reply": "llm",
    "RewardModelJudge": "reward_model",
    "Rubric": "llm",
    "ScoreRubric": "rubrics",
    "ScriptedJudge": "scripted",
    "Spent": "budget",
    "VerdictCache": "cache",
    "VerdictLog": "log",
    "load_rubric": "rubrics",
    "rubric_names": "rubrics",
}

__all__ = [
    "Budget",
    "BudgetExceededError",
    "Chat",
    "ChatError",
    "ComparisonRubric",
    "LLMJudge",
    "LocalChat",
    "OpenAIChat",
    "Reply",
    "RewardModelJudge",
    "Rubric",
    "ScoreRubric",
    "ScriptedJudge",
    "Spent",
    "VerdictCache",
    "VerdictLog",
    "load_rubric",
    "rubric_names",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
