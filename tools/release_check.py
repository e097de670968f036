"""Checks that a release hangs together: ``python tools/release_check.py``.

Version, changelog and citation agree, no skeleton is left among the recipes, and the built wheel holds prompts, tiny
models and the type marker. That every figure is dated, or says "not run yet", is tests/recipes/test_configs.py's part.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import yaml

from rag_rl import __version__

ROOT = Path(__file__).resolve().parents[1]


def changelog_problems(text: str, version: str) -> list[str]:
    r"""Reads a changelog in the form of keepachangelog.com.

    Args:
        text: of CHANGELOG.md.
        version: that is to be released, such as "0.1.0".

    Returns:
        What is wrong with it, one line each; empty when all is well.

    Example:
        >>> changelog_problems("## [Unreleased]\n## [0.1.0] - 2026-11-21\n### Added\n### Added\n", "0.1.0")
        ["CHANGELOG.md: '### Added' stands twice in '## [0.1.0] - 2026-11-21'"]
    """
    problems = []
    sections: dict[str, list[str]] = {}
    current = ""
    for line in text.splitlines():
        if line.startswith("## "):
            current = line.strip()
            if current in sections:
                problems.append(f"CHANGELOG.md: {current!r} stands twice")
            sections.setdefault(current, [])
        elif line.startswith("### "):
            heading = line.strip()
            if heading in sections.get(current, []):
                problems.append(f"CHANGELOG.md: {heading!r} stands twice in {current!r}")
            sections.setdefault(current, []).append(heading)
    if not any(section.startswith("## [Unreleased]") for section in sections):
        problems.append("CHANGELOG.md: has no '## [Unreleased]'")
    if not any(re.fullmatch(rf"## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", section) for section in sections):
        problems.append(f"CHANGELOG.md: has no '## [{version}] - YYYY-MM-DD'")
    return problems


def wheel_problems(names: set[str]) -> list[str]:
    """Looks for what the package cannot do without.

    Args:
        names: of the files in the wheel.

    Returns:
        What is missing, one line each.
    """
    wanted = {
        "the type marker": r"rag_rl/py\.typed",
        "prompts": r"rag_rl/prompts/[^/]+\.txt",
        "tiny weights": r"rag_rl/tiny/.+\.safetensors",
        "tiny tokenizer": r"rag_rl/tiny/.+/tokenizer\.json",
    }
    problems = [
        f"the wheel lacks {what}" for what, form in wanted.items() if not any(re.fullmatch(form, n) for n in names)
    ]
    extra = sorted({name.split("/")[0] for name in names if not name.startswith(("rag_rl/", "rag_rl-"))})
    return problems + [f"the wheel holds {name}, which is no part of the package" for name in extra]


def built_files() -> set[str]:
    """Builds the wheel in a temporary folder.

    Returns:
        Names of the files in it.

    Raises:
        CalledProcessError: it cannot be built.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = Path(folder).glob("*.whl")
        return set(zipfile.ZipFile(wheel).namelist())


def main() -> None:
    """Prints what is wrong; ends with status 1 if anything is."""
    problems = changelog_problems((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), __version__)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    if cited != __version__:
        problems.append(f"CITATION.cff: version {cited}, but rag_rl.__version__ is {__version__}")
    for recipe in sorted((ROOT / "recipes").glob("*.py")):
        if "(fill in" in recipe.read_text(encoding="utf-8"):
            problems.append(f"recipes/{recipe.name}: is still a skeleton")
    problems += wheel_problems(built_files())
    print("\n".join(problems) or f"rag-rl {__version__} can be released")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
