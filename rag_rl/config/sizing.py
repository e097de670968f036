"""What a config will need, before anything is loaded: the model's shape, the recipe's settings, the cards there are.

Of a model only its ``config.json`` is read; its layers are built on torch's meta device, which takes no memory, so
that every architecture of transformers is counted as it is. The arithmetic is in ``rag_rl.config.memory``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import yaml

from rag_rl.config.launching import check_sharding
from rag_rl.config.memory import (
    GIB,
    MemoryEstimate,
    Method,
    ModelShape,
    TrainingPlan,
    adapter_parameters,
    estimate_memory,
    generation_seconds,
    presets,
    training_flops,
)
from rag_rl.config.parsing import read_known
from rag_rl.config.parts import expand, import_attribute
from rag_rl.errors import ConfigError, UserError

Kind = Literal["causal", "encoder", "reranker"]

# Linear layers of a feed-forward that multiplies two branches, as transformers calls them.
_GATED = frozenset({"gate_proj", "gate_up_proj", "w3", "Wi"})
# A prompt of retrieved passages, where no setting says how long it may be: the words around them.
_AROUND = 128
_UNKNOWN_PROMPT = 1024
# Sub-queries, questions with their history and pairs, where the encoder's own limit is not known.
_UNKNOWN_TEXT = 512
# About half of what the data sheet of an H100 says, which is what trainings tend to reach.
FLOPS = 4e14
BANDWIDTH = 1.7e12
# Bytes of a vector's number in an index.
_VECTOR_BYTES = 4


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model as its config describes it.

    Attributes:
        name: as the user knows it.
        shape: what memory depends on.
        model_type: of transformers.
        stored_bytes: of a weight in its files.
    """

    name: str
    shape: ModelShape
    model_type: str
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class Launch:
    """How many processes share a training, and what.

    Attributes:
        processes: of all nodes.
        zero_stage: 0 for DDP; FSDP2 as 3.
        deepspeed: whether it is DeepSpeed.
        offload: to main memory.
        name: for the report.
    """

    processes: int = 1
    zero_stage: int = 0
    deepspeed: bool = False
    offload: bool = False
    name: str = "one process"


@dataclass(frozen=True, slots=True)
class Sizing:
    """What a config needs on one card.

    Attributes:
        config: recipe and config.
        model: what is trained.
        plan: how.
        launch: on how many.
        estimate: the bytes.
        others: what else lies on the card.
        index_bytes: of the vectors, memory-mapped; None where the corpus is not there.
        notes: what was assumed, and what is not counted.
        methods: what the recipe can train by.
        step_rows: sequences that one card trains on in a step.
        written_rows: sequences that it writes for a step; 0: none, or no number that the settings tell.
        shareable: whether its weights may be shared out over processes (ZeRO-3).
    """

    config: str
    model: FoundModel
    plan: TrainingPlan
    launch: Launch
    estimate: MemoryEstimate
    others: dict[str, float]
    index_bytes: int | None
    notes: list[str] = field(default_factory=list)
    methods: tuple[Method, ...] = ("full", "lora", "qlora")
    step_rows: int = 1
    written_rows: int = 0
    shareable: bool = True

    @property
    def training_seconds(self) -> float:
        """Of the passes of one step, at ``FLOPS``; those of a reference included."""
        tokens = self.step_rows * self.plan.length
        reference = 2.0 * self.model.shape.parameters * tokens if self.plan.reference else 0.0
        models = 2 if self.plan.value_model else 1
        return (models * training_flops(self.model.shape, self.plan, tokens=tokens) + reference) / FLOPS

    @property
    def writing_seconds(self) -> float:
        """Of the samples of one step, at ``BANDWIDTH``."""
        plan = replace(self.plan, generated_rows=self.written_rows, generated_length=self.plan.length)
        if not self.written_rows:
            return 0.0
        return generation_seconds(self.model.shape, plan, tokens=self.plan.logit_tokens, bytes_per_second=BANDWIDTH)


def read_model(name: str, kind: Kind = "causal", *, needs: str = "") -> FoundModel:
    """Reads a model's config, from a folder or the Hub's cache, and counts its layers.

    Args:
        name: folder, Hub id, ``${tiny}/...`` or ``python:package:function``.
        kind: what it is loaded as: a language model, an encoder, or a scorer of pairs.
        needs: what the header of the recipe's config says, for the error.

    Returns:
        The model.

    Raises:
        ConfigError: there is no config of it here, or transformers does not know the architecture.
    """
    from transformers import AutoConfig

    path = str(import_attribute(name.removeprefix("python:"))()) if name.startswith("python:") else expand(name)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        stated = f"; the header of the config says: {needs}" if needs else ""
        raise ConfigError(
            f"the config of {name!r} is not here: fetch it (a few kB, no weights) with 'hf download {name} "
            f"config.json'{stated}"
        ) from error
    return FoundModel(name, shape_of(config, kind), str(config.model_type), _stored_bytes(config))


def shape_of(config: Any, kind: Kind = "causal") -> ModelShape:
    """Builds a model without memory and counts.

    Args:
        config: of transformers.
        kind: what it is loaded as.

    Returns:
        The shape.

    Raises:
        ConfigError: transformers has no such model for this kind.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    classes: dict[str, Any] = {
        "causal": AutoModelForCausalLM,
        "encoder": AutoModel,
        "reranker": AutoModelForSequenceClassification,
    }
    try:
        with torch.device("meta"):
            model = classes[kind].from_config(config)
    except ValueError as error:
        first = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"a model of type {config.model_type!r} cannot be counted as a {kind} model: {first}"
        ) from error
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    inner = model.base_model if kind == "reranker" else model
    skipped = {id(model.get_output_embeddings())} if kind == "causal" else set()
    linear = tuple(
        (path.rpartition(".")[2], module.in_features, module.out_features)
        for path, module in inner.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) not in skipped
    )
    return ModelShape(
        parameters=sum(weight.numel() for weight in model.parameters()),
        linear=linear,
        hidden_size=text.hidden_size,
        layers=text.num_hidden_layers,
        intermediate_size=text.intermediate_size,
        attention_size=heads * width,
        cache_size=2 * (getattr(text, "num_key_value_heads", None) or heads) * width,
        vocab_size=text.vocab_size,
        gated=any(name in _GATED for name, _, _ in linear),
    )


def _stored_bytes(config: Any) -> int:
    return 2 if str(getattr(config, "dtype", None)).rpartition(".")[2] in ("bfloat16", "float16") else 4


def _bytes_of(dtype: str | None, model: FoundModel) -> int:
    """Of a weight as it is loaded; without a dtype of its own that of the files."""
    return {"bfloat16": 2, "float16": 2, "float32": 4}.get(str(dtype), model.stored_bytes)


def read_launch(path: str | None, processes: int | None = None) -> Launch:
    """Reads a launch file of accelerate.

    Args:
        path: YAML file; None for a single process.
        processes: in place of what the file says.

    Returns:
        What it means for memory.

    Raises:
        ConfigError: it is not there, or cannot be read.
    """
    if path is None:
        count = processes or 1
        return Launch(count, name="one process" if count == 1 else f"{count} processes, DDP")
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        count = processes or int(settings["num_processes"])
        kind = str(settings["distributed_type"])
        if kind == "DEEPSPEED":
            text = settings["deepspeed_config"]["deepspeed_config_file"]
            zero = json.loads(text)["zero_optimization"]
            offload = "offload_param" in zero or "offload_optimizer" in zero
            stage = int(zero["stage"])
            name = f"{count} processes, ZeRO-{stage}{' with offload' if offload else ''}"
            return Launch(count, stage, deepspeed=True, offload=offload, name=name)
    except FileNotFoundError as error:
        raise ConfigError(f"--launch {path}: there is no such file; see accelerate_configs/") from error
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"--launch {path} is no launch file of accelerate as in accelerate_configs/") from error
    if kind == "FSDP":
        return Launch(count, 3, name=f"{count} processes, FSDP2")
    return Launch(count, name="one process" if count == 1 else f"{count} processes, DDP")


def find_config(asked: str, roots: Sequence[Path]) -> tuple[Path, Path]:
    """Finds a config and the recipe that it belongs to.

    Args:
        asked: a YAML file in a folder named like its recipe, or ``recipe/name``.
        roots: folders that may hold ``recipe.py`` and ``configs/``.

    Returns:
        (config, recipe).

    Raises:
        ConfigError: one of them is not there.
    """
    name = asked if asked.endswith((".yaml", ".yml")) else f"{asked}.yaml"
    places = [Path(asked), *(root / "configs" / name for root in roots)]
    config = next((place for place in places if place.is_file()), None)
    if config is None:
        raise ConfigError(
            f"--config {asked}: there is no such file; give a path, or recipe/name as 'rag-rl doctor' lists"
        )
    recipe = f"{config.resolve().parent.name}.py"
    found = next((root / recipe for root in roots if (root / recipe).is_file()), None)
    if found is None:
        raise ConfigError(
            f"--config {asked}: a config lies in a folder named like its recipe (grpo_generator/mine.yaml), and there "
            f"is no recipe {recipe}"
        )
    return config, found


def read_settings(config: Path, recipe: Path) -> dict[str, Any]:
    """What a config means for its recipe, defaults included, without what only the machine of the run can check.

    Args:
        config: the YAML file.
        recipe: whose ``ARGUMENTS`` are filled.

    Returns:
        Value by setting.

    Raises:
        ConfigError: a value has the wrong type, or the recipe trains nothing.
    """
    specification = importlib.util.spec_from_file_location(f"sized_{recipe.stem}", recipe)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where dataclasses look a class's module up
    specification.loader.exec_module(module)
    if not any(hasattr(owner, "per_device_train_batch_size") for owner in module.ARGUMENTS):
        raise ConfigError(f"{recipe.stem} trains nothing: there is nothing to estimate")
    found: dict[str, Any] = {}
    for owner in module.ARGUMENTS:
        for one in dataclasses.fields(owner):
            if one.default is not dataclasses.MISSING:
                found[one.name] = one.default
            elif one.default_factory is not dataclasses.MISSING:
                found[one.name] = one.default_factory()
    return {**found, **read_known(config, module.ARGUMENTS)}


def size_config(
    config: Path,
    recipe: Path,
    *,
    launch: Launch,
    gpu_bytes: float | None = None,
    prompt_tokens: int | None = None,
    needs: str = "",
) -> Sizing:
    """Estimates what a config needs on one card.

    Args:
        config: the YAML file.
        recipe: the recipe's file.
        launch: how many processes share it.
        gpu_bytes: of a card, which vLLM takes its share of; None where there is none.
        prompt_tokens: length of a prompt, where the settings do not tell.
        needs: what the config's header says, for errors.

    Returns:
        The estimate, with its assumptions.

    Raises:
        ConfigError: a model's config is missing, the recipe trains nothing, or it refuses such a launch.
    """
    settings = read_settings(config, recipe)
    if "boost_rounds" in settings:
        raise ConfigError(f"{recipe.stem} trains two models in turns: ask about configs of the recipes that do it")
    _check_launch(settings, launch)
    notes: list[str] = []
    key, kind = _trained(settings)
    model = read_model(settings[key] or "", kind, needs=needs)
    plan = _plan(settings, model, kind, launch, prompt_tokens, notes)
    others, dimension = _others(settings, key, model, plan, gpu_bytes, notes)
    index_bytes = _index_bytes(settings, dimension, notes)
    methods: tuple[Method, ...] = ("full", "lora") if kind == "encoder" else ("full", "lora", "qlora")
    estimate = estimate_memory(model.shape, plan, others=others)
    name = f"{recipe.stem}/{config.stem}"
    steps = settings["gradient_accumulation_steps"]
    grpo = kind == "causal" and "num_generations" in settings
    if "num_ppo_epochs" in settings:
        notes.append("the chains that PPO's states and outcomes come from are not in the time of a step")
    return Sizing(
        name,
        model,
        plan,
        launch,
        estimate,
        others,
        index_bytes,
        notes,
        methods,
        step_rows=plan.rows * steps,
        written_rows=plan.rows * steps if grpo else 0,
        shareable=_takes(settings, Launch(launch.processes, 3, deepspeed=True)),
    )


def _check_launch(settings: Mapping[str, Any], launch: Launch) -> None:
    """Refuses what the recipe would refuse, in its words."""
    # What is refused under FSDP is refused under ZeRO-3 as well, so that the stage stands for both.
    plugin = SimpleNamespace(zero_stage=launch.zero_stage) if launch.deepspeed or launch.zero_stage else None
    check_sharding(SimpleNamespace(**{**settings, "deepspeed_plugin": plugin}))


def _takes(settings: Mapping[str, Any], launch: Launch) -> bool:
    try:
        _check_launch(settings, launch)
    except ConfigError:
        return False
    return True


def _trained(settings: Mapping[str, Any]) -> tuple[str, Kind]:
    """The setting that names what is trained, and what kind of model it is."""
    if "reranker_train" in settings:
        return "reranker_model", "reranker"
    if "retriever_train" in settings:
        return "retriever_encoder", "encoder"
    return "model_name_or_path", "causal"


def _plan(
    settings: Mapping[str, Any],
    model: FoundModel,
    kind: Kind,
    launch: Launch,
    prompt_tokens: int | None,
    notes: list[str],
) -> TrainingPlan:
    per_device = int(settings["per_device_train_batch_size"])
    half = settings.get("bf16") or settings.get("fp16")
    autocast = bool(half) if settings.get("bf16") is not None or settings.get("fp16") else kind == "causal"
    common: dict[str, Any] = {
        "autocast": autocast,
        "optimizer": str(getattr(settings["optim"], "value", settings["optim"])),
        "checkpointing": bool(settings["gradient_checkpointing"]),
        "processes": launch.processes,
        "zero_stage": launch.zero_stage,
        "deepspeed": launch.deepspeed,
        "offload": launch.offload,
    }
    if kind == "causal":
        common |= _language_model(settings, model)
        common |= _sequences(settings, per_device, prompt_tokens, notes)
    else:
        common |= _encoder(settings, model, kind, per_device, notes)
    return TrainingPlan(**common)


def _language_model(settings: Mapping[str, Any], model: FoundModel) -> dict[str, Any]:
    """Weights and adapter, by the settings of TRL's ``ModelConfig``."""
    adapted = bool(settings["use_peft"])
    targets = settings["lora_target_modules"]
    if targets is None:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

        targets = DEFAULTS.get(model.model_type, [])
    if isinstance(targets, str):
        targets = [targets]
    return {
        "method": ("qlora" if settings["load_in_4bit"] else "lora") if adapted else "full",
        "weight_bytes": _bytes_of(settings["dtype"], model),
        "lora_r": settings["lora_r"],
        "lora_targets": () if "all-linear" in targets else tuple(targets),
        "nested": bool(settings["use_bnb_nested_quant"]),
    }


def _sequences(
    settings: Mapping[str, Any], per_device: int, prompt_tokens: int | None, notes: list[str]
) -> dict[str, Any]:
    """Rows, lengths and logits of each trainer of TRL."""
    if "num_ppo_epochs" in settings:
        step = settings["reasoner_max_step_tokens"]
        prompt = prompt_tokens or settings["reasoner_max_prompt_tokens"] or _assumed_prompt(settings, notes)
        return {
            "rows": per_device,
            "length": prompt + step,
            "logit_tokens": step,
            "generated_rows": max(settings["rollout_batch_size"], settings["reasoner_eval_batch_size"]),
            "generated_length": prompt + step,
            "reference": True,
            "value_model": True,
        }
    if "num_generations" in settings:
        reasons = "reasoner_max_steps" in settings
        # Documents of a chain belong to its completion; before it stands the question alone.
        prompt = prompt_tokens or (2 * _AROUND if reasons else _assumed_prompt(settings, notes))
        completion = settings["max_completion_length"]
        at_once = settings["steps_per_generation"] or settings["gradient_accumulation_steps"]
        asked = settings["reasoner_eval_batch_size" if reasons else "generator_eval_batch_size"]
        return {
            "rows": per_device,
            "length": prompt + completion,
            "logit_tokens": completion,
            "generated_rows": 0 if settings["use_vllm"] else max(per_device * at_once, asked),
            "generated_length": prompt + completion,
            "reference": settings["beta"] > 0,
        }
    length = settings["max_length"] or _UNKNOWN_PROMPT
    if "precompute_ref_log_probs" in settings:
        return {
            "rows": 2 * per_device,  # the chosen and the rejected one
            "length": length,
            "logit_tokens": length,
            "generated_rows": settings.get("preference_batch_size", 0),
            "generated_length": _UNKNOWN_TEXT + settings.get("augmenter_max_new_tokens", 0),
            "reference": not settings["precompute_ref_log_probs"],
        }
    # Of a supervised loss TRL 1.12 computes the logits in parts ("chunked_nll"), unless it is told otherwise.
    return {
        "rows": per_device,
        "length": length,
        "logit_tokens": 0 if settings["loss_type"] in (None, "chunked_nll") else length,
        "generated_rows": settings.get("reasoner_eval_batch_size", 0),
        "generated_length": length,
    }


def _assumed_prompt(settings: Mapping[str, Any], notes: list[str]) -> int:
    chunk, top_k = settings.get("data_chunk_tokens"), settings["retriever_top_k"]
    limit: int | None = settings.get("generator_max_prompt_tokens")
    if chunk:
        steps = settings.get("reasoner_max_steps", 2) - 1
        found = chunk * top_k * max(1, steps) + _AROUND
        return min(found, limit) if limit else found
    if limit:
        return limit
    notes.append(f"prompts were taken for {_UNKNOWN_PROMPT} tokens long: --prompt_tokens says otherwise")
    return _UNKNOWN_PROMPT


def _encoder(
    settings: Mapping[str, Any], model: FoundModel, kind: Kind, per_device: int, notes: list[str]
) -> dict[str, Any]:
    """Rows and lengths of the trainers over sentence-transformers."""
    own = "reranker" if kind == "reranker" else "retriever"
    dtype = settings[f"{own}_dtype"]
    length = settings[f"{own}_max_length"]
    if kind == "reranker":
        listed = settings["reranker_candidates"] if "start_steps" in settings else 1 + settings["num_negatives"]
    elif "group_size" in settings:
        listed = settings["group_size"] + (2 if settings["augmentation_weight"] else 1)
    else:
        listed = settings["reader_max_hops"] if settings["reader_name"] != "none" else 1
        length = settings["retriever_state_tokens"] or length
    if length is None:
        length = _UNKNOWN_TEXT
        notes.append(f"texts were taken for {length} tokens long, all of them: shorter ones take less")
    method = settings[f"{own}_train"]
    return {
        "method": "full" if method == "head" else method,
        "weight_bytes": _bytes_of(dtype, model),
        "lora_r": settings[f"{own}_lora_r"],
        "nested": True,
        "rows": per_device * listed,
        "length": length,
    }


def _others(
    settings: Mapping[str, Any],
    key: str,
    model: FoundModel,
    plan: TrainingPlan,
    gpu_bytes: float | None,
    notes: list[str],
) -> tuple[dict[str, float], int | None]:
    """What else lies on the card, and the width of the index's vectors."""
    found: dict[str, float] = {}
    dimension = model.shape.hidden_size if key == "retriever_encoder" else None
    encoder = settings.get("retriever_encoder")
    if key != "retriever_encoder" and encoder and settings.get("retriever_name") == "dense":
        try:
            other = read_model(encoder, "encoder")
            dimension = other.shape.hidden_size
            found["retriever's encoder"] = float(
                other.shape.parameters * _bytes_of(settings["retriever_dtype"], other)
            )
        except ConfigError:
            notes.append(f"the encoder {encoder} is not counted, since its config is not here")
    if settings.get("reader_model") and not settings.get("reader_base_url"):
        try:
            other = read_model(settings["reader_model"])
            found["reader"] = float(other.shape.parameters * other.stored_bytes)
        except ConfigError:
            notes.append(f"the reader {settings['reader_model']} is not counted, since its config is not here")
    if settings.get("judge_name") in ("local", "reward_model"):
        notes.append(f"the judge {settings['judge_model']} runs in this process and is not counted")
    if settings.get("use_vllm"):
        if settings["vllm_mode"] != "colocate":
            notes.append("vLLM runs on cards of its own (vllm_mode server)")
        elif gpu_bytes is None:
            notes.append("vLLM's share of the card (vllm_gpu_memory_utilization) is not counted: say --gpu_memory")
        else:
            found["vLLM"] = settings["vllm_gpu_memory_utilization"] * gpu_bytes
    if "num_ppo_epochs" in settings:
        steps = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
        found["logits of an update"] = 4.0 * steps * plan.logit_tokens * model.shape.vocab_size
    return found, dimension


def _index_bytes(settings: Mapping[str, Any], dimension: int | None, notes: list[str]) -> int | None:
    """Of the vectors, by the number of documents."""
    if dimension is None or settings.get("retriever_name") != "dense" or not settings.get("data_corpus"):
        return None
    try:
        corpus = Path(expand(settings["data_corpus"]))
    except (UserError, OSError):
        return None
    corpus = corpus / "corpus.jsonl" if corpus.is_dir() else corpus
    if corpus.suffix != ".jsonl" or not corpus.is_file():
        return None
    with corpus.open("rb") as lines:
        documents = sum(1 for _ in lines)
    if settings.get("data_chunk_tokens"):
        notes.append("the index was counted with one chunk a document: longer ones give more")
    if settings.get("retriever_index", "flat") != "flat":
        notes.append(f"the index was counted as a flat one, not as {settings['retriever_index']}: docs/scaling.md")
    return documents * dimension * _VECTOR_BYTES


def describe(sizing: Sizing, *, gpu_bytes: float | None, gpu: str = "") -> list[str]:
    """Lays an estimate out for the terminal.

    Args:
        sizing: the estimate.
        gpu_bytes: memory of a card; None where there is none.
        gpu: its name.

    Returns:
        Lines.
    """
    shape, estimate, plan = sizing.model.shape, sizing.estimate, sizing.plan
    lines = [f"{sizing.config}: {sizing.model.name}, {_count(shape.parameters)} parameters"]
    if plan.method != "full":
        lines.append(f"  adapter     {_count(adapter_parameters(shape, plan))} parameters, rank {plan.lora_r}")
    lines.append(f"  launch      {sizing.launch.name}")
    lines.append(
        f"  one card    {_gib(estimate.total)} (an estimate: {_gib(estimate.counted)} counted, and 10% + 1 GiB on top)"
    )
    training, generating = sum(estimate.training.values()), sum(estimate.generating.values())
    for title, part, shown in (
        ("all the time", estimate.held, True),
        ("training", estimate.training, training > 0),
        ("writing samples, at another time", estimate.generating, generating > 0),
    ):
        rows = [(name, size) for name, size in part.items() if size]
        if shown and rows:
            lines.append(f"    {title}")
            lines += [f"      {name:22}{_gib(size):>11}" for name, size in rows]
    if estimate.host:
        lines.append(f"  main memory {_gib(sum(estimate.host.values()))} a process, for what is offloaded")
    seconds = [f"training {sizing.training_seconds:.2g} s"]
    if sizing.written_rows:
        seconds.append(f"samples {sizing.writing_seconds:.2g} s")
    lines.append(
        f"  a step      {' and '.join(seconds)}, at 400 Tflop/s and 1.7 TB/s (half an H100); no more than a scale"
    )
    if sizing.index_bytes is not None:
        lines.append(
            f"  index       {_gib(sizing.index_bytes)} of vectors, memory-mapped (on disk and in the page cache)"
        )
    lines += [f"  note        {note}" for note in sizing.notes]
    lines.append("  presets" if gpu_bytes is None else f"  presets on {gpu or 'a card'} of {_gib(gpu_bytes)}")
    best = ""
    for name, other in presets(plan).items():
        if other.method not in sizing.methods:
            continue
        total = estimate_memory(shape, other, others=sizing.others).total
        fits = gpu_bytes is not None and total <= gpu_bytes
        best = best or (name if fits else "")
        verdict = "" if gpu_bytes is None else "  fits" if fits else "  does not fit"
        this = "  <- this config" if other == plan else ""
        lines.append(f"    {name:24}{_gib(total):>11}{verdict}{this}")
    if gpu_bytes is not None:
        lines.append(f"  advice      {_advice(sizing, best, gpu_bytes)}")
    return lines


def _advice(sizing: Sizing, best: str, gpu_bytes: float) -> str:
    if sizing.estimate.total <= gpu_bytes:
        return "this config fits as it is"
    if not best:
        shared = "accelerate_configs/zero3.yaml or zero3_offload.yaml over more cards, " if sizing.shareable else ""
        return (
            f"none fits: fewer rows a step (per_device_train_batch_size), shorter texts, {shared}or a smaller model "
            "(docs/clusters.md)"
        )
    method, _, checkpointing = best.partition(" + ")
    own = {"reranker": "reranker_train", "retriever": "retriever_train"}
    named = next((f"--{own[one]} {method.lower()}" for one in own if f"_{one}" in sizing.config.split("/")[0]), "")
    flags = (
        named
        or {
            "full": "--use_peft false",
            "LoRA": "--use_peft true --lora_target_modules all-linear",
            "QLoRA": "--use_peft true --lora_target_modules all-linear --load_in_4bit true --bf16 true",
        }[method]
    )
    return f"{best} fits: {flags} --gradient_checkpointing {'true' if checkpointing else 'false'}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size < GIB / 10 else f"{size / GIB:.1f} GiB"


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)
