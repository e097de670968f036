from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from rag_rl.config import (
    config_difference,
    config_source,
    one_line_errors,
    parse,
    read_arguments,
    resolved,
    without_secrets,
)
from rag_rl.errors import BackendError, ConfigError

pytestmark = pytest.mark.smoke


class Pooling(str, Enum):
    CLS = "cls"
    MEAN = "mean"


@dataclass
class Arguments:
    """What this recipe alone needs."""

    retriever_top_k: int = field(default=3, metadata={"help": "Passages shown, 100% of them."})
    retriever_score: float = 0.5
    retriever_pooling: Pooling = Pooling.CLS
    retriever_schedule: Pooling | str = "cls"
    retriever_cache: bool = True
    retriever_folder: Path | None = None
    retriever_devices: list[int] | None = None
    reward_names: list[str] = field(default_factory=lambda: ["f1"])
    reward_pair: tuple[int, str] = (1, "a")
    generator_type: Literal["api", "base", "instruct"] = "instruct"
    generator_level: str = field(default="low", metadata={"choices": ["low", "high"]})
    generator_kwargs: dict | str | None = None
    prompts: str | dict[str, str] | dict[str, dict[str, str]] | None = None
    flags: dict[str, bool] | None = None


@dataclass
class Training:
    output_dir: str | None = None
    learning_rate: float = 1e-6
    max_steps: int = -1
    threshold: float | int | None = None
    report_to: None | str | list[str] = "none"  # noqa: RUF036 - as transformers has it
    deepspeed: dict | str | None = None
    model_init_kwargs: dict[str, Any] | str | None = None
    precision: bool | str | None = None
    bf16: bool | None = None
    eval_strategy: str = "no"
    hub_token: str | None = None

    def __post_init__(self) -> None:
        if self.max_steps == 0:
            raise ValueError("max_steps must not be 0:\ngive -1 for no limit")
        if self.max_steps == 666:
            raise KeyError("a bug")
        if self.max_steps == 7:
            warnings.warn("seven is deprecated", FutureWarning, stacklevel=2)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "grpo_fake.py"
    path.write_text('"""Trains a fake, 100% of it.\n\nNeeds: nothing.\n"""\n')
    folder = tmp_path / "configs" / "grpo_fake"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text("# how to run\nretriever_top_k: 4\nlearning_rate: 2.0e-4\n")
    return path


def from_yaml(recipe: Path, text: str, *argv: str) -> tuple[Arguments, Training]:
    path = recipe.parent / "c.yaml"
    path.write_text(text)
    arguments, training = read_arguments(recipe, Arguments, Training, argv=["--config", str(path), *argv])
    return arguments, training


def test_the_command_line_wins_over_yaml_and_yaml_over_the_default(recipe: Path) -> None:
    arguments, training = read_arguments(recipe, Arguments, Training, argv=["--learning_rate", "1e-3"])
    assert (arguments.retriever_top_k, training.learning_rate, training.max_steps) == (4, 1e-3, -1)
    training, arguments = read_arguments(recipe, Training, Arguments, argv=["--retriever_top_k=9"])
    assert isinstance(training, Training)
    assert arguments.retriever_top_k == 9


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("retriever_score: 1", "retriever_score", 1.0),
        ("retriever_score: 1e-5", "retriever_score", 1e-5),
        ("retriever_score: -.5", "retriever_score", -0.5),
        ("retriever_score: .inf", "retriever_score", float("inf")),
        ("retriever_pooling: mean", "retriever_pooling", Pooling.MEAN),
        ("retriever_schedule: mean", "retriever_schedule", "mean"),
        ("retriever_cache: false", "retriever_cache", False),
        ("retriever_folder: ${data}/scifact", "retriever_folder", Path("${data}/scifact")),
        ("retriever_devices: [0, 1]", "retriever_devices", [0, 1]),
        ("retriever_devices:", "retriever_devices", None),
        ("reward_names:\n- em\n- f1", "reward_names", ["em", "f1"]),
        ("reward_names: []", "reward_names", []),
        ("reward_pair: [3, b]", "reward_pair", (3, "b")),
        ("generator_type: base", "generator_type", "base"),
        ("generator_level: high", "generator_level", "high"),
        ("generator_kwargs: {top_k: 5, stop: [x]}", "generator_kwargs", {"top_k": 5, "stop": ["x"]}),
        ("generator_kwargs: '{\"top_k\": 5}'", "generator_kwargs", {"top_k": 5}),
        ("prompts: {query: 'q: '}", "prompts", {"query": "q: "}),
        ("prompts: {a: {query: 'q: '}}", "prompts", {"a": {"query": "q: "}}),
        ("flags: {a: true}", "flags", {"a": True}),
        ("output_dir: ${data}/x", "output_dir", "${data}/x"),
        ("output_dir: 2024-01-01", "output_dir", "2024-01-01"),
        ("threshold: 3", "threshold", 3),
        ("threshold: 0.5", "threshold", 0.5),
        ("threshold: null", "threshold", None),
        ("report_to: wandb", "report_to", "wandb"),
        ("report_to: [wandb, trackio]", "report_to", ["wandb", "trackio"]),
        ("deepspeed: zero2.json", "deepspeed", "zero2.json"),
        ("precision: true", "precision", True),
        ("precision: auto", "precision", "auto"),
        ("eval_strategy: no", "eval_strategy", "no"),
        (
            "model_init_kwargs:\n  dtype: bfloat16\n  eps: 1e-5",
            "model_init_kwargs",
            {"dtype": "bfloat16", "eps": 1e-5},
        ),
        ("{}", "max_steps", -1),
    ],
)
def test_yaml_values(recipe: Path, text: str, name: str, expected: object) -> None:
    arguments, training = from_yaml(recipe, text)
    value = getattr(arguments if hasattr(arguments, name) else training, name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("retriever_top_k: many", "1: retriever_top_k: expected an integer, got 'many'"),
        ("\n\nretriever_top_k: 2.5", "3: retriever_top_k: expected an integer, got 2.5"),
        ("retriever_top_k: [1]", "1: retriever_top_k: expected an integer, got [1]"),
        ("retriever_top_k: null", "1: retriever_top_k: expected an integer, got null"),
        ("retriever_top_k: true", "1: retriever_top_k: expected an integer, got true"),
        ("retriever_top_k: 010", "1: retriever_top_k: expected an integer, got '010'"),
        ("retriever_score: true", "1: retriever_score: expected a number, got true"),
        ("retriever_score: '1e-5'", "1: retriever_score: expected a number, got '1e-5'"),
        ("retriever_score: .nan", "1: retriever_score: expected a number, got NaN"),
        ("retriever_score: 1" + "0" * 400, "1: retriever_score: expected a number, got 1" + "0" * 76 + "..."),
        ("retriever_pooling: max", "1: retriever_pooling: expected one of cls, mean, got 'max'"),
        ("retriever_schedule: max", "1: retriever_schedule: expected one of cls, mean, got 'max'"),
        ("retriever_cache: yes", "1: retriever_cache: expected true or false, got 'yes'"),
        ("retriever_cache: 1", "1: retriever_cache: expected true or false, got 1"),
        ("reward_names: f1", "1: reward_names: expected a list of strings, got 'f1'; write [f1]"),
        ("reward_names: [1]", '1: reward_names: expected a list of strings, got [1]; put it in quotes: "1"'),
        ("reward_names: null", "1: reward_names: expected a list of strings, got null"),
        ("retriever_devices: 0", "1: retriever_devices: expected a list of integers or null, got 0; write [0]"),
        ("reward_pair: [1]", "1: reward_pair: expected a list of integers, got [1]; 2 values are needed"),
        ("generator_type: chat", "1: generator_type: expected one of api, base, instruct, got 'chat'"),
        ("generator_level: mid", "1: generator_level: expected one of low, high, got 'mid'"),
        ("flags: {a: 1}", '1: flags: expected a mapping to booleans or null, got {"a": 1}'),
        ("output_dir: [a]", '1: output_dir: expected a string or null, got ["a"]'),
        ("output_dir: 12", '1: output_dir: expected a string or null, got 12; put it in quotes: "12"'),
        ("threshold: high", "1: threshold: expected an integer or a number or null, got 'high'"),
        ("precision: 3", "1: precision: expected true or false or a string or null, got 3"),
        ("hub_token: [hf_abc]", "1: hub_token: expected a string or null, got (hidden)"),
        (
            "model_init_kwargs: bf16",
            "1: model_init_kwargs: expected a mapping or null, got 'bf16'; write {key: value}",
        ),
        ("generator_kwargs: '{a'", "1: generator_kwargs: expected a mapping or null, got '{a'; not valid JSON"),
        ("retriever_topk: 3", "1: unknown key retriever_topk; the closest valid one is retriever_top_k"),
        ("max_steps: 1\nzzz: 3", "2: unknown key zzz; the closest valid one is "),
        ("warmup_ratio: 0.1", "1: unknown key warmup_ratio: use warmup_steps"),
        ("env: {A: b}", "1: unknown key env: a config sets no environment variables"),
        ("max_steps: 1\nmax_steps: 2", "2: max_steps is already set in line 1"),
        ("deepspeed:\n  a: 1\n  a: 2", "3: a is already set in line 2"),
        ("1: 2", "1: expected a key that is a name, got 1"),
        ("? [a]\n: 2", "1: expected a key that is a name"),
        ("<<: {max_steps: 3}", "1: unknown key <<"),
        ("max_steps: 3\nreward_names: [a", "2: not valid YAML: "),
        ("max_steps: 3\n\tb: 4", "2: not valid YAML: "),
        ("max_steps: *nothing", "1: not valid YAML: found undefined alias"),
        ("max_steps: !!python/name:os.system", "1: not valid YAML: could not determine a constructor"),
        ("max_steps: !!int many", "1: max_steps: invalid literal"),
        ("max_steps: 1\n---\nmax_steps: 2", "2: not valid YAML: but found another document"),
    ],
)
def test_yaml_mistakes_are_named_with_file_and_line(recipe: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_yaml(recipe, text)
    assert str(caught.value).startswith(f"{recipe.parent / 'c.yaml'}:{message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n", "expected lines of 'key: value', got a list"),
        (b"words", "expected lines of 'key: value', got a value"),
        (b"# nothing\n", "expected lines of 'key: value', got an empty file"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"a: \x07", "not valid YAML: special characters are not allowed"),
    ],
)
def test_files_that_are_no_mapping(recipe: Path, content: bytes, message: str) -> None:
    path = recipe.parent / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_arguments(recipe, Training, argv=[f"--config={path}"])


@pytest.mark.parametrize(
    ("argv", "name", "expected"),
    [
        (["--retriever_top_k", "7"], "retriever_top_k", 7),
        (["--retriever_top_k=7"], "retriever_top_k", 7),
        (["--retriever_top_k", "7", "--retriever_top_k", "8"], "retriever_top_k", 8),
        (["--max_steps", "-2"], "max_steps", -2),
        (["--retriever_score", "-1e-5"], "retriever_score", -1e-5),
        (["--retriever_score", "2"], "retriever_score", 2.0),
        (["--retriever_pooling", "mean"], "retriever_pooling", Pooling.MEAN),
        (["--retriever_schedule", "mean"], "retriever_schedule", "mean"),
        (["--retriever_cache", "no"], "retriever_cache", False),
        (["--retriever_cache", "0"], "retriever_cache", False),
        (["--retriever_cache", "True"], "retriever_cache", True),
        (["--retriever_cache"], "retriever_cache", True),
        (["--bf16", "false"], "bf16", False),
        (["--bf16", "none"], "bf16", None),
        (["--retriever_devices", "0", "1"], "retriever_devices", [0, 1]),
        (["--retriever_devices", "[0, 1]"], "retriever_devices", [0, 1]),
        (["--retriever_devices", "null"], "retriever_devices", None),
        (["--reward_names", "em", "f1"], "reward_names", ["em", "f1"]),
        (["--reward_names=em"], "reward_names", ["em"]),
        (["--reward_names", "[]"], "reward_names", []),
        (["--reward_pair", "3", "b"], "reward_pair", (3, "b")),
        (["--generator_type", "api"], "generator_type", "api"),
        (["--generator_kwargs", '{"top_k": 5}'], "generator_kwargs", {"top_k": 5}),
        (["--prompts", '{"a": "b"}'], "prompts", {"a": "b"}),
        (["--prompts", "query: "], "prompts", "query: "),
        (["--output_dir", "3"], "output_dir", "3"),
        (["--output_dir", "none"], "output_dir", "none"),
        (["--output_dir", "null"], "output_dir", None),
        (["--threshold", "3"], "threshold", 3),
        (["--threshold", "3.0"], "threshold", 3.0),
        (["--report_to", "wandb"], "report_to", "wandb"),
        (["--report_to", "none"], "report_to", "none"),
        (["--report_to", "wandb", "trackio"], "report_to", ["wandb", "trackio"]),
        (["--report_to", '["wandb"]'], "report_to", ["wandb"]),
        (["--deepspeed", "zero2.json"], "deepspeed", "zero2.json"),
        (["--precision", "true"], "precision", True),
        (["--precision", "no"], "precision", "no"),
    ],
)
def test_command_line_values(recipe: Path, argv: list[str], name: str, expected: object) -> None:
    arguments, training = read_arguments(recipe, Arguments, Training, argv=argv)
    value = getattr(arguments if hasattr(arguments, name) else training, name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--retriever_top_k", "2.5"], "--retriever_top_k: expected an integer, got '2.5'"),
        (["--retriever_top_k"], "--retriever_top_k: expected one argument"),
        (["--retriever_score", "nan"], "--retriever_score: expected a number, got 'nan'"),
        (["--retriever_cache", "maybe"], "--retriever_cache: expected true or false, got 'maybe'"),
        (
            ["--retriever_devices", "a", "b"],
            '--retriever_devices: expected a list of integers or null, got ["a", "b"]',
        ),
        (["--retriever_devices", "[x]"], "--retriever_devices: expected a list of integers or null, got '[x]'"),
        (["--reward_names"], "--reward_names: expected at least one argument"),
        (["--retriever_pooling", "max"], "--retriever_pooling: expected one of cls, mean, got 'max'"),
        (["--generator_type", "chat"], "--generator_type: expected one of api, base, instruct, got 'chat'"),
        (
            ["--generator_kwargs", "{top_k: 5}"],
            "--generator_kwargs: expected a mapping or null, got '{top_k: 5}'; not",
        ),
        (["--model_init_kwargs", "bf16"], "--model_init_kwargs: expected a mapping or null, got 'bf16'; write"),
        (["--generator_kwargs", "[1]"], "--generator_kwargs: expected a mapping or null, got '[1]'; write"),
        (["--retriever_to", "3"], "unknown flag --retriever_to; the closest valid one is --retriever_top_k"),
        (["--retriever-top-k=3"], "unknown flag --retriever-top-k; the closest valid one is --retriever_top_k"),
        (["--confi", "tiny"], "unknown flag --confi; the closest valid one is --config"),
        (["--no_retriever_cache"], "unknown flag --no_retriever_cache: write --retriever_cache false"),
        (["--torch_dtype", "bfloat16"], "unknown flag --torch_dtype: use dtype"),
        (["stray"], "unexpected argument 'stray': write --name value"),
        (["-x"], "unexpected argument '-x'"),
        (["--config"], "--config: expected one argument"),
        (["--max_steps", "0"], "Training: max_steps must not be 0"),
    ],
)
def test_command_line_mistakes_name_the_flag(recipe: Path, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_arguments(recipe, Arguments, Training, argv=argv)
    assert str(caught.value).startswith(message)


def test_other_exceptions_of_a_dataclass_stay_what_they_are(recipe: Path) -> None:
    with pytest.raises(KeyError, match="a bug"):
        parse(recipe, Arguments, Training, argv=["--max_steps", "666"])


def test_warnings_of_a_dataclass_still_appear(recipe: Path) -> None:
    with pytest.warns(FutureWarning, match="seven"):
        read_arguments(recipe, Arguments, Training, argv=["--max_steps", "7"])


def test_a_field_without_default_must_be_given(recipe: Path) -> None:
    @dataclass
    class Needs:
        question_file: str
        retriever_top_k: int = 1
        learning_rate: float = 1.0

    with pytest.raises(ConfigError, match="question_file is required"):
        read_arguments(recipe, Needs, argv=[])
    assert read_arguments(recipe, Needs, argv=["--question_file", "q.jsonl"])[0].question_file == "q.jsonl"


def test_dataclasses_that_do_not_go_together_are_a_programming_error(recipe: Path) -> None:
    @dataclass
    class Again:
        retriever_top_k: int = 1

    @dataclass
    class Reserved:
        config: str = ""

    with pytest.raises(ValueError, match="retriever_top_k is a field of Arguments and Again"):
        parse(recipe, Arguments, Again, argv=[])
    with pytest.raises(ValueError, match="--config is reserved"):
        parse(recipe, Reserved, argv=[])


def test_config_source(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs" / "grpo_fake"
    (folder / "large.yaml").write_text("{}")
    (tmp_path / "own.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert config_source([], recipe) == folder / "tiny.yaml"
    assert config_source(["--config", "large"], recipe) == folder / "large.yaml"
    assert config_source(["--x", "--config=large.yaml", "--y", "3"], recipe) == folder / "large.yaml"
    assert config_source(["--config", "own.yaml"], recipe) == Path("own.yaml")
    assert config_source(["--config", "./own.yaml"], recipe) == Path("own.yaml")
    assert config_source(["--config", "large", "--config", "tiny"], recipe) == folder / "tiny.yaml"
    monkeypatch.setattr(sys, "argv", ["x", "--config", "large"])
    assert config_source(None, recipe) == folder / "large.yaml"
    for missing in ("lrge", "other.yaml", "own", str(folder)):
        with pytest.raises(ConfigError, match=r"no such file; configs/grpo_fake has: large, tiny"):
            config_source(["--config", missing], recipe)
    with pytest.raises(ConfigError, match="give --config PATH"):
        config_source([], tmp_path / "copied.py")
    with pytest.raises(ConfigError, match="configs/copied has none: give a path"):
        config_source(["--config", "tiny"], tmp_path / "copied.py")


def test_help_lists_own_fields_first(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Library:
        """Comes from a library.

        Long.
        """

        library_size: int = 1

    Library.__module__ = "trl.trainer.x"
    Library.__init__.__annotations__.clear()
    with pytest.raises(SystemExit) as caught:
        parse(recipe, Library, Arguments, argv=["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "Trains a fake, 100% of it.\n\nNeeds: nothing." in out
    assert out.index("--retriever_top_k") < out.index("--library_size")
    words = " ".join(out.split())
    assert "Passages shown, 100% of them. (an integer; default: 3)" in words
    assert "Comes from a library. --library_size" in words
    assert "(one of api, base, instruct; default: instruct)" in words
    assert '(a list of strings; default: ["f1"])' in words


def test_parse_prints_one_line_and_leaves_with_2(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as caught:
        parse(recipe, Arguments, Training, argv=["--max_steps", "0"])
    assert caught.value.code == 2
    line = "grpo_fake.py: error: Training: max_steps must not be 0: give -1 for no limit\n"
    assert capsys.readouterr().err == line
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        parse(recipe, Arguments, Training, argv=["--max_steps", "0"])
    assert capsys.readouterr().err == ""


def test_a_broken_backend_is_no_mistake_of_the_user() -> None:
    with pytest.raises(BackendError), one_line_errors("x"):
        raise BackendError("down")


def test_resolved_is_stable_and_without_secrets(recipe: Path) -> None:
    @dataclass
    class Secrets:
        hub_token: str | None = "hf_1"
        judge_api_key: str = "sk"
        judge_api_key_env: str = "GEMINI_API_KEY"
        judge_base_url: str = "https://me:pw@host/v1?key=abc&x=1"
        judge_kwargs: dict[str, Any] = field(
            default_factory=lambda: {"extra": {"api_key": "sk", "Authorization": "Bearer x", "n": 1}}
        )
        max_new_tokens: int = 5
        include_num_input_tokens_seen: bool = False
        eos_token: str = "<eos>"
        plain: str = field(default="p", metadata={"secret": True})
        sort_key: str = field(default="k", metadata={"secret": False})
        made: Any = field(default_factory=object)
        function: Any = json.loads

    assert resolved([Secrets()]) == {
        "judge_api_key_env": "GEMINI_API_KEY",
        "judge_base_url": "https://host/v1?key=...&x=1",
        "judge_kwargs": {"extra": {"n": 1}},
        "max_new_tokens": 5,
        "include_num_input_tokens_seen": False,
        "eos_token": "<eos>",
        "sort_key": "k",
        "made": "builtins:object",
        "function": "json:loads",
    }

    text = "retriever_pooling: mean\nretriever_folder: a/b\nlearning_rate: 1e-6\nreward_pair: [1, x]"
    first = resolved(from_yaml(recipe, text))
    assert list(first) == [f.name for f in fields(Arguments)] + [f.name for f in fields(Training)][:-1]
    assert first["retriever_pooling"] == "mean"
    assert first["retriever_folder"] == "a/b"
    assert yaml.safe_load(yaml.safe_dump(first)) == first == json.loads(json.dumps(first))
    assert config_difference(first, resolved(from_yaml(recipe, text))) == []


def test_command_lines_without_secrets() -> None:
    assert without_secrets(["--seed", "7", "--reward_names", "em", "f1", "my config"]) == [
        "--seed", "7", "--reward_names", "em", "f1", "my config",
    ]  # fmt: skip
    assert without_secrets(["--hub_token", "hf_1", "--judge_api_key=sk", "--max_new_tokens", "5"]) == [
        "--hub_token", "...", "--judge_api_key=...", "--max_new_tokens", "5",
    ]  # fmt: skip
    assert without_secrets(["--url", "https://me:pw@host/v1?key=abc&x=1"]) == ["--url", "https://host/v1?key=...&x=1"]


def test_config_difference() -> None:
    before = {"a": 1, "b": "x", "c": [1], "d": True, "seed": 0}
    after = {"a": 2, "b": "x", "c": [1, 2], "d": 1, "e": None, "seed": 1}
    assert config_difference(before, after, ignore={"seed"}) == [
        "a: 1 -> 2",
        "c: [1] -> [1, 2]",
        "d: true -> 1",
        "e: (absent) -> null",
    ]
    assert config_difference(before, before) == []


FAKE = '''"""Trains nothing at all."""
from __future__ import annotations
import sys
from dataclasses import dataclass, field
from rag_rl.config import parse
{imports}

@dataclass
class Arguments:
    """Flags of this recipe."""
    retriever_top_k: int = field(default=3, metadata={{"help": "Passages shown."}})
    reward_names: list[str] = field(default_factory=lambda: ["f1"])

def main() -> None:
    print(parse(__file__, {classes}))
    print(sorted(name for name in sys.modules if name in ("torch", "transformers", "trl.trainer.grpo_trainer")))

if __name__ == "__main__":
    main()
'''


def write_fake(folder: Path, imports: str = "", classes: str = "Arguments") -> Path:
    path = folder / "grpo_fake.py"
    path.write_text(FAKE.format(imports=imports, classes=classes))
    configs = folder / "configs" / "grpo_fake"
    configs.mkdir(parents=True)
    (configs / "tiny.yaml").write_text("retriever_top_k: 5\n")
    return path


def run(path: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(path), *argv]
    return subprocess.run(
        command, cwd=path.parent, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_recipe_as_a_process(tmp_path: Path) -> None:
    path = write_fake(tmp_path)
    done = run(path, "--reward_names", "em")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Arguments(retriever_top_k=5, reward_names=['em'])" in done.stdout
    assert done.stdout.endswith("[]\n")  # nothing heavy was imported

    wrong = run(path, "--retriever_to", "3")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr == (
        "grpo_fake.py: error: unknown flag --retriever_to; the closest valid one is --retriever_top_k\n"
    )

    (tmp_path / "bad.yaml").write_text("\nretriever_top_k: many\n")
    wrong = run(path, "--config=bad.yaml")
    assert wrong.returncode == 2
    assert wrong.stderr == "grpo_fake.py: error: bad.yaml:2: retriever_top_k: expected an integer, got 'many'\n"

    shown = run(path, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "Trains nothing at all." in shown.stdout
    assert "--retriever_top_k" in shown.stdout


def test_with_the_configs_of_trl(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("trl")
    from trl import DPOConfig, GRPOConfig, ModelConfig, SFTConfig

    path = write_fake(tmp_path)
    config = tmp_path / "c.yaml"
    config.write_text(
        "output_dir: ${data}/run\nuse_cpu: true\nbf16: false\n"
        "learning_rate: 1e-5\nwarmup_steps: 0.1\neval_strategy: no\n"
        "lr_scheduler_type: cosine\nreport_to: none\nreward_weights: [1, 0.5]\ngeneration_kwargs: {do_sample: true}\n"
        "gradient_checkpointing: false\ngradient_checkpointing_kwargs: {use_reentrant: false}\n"
        "model_name_or_path: some/model\ndtype: bfloat16\nlora_target_modules: [q_proj, v_proj]\nscale_rewards: none\n"
    )
    argv = [f"--config={config}", "--max_steps", "3", "--lora_r", "4", "--generation_kwargs", '{"do_sample": false}']
    training, model = read_arguments(path, GRPOConfig, ModelConfig, argv=argv)
    assert (training.learning_rate, training.warmup_steps, training.max_steps) == (1e-5, 0.1, 3)
    assert (training.output_dir, training.eval_strategy.value) == ("${data}/run", "no")
    assert training.reward_weights == [1.0, 0.5]
    assert training.generation_kwargs == {"do_sample": False}
    assert training.lr_scheduler_type.value == "cosine"
    assert (model.dtype, model.lora_r, model.lora_target_modules) == ("bfloat16", 4, ["q_proj", "v_proj"])

    flat = resolved([training, model])
    assert yaml.safe_load(yaml.safe_dump(flat)) == flat
    again = resolved(read_arguments(path, GRPOConfig, ModelConfig, argv=argv))
    assert config_difference(flat, again) == []

    for owner in (GRPOConfig, SFTConfig, DPOConfig, ModelConfig):
        names = [f.name for f in fields(owner) if f.init]
        made = owner(**({} if owner is ModelConfig else {"use_cpu": True, "bf16": False, "output_dir": "x"}))
        assert set(names) - set(resolved([made])) <= {"hub_token"}, owner

    for text, message in {
        "lr_scheduler_type: cosin": "c.yaml:1: lr_scheduler_type: expected one of linear, cosine, ",
        "dtype: float17": "c.yaml:1: dtype: expected one of auto, bfloat16, float16, float32, got 'float17'",
        "reward_weights: 1.0": "c.yaml:1: reward_weights: expected a list of numbers or null, got 1.0; write [1.0]",
        "max_prompt_length: 512": "c.yaml:1: unknown key max_prompt_length: TRL no longer cuts prompts",
        "parallelism_config: {dp: 2}": "c.yaml:1: parallelism_config: expected null, got ",
        "use_cpu: true\nbf16: false\nnum_generations: 1": "GRPOConfig: ",
    }.items():
        config.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_arguments(path, GRPOConfig, ModelConfig, argv=[f"--config={config}"])
        assert message in str(caught.value)


def test_a_recipe_with_grpo_config_as_a_process(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    path = write_fake(tmp_path, "from trl import GRPOConfig, ModelConfig", "GRPOConfig, ModelConfig, Arguments")
    shown = run(path, "--help")
    assert shown.returncode == 0
    assert shown.stdout.index("--retriever_top_k") < shown.stdout.index("--num_generations")
    assert shown.stdout.index("--num_generations") < shown.stdout.index("--lora_r")
    wrong = run(path, "--use_cpu", "--bf16", "false", "--num_generations", "1")
    assert wrong.returncode == 2
    lines = [line for line in wrong.stderr.splitlines() if "kernels" not in line]  # a library's remark on import
    assert len(lines) == 1
    assert lines[0].startswith("grpo_fake.py: error: GRPOConfig: ")
