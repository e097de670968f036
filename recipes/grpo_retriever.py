"""Train a dense retriever with GRPO from the outcome of the whole pipeline: HARR, over a frozen document index.

Trains: the query encoder, whole, through LoRA, or a linear map on top of it; document vectors stay as they are.
Data: data_corpus (documents) and data_train / data_eval (question, answers[], gold_doc_ids[]?, decomposition?), or a
    BEIR folder with the split in data_train_qrels; docs/data_formats.md.
Rewards: reader_reward; default token F1 of the answer after the last hop; with judged documents also ndcg, recall, ...
Needs: tiny runs on 2 CPU cores in minutes; a 0.6B encoder needs a GPU (not measured yet); react wants an LLM endpoint.
Paper: HARR (arXiv 2602.03645). Differences: exact ratios, dropout off, groups without variance dropped while training,
    failed readers dropped, not rewarded with 0; a loss near 0 is expected and says nothing: watch reward and success.
CPU: accelerate launch recipes/grpo_retriever.py
One node: accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/grpo_retriever.py --config NAME
Cluster: accelerate launch --config_file accelerate_configs/multi_node.yaml --num_machines M --num_processes GPUS
    --machine_rank RANK --main_process_ip HOST recipes/grpo_retriever.py --config NAME
    (on each node; docs/clusters.md says what the four are, and has a script for Slurm)
"""

from rag_rl.config.arguments import (
    DataArguments,
    QueryEncoderArguments,
    ReaderArguments,
    RetrieverArguments,
    RunArguments,
)
from rag_rl.run import launch, start_run
from rag_rl.trainers.retriever_grpo_config import RetrieverGRPOConfig

ARGUMENTS = (
    RunArguments,
    DataArguments,
    RetrieverArguments,
    QueryEncoderArguments,
    ReaderArguments,
    RetrieverGRPOConfig,
)


def main() -> None:
    """Runs the recipe."""
    # 1. Start the run: strict parsing, run folder, seed, resume point
    run = start_run(__file__, ARGUMENTS)
    run_args, data_args, retriever_args, encoder_args, reader_args, training_args = run.arguments

    from rag_rl.config.parts import build_questions, build_search, build_trained_questions
    from rag_rl.trainers.retriever_grpo_trainer import RetrieverGRPOTrainer

    # 2. Data: questions to train on, and held-out ones
    reads = reader_args.reader_name != "none"
    questions, held_out = build_questions(data_args, seed=run.seed, require_answers=reads)

    # 3. Retriever: the frozen index, the query encoder, and the reader that searches hop by hop
    search = build_search(retriever_args, data_args, reader_args, encoder_args)
    questions = build_trained_questions(questions, search, what="training")
    held_out = build_trained_questions(held_out, search, what="held-out")

    # 4. Rewards: of a finished trajectory, in search.environment
    # 5. The trainer
    trainer = RetrieverGRPOTrainer(
        encoder=search.encoder,
        args=training_args,
        index=search.retriever,
        environment=search.environment,
        questions=questions,
        top_k=retriever_args.retriever_top_k,
        callbacks=run.callbacks,
    )

    # 6. Measure, train, measure again
    run.measure_before(trainer, search, held_out)
    run.train(trainer)
    run.finish(trainer, search, held_out, save_merged=run_args.save_merged, examples=run_args.report_examples)


if __name__ == "__main__":
    launch(main)
