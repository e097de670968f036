"""Teach a language model to search step by step, before reinforcement: supervised fine-tuning on a teacher's chains.

Trains: a causal LM that writes one step at a time, through LoRA or in full.
Data: data_corpus (documents) and data_train / data_eval (question, answers[], gold_doc_ids[]?). Chains come from
    coldstart_path (build_trajectories makes them) or, without it, from the teacher_* flags; docs/data_formats.md.
Rewards: none; one example a step, and the loss is on the step alone, not on question, earlier steps and documents.
Needs: tiny runs on 2 CPU cores in minutes; the 4 GB preset of a 0.5B model is qwen2.5-0.5b_hotpotqa. A card without
    bf16 takes --dtype float16 --bf16 false --fp16 true.
Paper: R3-RAG (arXiv 2505.23794), cold start. It fine-tunes in full; here LoRA is the preset of small cards. A prompt
    that is too long loses its oldest documents instead of its end.
CPU: accelerate launch recipes/sft_reasoner.py
One node: accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/sft_reasoner.py --config NAME
Cluster: accelerate launch --config_file accelerate_configs/zero3.yaml --num_machines M --num_processes GPUS
    --machine_rank RANK --main_process_ip HOST recipes/sft_reasoner.py --config NAME
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
from rag_rl.config.teacher_arguments import ColdStartArguments, TeacherArguments
from rag_rl.run import launch, start_run
from trl import ModelConfig, SFTConfig

ARGUMENTS = (
    RunArguments,
    DataArguments,
    RetrieverArguments,
    ReasonerArguments,
    StepRewardArguments,
    JudgeArguments,
    ColdStartArguments,
    TeacherArguments,
    SFTConfig,
    ModelConfig,
)


def main() -> None:
    """Runs the recipe."""
    # 1. Start the run: strict parsing, run folder, seed, resume point
    run = start_run(__file__, ARGUMENTS)
    run_args, data_args, retriever_args, reasoner_args, step_args, judge_args, cold_args, teacher_args, *rest = (
        run.arguments
    )
    training_args, model_args = rest

    from rag_rl.config.parts import build_baselines, build_questions, build_reasoning, build_step_setup
    from rag_rl.config.teachers import build_chains, build_examples
    from trl import SFTTrainer, get_peft_config, get_quantization_config

    # 2. Data: questions to write chains about, and held-out ones
    questions, held_out = build_questions(data_args, seed=run.seed)

    # 3. Retriever and judge: how chains are played and measured
    setup = build_step_setup(reasoner_args, retriever_args, data_args, seed=run.seed)
    assembly = build_reasoning(setup, step_args, judge_args, run.folder)
    baselines = build_baselines(assembly, reasoner_args, model_args)

    # 4. No rewards, but chains to learn from: read, or written by the teacher
    chains = build_chains(
        cold_args,
        questions,
        run.folder,
        setup.retriever,
        teacher=teacher_args,
        judge=judge_args,
        search=retriever_args,
        data=data_args,
    )
    train_dataset, eval_dataset, tokenizer = build_examples(
        cold_args, chains, held_out, setup, training_args, model_args
    )

    # 5. The trainer
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
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
