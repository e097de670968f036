"""Train a multi-hop reasoner with PPO, each step of a chain an episode: search step by step, reward step and outcome.

Trains: a causal LM that writes one step at a time (analysis, and a query or the answer), through LoRA or in full.
Data: data_corpus (documents) and data_train / data_eval (question, answers[], gold_doc_ids[]?); docs/data_formats.md.
Rewards: step_reward (the paper's process, outcome and format rewards, or another rule); verdicts come from judge_name,
    gold_gain and outcome_only need none. outcome_multiplier none does without playing each step on to its end.
Needs: tiny runs on 2 CPU cores in minutes; the 4 GB preset of a 0.5B model is qwen2.5-0.5b_hotpotqa (not measured
    yet). Start from a run of sft_reasoner, saved merged: models that do not know the form collapse.
Paper: R3-RAG (arXiv 2505.23794). What differs: states come from rounds of the current policy, and the step trained in
    each is written anew and played on to its own end; samples are drawn at temperature 1, so that none is off-policy.
CPU: accelerate launch recipes/ppo_reasoner.py
One node: accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/ppo_reasoner.py --config NAME
Cluster: accelerate launch --config_file accelerate_configs/multi_node.yaml --num_machines M --num_processes GPUS
    --machine_rank RANK --main_process_ip HOST recipes/ppo_reasoner.py --config NAME
    (on each node; docs/clusters.md says what the four are, and has a script for Slurm)
"""

from rag_rl.config.arguments import (
    DataArguments,
    JudgeArguments,
    ReasonerArguments,
    RetrieverArguments,
    RunArguments,
    StepRewardArguments,
)
from rag_rl.run import launch, start_run
from rag_rl.trainers.step_ppo_config import StepPPOConfig
from trl import ModelConfig

ARGUMENTS = (
    RunArguments,
    DataArguments,
    RetrieverArguments,
    ReasonerArguments,
    StepRewardArguments,
    JudgeArguments,
    StepPPOConfig,
    ModelConfig,
)


def main() -> None:
    """Runs the recipe."""
    # 1. Start the run: strict parsing, run folder, seed, resume point
    run = start_run(__file__, ARGUMENTS)
    run_args, data_args, retriever_args, reasoner_args, step_args, judge_args, training_args, model_args = (
        run.arguments
    )

    from rag_rl.config.parts import (
        build_baselines,
        build_questions,
        build_reasoning,
        build_step_scorer,
        build_step_setup,
        build_tokenizer,
    )
    from rag_rl.generation import PolicyGenerator
    from rag_rl.trainers.step_ppo_trainer import StepPPOTrainer
    from trl import get_peft_config, get_quantization_config

    # 2. Data: questions to train on, and held-out ones
    questions, held_out = build_questions(data_args, seed=run.seed)

    # 3. Retriever and judge: how chains are played and measured
    setup = build_step_setup(reasoner_args, retriever_args, data_args, seed=run.seed)
    tokenizer, _ = build_tokenizer(model_args, training_args)
    assembly = build_reasoning(setup, step_args, judge_args, run.folder)
    baselines = build_baselines(assembly, reasoner_args, model_args)

    # 4. Rewards: one a step
    scorer = build_step_scorer(step_args, judge_args, run.folder)

    # 5. The trainer
    trainer = StepPPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        setup=setup,
        scorer=scorer,
        questions=questions,
        processing_class=tokenizer,
        generator_class=PolicyGenerator,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        callbacks=run.callbacks,
    )

    # 6. Measure, train, measure again
    run.measure_before(
        trainer,
        assembly,
        held_out,
        headroom_samples=run_args.headroom_samples,
        batch_size=reasoner_args.reasoner_eval_batch_size,
        baselines=baselines,
    )
    run.train(trainer)
    run.finish(
        trainer,
        assembly,
        held_out,
        save_merged=run_args.save_merged,
        batch_size=reasoner_args.reasoner_eval_batch_size,
        examples=run_args.report_examples,
    )


if __name__ == "__main__":
    launch(main)
