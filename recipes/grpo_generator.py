"""Train the generator of a RAG system with GRPO: retrieve, answer G times, reward, move towards the better answers.

Trains: a causal LM that answers from retrieved passages, through LoRA or in full.
Data: data_corpus (documents) and data_train / data_eval (question, answers[], gold_doc_ids[]?); docs/data_formats.md.
Rewards: reward_names weighted by reward_weights; default f1 1.0 + format 0.2; all of rag_rl.rewards, or your own. The
    reward judged asks judge_name (an LLM endpoint, a local model, a reward model); docs/adapters.md.
Needs: tiny runs on 2 CPU cores in minutes; a 0.5B model with LoRA needs a GPU (not measured yet); no services, except
    the endpoint of a judge where one is asked for.
Paper: DeepSeekMath (arXiv 2402.03300) for GRPO. Context is fixed before generation, so only the reader learns; TRL's
    default loss (DAPO) is kept unless a config says otherwise.
CPU: accelerate launch recipes/grpo_generator.py
One node: accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/grpo_generator.py --config NAME
Cluster: accelerate launch --config_file accelerate_configs/zero2.yaml --num_machines M --num_processes GPUS
    --machine_rank RANK --main_process_ip HOST recipes/grpo_generator.py --config NAME
    (on each node; docs/clusters.md says what the four are, and has a script for Slurm)
"""

from rag_rl.config.arguments import (
    DataArguments,
    GeneratorArguments,
    JudgeArguments,
    RetrieverArguments,
    RewardArguments,
    RunArguments,
)
from rag_rl.run import launch, start_run
from trl import GRPOConfig, ModelConfig

ARGUMENTS = (
    RunArguments,
    DataArguments,
    RetrieverArguments,
    GeneratorArguments,
    RewardArguments,
    JudgeArguments,
    GRPOConfig,
    ModelConfig,
)


def main() -> None:
    """Runs the recipe."""
    # 1. Start the run: strict parsing, run folder, seed, resume point
    run = start_run(__file__, ARGUMENTS)
    run_args, data_args, retriever_args, generator_args, reward_args, judge_args, training_args, model_args = (
        run.arguments
    )

    from rag_rl.config.parts import (
        build_assembly,
        build_judge,
        build_prompts,
        build_questions,
        build_retriever,
        build_rewards,
    )
    from trl import GRPOTrainer, get_peft_config, get_quantization_config

    # 2. Data: questions to train on, and held-out ones
    questions, held_out = build_questions(data_args, seed=run.seed)

    # 3. Retriever and judge: one batched search gives every prompt its passages
    retriever = build_retriever(retriever_args, data_args, seed=run.seed)
    assembly, tokenizer = build_assembly(
        generator_args, retriever, top_k=retriever_args.retriever_top_k, training=training_args, model=model_args
    )
    train_dataset = build_prompts(assembly, questions)
    judge = build_judge(judge_args, run.folder)

    # 4. Rewards
    rewards = build_rewards(reward_args, generator_args, training_args, judge)

    # 5. The trainer
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=rewards.combined,
        train_dataset=train_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        callbacks=run.callbacks,
    )

    # 6. Measure, train, measure again
    run.measure_before(
        trainer,
        assembly,
        held_out,
        rewards=rewards.score,
        headroom_samples=run_args.headroom_samples,
        batch_size=generator_args.generator_eval_batch_size,
    )
    run.train(trainer)
    run.finish(
        trainer,
        assembly,
        held_out,
        rewards=rewards.score,
        save_merged=run_args.save_merged,
        batch_size=generator_args.generator_eval_batch_size,
        examples=run_args.report_examples,
    )


if __name__ == "__main__":
    launch(main)
