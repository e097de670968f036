"""Configuration: strict parsing of YAML files and command lines into dataclasses."""

from __future__ import annotations

from rag_rl.config.parsing import (
    config_difference,
    config_source,
    fill,
    one_line_errors,
    parse,
    read_arguments,
    resolved,
    without_secrets,
)

__all__ = [
    "config_difference",
    "config_source",
    "fill",
    "one_line_errors",
    "parse",
    "read_arguments",
    "resolved",
    "without_secrets",
]
