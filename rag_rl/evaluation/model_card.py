"""The model card of a trained part: a ``README.md`` with the front matter that the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from rag_rl.evaluation.report import change_in_words, metric_words, pick_main_metric

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PACKAGES = ("rag-rl", "trl", "transformers", "peft", "sentence-transformers", "torch")


def model_card(
    summary: Mapping[str, Any],
    *,
    base_model: str | None,
    recipe: str,
    config_name: str,
    title: str,
    library_name: str = "transformers",
    usage: str = "",
    versions: Mapping[str, str] | None = None,
    main_metric: str | None = None,
) -> str:
    """Writes the text of a model card. It names no path of the machine that made the model.

    Args:
        summary: the content of ``metrics.json``.
        base_model: Hub id or relative path of what the training started from; an absolute path is left out.
        recipe: name of the recipe.
        config_name: name of the configuration, or its file.
        title: what was trained, in words.
        library_name: who loads it: ``"transformers"``, ``"peft"`` or ``"sentence-transformers"``.
        usage: Python that loads the model; by default a snippet for the library.
        versions: package to version; by default those installed here.
        main_metric: what the first sentence is about; by default the one that ``pick_main_metric`` takes.

    Returns:
        YAML front matter and Markdown.
    """
    base = portable_base(base_model)
    config = PurePosixPath(config_name.replace("\\", "/")).name.removesuffix(".yaml")
    front: dict[str, Any] = {"library_name": library_name, "tags": ["rag-rl", "trl", recipe]}
    if base is not None:
        front["base_model"] = base
    main = main_metric or pick_main_metric(summary)
    known = versions if versions is not None else installed_versions()
    started = f"`{base}`" if base is not None else "a local model"
    command = f"accelerate launch recipes/{recipe}.py --config recipes/configs/{recipe}/{config}.yaml"
    if summary.get("seed") is not None:
        command += f" --seed {summary['seed']}"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {_line(title)}",
        f"Trained from {started} with the rag-rl recipe `{recipe}`, configuration `{config}`."
        + (f" {change_in_words(summary, main)}" if main else ""),
    ]
    if summary.get("status") != "complete":
        parts.append(f"**This run is not complete** (status: {summary.get('status')}).")
    parts += [
        "## Before and after",
        _table(summary),
        "Both columns come from the same held-out questions; the interval is a paired bootstrap of after less before.",
        "## How to load",
        f"```python\n{(usage or _usage(library_name, base)).strip()}\n```",
        "## How it was made",
        f"```sh\n{command}\n```",
        "`resolved_config.yaml` holds every setting, `report.html` curves and examples, `metrics.json` the figures.",
        "\n".join(f"- {name} {version}" for name, version in known.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def portable_base(base_model: str | None) -> str | None:
    """Keeps a base model's name only where it means the same on another machine.

    Args:
        base_model: Hub id, relative or absolute path, or None.

    Returns:
        The Hub id or relative path; None for an absolute path, one in the home folder, or a URL.

    Example:
        >>> portable_base("Qwen/Qwen2.5-0.5B-Instruct"), portable_base("/models/mine"), portable_base("../start")
        ('Qwen/Qwen2.5-0.5B-Instruct', None, '../start')
    """
    if not base_model:
        return None
    if _HUB_ID.fullmatch(base_model):
        return base_model
    absolute = PurePosixPath(base_model).is_absolute() or PureWindowsPath(base_model).drive or base_model[0] in "~\\$"
    return None if absolute or "://" in base_model else base_model


def installed_versions() -> dict[str, str]:
    """Versions of the packages that made the model.

    Returns:
        Package to version, for those that are installed.
    """
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _table(summary: Mapping[str, Any]) -> str:
    before, after, ci = (summary.get(key) or {} for key in ("before", "after", "ci95"))
    names = list(dict.fromkeys([*before, *after]))
    if not names:
        return "Nothing was measured."

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    lines = ["| metric | before | after | change | 95% interval |", "|---|---:|---:|---:|---:|"]
    for name in names:
        old, new = before.get(name), after.get(name)
        change = f"{new - old:+.3f}" if old is not None and new is not None else "–"
        interval = f"{ci[name][0]:+.3f} to {ci[name][1]:+.3f}" if ci.get(name) else "–"
        words = metric_words(name)
        label = f"`{name}`" + (f" ({words})" if words != name else "")
        lines.append(f"| {_line(label)} | {number(old)} | {number(new)} | {change} | {interval} |")
    n = summary.get("n_eval")
    return "\n".join(lines) + (f"\n\n{n:,} held-out questions." if n else "")


def _usage(library: str, base: str | None) -> str:
    if library == "sentence-transformers":
        return (
            "from sentence_transformers import SentenceTransformer\n\n"
            'model = SentenceTransformer("path/to/this/folder")\n'
            'vectors = model.encode_query(["Which river does Elmton lie on?"])'
        )
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if library == "peft":
        lines = ["from peft import PeftModel", *lines]
        start = base or "path/to/the/base/model"
        lines.append(f'start = AutoModelForCausalLM.from_pretrained("{start}")')
        lines.append('model = PeftModel.from_pretrained(start, "path/to/this/folder")')
    else:
        lines.append('model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")')
    return "\n".join([*lines, 'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'])


def _line(text: str) -> str:
    """One line of Markdown, whatever the text."""
    return " ".join(text.split()).replace("|", "\\|")
