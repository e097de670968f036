"""Trainers and losses that TRL and sentence-transformers do not have.

Importing this package loads no torch. ``rag_rl.trainers.plackett_luce`` is used as a module: its names (``sample``,
``log_prob``, ...) say little on their own.
"""

from __future__ import annotations

__all__: list[str] = []
