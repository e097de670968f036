"""Generation with a transformers model that lives in this process."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rag_rl.errors import ConfigError, DataError, MissingPackageError
from rag_rl.generation.prompting import cut_at_stop, prompt_text
from rag_rl.types import Generation, Prompt

GeneratorType: TypeAlias = Literal["instruct", "base"]


class _ReadsPrompts(Protocol):
    """What the cost of a prompt depends on; the policy under training has it too, and takes the methods over."""

    @property
    def model(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def max_prompt_tokens(self) -> int | None: ...
    @property
    def generator_type(self) -> GeneratorType: ...
    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]: ...


class TransformersGenerator:
    """A model that is already loaded, as a ``rag_rl.types.Generator``.

    The distribution sampled from is the model's own, shaped by ``temperature`` and ``top_p`` only: the ``top_k``,
    ``repetition_penalty`` and the like of the model's ``generation_config`` are set aside for the call, as TRL does in
    training. Its end tokens are kept, together with the tokenizer's.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.
        tokenizer: its tokenizer; nothing in it is changed. Prompts are padded on the left, whatever its
            ``padding_side``.
        batch_size: sequences in one pass (prompts times ``n``), >= 1.
        max_prompt_tokens: longest prompt that is let through, in tokens; None for what the model's context leaves.
        generator_type: "instruct" renders chat turns with the tokenizer's chat template; "base" writes their contents
            as plain text. Plain-text prompts are given to the model as they are in both.

    Raises:
        ConfigError: ``batch_size`` below 1, or an unknown ``generator_type``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 32,
        max_prompt_tokens: int | None = None,
        generator_type: GeneratorType = "instruct",
    ) -> None:
        check_settings(batch_size=batch_size, generator_type=generator_type)
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_prompt_tokens = max_prompt_tokens
        self.generator_type: GeneratorType = generator_type

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        adapter: str | None = None,
        batch_size: int = 32,
        max_prompt_tokens: int | None = None,
        generator_type: GeneratorType = "instruct",
    ) -> TransformersGenerator:
        """Loads model and tokenizer; weights from safetensors only, and no code from the repository is run.

        Args:
            name_or_path: folder or Hub id of a model, or a folder with an ``adapter_config.json``: then the base that
                it names is loaded (relative names: relative to that folder) with the adapter on top.
            dtype: of the weights ("bfloat16", "auto", ...); None for the one in the model's config.
            device: None for the first GPU, or the CPU where there is none.
            revision: branch, tag or commit of ``name_or_path`` on the Hub.
            adapter: folder or Hub id of a PEFT adapter to put on top.
            batch_size: as in the constructor.
            max_prompt_tokens: as in the constructor.
            generator_type: as in the constructor.

        Returns:
            A generator in evaluation mode.

        Raises:
            ConfigError: as in the constructor.
            DataError: the model, the adapter or the tokenizer is missing, unreadable or not in safetensors.
            MissingPackageError: an adapter is asked for and peft is not installed.
        """
        base, tokenizer_at = name_or_path, [(name_or_path, revision)]
        if adapter is None and (Path(name_or_path) / "adapter_config.json").is_file():
            adapter, base, revision = name_or_path, _base_of_adapter(Path(name_or_path)), None
            # Training may have added tokens, so the adapter's own tokenizer goes first, if it has one.
            tokenizer_at = [(name_or_path, None)] if _has_tokenizer(name_or_path) else [(base, None)]
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                tokenizer_at[0][0], revision=tokenizer_at[0][1], trust_remote_code=False
            )
            model: Any = AutoModelForCausalLM.from_pretrained(
                base, revision=revision, use_safetensors=True, trust_remote_code=False, **options
            )
        except (OSError, ValueError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise DataError(f"cannot load the model {base!r} (from safetensors): {first_line}") from error
        if adapter is not None:
            model = _with_adapter(model, adapter)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model.eval()
        return cls(
            model,
            tokenizer,
            batch_size=batch_size,
            max_prompt_tokens=max_prompt_tokens,
            generator_type=generator_type,
        )

    def encode(self: _ReadsPrompts, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Renders and tokenises prompts: the ``prompt_ids`` that go with a generation's ``token_ids``.

        Args:
            prompts: B prompts.

        Returns:
            B lists of token ids, each of its own length.

        Raises:
            ConfigError: chat turns for a tokenizer without a chat template.
        """
        return encode_prompts(self.tokenizer, prompts, generator_type=self.generator_type)

    def prompt_tokens(self: _ReadsPrompts, prompts: Sequence[Prompt]) -> list[int]:
        """Counts what prompts cost; made for ``fit_passages``.

        Args:
            prompts: B prompts.

        Returns:
            Their lengths in tokens, chat template included.

        Raises:
            ConfigError: as ``encode``.
        """
        return [len(ids) for ids in self.encode(prompts)]

    def prompt_limit(self: _ReadsPrompts, max_new_tokens: int) -> int | None:
        """Tells how long a prompt may be.

        Args:
            max_new_tokens: budget of the continuation, in tokens.

        Returns:
            The most tokens that ``generate`` takes with that budget; None where neither the model nor
            ``max_prompt_tokens`` sets a bound.
        """
        return prompt_limit(self.model, max_new_tokens, self.max_prompt_tokens)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[list[Generation]]:
        """Continues prompts.

        Args:
            prompts: B prompts.
            n: continuations a prompt, >= 1, sampled in one pass. Greedy ones are computed once and repeated.
            max_new_tokens: budget of one continuation in tokens, >= 1.
            temperature: 0 for greedy, else > 0.
            top_p: share of the probability mass that is sampled from, in (0, 1].
            stop: strings that end a continuation; the text is cut before them.
            seed: the same call with the same seed gives the same result, and torch's global random state is left as it
                was. None samples from that global state.

        Returns:
            B lists of ``n`` generations. ``token_ids`` are what the model wrote, the end token or the tokens of the
            stop string included; so they decode to ``text`` plus, after a stop string, what it was cut from.

        Raises:
            ConfigError: a value out of range, or chat turns for a tokenizer without a chat template.
            DataError: prompts that are empty or leave no room in the model's context; the message counts them.
        """
        encoded = self.encode(prompts)
        check_lengths(encoded, self.prompt_limit(max_new_tokens))
        with torch.inference_mode():
            return sample(
                self.model,
                self.tokenizer,
                encoded,
                n=n,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                stop=stop,
                seed=seed,
                batch_size=self.batch_size,
            )


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], *, generator_type: GeneratorType) -> list[list[int]]:
    """Renders and tokenises prompts.

    Args:
        tokenizer: of transformers.
        prompts: B prompts.
        generator_type: "instruct" renders chat turns with the chat template, "base" writes them as plain text.

    Returns:
        B lists of token ids, each of its own length.

    Raises:
        ConfigError: chat turns for a tokenizer without a chat template.
    """
    chats = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str) and generator_type == "instruct"]
    if chats and not tokenizer.chat_template:
        raise ConfigError(
            "the tokenizer has no chat template, but the prompts are chat turns: use generator_type base"
        )
    expect_long_texts(tokenizer)
    encoded: list[list[int]] = [[] for _ in prompts]
    if chats:
        rows = tokenizer.apply_chat_template(
            [prompts[i] for i in chats], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for i, ids in zip(chats, rows, strict=True):
            encoded[i] = list(ids)
    chosen = set(chats)
    plain = [i for i in range(len(prompts)) if i not in chosen]
    if plain:
        rows = tokenizer([prompt_text(prompts[i]) for i in plain])["input_ids"]
        for i, ids in zip(plain, rows, strict=True):
            encoded[i] = list(ids)
    return encoded


def expect_long_texts(tokenizer: Any) -> None:
    """Keeps a tokenizer from warning of texts that are longer than its model's context.

    For who tokenises to look at the lengths and cuts what is too long: transformers' warning of indexing errors to
    come would be wrong.

    Args:
        tokenizer: of transformers, changed.
    """
    getattr(tokenizer, "deprecation_warnings", {})["sequence-length-is-longer-than-the-specified-maximum"] = True


def prompt_limit(model: Any, max_new_tokens: int, max_prompt_tokens: int | None = None) -> int | None:
    """Tells how long a prompt may be.

    Args:
        model: of transformers; its config tells the context's length.
        max_new_tokens: budget of the continuation, in tokens.
        max_prompt_tokens: a bound of the caller's own.

    Returns:
        The smaller of both bounds in tokens; None where there is neither.
    """
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    bounds = [context - max_new_tokens] if context else []
    return min([*bounds, *([] if max_prompt_tokens is None else [max_prompt_tokens])], default=None)


def check_lengths(encoded: Sequence[Sequence[int]], limit: int | None) -> None:
    """Refuses prompts that a model cannot take.

    Args:
        encoded: token ids of each prompt.
        limit: most tokens of a prompt; None for no bound.

    Raises:
        DataError: a prompt is empty or too long; the message counts them.
    """
    empty = sum(not ids for ids in encoded)
    if empty:
        raise DataError(f"{empty} of {len(encoded)} prompts are empty: a model has nothing to continue")
    longest = max((len(ids) for ids in encoded), default=0)
    if limit is not None and longest > limit:
        number = sum(len(ids) > limit for ids in encoded)
        raise DataError(
            f"{number} of {len(encoded)} prompts are longer than the {max(limit, 0)} tokens that the model's context "
            f"or max_prompt_tokens leaves for them (the longest has {longest}): give fewer or shorter passages "
            f"(rag_rl.generation.fit_passages), or a smaller max_new_tokens"
        )


def check_settings(*, batch_size: int, generator_type: str) -> None:
    """Refuses settings that no generator in this process has.

    Args:
        batch_size: sequences in one pass, >= 1.
        generator_type: "instruct" or "base".

    Raises:
        ConfigError: names the setting and what it may be.
    """
    if batch_size < 1:
        raise ConfigError(f"generator_batch_size must be at least 1, got {batch_size}")
    if generator_type not in ("instruct", "base"):
        raise ConfigError(
            f"generator_type must be 'instruct' or 'base' for a model in this process, got {generator_type!r}"
        )


def check_sampling(*, n: int, max_new_tokens: int, temperature: float, top_p: float, stop: Sequence[str]) -> None:
    """Refuses sampling settings that are out of range.

    Args:
        n: continuations a prompt, >= 1.
        max_new_tokens: budget in tokens, >= 1.
        temperature: >= 0.
        top_p: in (0, 1].
        stop: non-empty strings; not one string, which would read as its letters.

    Raises:
        ConfigError: names the setting and what it may be.
    """
    if n < 1:
        raise ConfigError(f"n must be at least 1, got {n}")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0.0:
        raise ConfigError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ConfigError(f"top_p must be above 0 and at most 1, got {top_p}")
    if isinstance(stop, str) or not all(stop):
        raise ConfigError(f"stop must be a list of non-empty strings, got {stop!r}")


def sample(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[Sequence[int]],
    *,
    n: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop: Sequence[str],
    seed: int | None,
    batch_size: int,
    passes: int = 0,
    synced: bool = False,
) -> list[list[Generation]]:
    """Continues tokenised prompts; the caller turns gradients off.

    Args:
        model: a causal LM of transformers, or a PEFT model around one. Each module's training flag is put back.
        tokenizer: its tokenizer.
        encoded: B non-empty lists of token ids.
        n: as in ``TransformersGenerator.generate``.
        max_new_tokens: as there.
        temperature: as there.
        top_p: as there.
        stop: as there.
        seed: as there.
        batch_size: sequences in one pass, >= 1.
        passes: fewest passes to make; those without a prompt left run on a single token. For models whose forward pass
            is collective, where every rank must make the same number.
        synced: every rank goes on forwarding until the last one has finished its pass.

    Returns:
        B lists of ``n`` generations, in the order of ``encoded``.

    Raises:
        ConfigError: a value out of range.
    """
    check_sampling(n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=stop)
    greedy = temperature == 0.0
    copies = 1 if greedy else n
    end_ids, strings = _ends(model, tokenizer, stop)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(end_ids, default=0)
    shape: dict[str, Any] = {} if greedy else {"temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=max_new_tokens,
        num_return_sequences=copies,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=pad_id,
        # Trainers switch the cache off in the model's config when they checkpoint activations.
        use_cache=True,
        disable_compile=True,
        **shape,
    )
    # Longest first: neighbours pad least, and a batch that does not fit into memory says so at once.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    step = max(1, batch_size // copies)
    chunks = [order[start : start + step] for start in range(0, len(order), step)]
    results: list[list[Generation]] = [[] for _ in encoded]
    with (
        _evaluating(model),
        _own_generation_config(model, config),
        _random_state(model.device, None if greedy else seed),
    ):
        for chunk in chunks:
            rows = _one_pass(model, tokenizer, [encoded[i] for i in chunk], config, strings, synced=synced)
            for place, i in enumerate(chunk):
                results[i] = [
                    _generation(tokenizer, ids, end_ids, strings, prompt_tokens=len(encoded[i]))
                    for ids in rows[place * copies : (place + 1) * copies]
                ] * (n // copies)
        for _ in range(passes - len(chunks)):
            _one_pass(model, tokenizer, [[pad_id]], config, strings, synced=synced)
    return results


def finish(tokenizer: Any, model: Any, ids: Sequence[int], stop: Sequence[str], *, prompt_tokens: int) -> Generation:
    """Makes a generation from the token ids that another engine sampled for the same model.

    Args:
        tokenizer: the model's tokenizer.
        model: tells the end tokens.
        ids: token ids of the continuation, with or without its end token; may run on past a stop string.
        stop: strings that end a continuation.
        prompt_tokens: length of the prompt.

    Returns:
        The generation, cut at the first end token or stop string.
    """
    end_ids, strings = _ends(model, tokenizer, stop)
    return _generation(tokenizer, list(ids), end_ids, strings, prompt_tokens=prompt_tokens)


class _StopStrings(StoppingCriteria):  # type: ignore[misc]
    """Ends a row when its continuation contains a stop string.

    transformers' own criterion looks at the prompt too, so a stop string that begins in the prompt and is completed by
    the first new token ends a row at once.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_width: int) -> None:
        self._tokenizer, self._stop, self._prompt_width = tokenizer, stop, prompt_width
        # A token is at least one byte; four more, since the tail may begin within a character.
        self._tail = max(len(string.encode()) for string in stop) + 4

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids[:, self._prompt_width :]
        tails = self._tokenizer.batch_decode(new[:, -self._tail :].tolist(), skip_special_tokens=True)
        done = [cut_at_stop(tail, self._stop) is not None for tail in tails]
        for row in (row for row, hit in enumerate(done) if hit):
            # A tail can read unlike the whole (a lost leading space): only what the text will show counts.
            whole = self._tokenizer.decode(new[row].tolist(), skip_special_tokens=True)
            done[row] = cut_at_stop(whole, self._stop) is not None
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def _one_pass(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    stop: Sequence[str],
    *,
    synced: bool,
) -> list[list[int]]:
    """Continuations (prompts times ``num_return_sequences``) as the model gives them, pads included."""
    width = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), width), config.pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids, dtype=torch.long)
        attention_mask[row, width - len(ids) :] = 1
    criteria = StoppingCriteriaList([_StopStrings(tokenizer, stop, width)] if stop else [])
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=config,
        stopping_criteria=criteria,
        synced_gpus=synced,
    )
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


def _generation(
    tokenizer: Any, ids: list[int], end_ids: set[int], stop: Sequence[str], *, prompt_tokens: int
) -> Generation:
    end = next((place for place, token in enumerate(ids) if token in end_ids), None)
    if end is not None:
        ids = ids[: end + 1]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    cut = cut_at_stop(text, stop)
    if cut is not None:
        # Whatever follows the token that completes the stop string is padding, or was not asked for.
        def complete(length: int) -> bool:
            return cut_at_stop(tokenizer.decode(ids[:length], skip_special_tokens=True), stop) is not None

        ids, text = ids[: bisect_left(range(len(ids)), True, key=complete)], cut
    reason = "length" if end is None and cut is None else "stop"
    return Generation(text, token_ids=tuple(ids), finish_reason=reason, prompt_tokens=prompt_tokens)


def _ends(model: Any, tokenizer: Any, stop: Sequence[str]) -> tuple[set[int], list[str]]:
    """End token ids, and the stop strings that are left to look for in the text."""
    end_ids: set[int] = set()
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for ids in (given, tokenizer.eos_token_id):
        end_ids.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    # A special token never shows in the decoded text, so a stop string that is one ends a row by its id.
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    end_ids.update(special[string] for string in stop if string in special)
    return end_ids, [string for string in stop if string not in special]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, module by module put back: a trainer may keep parts of a model out of training."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _own_generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Replaces the model's generation config, from which ``generate`` fills in whatever ours leaves open."""
    # PEFT keeps one of its own and writes it over the base model's.
    owners = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    before = [(owner, owner.generation_config) for owner in owners if hasattr(owner, "generation_config")]
    try:
        for owner, _ in before:
            owner.generation_config = config
        yield
    finally:
        for owner, own in before:
            owner.generation_config = own


@contextmanager
def _random_state(device: torch.device, seed: int | None) -> Iterator[None]:
    """Seeded sampling that leaves the global random state as it was; does nothing for None."""
    if seed is None:
        yield
        return
    # torch.manual_seed would reach the generators of every GPU, but only the model's is put back afterwards.
    on_cuda = device.type == "cuda"
    index = (device.index if device.index is not None else torch.cuda.current_device()) if on_cuda else 0
    with torch.random.fork_rng(devices=[index] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def _base_of_adapter(folder: Path) -> str:
    path = folder / "adapter_config.json"
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable adapter configuration: {error}") from error
    if not base:
        raise DataError(f"{path}: 'base_model_name_or_path' is empty: give the base model, and this folder as adapter")
    beside = folder / base
    return str(beside) if beside.is_dir() else str(base)


def _has_tokenizer(folder: str) -> bool:
    return (Path(folder) / "tokenizer_config.json").is_file()


def _with_adapter(model: Any, adapter: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingPackageError("peft is not installed: pip install rag-rl") from error
    folder = Path(adapter)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            folder = Path(snapshot_download(adapter, allow_patterns=["*.json", "*.safetensors"]))
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise DataError(f"adapter {adapter!r}: no such folder, and not to be had from the Hub: {error}") from error
    # PEFT falls back to a pickle without a word.
    if not (folder / "adapter_model.safetensors").is_file():
        raise DataError(f"adapter {adapter!r}: no adapter_model.safetensors in {folder}")
    return PeftModel.from_pretrained(model, str(folder))
