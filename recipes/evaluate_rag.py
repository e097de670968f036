"""Score any assembly of finished parts on any question set: augmenter, retriever, reranker, generator or reasoner.

Trains: nothing; it measures an assembly, so that you see which part is worth training next. `rag-rl compare` sets
    several of its folders against each other, and `rag-rl ask --config` asks the same file.
Data: data_eval (question, answers[]?, gold_doc_ids[]?), data_corpus (documents); docs/data_formats.md.
Rewards: none; em, f1, contains_em, format, judge_accuracy (with a judge), recall@k, all_gold@k, ndcg@10, mrr@10, and
    what a question costs: searches, tokens, seconds.
Needs: tiny runs on 2 CPU cores in a minute; otherwise what the parts need. An interrupted evaluation goes on where it
    was when it is started again.
Paper: none; intervals are percentile bootstraps over questions (Efron 1979), p is of a paired permutation test.
CPU: accelerate launch recipes/evaluate_rag.py
One node: accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/evaluate_rag.py --config NAME
Cluster: accelerate launch --config_file accelerate_configs/multi_node.yaml --num_machines M --num_processes GPUS
    --machine_rank RANK --main_process_ip HOST recipes/evaluate_rag.py --config NAME
    (on each node; docs/clusters.md says what the four are, and has a script for Slurm)
"""

from rag_rl.config.arguments import (
    DataArguments,
    GeneratorArguments,
    JudgeArguments,
    ReasonerArguments,
    RetrieverArguments,
)
from rag_rl.config.assembly_arguments import AssemblyArguments, EvaluationArguments
from rag_rl.config.augmenter_arguments import AugmenterArguments, AugmenterModelArguments
from rag_rl.run import launch

ARGUMENTS = (
    EvaluationArguments,
    AssemblyArguments,
    DataArguments,
    RetrieverArguments,
    AugmenterArguments,
    AugmenterModelArguments,
    GeneratorArguments,
    ReasonerArguments,
    JudgeArguments,
)


def main() -> None:
    """Runs the recipe."""
    from rag_rl.config.assemblies import (
        build_assembly_search,
        build_evaluable,
        build_evaluation_baselines,
        build_evaluation_questions,
    )
    from rag_rl.evaluation.evaluation_run import start_evaluation

    # 1. Start the run: strict parsing, settings of the runs that parts come from, run folder
    run = start_evaluation(__file__, ARGUMENTS)

    # 2. Retriever, with the augmenter before it and the reranker after it; None where there is none
    search = build_assembly_search(run.plan)

    # 3. Data: questions whose gold documents the corpus holds
    questions = build_evaluation_questions(run.plan, search)

    # 4. The assembly: who answers from what was found; and other ways to answer the same questions
    assembly = build_evaluable(run.plan, search, run.folder)
    baselines = build_evaluation_baselines(run.plan, assembly, search)

    # 5. No trainer: every question is answered once, and its row is on the disk before the next batch
    run.evaluate(assembly, questions, baselines=baselines)

    # 6. Report
    run.report()


if __name__ == "__main__":
    launch(main)
