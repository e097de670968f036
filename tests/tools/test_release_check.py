"""The release check sees what it is there to see, and the project's own files pass it."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import yaml

import rag_rl
from tests.scripts import load

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def check():
    return load(ROOT / "tools" / "release_check.py")


def test_our_changelog_passes(check):
    assert check.changelog_problems((ROOT / "CHANGELOG.md").read_text(), rag_rl.__version__) == []


def test_our_changelog_says_which_numbers_moved():
    assert "### Numbers moved" in (ROOT / "CHANGELOG.md").read_text()


def test_our_citation_passes():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rag_rl.__version__
    assert citation["preferred-citation"]["title"] == citation["title"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("## [0.1.0] - 2026-11-21\n", "no '## \\[Unreleased\\]'"),
        ("## [Unreleased]\n", "no '## \\[0.1.0\\]"),
        ("## [Unreleased]\n## [0.1.0]\n", "no '## \\[0.1.0\\]"),
        ("## [Unreleased]\n### Added\n### Fixed\n### Fixed\n## [0.1.0] - 2026-11-21\n", "'### Fixed' stands twice"),
        ("## [Unreleased]\n## [Unreleased]\n## [0.1.0] - 2026-11-21\n", "stands twice"),
    ],
)
def test_changelog_problems_are_seen(check, text, problem):
    found = check.changelog_problems(text, "0.1.0")
    assert len(found) == 1
    assert re.search(problem, found[0])


def test_a_wheel_without_models_is_seen(check):
    whole = {
        "rag_rl/py.typed",
        "rag_rl/prompts/a.txt",
        "rag_rl/tiny/m/model.safetensors",
        "rag_rl/tiny/m/tokenizer.json",
    }
    assert check.wheel_problems(whole | {"rag_rl-0.1.0.dist-info/METADATA"}) == []
    assert check.wheel_problems(whole - {"rag_rl/tiny/m/model.safetensors"}) == ["the wheel lacks tiny weights"]
    assert check.wheel_problems(whole | {"tests/test_a.py"}) == [
        "the wheel holds tests, which is no part of the package"
    ]


def test_examples(check):
    result = doctest.testmod(check)
    assert result.attempted > 0
    assert result.failed == 0
