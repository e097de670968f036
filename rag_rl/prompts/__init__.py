"""Prompts: one text file each, rendered by one function; any of them can be replaced by a path.

A prompt file is a ``string.Template``: ``$question`` stands for the question, ``$$`` for a dollar sign. Braces mean
nothing, so that JSON can stand in a prompt as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from string import Template

from rag_rl.types import Passage

_FOLDER = Path(__file__).parent


def prompt_names() -> list[str]:
    """Names of the prompts that come with the package.

    Returns:
        File names without their ending, sorted.
    """
    return sorted(path.stem for path in _FOLDER.glob("*.txt"))


@lru_cache(maxsize=64)
def load_prompt(name_or_path: str) -> str:
    """Reads a prompt's template.

    Args:
        name_or_path: one of ``prompt_names()``, or the path of a text file.

    Returns:
        The template, without a trailing newline.

    Raises:
        FileNotFoundError: neither a known name nor a file.
    """
    path = _FOLDER / f"{name_or_path}.txt"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(f"prompt {name_or_path!r}: no such file, and not one of {', '.join(prompt_names())}")
    return path.read_text(encoding="utf-8").rstrip("\n")


def render(name_or_path: str, **fields: str) -> str:
    r"""Fills a prompt.

    Args:
        name_or_path: as in ``load_prompt``.
        **fields: one text for each placeholder of the template; fields that the template does not use are ignored.

    Returns:
        The filled prompt.

    Raises:
        FileNotFoundError: no such prompt.
        ValueError: the template has a placeholder that is not among ``fields``, or a stray ``$``.

    Example:
        >>> render("tiny_passage", question="Who rules Elmton?")
        'Write a passage that answers this question.\nWho rules Elmton?'
    """
    template = Template(load_prompt(name_or_path))
    try:
        return template.substitute(fields)
    except KeyError as error:
        known = ", ".join(f"${name}" for name in fields)
        raise ValueError(f"prompt {name_or_path!r} asks for ${error.args[0]}, but there is only {known}") from error
    except ValueError as error:
        raise ValueError(f"prompt {name_or_path!r}: {error}; write $$ for a dollar sign") from error


def placeholders(text: str) -> list[str]:
    """Lists the placeholders of a template.

    ``string.Template.get_identifiers``, which does the same, came with Python 3.11.

    Args:
        text: a template; a stray ``$`` in it is passed over.

    Returns:
        Their names without ``$``, each once, in the order in which they first stand there.

    Example:
        >>> placeholders("${question}? $passages and $question cost $$5")
        ['question', 'passages']
    """
    found = (match.group("named") or match.group("braced") for match in Template.pattern.finditer(text))
    return [name for name in dict.fromkeys(found) if name]


def require_placeholders(name_or_path: str, needed: Sequence[str]) -> None:
    """Checks that a prompt has a place for everything that must be in it.

    Args:
        name_or_path: as in ``load_prompt``.
        needed: placeholder names without ``$``.

    Raises:
        FileNotFoundError: no such prompt.
        ValueError: a placeholder is missing.
    """
    known = placeholders(load_prompt(name_or_path))
    missing = [f"${name}" for name in needed if name not in known]
    if missing:
        lacking = " and no ".join(missing)
        raise ValueError(f"prompt {name_or_path!r} has no {lacking}: without it the model sees nothing")


def render_passages(passages: Sequence[Passage]) -> str:
    r"""Numbers passages from 1, one block each, for ``$passages``.

    Args:
        passages: in the order in which they shall be read.

    Returns:
        ``[1] title`` and text a block, blocks separated by a newline; "(none)" for no passage.

    Example:
        >>> render_passages([Passage("d1", "It lies on the Mira.", title="Elmton")])
        '[1] Elmton\nIt lies on the Mira.'
    """
    return "\n".join(f"[{i}] {passage.contents}" for i, passage in enumerate(passages, start=1)) or "(none)"
