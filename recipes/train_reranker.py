"""Train a cross-encoder reranker on pairwise data, whole, with LoRA or with QLoRA, and measure it on whole lists.

Trains: a cross-encoder (or an encoder under a new head) that orders what a retriever found.
Data: train_file / valid_file (query_text, positives[], negatives[], source_chunk?, meta?), or data_corpus, data_train
    and data_eval with gold documents, from which negatives are mined with the retriever; docs/data_formats.md.
Rewards: none; a pairwise margin loss with several positives (loss_type; or ranknet, listnet, lambda).
Needs: tiny runs on 2 CPU cores in minutes; a 0.6B cross-encoder with QLoRA needs a GPU (not measured yet).
Paper: hinge over pairs as in Herbrich et al. 1999. Differences: negatives are drawn anew in every epoch, from a set
    share of hard and random ones; validation is fixed and complete.
CPU: python recipes/train_reranker.py
One node: accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/train_reranker.py --config NAME
Cluster: accelerate launch --config_file accelerate_configs/multi_node.yaml --num_machines M --num_processes GPUS
    --machine_rank RANK --main_process_ip HOST recipes/train_reranker.py --config NAME
    (on each node; docs/clusters.md says what the four are, and has a script for Slurm)
"""

from rag_rl.config.arguments import DataArguments, RetrieverArguments, RunArguments
from rag_rl.config.reranker_arguments import RerankerArguments
from rag_rl.run import launch, start_run
from rag_rl.trainers.reranker_config import RerankerConfig

ARGUMENTS = (RunArguments, DataArguments, RetrieverArguments, RerankerArguments, RerankerConfig)


def main() -> None:
    """Runs the recipe."""
    # 1. Start the run: strict parsing, run folder, seed, resume point
    run = start_run(__file__, ARGUMENTS)
    run_args, data_args, retriever_args, reranker_args, training_args = run.arguments

    from rag_rl.config.rerankers import build_cross_encoder, build_pairs, settle_adapter
    from rag_rl.data import PairSampler
    from rag_rl.evaluation.reranking import RerankingAssembly
    from rag_rl.trainers.reranker_trainer import ListEvaluator, RerankerTrainer

    # 2. Data: rows from files, or mined with the retriever; held-out ones are ranked whole
    rows, held_out = build_pairs(reranker_args, data_args, retriever_args, seed=run.seed)
    ranking = RerankingAssembly(
        held_out,
        top_k=retriever_args.retriever_top_k,
        batch_size=reranker_args.reranker_batch_size,
        retriever_weight=reranker_args.reranker_retriever_weight,
    )

    # 3. The cross-encoder, whole or with an adapter
    model = build_cross_encoder(reranker_args, use_cpu=training_args.use_cpu)

    # 4. What each epoch draws for a query
    pairs = PairSampler(
        rows,
        negatives=training_args.num_negatives,
        positives=training_args.num_positives,
        hard_share=training_args.hard_share,
        seed=training_args.seed,
    )

    # 5. The trainer
    trainer = RerankerTrainer(
        model=model,
        args=training_args,
        pairs=pairs,
        evaluator=ListEvaluator(ranking.lists(), batch_size=reranker_args.reranker_batch_size),
        callbacks=run.callbacks,
    )

    # 6. Measure the retriever's order, train, measure the reranker's
    run.measure_before(trainer, ranking, ranking.questions)
    run.train(trainer)
    settle_adapter(model, merged=run_args.save_merged)
    run.finish(trainer, ranking, ranking.questions, examples=run_args.report_examples)


if __name__ == "__main__":
    launch(main)
