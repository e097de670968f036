"""Train a cross-encoder reranker with GRPO over the orders that it samples, from what a reader answers with them.

Trains: a cross-encoder, whole, with LoRA or with QLoRA, that orders what a retriever found; one that was trained by
    train_reranker (reranker_model: its run folder), or one that is taught first, for start_steps.
Data: as train_reranker; a reader's reward also needs answers: those of the questions, or answers in the meta of a row.
Rewards: reader_reward; default token F1 of the answer from the first retriever_top_k of an order; ndcg, recall,
    reciprocal_rank against the judged documents need no reader (reader_name none).
Needs: tiny runs on 2 CPU cores in minutes; a 0.6B cross-encoder needs a GPU (not measured yet); a reader's endpoint.
Paper: no paper of its own; the policy is that of HARR (arXiv 2602.03645, eq. 7 to 9) over a cross-encoder's scores.
    Differences: one search a question; one forward pass samples and carries the gradient, so no ratio to clip.
CPU: accelerate launch recipes/grpo_reranker.py
One node: accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/grpo_reranker.py --config NAME
Cluster: accelerate launch --config_file accelerate_configs/multi_node.yaml --num_machines M --num_processes GPUS
    --machine_rank RANK --main_process_ip HOST recipes/grpo_reranker.py --config NAME
    (on each node; docs/clusters.md says what the four are, and has a script for Slurm)
"""

from rag_rl.config.arguments import DataArguments, ReaderArguments, RetrieverArguments, RunArguments
from rag_rl.config.reranker_arguments import RerankerArguments
from rag_rl.run import launch, start_run
from rag_rl.trainers.reranker_grpo import RerankerGRPOConfig

ARGUMENTS = (
    RunArguments,
    DataArguments,
    RetrieverArguments,
    RerankerArguments,
    ReaderArguments,
    RerankerGRPOConfig,
)


def main() -> None:
    """Runs the recipe."""
    # 1. Start the run: strict parsing, run folder, seed, resume point
    run = start_run(__file__, ARGUMENTS)
    run_args, data_args, retriever_args, reranker_args, reader_args, training_args = run.arguments

    from rag_rl.config.rerankers import build_cross_encoder, build_pairs, build_ranking_environment, settle_adapter
    from rag_rl.data import PairSampler
    from rag_rl.evaluation.reranking import RerankingAssembly
    from rag_rl.trainers.reranker_grpo import RerankerGRPOTrainer, supervised_start
    from rag_rl.trainers.reranker_trainer import ListEvaluator

    # 2. Data: queries with the candidates that the retriever found, from files or mined
    rows, held_out = build_pairs(reranker_args, data_args, retriever_args, seed=run.seed)

    # 3. Rewards: who reads the first of an order, or how it agrees with the judgements
    environment = build_ranking_environment(reader_args)
    top_k = retriever_args.retriever_top_k
    practice = RerankingAssembly(rows, top_k=top_k, environment=environment)
    ranking = RerankingAssembly(
        held_out,
        top_k=top_k,
        batch_size=reranker_args.reranker_batch_size,
        retriever_weight=reranker_args.reranker_retriever_weight,
        environment=environment,
    )

    # 4. The cross-encoder: trained before, or taught now
    model = build_cross_encoder(reranker_args, use_cpu=training_args.use_cpu)
    pairs = PairSampler(
        rows,
        negatives=training_args.num_negatives,
        positives=training_args.num_positives,
        hard_share=training_args.hard_share,
        seed=training_args.seed,
    )
    supervised_start(model, pairs, training_args, resumed=run.checkpoint is not None)

    # 5. The trainer
    trainer = RerankerGRPOTrainer(
        model=model,
        args=training_args,
        lists=practice.lists(),
        reward=practice.reward(),
        top_k=top_k,
        evaluator=ListEvaluator(ranking.lists(), batch_size=reranker_args.reranker_batch_size),
        callbacks=run.callbacks,
    )

    # 6. Measure the start and the retriever's own order, train, measure again
    run.measure_before(trainer, ranking.against_start(), ranking.questions, baselines=ranking.baselines())
    run.train(trainer)
    settle_adapter(model, merged=run_args.save_merged)
    run.finish(trainer, ranking, ranking.questions, examples=run_args.report_examples)


if __name__ == "__main__":
    launch(main)
