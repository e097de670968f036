"""Evaluation: an assembly of parts is run over questions and scored, and runs are compared and drawn.

Importing this package loads neither torch nor matplotlib: each part is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_rl.evaluation.agreement import agreement_section, agreement_with_em, judge_agreement
    from rag_rl.evaluation.assembly import Answered, Asked, Assembly, OtherModel
    from rag_rl.evaluation.curves import draw_curves
    from rag_rl.evaluation.reasoning import ReasoningAssembly
    from rag_rl.evaluation.report import write_report
    from rag_rl.evaluation.reranking import RerankingAssembly
    from rag_rl.evaluation.sampling import pass_at_k, sample_statistics
    from rag_rl.evaluation.scoring import (
        Evaluation,
        answer_differences,
        confidence_intervals,
        evaluate,
        evaluate_retrieval,
        mean_metrics,
        read_rows,
        retrieval_scores,
        reward_columns,
        score_row,
        write_rows,
    )
    from rag_rl.evaluation.search import SearchAssembly

# Without ``model_card``: the module of that name would hide the function as soon as it is imported.
_MODULE_OF = {
    "Answered": "assembly",
    "Asked": "assembly",
    "Assembly": "assembly",
    "Evaluation": "scoring",
    "OtherModel": "assembly",
    "ReasoningAssembly": "reasoning",
    "RerankingAssembly": "reranking",
    "SearchAssembly": "search",
    "agreement_section": "agreement",
    "agreement_with_em": "agreement",
    "answer_differences": "scoring",
    "confidence_intervals": "scoring",
    "draw_curves": "curves",
    "evaluate": "scoring",
    "evaluate_retrieval": "scoring",
    "judge_agreement": "agreement",
    "mean_metrics": "scoring",
    "pass_at_k": "sampling",
    "read_rows": "scoring",
    "retrieval_scores": "scoring",
    "reward_columns": "scoring",
    "sample_statistics": "sampling",
    "score_row": "scoring",
    "write_report": "report",
    "write_rows": "scoring",
}

__all__ = [
    "Answered",
    "Asked",
    "Assembly",
    "Evaluation",
    "OtherModel",
    "ReasoningAssembly",
    "RerankingAssembly",
    "SearchAssembly",
    "agreement_section",
    "agreement_with_em",
    "answer_differences",
    "confidence_intervals",
    "draw_curves",
    "evaluate",
    "evaluate_retrieval",
    "judge_agreement",
    "mean_metrics",
    "pass_at_k",
    "read_rows",
    "retrieval_scores",
    "reward_columns",
    "sample_statistics",
    "score_row",
    "write_report",
    "write_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
