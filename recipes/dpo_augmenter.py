"""Teach a language model to write what finds the passage: pseudo-answers that a retriever prefers, learnt with DPO.

Trains: a causal LM that expands a query before it is searched, through LoRA or in full; the retriever stays as it is.
Data: data_corpus, and data_train / data_eval: questions with gold documents, a queries.json of Reinforced-IR, or a
    folder that synthesize_queries wrote from the corpus alone; docs/data_formats.md.
Rewards: none; of preference_candidates augmentations a query the retriever prefers the one that brings the query
    nearer to its passage (preference_signal published), or further above other passages (margin, rank).
Needs: tiny runs on 2 CPU cores in minutes; an 8B model with LoRA needs a GPU of 80 GB (an estimate, not measured).
Paper: Reinforced-IR (arXiv 2502.11562), RLRF. All candidates of a query come from one pass, not from one a candidate;
    scores can see hard negatives and leave length out; stopped at any moment it goes on where it was.
CPU: accelerate launch recipes/dpo_augmenter.py
One node: accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/dpo_augmenter.py --config NAME
Cluster: accelerate launch --config_file accelerate_configs/zero1.yaml --num_machines M --num_processes GPUS
    --machine_rank RANK --main_process_ip HOST recipes/dpo_augmenter.py --config NAME
    (on each node; docs/clusters.md says what the four are, and has a script for Slurm)
"""

from functools import partial

from rag_rl.config.arguments import DataArguments, RetrieverArguments, RunArguments
from rag_rl.config.augmenter_arguments import AugmenterArguments, PreferenceArguments
from rag_rl.run import launch, start_run
from trl import DPOConfig, ModelConfig

ARGUMENTS = (
    RunArguments,
    DataArguments,
    RetrieverArguments,
    AugmenterArguments,
    PreferenceArguments,
    DPOConfig,
    ModelConfig,
)


def main() -> None:
    """Runs the recipe."""
    # 1. Start the run: strict parsing, run folder, seed, resume point
    run = start_run(__file__, ARGUMENTS)
    run_args, data_args, retriever_args, augmenter_args, preference_args, training_args, model_args = run.arguments

    from rag_rl.config.augmenters import build_augmented_retriever, build_dense_index, build_queries, wrap_generator
    from rag_rl.config.parts import build_tokenizer
    from rag_rl.config.preferences import build_preference_dataset, build_preferences, write_augmentations
    from rag_rl.evaluation.augmenting import AugmentingAssembly
    from trl import DPOTrainer, get_peft_config, get_quantization_config

    # 2. Data: queries to learn from, and held-out ones, each with its passage
    index = build_dense_index(retriever_args, data_args)
    queries, held_out = build_queries(data_args, index.passages, seed=run.seed)
    questions = [query.question for query in held_out]

    # 3. The augmenter before the retriever: how it is asked, and how what it writes is mixed with the query
    tokenizer, _ = build_tokenizer(model_args, training_args)
    assembly = AugmentingAssembly(
        index,
        augment=partial(wrap_generator, augmenter_args),
        mix=partial(build_augmented_retriever, augmenter_args, index),
        top_k=retriever_args.retriever_top_k,
    )

    # 4. No rewards, but preferences: candidates, the retriever's scores of them, pairs
    pairs = build_preferences(
        preference_args,
        augmenter_args,
        queries,
        index,
        run.folder,
        model=model_args,
        training=training_args,
        tokenizer=tokenizer,
        seed=run.seed,
        settings=(data_args, retriever_args),
    )

    # 5. The trainer
    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=build_preference_dataset(pairs, training=training_args, tokenizer=tokenizer),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        callbacks=run.callbacks,
    )

    # 6. Measure, train, measure again; and write what the retriever can learn from next
    run.measure_before(
        trainer,
        assembly,
        questions,
        batch_size=augmenter_args.augmenter_batch_size,
        baselines={"no_augmentation": assembly.without_augmentation()},
    )
    run.train(trainer)
    write_augmentations(
        assembly.under_training(trainer, batch_size=augmenter_args.augmenter_batch_size),
        queries,
        index,
        run.folder,
        prefix=augmenter_args.augmenter_prefix,
    )
    run.finish(
        trainer,
        assembly,
        questions,
        save_merged=run_args.save_merged,
        batch_size=augmenter_args.augmenter_batch_size,
        examples=run_args.report_examples,
    )


if __name__ == "__main__":
    launch(main)
