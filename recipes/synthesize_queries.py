"""Write queries for the passages of a corpus that nobody has asked for, and with --with_answers true also answers.

Trains: nothing; it makes queries.json (Reinforced-IR's form) and questions.jsonl for data_train of the other recipes.
Data: data_corpus (documents, or a plain corpus.json of texts); docs/data_formats.md. Nothing else: no labels.
Rewards: none; a query is kept if the quality check says that its passage serves it.
Needs: tiny runs on 2 CPU cores in a minute; a model behind an endpoint is asked up to 2 x 2 times a query.
    Stopped at any moment it goes on when it is started again.
Paper: Reinforced-IR (arXiv 2502.11562), step A. Differences: seeded; a reply with a "1" somewhere in it does not pass
    the check, only a verdict does; answers, and their check by a reader, are ours (after Alberti et al. 2019).
CPU: accelerate launch recipes/synthesize_queries.py
One node: accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/synthesize_queries.py --config NAME
Cluster: accelerate launch --config_file accelerate_configs/multi_node.yaml --num_machines M --num_processes GPUS
    --machine_rank RANK --main_process_ip HOST recipes/synthesize_queries.py --config NAME
    (on each node; docs/clusters.md says what the four are, and has a script for Slurm)
"""

from dataclasses import dataclass, field
from pathlib import Path

from rag_rl.config.arguments import DataArguments, RetrieverArguments
from rag_rl.config.synthesis_arguments import SynthesisArguments
from rag_rl.run import launch, start_data_run


@dataclass
class OutputArguments:
    """Where the queries go."""

    output_dir: str = field(
        default="", metadata={"help": "folder, new or of this very synthesis; by default synthetic/<config>"}
    )
    seed: int = field(default=42, metadata={"help": "of the choice of passages, of lengths and styles, of sampling"})


ARGUMENTS = (OutputArguments, DataArguments, SynthesisArguments, RetrieverArguments)


def main() -> None:
    """Runs the recipe."""
    # 1. Start the run: strict parsing, output folder
    output_args, data_args, synthesis_args, retriever_args = start_data_run(__file__, ARGUMENTS, parent="synthetic")
    folder = Path(output_args.output_dir)

    from rag_rl.config.synthesis import report_queries, synthesize_queries

    # 2. Data: passages of the corpus, chosen by the seed
    # 3. Writer and check: one model, asked by two prompts
    # 4. Draft, check, draft again what did not pass; each batch is kept
    found = synthesize_queries(synthesis_args, data_args, folder, seed=output_args.seed)

    # 5. No trainer
    # 6. Report: what was kept, and with an encoder how many queries find their document
    report_queries(found, synthesis_args, data_args, retriever_args, folder)


if __name__ == "__main__":
    launch(main)
