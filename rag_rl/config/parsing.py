"""Strict parsing of a YAML file and a command line into dataclasses.

Precedence: dataclass default < YAML < command line. Every value is checked against its field's annotation, every key
must exist, no abbreviation is accepted, and whatever is wrong ends in one line that names the key.

transformers' ``HfArgumentParser`` is not used: it leaves YAML values unchecked, rewrites ``field.type`` of the class,
refuses unions such as ``float | int | None`` and reads the others as one of their members. Here both sources go
through the same check (``_accept``), and argparse only splits the command line and prints the help.

YAML is read by the rules of YAML 1.2, which is what people expect: ``1e-5`` is a number, ``no`` and ``on`` are words
(``eval_strategy: no``), only ``true`` and ``false`` are booleans, dates stay text.

Nothing here imports torch, transformers or TRL: ``--help`` costs what the dataclasses themselves import.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import json
import math
import os
import re
import sys
import types
import typing
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

import yaml

from rag_rl.errors import ConfigError, UserError

T = TypeVar("T")

# Names that transformers 5 or TRL 1.12 no longer know, and that old configs and tutorials still carry.
_REMOVED = {
    "warmup_ratio": "use warmup_steps (a number below 1 is a share of all steps)",
    "torch_dtype": "use dtype",
    "evaluation_strategy": "use eval_strategy",
    "overwrite_output_dir": "a run folder is never overwritten: give another output_dir, or resume_from_checkpoint",
    "no_cuda": "use use_cpu",
    "max_prompt_length": "TRL no longer cuts prompts: give fewer or shorter passages (retriever_top_k)",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "group_by_length": "use train_sampling_strategy: group_by_length",
    "save_safetensors": "weights are always saved as safetensors: delete it",
    "per_gpu_train_batch_size": "use per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use per_device_eval_batch_size",
    "env": "a config sets no environment variables: set them in the shell",
}

# The last word of a name that holds a secret. "judge_api_key_env" names a variable and "max_new_tokens" is a count, so
# neither ends in one of these words.
_SECRET_WORDS = frozenset(
    {"token", "key", "apikey", "secret", "secrets", "password", "passwords", "credentials", "authorization"}
)
# Pieces of a vocabulary, which are no secrets, and to whose value a run's result is sensitive.
_VOCABULARY_TOKENS = frozenset(
    f"{which}_token" for which in ("bos", "cls", "eos", "image", "mask", "pad", "sep", "stop", "unk")
)

# Which member of a union looks at a value first: the exact ones before those that accept or convert much.
_RANK: list[Any] = [type(None), bool, int, float, Literal, Enum, dict, list, tuple, str, Path]

_WORDS: dict[Any, tuple[str, str]] = {  # one of it, several of it
    type(None): ("null", "nulls"),
    bool: ("true or false", "booleans"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    Path: ("a path", "paths"),
    Any: ("anything", "values"),
}


class _Mismatch(Exception):
    """A value does not fit an annotation; the text, if any, says more than the annotation does."""


# ---- annotations


def _kind(hint: Any) -> Any:
    """What an annotation is, as listed in ``_RANK``; None for what text cannot express (classes, callables)."""
    origin = typing.get_origin(hint) or hint
    if origin in (Union, types.UnionType):
        return Union
    if origin is Literal or origin is Any:
        return origin
    if isinstance(origin, type):
        if issubclass(origin, Enum):
            return Enum
        if origin in (str, bool, int, float, dict, list, tuple, Path, type(None)):
            return origin
        if origin.__name__ in ("Mapping", "MutableMapping"):
            return dict
        if origin.__name__ in ("Sequence", "Iterable", "Collection"):
            return list
    return None


def _members(hint: Any) -> list[Any]:
    """The alternatives of an annotation that text can express, in the order in which they look at a value."""
    if _kind(hint) is not Union:
        return [hint] if _kind(hint) is not None else []
    expressible = [member for member in typing.get_args(hint) if _kind(member) is not None]
    return sorted(expressible, key=lambda member: -1 if _kind(member) is Any else _RANK.index(_kind(member)))


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values that a Literal or an Enum allows."""
    return typing.get_args(hint) if _kind(hint) is Literal else tuple(choice.value for choice in hint)


def _describe(hint: Any, *, several: bool = False) -> str:
    """An annotation in words."""
    kind = _kind(hint)
    if kind is Union:
        members = _members(hint)
        if any(_kind(member) is Enum for member in members):
            members = [member for member in members if member is not str]  # the text must be one of the Enum's
        members.sort(key=lambda member: member is type(None))
        return " or ".join(_describe(member, several=several) for member in members) or "nothing that text can express"
    if kind in (Literal, Enum):
        return "one of " + ", ".join(_plain(choice) for choice in _choices(hint))
    arguments = [argument for argument in typing.get_args(hint) if argument is not Ellipsis]
    if kind in (list, tuple):
        of = f" of {_describe(arguments[0], several=True)}" if arguments and arguments[0] is not Any else ""
        return f"{'lists' if several else 'a list'}{of}"
    if kind is dict:
        of = f" to {_describe(arguments[1], several=True)}" if len(arguments) == 2 and arguments[1] is not Any else ""
        return f"{'mappings' if several else 'a mapping'}{of}"
    if kind is None:
        return "nothing that text can express"
    return _WORDS[kind][several]


def _plain(value: Any) -> str:
    """A value as a user would write it, cut to a readable length."""
    if isinstance(value, Enum):
        value = value.value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- values


def _from_json(text: str) -> Any:
    """A mapping or list written as JSON, on the command line or in quotes in a YAML file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _Mismatch(f"not valid JSON: {error.msg} at character {error.pos + 1}") from error


def _accept(value: Any, hint: Any, *, text: bool) -> Any:
    """The value as the annotation wants it.

    Args:
        value: from YAML or JSON (``text=False``), or from the command line: a string, or a list of strings.
        hint: the annotation, resolved.
        text: whether the value still is text.

    Returns:
        The value; an integer becomes a float where only a float is wanted, a list a tuple, a string a Path or Enum.

    Raises:
        _Mismatch: it does not fit.
    """
    kind = _kind(hint)
    if kind is Any:
        return value
    if kind is Union:
        return _accept_union(value, hint, text=text)
    if kind in (list, tuple):
        return _accept_list(value, hint, kind, text=text)
    if text and isinstance(value, list):  # a union with a list takes several words; one word may be meant as a scalar
        if len(value) != 1:
            raise _Mismatch
        value = value[0]
    if kind is dict:
        return _accept_mapping(value, hint)
    if kind in (Literal, Enum):
        for choice in _choices(hint):
            same = str(choice).lower() == value.lower() if text and isinstance(choice, bool) else str(choice) == value
            if (same and text) or (type(choice) is type(value) and choice == value):
                return hint(choice) if kind is Enum else choice
        raise _Mismatch
    if kind is None:
        raise _Mismatch("only code can set it")
    return _accept_scalar(value, kind, text=text)


def _accept_scalar(value: Any, kind: Any, *, text: bool) -> Any:
    if kind in (str, Path):
        if not isinstance(value, str):
            raise _Mismatch(f'put it in quotes: "{_plain(value)}"' if isinstance(value, int | float) else "")
        return kind(value)
    if kind is type(None):
        if value is None or (text and value == "null"):
            return None
        raise _Mismatch
    if text:
        # The spellings of transformers' parser, which every command line of TRL accepts.
        words = {"true": True, "yes": True, "1": True, "t": True, "y": True}
        words |= {"false": False, "no": False, "0": False, "f": False, "n": False}
        try:
            value = words[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError) as error:
            raise _Mismatch from error
    if kind is float and type(value) is int and abs(value) < 2**1000:  # beyond, float() overflows
        value = float(value)
    if type(value) is not kind or (kind is float and math.isnan(value)):
        raise _Mismatch
    return value


def _accept_union(value: Any, hint: Any, *, text: bool) -> Any:
    members = _members(hint)
    kinds = [_kind(member) for member in members]
    word = value[0] if isinstance(value, list) and len(value) == 1 else value
    if text and type(None) in kinds and isinstance(word, str):
        # "none" can be a value of a text field (report_to), "null" cannot: YAML would read it as no value, too.
        numbers_only = not {str, Path, Literal, Enum} & set(kinds)
        if word == "null" or (numbers_only and word.lower() == "none"):
            return None
    if str in kinds and isinstance(word, str):
        if Enum in kinds:  # transformers' "SchedulerType | str": the text of a member, which the class itself converts
            _accept(word, members[kinds.index(Enum)], text=True)
            return word
        if dict in kinds and word.lstrip().startswith("{"):
            return _accept(word, members[kinds.index(dict)], text=text)
        if text and bool in kinds and word.lower() not in ("true", "false"):
            return word  # "str | bool" has words of its own, such as "no"
    if text and list in kinds and isinstance(word, str) and word.startswith("["):
        return _accept(value, members[kinds.index(list)], text=True)
    if text:  # one word is a list of one only where nothing else takes it
        members.sort(key=lambda member: _kind(member) in (list, tuple))
    why = ""
    for member in members:
        try:
            return _accept(value, member, text=text)
        except _Mismatch as mismatch:
            why = why or str(mismatch)
    raise _Mismatch(why)


def _accept_list(value: Any, hint: Any, kind: Any, *, text: bool) -> Any:
    if text:
        value = value if isinstance(value, list) else [value]
        if len(value) == 1 and value[0].startswith("[") and value[0].endswith("]"):
            value, text = _from_json(value[0]), False
    if not isinstance(value, list):
        raise _Mismatch(f"write [{_plain(value)}]" if isinstance(value, str | int | float) else "")
    arguments = typing.get_args(hint)
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(arguments) != len(value):
            raise _Mismatch(f"{len(arguments)} values are needed")
        return tuple(_accept(item, argument, text=text) for item, argument in zip(value, arguments, strict=True))
    return kind(_accept(item, arguments[0] if arguments else Any, text=text) for item in value)


def _accept_mapping(value: Any, hint: Any) -> dict[Any, Any]:
    if isinstance(value, str):
        if not value.lstrip().startswith("{"):
            raise _Mismatch("write {key: value} in YAML, '{\"key\": value}' on the command line")
        value = _from_json(value)
    if not isinstance(value, dict):
        raise _Mismatch
    of_key, of_value = typing.get_args(hint) or (Any, Any)
    return {_accept(key, of_key, text=False): _accept(item, of_value, text=False) for key, item in value.items()}


# ---- fields


@dataclasses.dataclass(frozen=True)
class _Field:
    """One field of one dataclass, with its annotation resolved."""

    name: str
    hint: Any
    owner: type[Any]
    field: dataclasses.Field[Any]

    @property
    def required(self) -> bool:
        return self.field.default is dataclasses.MISSING and self.field.default_factory is dataclasses.MISSING

    def accept(self, value: Any, where: str, *, text: bool) -> Any:
        """The checked value; ``where`` (file and line, or flag) opens the message of the ConfigError."""
        choices = self.field.metadata.get("choices")
        try:
            accepted = _accept(value, self.hint, text=text)
            if choices is not None and accepted is not None and accepted not in choices:
                raise _Mismatch
        except _Mismatch as mismatch:
            expected = _describe(self.hint)
            if choices is not None:
                expected = "one of " + ", ".join(_plain(choice) for choice in choices)
            shown = value[0] if text and isinstance(value, list) and len(value) == 1 else value
            got = "(hidden)" if _is_secret(self.name) else _quoted(shown)
            more = f"; {mismatch}" if str(mismatch) else ""
            raise ConfigError(f"{where}: expected {expected}, got {got}{more}") from mismatch
        return accepted


def _quoted(value: Any) -> str:
    return f"'{_plain(value)}'" if isinstance(value, str) else _plain(value)


def _fields(dataclasses_: Sequence[type[Any]]) -> dict[str, _Field]:
    """Every field that can be set, by name, in the order of the dataclasses.

    Args:
        dataclasses_: what to fill.

    Returns:
        Name to field.

    Raises:
        ValueError: the program is wrong: two dataclasses share a name, or a name is reserved.
    """
    found: dict[str, _Field] = {}
    for owner in dataclasses_:
        hints = typing.get_type_hints(owner)
        for field in dataclasses.fields(owner):
            if not field.init:
                continue
            if field.name in found:
                raise ValueError(f"{field.name} is a field of {found[field.name].owner.__name__} and {owner.__name__}")
            if field.name in ("config", "help"):
                raise ValueError(f"{owner.__name__}.{field.name}: --{field.name} is reserved")
            hint = hints[field.name]
            if field.name.endswith("_kwargs") and any(_kind(member) is dict for member in _members(hint)):
                # Declared "dict | str | None" by transformers and TRL, but the text is only ever JSON.
                hint = Union[tuple(member for member in _members(hint) if member is not str)]  # noqa: UP007
            found[field.name] = _Field(field.name, hint, owner, field)
    return found


def _closest(name: str, valid: Collection[str]) -> str:
    """The valid name that the user most likely meant."""
    name = name.replace("-", "_").lower()
    longer = [candidate for candidate in valid if candidate.startswith(name)]  # an abbreviation
    return next(iter(difflib.get_close_matches(name, longer or list(valid), n=1, cutoff=0.0)), "")


def _unknown(name: str, valid: Collection[str], *, flag: bool) -> str:
    dashes, what = ("--", "flag") if flag else ("", "key")
    message = f"unknown {what} {dashes}{name}"
    if name.replace("-", "_") in _REMOVED:
        return f"{message}: {_REMOVED[name.replace('-', '_')]}"
    if not valid:
        return f"{message}; there are no others"
    if flag and name.startswith(("no_", "no-")) and name[3:].replace("-", "_") in valid:
        return f"{message}: write --{name[3:].replace('-', '_')} false"
    return f"{message}; the closest valid one is {dashes}{_closest(name, valid)}"


# ---- YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.2's reading of unquoted words; PyYAML follows 1.1, where ``no`` is false and ``1e-5`` a string."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _shown(path: Path) -> str:
    """The path as a user would type it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def _refuse_duplicates(node: yaml.Node | None, where: str, seen: set[int]) -> None:
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, where, seen)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    raise ConfigError(f"{where}:{line}: {key.value} is already set in line {lines[key.value]}")
                lines[key.value] = line
            _refuse_duplicates(value, where, seen)


def _read_yaml(path: Path) -> dict[str, tuple[int, Any]]:
    """The top level of a YAML file.

    Args:
        path: the file.

    Returns:
        (line from 1, value) by key, in file order.

    Raises:
        ConfigError: not readable, not YAML, not a mapping, or a key twice.
    """
    where = _shown(path)
    try:
        loader = _Loader(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not UTF-8 text (byte {error.start})") from error
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{where}: not valid YAML: {error.reason} (character {error.position})") from error
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            found = "an empty file" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "a value"
            raise ConfigError(f"{where}: expected lines of 'key: value', got {found}; {{}} means all defaults")
        _refuse_duplicates(node, where, set())
        values: dict[str, tuple[int, Any]] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if key_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                got = key if isinstance(key, str) else "something else"
                raise ConfigError(f"{where}:{line}: expected a key that is a name, got {got}")
            try:
                values[key] = (line, loader.construct_object(value_node, deep=True))
            except ValueError as error:  # an explicit tag with a value that does not fit, such as "!!int many"
                raise ConfigError(f"{where}:{line}: {key}: {error}") from error
        return values
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{where}{at}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    finally:
        loader.dispose()


# ---- command line


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing its usage and leaving."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        # argparse takes -1 for a value, but -1e-5 for a flag (before Python 3.14).
        self._negative_number_matcher = re.compile(r"^-(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$|^-inf$")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def _docstring(recipe_file: Path) -> str:
    """The docstring of a file, without importing it."""
    return ast.get_docstring(ast.parse(recipe_file.read_text(encoding="utf-8"))) or ""


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _plain(field.default) or '""'
    return "" if field.default_factory is dataclasses.MISSING else _plain(field.default_factory())


def _make_parser(recipe_file: Path, dataclasses_: Sequence[type[Any]], fields: Mapping[str, _Field]) -> _Parser:
    parser = _Parser(
        prog=recipe_file.name,
        usage="%(prog)s [--config NAME_OR_PATH] [--any_field value ...]",
        description=_docstring(recipe_file),
        epilog="A flag wins over the config, and that over the default. Mappings are written as JSON; null unsets.",
        argument_default=argparse.SUPPRESS,
    )
    where = f"configs/{recipe_file.stem}"
    parser.add_argument(
        "--config", metavar="NAME_OR_PATH", help=f"a YAML file, or the name of one in {where} (default: tiny)"
    )
    # The recipe's own fields first: those of the libraries' configs fill pages.
    libraries = ("trl", "transformers", "sentence_transformers")
    for owner in sorted(dataclasses_, key=lambda owner: owner.__module__.partition(".")[0] in libraries):
        about = (owner.__doc__ or "").strip().partition("\n\n")[0]
        about = "" if about.startswith(f"{owner.__name__}(") else " ".join(about.split())  # the signature is no help
        group = parser.add_argument_group(owner.__name__, about)
        for field in fields.values():
            if field.owner is not owner:
                continue
            default = "required" if field.required else f"default: {_default(field.field)}"
            text = " ".join(str(field.field.metadata.get("help", "")).replace("%%", "%").split())
            help_ = f"{text} ({_describe(field.hint)}; {default})".strip()
            kinds = [_kind(member) for member in _members(field.hint)]
            settings: dict[str, Any] = {"metavar": "X", "help": help_.replace("%", "%%")}
            if list in kinds or tuple in kinds:
                settings["nargs"] = "+"
            elif bool in kinds:
                settings |= {"nargs": "?", "const": "true"}
            elif field.field.metadata.get("nargs") == "?" and isinstance(field.field.metadata.get("const"), str):
                settings |= {"nargs": "?", "const": field.field.metadata["const"]}
            group.add_argument(f"--{field.name}", dest=field.name, **settings)
    return parser


def config_source(argv: Sequence[str] | None, recipe_file: str | os.PathLike[str]) -> Path:
    """Finds the YAML file that a command line asks for.

    Args:
        argv: arguments after the program's name; None: those of this process.
        recipe_file: the recipe's ``__file__``; names are looked up in ``configs/<recipe>`` beside it.

    Returns:
        An existing file: the path after ``--config``; the config of that name; without ``--config``, the one named
        ``tiny``. Its stem is the config's name.

    Raises:
        ConfigError: there is no such file.
    """
    finder = _Parser(add_help=False)
    finder.add_argument("--config")
    asked: str | None = finder.parse_known_args(sys.argv[1:] if argv is None else list(argv))[0].config
    recipe = Path(recipe_file)
    folder = recipe.parent / "configs" / recipe.stem
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if asked is None:
        if not (folder / "tiny.yaml").is_file():
            raise ConfigError(f"no --config given, and there is no {_shown(folder / 'tiny.yaml')}: give --config PATH")
        return folder / "tiny.yaml"
    if os.sep in asked:
        candidates = [Path(asked).expanduser()]
    elif Path(asked).suffix in (".yaml", ".yml"):
        candidates = [Path(asked), folder / asked]
    else:
        candidates = [folder / f"{asked}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    there = f"{_shown(folder)} has: {', '.join(names)}" if names else f"{_shown(folder)} has none: give a path"
    raise ConfigError(f"--config {asked}: there is no such file; {there}")


# ---- the two together


def read_arguments(
    recipe_file: str | os.PathLike[str], *dataclasses_: type[Any], argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """Reads config file and command line; ``parse`` without the exit.

    Args:
        recipe_file: the recipe's ``__file__``.
        *dataclasses_: what to fill; no two may share a field name. ``metadata`` of a field may carry ``help`` and
            ``choices``.
        argv: arguments after the program's name; None: those of this process.

    Returns:
        One instance of each dataclass, in the given order.

    Raises:
        ConfigError: a key, a type, a value or a file is wrong, or a dataclass refused its values with a ValueError.
        ValueError: the dataclasses themselves do not go together.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    fields = _fields(dataclasses_)
    namespace, extra = _make_parser(Path(recipe_file), dataclasses_, fields).parse_known_args(argv)
    for argument in extra:
        if argument.startswith("--") and argument != "--":
            name = argument[2:].partition("=")[0]
            raise ConfigError(_unknown(name, [*fields, "config"], flag=True))
    if extra:
        raise ConfigError(f"unexpected argument '{extra[0]}': write --name value")

    source = config_source(argv, recipe_file)
    values: dict[str, Any] = {}
    for name, (line, value) in _read_yaml(source).items():
        if name not in fields:
            raise ConfigError(f"{_shown(source)}:{line}: {_unknown(name, fields, flag=False)}")
        values[name] = fields[name].accept(value, f"{_shown(source)}:{line}: {name}", text=False)
    for name, value in vars(namespace).items():
        if name != "config":
            values[name] = fields[name].accept(value, f"--{name}", text=True)
    for name, field in fields.items():
        if field.required and name not in values:
            raise ConfigError(
                f"{name} is required ({_describe(field.hint)}): set it in {_shown(source)} or by --{name}"
            )

    # Held back until all is well: an error must be the only line.
    with warnings.catch_warnings(record=True) as held:
        instances = tuple(_make(owner, fields, values) for owner in dataclasses_)
    for warning in held:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return instances


def _make(owner: type[Any], fields: Mapping[str, _Field], values: Mapping[str, Any]) -> Any:
    try:
        return owner(**{name: value for name, value in values.items() if fields[name].owner is owner})
    except ValueError as error:
        raise ConfigError(f"{owner.__name__}: {error}") from error


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turns a UserError into one line on stderr and exit code 2; every other exception passes.

    Of the processes of one machine only the first prints (launchers set ``LOCAL_RANK``); all of them exit.

    Args:
        program: opens the line.

    Yields:
        Nothing.

    Raises:
        SystemExit: with code 2, after a UserError.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
            print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None


def parse(
    recipe_file: str | os.PathLike[str], *dataclasses_: type[Any], argv: Sequence[str] | None = None
) -> tuple[Any, ...]:
    """Reads config file and command line, or leaves the process with one line on stderr and exit code 2.

    ``--config`` takes a path or the name of a config in ``configs/<recipe>`` beside the recipe; without it the config
    named ``tiny`` is read. ``--help`` prints the recipe's docstring and every field, and leaves with 0.

    Args:
        recipe_file: the recipe's ``__file__``.
        *dataclasses_: what to fill; no two may share a field name. ``metadata`` of a field may carry ``help`` and
            ``choices``.
        argv: arguments after the program's name; None: those of this process.

    Returns:
        One instance of each dataclass, in the given order.

    Raises:
        SystemExit: with code 2 after an error of the user, with 0 after ``--help``.
        ValueError: the dataclasses themselves do not go together.
    """
    with one_line_errors(Path(recipe_file).name):
        return read_arguments(recipe_file, *dataclasses_, argv=argv)


# ---- what a run was started with


def _is_secret(name: str) -> bool:
    """Whether a field or a key of a nested mapping holds a secret, by its last word."""
    name = name.lower().replace("-", "_")
    return name not in _VOCABULARY_TOKENS and name.rpartition("_")[2] in _SECRET_WORDS


def _storable(value: Any) -> Any:
    """The value in terms of JSON, without secrets, the same in every run."""
    if isinstance(value, Enum):
        return _storable(value.value)
    if isinstance(value, str):
        # User name and password, or a key in the query, of an address.
        value = re.sub(r"(?<=://)[^/@\s]+@", "", str(value))
        return re.sub(r"([?&](?:api_?key|key|token|access_token)=)[^&\s]*", r"\1...", value, flags=re.IGNORECASE)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _storable(item) for key, item in value.items() if not _is_secret(str(key))}
    if isinstance(value, set | frozenset):
        return sorted((_storable(item) for item in value), key=str)
    if isinstance(value, Sequence):
        return [_storable(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return resolved([value])
    if hasattr(value, "__qualname__"):  # a class or function
        return f"{value.__module__}:{value.__qualname__}"
    text = str(value)
    # An address in memory would differ in every run.
    return f"{type(value).__module__}:{type(value).__qualname__}" if " at 0x" in text else text


def read_known(path: Path, dataclasses_: Sequence[type[Any]]) -> dict[str, Any]:
    """What a recipe's config says of some of its arguments, checked as the recipe would.

    Args:
        path: a YAML file; what belongs to other arguments is left out.
        dataclasses_: the arguments.

    Returns:
        Settings by name, those that the file has.

    Raises:
        ConfigError: it cannot be read, or a value has the wrong type.
    """
    fields = _fields(dataclasses_)
    return {
        name: fields[name].accept(value, f"{_shown(path)}:{line}: {name}", text=False)
        for name, (line, value) in _read_yaml(path).items()
        if name in fields
    }


def resolved(instances: Iterable[Any]) -> dict[str, Any]:
    """Lists every setting of a run, fit for JSON and YAML.

    Fields that hold a secret are left out: those whose last word is token, key, secret, password, credentials or
    authorization (``hub_token``, ``judge_api_key``; also inside mappings), but not ``eos_token`` and its like. A
    field's ``metadata={"secret": True}`` or ``False`` decides otherwise. Credentials inside addresses are cut out.

    Args:
        instances: dataclass instances, as ``parse`` returned them.

    Returns:
        Value by field name, in the order of the dataclasses and their fields.

    Example:
        >>> @dataclasses.dataclass
        ... class Arguments:
        ...     top_k: int = 3
        ...     hub_token: str = "hf_..."
        >>> resolved([Arguments()])
        {'top_k': 3}
    """
    return {
        field.name: _storable(getattr(instance, field.name))
        for instance in instances
        for field in dataclasses.fields(instance)
        if field.init and not field.metadata.get("secret", _is_secret(field.name))
    }


def without_secrets(words: Sequence[str]) -> list[str]:
    """Takes what ``resolved`` leaves out, out of a command line.

    Args:
        words: as in ``sys.argv``.

    Returns:
        The words; the values of flags that hold a secret are ``...``, and addresses lack their credentials.

    Example:
        >>> without_secrets(["--hub_token", "hf_1", "--judge_base_url=https://me:pw@host/v1", "--seed", "7"])
        ['--hub_token', '...', '--judge_base_url=https://host/v1', '--seed', '7']
    """
    shown: list[str] = []
    secret = False
    for word in words:
        if not word.startswith("--"):
            shown.append("..." if secret else _storable(word))
            continue
        flag, equals, value = word.partition("=")
        secret = _is_secret(flag.lstrip("-"))
        shown.append(f"{flag}={'...' if secret else _storable(value)}" if equals else flag)
    return shown


def fill(kind: type[T], settings: Mapping[str, Any]) -> T:
    """Makes a dataclass of those settings that are its own.

    Args:
        kind: the dataclass.
        settings: values by name, for instance read back from a run folder; other names are passed over.

    Returns:
        An instance, with defaults for what is not among them.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Flags:
        ...     top_k: int = 3
        >>> fill(Flags, {"top_k": 5, "seed": 1})
        Flags(top_k=5)
    """
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in settings.items() if name in names})


def config_difference(
    before: Mapping[str, Any], after: Mapping[str, Any], *, ignore: Collection[str] = ()
) -> list[str]:
    """Says what differs between two resolved configs.

    Args:
        before: one result of ``resolved``, for instance read back from a run folder.
        after: the other.
        ignore: keys that may differ.

    Returns:
        One line ``key: value before -> value after`` for each key that differs, in order; a key that only one of them
        has is ``(absent)`` in the other.

    Example:
        >>> config_difference({"top_k": 3, "seed": 0}, {"top_k": 5, "seed": 1}, ignore=["seed"])
        ['top_k: 3 -> 5']
    """
    absent = object()
    lines = []
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key, absent), after.get(key, absent)
        if key not in ignore and (old != new or isinstance(old, bool) != isinstance(new, bool)):
            shown = ["(absent)" if value is absent else _plain(value) for value in (old, new)]
            lines.append(f"{key}: {shown[0]} -> {shown[1]}")
    return lines
