"""Evaluation: an assembly of parts is run over questions and scored, and runs are compared and drawn.

Importing this package loads neither torch nor matplotlib: each part is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_rl.evaluation.agreement import agreement_section, agreement_with_em, judge_agreement
    from rag_rl.evaluation.assembly import Answered, Asked, Assembly, OtherModel
    from rag_rl.evaluation.comparison import compare, comparison_table, open_sides
    from rag_rl.evaluation.comparison_page import write_comparison
    from rag_rl.evaluation.curves import draw_curves
    from rag_rl.evaluation.evaluating import evaluate_to_file
    from rag_rl.evaluation.measuring import Measured, SearchOnly
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
    from rag_rl.evaluation.significance import mean_interval, permutation_test

# Without ``model_card``: the module of that name would hide the function as soon as it is imported.
_MODULE_OF = {
    "Answered": "assembly",
    "Asked": "assembly",
    "Assembly": "assembly",
    "Evaluation": "scoring",
    "Measured": "measuring",
    "OtherModel": "assembly",
    "ReasoningAssembly": "reasoning",
    "RerankingAssembly": "reranking",
    "SearchAssembly": "search",
    "SearchOnly": "measuring",
    "agreement_section": "agreement",
    "agreement_with_em": "agreement",
    "answer_differences": "scoring",
    "compare": "comparison",
    "comparison_table": "comparison",
    "confidence_intervals": "scoring",
    "draw_curves": "curves",
    "evaluate": "scoring",
    "evaluate_retrieval": "scoring",
    "evaluate_to_file": "evaluating",
    "judge_agreement": "agreement",
    "mean_interval": "significance",
    "mean_metrics": "scoring",
    "open_sides": "comparison",
    "pass_at_k": "sampling",
    "permutation_test": "significance",
    "read_rows": "scoring",
    "retrieval_scores": "scoring",
    "reward_columns": "scoring",
    "sample_statistics": "sampling",
    "score_row": "scoring",
    "write_comparison": "comparison_page",
    "write_report": "report",
    "write_rows": "scoring",
}

__all__ = [
    "Answered",
    "Asked",
    "Assembly",
    "Evaluation",
    "Measured",
    "OtherModel",
    "ReasoningAssembly",
    "RerankingAssembly",
    "SearchAssembly",
    "SearchOnly",
    "agreement_section",
    "agreement_with_em",
    "answer_differences",
    "compare",
    "comparison_table",
    "confidence_intervals",
    "draw_curves",
    "evaluate",
    "evaluate_retrieval",
    "evaluate_to_file",
    "judge_agreement",
    "mean_interval",
    "mean_metrics",
    "open_sides",
    "pass_at_k",
    "permutation_test",
    "read_rows",
    "retrieval_scores",
    "reward_columns",
    "sample_statistics",
    "score_row",
    "write_comparison",
    "write_report",
    "write_rows",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
