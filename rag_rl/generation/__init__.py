"""Generators: prompts in, continuations out (``rag_rl.types.Generator``).

Importing this package loads neither torch nor openai: each generator is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_rl.generation.augmenting import QueryAugmenter
    from rag_rl.generation.cached import CachedGenerator
    from rag_rl.generation.openai_generator import OpenAIGenerator
    from rag_rl.generation.policy import PolicyGenerator
    from rag_rl.generation.prompting import Fitted, fit_batch, fit_passages, prompt_text
    from rag_rl.generation.ranking import LikelihoodRanker, ListwiseRanker, parse_ranking
    from rag_rl.generation.scripted import ScriptedGenerator
    from rag_rl.generation.transformers_generator import TransformersGenerator

_MODULE_OF = {
    "CachedGenerator": "cached",
    "Fitted": "prompting",
    "LikelihoodRanker": "ranking",
    "ListwiseRanker": "ranking",
    "OpenAIGenerator": "openai_generator",
    "PolicyGenerator": "policy",
    "QueryAugmenter": "augmenting",
    "ScriptedGenerator": "scripted",
    "TransformersGenerator": "transformers_generator",
    "fit_batch": "prompting",
    "fit_passages": "prompting",
    "parse_ranking": "ranking",
    "prompt_text": "prompting",
}

__all__ = [
    "CachedGenerator",
    "Fitted",
    "LikelihoodRanker",
    "ListwiseRanker",
    "OpenAIGenerator",
    "PolicyGenerator",
    "QueryAugmenter",
    "ScriptedGenerator",
    "TransformersGenerator",
    "fit_batch",
    "fit_passages",
    "parse_ranking",
    "prompt_text",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
