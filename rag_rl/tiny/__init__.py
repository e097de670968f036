"""The embedded default: a small synthetic world and tiny models that learn something real in minutes on a CPU.

``${tiny}`` in a configuration stands for this package's folder: ``${tiny}/reader`` is the language model,
``${tiny}/encoder`` the sentence encoder, ``${tiny}/data`` corpus and questions.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
"""What ``${tiny}`` stands for."""
