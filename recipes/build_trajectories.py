"""Let a teacher write the chains that a multi-hop reasoner starts from: search step by step until an answer is right.

Trains: nothing; it makes trajectories.jsonl for --coldstart_path of sft_reasoner, and dpo.jsonl for those who want it.
Data: data_corpus (documents) and data_train (question, answers[]); held-out questions get no chain. The oracle needs
    gold_doc_ids[] and a decomposition as well; docs/data_formats.md.
Rewards: none; a chain is right if its answer matches an accepted one, or judge_name says so.
Needs: tiny runs on 2 CPU cores in seconds; a teacher behind an endpoint is asked up to 7 x 7 x 2 times a question.
    Stopped at any moment it goes on when it is started again.
Paper: R3-RAG (arXiv 2505.23794), cold start: rejection sampling, the first attempt greedy. Later attempts differ by
    sampling alone, and the documents of a step are not cut by how many the chain has seen; failed chains are kept.
CPU: accelerate launch recipes/build_trajectories.py
One node: python recipes/build_trajectories.py --config NAME
Cluster: no (one process asks the teacher; the teacher itself may be served by a cluster)
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rag_rl.config.arguments import DataArguments, JudgeArguments, RetrieverArguments
from rag_rl.config.teacher_arguments import TeacherArguments
from rag_rl.run import launch, start_data_run


@dataclass
class CollectArguments:
    """Where the chains go."""

    output_dir: str = field(
        default="", metadata={"help": "folder, new or of this very collection; by default trajectories/<config>"}
    )
    seed: int = field(default=42, metadata={"help": "of the choice of questions; the same as sft_reasoner's"})
    dpo_layout: Literal["turn", "chat"] = field(
        default="turn", metadata={"help": "prompts of dpo.jsonl, as in reasoner_layout"}
    )


ARGUMENTS = (CollectArguments, DataArguments, RetrieverArguments, TeacherArguments, JudgeArguments)


def main() -> None:
    """Runs the recipe."""
    # 1. Start the run: strict parsing, output folder
    collect_args, data_args, retriever_args, teacher_args, judge_args = start_data_run(
        __file__, ARGUMENTS, parent="trajectories"
    )
    folder = Path(collect_args.output_dir)

    from rag_rl.config.parts import build_questions, build_retriever
    from rag_rl.config.teachers import collect_chains, report_trajectories

    # 2. Data: questions with answers, as sft_reasoner would choose them
    questions, _ = build_questions(data_args, seed=collect_args.seed)

    # 3. Retriever
    retriever = build_retriever(retriever_args, data_args, seed=collect_args.seed)

    # 4. Rejection sampling: the teacher plays each question until a chain is right
    # 5. No trainer
    collected = collect_chains(
        questions,
        folder,
        retriever,
        teacher=teacher_args,
        judge=judge_args,
        search=retriever_args,
        data=data_args,
    )

    # 6. Report: pairs of right and failed chains, and what came out
    report_trajectories(folder, questions, collected, layout=collect_args.dpo_layout)


if __name__ == "__main__":
    launch(main)
