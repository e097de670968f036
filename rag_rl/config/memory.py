"""How much memory, and roughly how much time, a training takes: arithmetic over the shape of a model.

Nothing here looks at a model, a file or a card; ``rag_rl.config.sizing`` does, and ``rag-rl doctor --config`` prints
what comes out. docs/clusters.md explains the formulas. They count what must be there; what an allocator wastes and a
driver takes is a flat allowance (``OVERHEAD``, ``CONTEXT_BYTES``), so that a result is good to perhaps a fifth.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

Method = Literal["full", "lora", "qlora"]
METHODS: tuple[Method, ...] = ("full", "lora", "qlora")

GIB = 2**30
# Of what is counted, for fragments, workspaces and communication buffers; and what CUDA takes before anything runs.
OVERHEAD = 0.1
CONTEXT_BYTES = GIB
# Bytes of optimiser state a trained parameter, by the first word of transformers' ``optim`` that fits. Two moments for
# Adam, one for the others; 8-bit states come with one float32 a block of 256.
_STATES = {"adamw": 2, "ademamix": 3, "stable": 2, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "adafactor": 0}
_BLOCK_8BIT = 1 + 4 / 256
# A 4-bit weight, with one float32 a block of 64; nested, that one has 8 bits, and a float32 a block of 256.
NF4_BYTES = 0.5 + 4 / 64
NF4_NESTED_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Log-probabilities of TRL: the logits in float32, the same divided by the temperature, and a gradient of each.
_LOGIT_BYTES = 16


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a transformer its memory depends on.

    Attributes:
        parameters: all of them; tied ones count once.
        linear: name, inputs and outputs of each linear layer of the body: what LoRA adapts and 4 bits hold. The head
            that gives logits is not among them.
        hidden_size: width of the stream between layers.
        layers: how many.
        intermediate_size: width inside a feed-forward.
        attention_size: width of all query heads together.
        cache_size: width of keys and values of one token in one layer together.
        vocab_size: logits a token.
        gated: the feed-forward multiplies two branches (SwiGLU and its like).
    """

    parameters: int
    linear: tuple[tuple[str, int, int], ...]
    hidden_size: int
    layers: int
    intermediate_size: int
    attention_size: int
    cache_size: int
    vocab_size: int
    gated: bool = True

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers, without biases."""
        return sum(inputs * outputs for _, inputs, outputs in self.linear)


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How a model is trained.

    Attributes:
        method: all weights, an adapter, or an adapter over 4 bits.
        weight_bytes: of a weight as it is loaded, 4 or 2.
        autocast: bf16 or fp16 computes, over weights that may have more bits.
        lora_r: rank of the adapter.
        lora_targets: last names of the layers that it adapts; none for all.
        nested: double quantisation.
        optimizer: transformers' name.
        checkpointing: activations are computed again in the backward pass.
        rows: sequences in one forward pass.
        length: tokens of each.
        logit_tokens: tokens of each for which logits are kept.
        generated_rows: sequences that are generated at once; 0: none.
        generated_length: tokens of each, the prompt included.
        reference: a frozen copy of the model stands beside it; over an adapter it costs nothing.
        value_model: a second trained model of the same shape (PPO); over an adapter a second adapter.
        processes: cards that share.
        zero_stage: 0 for DDP, 1 to 3 as in DeepSpeed; FSDP2 is as stage 3.
        deepspeed: DeepSpeed keeps a float32 copy of what is trained; FSDP2 does not.
        offload: weights and optimiser state lie in main memory.
    """

    method: Method = "full"
    weight_bytes: int = 2
    autocast: bool = True
    lora_r: int = 16
    lora_targets: Collection[str] = ()
    nested: bool = False
    optimizer: str = "adamw_torch_fused"
    checkpointing: bool = True
    rows: int = 1
    length: int = 1024
    logit_tokens: int = 0
    generated_rows: int = 0
    generated_length: int = 0
    reference: bool = False
    value_model: bool = False
    processes: int = 1
    zero_stage: int = 0
    deepspeed: bool = True
    offload: bool = False

    @property
    def compute_bytes(self) -> int:
        """Of an activation."""
        return 2 if self.autocast else self.weight_bytes


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one card, by what takes them.

    Attributes:
        held: what is there all the time.
        training: what a forward and backward pass adds.
        generating: what writing samples adds, at another moment.
        host: what lies in main memory instead.
    """

    held: dict[str, float]
    training: dict[str, float]
    generating: dict[str, float]
    host: dict[str, float] = field(default_factory=dict)

    @property
    def counted(self) -> float:
        """Most that is there at one moment."""
        return sum(self.held.values()) + max(sum(self.training.values()), sum(self.generating.values()))

    @property
    def total(self) -> float:
        """The same with the allowance for what cannot be counted."""
        return self.counted * (1 + OVERHEAD) + CONTEXT_BYTES


def optimizer_bytes(name: str, weight_bytes: float) -> float:
    """State of an optimiser.

    Args:
        name: of transformers' ``optim``.
        weight_bytes: of a trained weight, which states of full precision share.

    Returns:
        Bytes a trained parameter; that of AdamW for an optimiser that is not known.

    Example:
        >>> optimizer_bytes("adamw_torch_fused", 4), optimizer_bytes("sgd", 4)
        (8.0, 0.0)
        >>> optimizer_bytes("paged_adamw_8bit", 2)
        2.03125
    """
    base = name.removeprefix("paged_")
    states = next((count for start, count in _STATES.items() if base.startswith(start)), 2)
    if "4bit" in base:
        return states * (0.5 + 4 / 128)
    return float(states * (_BLOCK_8BIT if "8bit" in base or base == "adamw_bnb" else weight_bytes))


def adapter_parameters(shape: ModelShape, plan: TrainingPlan) -> int:
    """Parameters of a LoRA adapter: r x (inputs + outputs) a layer (arXiv 2106.09685).

    Args:
        shape: of the model.
        plan: rank and targets.

    Returns:
        How many.
    """
    chosen = [layer for layer in shape.linear if not plan.lora_targets or layer[0] in plan.lora_targets]
    return sum(plan.lora_r * (inputs + outputs) for _, inputs, outputs in chosen)


def weight_bytes(shape: ModelShape, plan: TrainingPlan) -> float:
    """The model as it is loaded, whole, without its adapter.

    Args:
        shape: of the model.
        plan: dtype and quantisation.

    Returns:
        Bytes.
    """
    if plan.method != "qlora":
        return float(shape.parameters * plan.weight_bytes)
    small = NF4_NESTED_BYTES if plan.nested else NF4_BYTES
    return (shape.parameters - shape.linear_parameters) * plan.weight_bytes + shape.linear_parameters * small


def layer_bytes(shape: ModelShape, compute_bytes: int) -> int:
    """What the backward pass of one layer needs of one token.

    Counted are: the input of each of two norms in float32, what they normalised and what they gave; queries, keys,
    values (copied to all heads) and the outcome of an attention that keeps no matrix; of a gated feed-forward both
    branches, the activation and the product, of a plain one its middle before and after the activation.

    Args:
        shape: of the model.
        compute_bytes: of an activation.

    Returns:
        Bytes a token.
    """
    norms = 2 * shape.hidden_size * (4 + 2 * compute_bytes)
    branches = 4 if shape.gated else 2
    return norms + compute_bytes * (4 * shape.attention_size + branches * shape.intermediate_size)


def activation_bytes(shape: ModelShape, plan: TrainingPlan) -> float:
    """What a forward pass keeps for the backward pass, without logits.

    With checkpointing that is the input of each layer, and everything of the one layer that is computed again; in both
    cases what the norm after the last layer keeps.

    Args:
        shape: of the model.
        plan: rows, length and checkpointing.

    Returns:
        Bytes.
    """
    tokens = plan.rows * plan.length
    one = layer_bytes(shape, plan.compute_bytes)
    last = shape.hidden_size * (4 + 2 * plan.compute_bytes)
    if not plan.checkpointing:
        return float(tokens * (shape.layers * one + last))
    return float(tokens * (shape.layers * shape.hidden_size * plan.compute_bytes + one + last))


def cache_bytes(shape: ModelShape, plan: TrainingPlan) -> float:
    """Keys and values of all tokens that are being generated.

    Args:
        shape: of the model.
        plan: rows and length.

    Returns:
        Bytes.
    """
    return float(plan.generated_rows * plan.generated_length * shape.layers * shape.cache_size * plan.compute_bytes)


def estimate_memory(
    shape: ModelShape, plan: TrainingPlan, *, others: dict[str, float] | None = None
) -> MemoryEstimate:
    """What one card must hold.

    ZeRO (arXiv 1910.02054) divides the optimiser's state from stage 1 on, gradients from 2 on, weights at 3. At stage
    3 TRL gathers all weights on each card while samples are written.

    Args:
        shape: of the model.
        plan: how it is trained.
        others: bytes of what else lies on the card, by name, such as the retriever's encoder.

    Returns:
        The estimate.
    """
    stage, share = plan.zero_stage, max(1, plan.processes)
    adapted = plan.method != "full"
    whole = weight_bytes(shape, plan)
    trained = adapter_parameters(shape, plan) if adapted else shape.parameters
    # PEFT keeps an adapter in float32 whatever the model has.
    each = 4 if adapted else plan.weight_bytes
    models = 2 if plan.value_model else 1
    state = optimizer_bytes(plan.optimizer, each)
    if stage and plan.deepspeed:  # states of full precision over a float32 copy
        state = 4 + optimizer_bytes(plan.optimizer, 4)
    held = {
        "weights": whole * (1 if adapted else models) / (share if stage == 3 else 1),
        "adapter": float(trained * each * models) if adapted else 0.0,
        "gradients": float(trained * each * models) / (share if stage >= 2 else 1),
        "optimiser": trained * state * models / (share if stage >= 1 else 1),
        "reference": whole / (share if stage == 3 else 1) if plan.reference and not adapted else 0.0,
        **(others or {}),
    }
    host = {}
    if plan.offload:
        host = {name: held.pop(name) for name in ("weights", "optimiser", "reference")}
    training = {
        "activations": activation_bytes(shape, plan) * models,
        "logits": float(plan.rows * plan.logit_tokens * shape.vocab_size * _LOGIT_BYTES),
        # autocast keeps what it has cast of weights that are trained until the pass is over.
        "cast weights": 2.0 * shape.parameters
        if plan.autocast and plan.weight_bytes == 4 and not adapted and not (stage and plan.deepspeed)
        else 0.0,
    }
    generating = {"key-value cache": cache_bytes(shape, plan)}
    if stage == 3 and plan.generated_rows:
        generating["gathered weights"] = whole if plan.offload else whole * (1 - 1 / share)
    return MemoryEstimate(held, training, generating, host)


def presets(plan: TrainingPlan) -> dict[str, TrainingPlan]:
    """The ways in which the same training takes less and less memory.

    Args:
        plan: one of them.

    Returns:
        Plans by name: full, LoRA and QLoRA, each without and with checkpointing.
    """
    found = {}
    for method in METHODS:
        for checkpointing in (False, True):
            name = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}[method]
            name += " + checkpointing" if checkpointing else ""
            # An adapter that the plan does not have yet goes on all layers.
            targets = () if plan.method == "full" and method != "full" else plan.lora_targets
            found[name] = replace(plan, method=method, checkpointing=checkpointing, lora_targets=targets)
    return found


def training_flops(shape: ModelShape, plan: TrainingPlan, *, tokens: int) -> float:
    """Arithmetic of forward and backward passes, by the count of 2 a weight and token (arXiv 2001.08361, section 2.1).

    Args:
        shape: of the model.
        plan: without an adapter the backward pass costs twice the forward one, with it once; checkpointing adds a
            forward pass. The arithmetic of attention is left out.
        tokens: of all rows and steps together.

    Returns:
        Floating-point operations.
    """
    passes = (3 if plan.method == "full" else 2) + (1 if plan.checkpointing else 0)
    return 2.0 * passes * shape.parameters * tokens


def generation_seconds(shape: ModelShape, plan: TrainingPlan, *, tokens: int, bytes_per_second: float) -> float:
    """Time to write samples that are all generated at once, where reading weights and cache is what it takes.

    Args:
        shape: of the model.
        plan: rows, prompt and all; the cache counts as half full.
        tokens: new tokens a row.
        bytes_per_second: memory bandwidth of the card that is reached.

    Returns:
        Seconds.
    """
    return tokens * (weight_bytes(shape, plan) + cache_bytes(shape, plan) / 2) / bytes_per_second
