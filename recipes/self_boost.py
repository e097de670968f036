"""Let a query augmenter and a dense retriever teach each other, in rounds, from a corpus without labels.

Trains: a causal LM that expands queries, by the retriever's preferences (DPO), and the encoder, by the order in which
    that LM ranks its passages; a step that does not help on held-out synthetic queries is not kept.
Data: data_corpus; queries are written for it, round by round, or named in boost_queries. data_eval, if there is any,
    only shows what the untrained pair finds and the kept one; docs/data_formats.md.
Rewards: none; preferences as in dpo_augmenter, a listwise loss as in distill_retriever.
Needs: tiny runs on 2 CPU cores in minutes; an 8B model with LoRA needs GPUs of 80 GB (an estimate, not measured).
Paper: Reinforced-IR (arXiv 2502.11562). Differences: those of the two recipes; one set of queries a round for both
    parts; a gate; each step has a manifest, so that what is finished is skipped, and what depends on a changed setting
    is done anew, when it goes on.
CPU: accelerate launch recipes/self_boost.py
One node: accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/self_boost.py --config NAME
Cluster: accelerate launch --config_file accelerate_configs/multi_node.yaml --num_machines M --num_processes GPUS
    --machine_rank RANK --main_process_ip HOST recipes/self_boost.py --config NAME
    (on each node; docs/clusters.md says what the four are, and has a script for Slurm)
"""

from rag_rl.config.arguments import DataArguments, QueryEncoderArguments, RetrieverArguments
from rag_rl.config.augmenter_arguments import AugmenterArguments, PreferenceArguments
from rag_rl.config.distillation_arguments import DistillationArguments
from rag_rl.config.self_boosting_arguments import BoostArguments, RetrieverTrainingArguments
from rag_rl.config.synthesis_arguments import SynthesisArguments
from rag_rl.run import launch, start_run
from trl import DPOConfig, ModelConfig

ARGUMENTS = (
    BoostArguments,
    DataArguments,
    SynthesisArguments,
    RetrieverArguments,
    QueryEncoderArguments,
    AugmenterArguments,
    PreferenceArguments,
    DistillationArguments,
    RetrieverTrainingArguments,
    DPOConfig,
    ModelConfig,
)


def main() -> None:
    """Runs the recipe."""
    # 1. Start the run: strict parsing, run folder, seed; each step below is a run of its own in a folder of it
    run = start_run(__file__, ARGUMENTS, in_steps=True)
    boost_args, data_args, synthesis_args, retriever_args, encoder_args, augmenter_args, *learning = run.arguments
    preference_args, distill_args, distill_training_args, dpo_args, model_args = learning

    from rag_rl.config.distillation import build_lists, build_trained_encoder
    from rag_rl.config.parts import build_tokenizer
    from rag_rl.config.preferences import build_preference_dataset, build_preferences
    from rag_rl.config.self_boosting import Boosting
    from rag_rl.trainers.distillation_trainer import DistillationTrainer
    from trl import DPOTrainer, get_peft_config, get_quantization_config

    # 2. Data: a corpus, and the pair to start from
    boost = Boosting(run, boost_args, data_args, synthesis_args, retriever_args, augmenter_args, model_args)
    boost.measure_before()

    for number in boost.rounds:
        # 3. Queries of this round; the pair of the moment is evaluated on those that are held out
        data = boost.write_queries(number)

        # 4. No rewards: the augmenter learns what the retriever prefers, ...
        step, training, model, pair = boost.augmenter_step(number, data, preference_args, dpo_args)
        if not step.finished:
            tokenizer, _ = build_tokenizer(model, training)
            pairs = build_preferences(
                preference_args,
                augmenter_args,
                data.queries,
                data.index,
                step.folder,
                model=model,
                training=training,
                tokenizer=tokenizer,
                seed=step.seed,
            )
            trainer = DPOTrainer(
                model=model.model_name_or_path,
                args=training,
                train_dataset=build_preference_dataset(pairs, training=training, tokenizer=tokenizer),
                processing_class=tokenizer,
                peft_config=get_peft_config(model),
                quantization_config=get_quantization_config(model),
                callbacks=step.callbacks,
            )
            step.measure_before(trainer, pair, data.held_out, batch_size=augmenter_args.augmenter_batch_size)
            step.train(trainer)
            step.finish(trainer, pair, data.held_out, save_merged=True, batch_size=augmenter_args.augmenter_batch_size)
            del trainer
        boost.keep(step)

        # 5. ... and the retriever the order in which the augmenter ranks; the trainers of both are spelled out here
        step, training, writer = boost.retriever_step(
            number, data, distill_args, encoder_args, distill_training_args, dpo_args
        )
        if not step.finished:
            corpora = build_lists(
                distill_args, data, data_args, boost.retriever, augmenter_args, writer, step.folder, seed=step.seed
            )
            encoder = build_trained_encoder(boost.retriever, encoder_args)
            pair = boost.search(data, encoder)
            trainer = DistillationTrainer(encoder=encoder, args=training, corpora=corpora, callbacks=step.callbacks)
            step.measure_before(trainer, pair, data.held_out)
            step.train(trainer)
            step.finish(trainer, pair, data.held_out, save_merged=True)
            del trainer
        boost.keep(step)

    # 6. Save the pair that was kept, measure it as reloaded, report over all rounds
    boost.finish()


if __name__ == "__main__":
    launch(main)
