"""Train a dense retriever on the order in which a generator or a reranker ranks its passages: RLGF, no labels needed.

Trains: an encoder, queries and documents alike: whole, through LoRA, or a linear map on top of it.
Data: data_corpus (documents) and data_train (queries with gold documents, a queries.json, or a folder of
    synthesize_queries; without it queries are written first); data_eval; distill_files; docs/data_formats.md.
Rewards: none; a listwise loss over each query's passages and those of the batch, of all processes (in-batch
    negatives), in the teacher's order, and a contrast of queries with their augmentations.
Needs: tiny runs on 2 CPU cores in minutes; the published setting 8 GPUs (not measured yet).
Paper: Reinforced-IR (arXiv 2502.11562), steps D and E. Differences: vectorised mining, gradients through the gather,
    a query's own passages are never its negatives, short lists get unranked negatives; other teachers, and none.
CPU: accelerate launch recipes/distill_retriever.py
One node: accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/distill_retriever.py --config NAME
Cluster: accelerate launch --config_file accelerate_configs/multi_node.yaml --num_machines M --num_processes GPUS
    --machine_rank RANK --main_process_ip HOST recipes/distill_retriever.py --config NAME
    (on each node; docs/clusters.md says what the four are, and has a script for Slurm)
"""

from rag_rl.config.arguments import DataArguments, QueryEncoderArguments, RetrieverArguments, RunArguments
from rag_rl.config.augmenter_arguments import AugmenterArguments, AugmenterModelArguments
from rag_rl.config.distillation_arguments import DistillationArguments
from rag_rl.config.synthesis_arguments import SynthesisArguments
from rag_rl.run import launch, start_run
from rag_rl.trainers.distillation_config import DistillationConfig

ARGUMENTS = (
    RunArguments,
    DataArguments,
    SynthesisArguments,
    RetrieverArguments,
    QueryEncoderArguments,
    AugmenterArguments,
    AugmenterModelArguments,
    DistillationArguments,
    DistillationConfig,
)


def main() -> None:
    """Runs the recipe."""
    # 1. Start the run: strict parsing, run folder, seed, resume point
    run = start_run(__file__, ARGUMENTS)
    run_args, data_args, synthesis_args, retriever_args, encoder_args, *augmenter_args, distill_args, training_args = (
        run.arguments
    )

    from rag_rl.config.distillation import build_distillation_data, build_lists, build_trained_encoder
    from rag_rl.evaluation.retrieval import RetrievalAssembly
    from rag_rl.trainers.distillation_trainer import DistillationTrainer

    # 2. Data: queries, written for the corpus where none are named, and held-out ones
    data = build_distillation_data(distill_args, data_args, synthesis_args, retriever_args, run.folder, seed=run.seed)

    # 3. Augment the queries, mine negatives, let the teacher rank; all of it is kept in <run folder>/retriever
    corpora = build_lists(distill_args, data, data_args, retriever_args, *augmenter_args, run.folder, seed=run.seed)

    # 4. The encoder; for each evaluation the corpus is embedded anew
    encoder = build_trained_encoder(retriever_args, encoder_args)
    search = RetrievalAssembly(data.index.passages, data.held_out, encoder, top_k=retriever_args.retriever_top_k)

    # 5. The trainer
    trainer = DistillationTrainer(encoder=encoder, args=training_args, corpora=corpora, callbacks=run.callbacks)

    # 6. Measure, train, measure again
    run.measure_before(trainer, search, data.held_out)
    run.train(trainer)
    run.finish(trainer, search, data.held_out, save_merged=run_args.save_merged, examples=run_args.report_examples)


if __name__ == "__main__":
    launch(main)
