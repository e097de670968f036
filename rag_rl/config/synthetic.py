"""Queries for a run that has none: written for its own corpus, into its own folder, before anything is learnt."""

from __future__ import annotations

from pathlib import Path

from rag_rl.config.arguments import DataArguments, RetrieverArguments
from rag_rl.config.synthesis import report_queries, synthesize_queries
from rag_rl.config.synthesis_arguments import SynthesisArguments

FOLDER = "synthetic"
_FINISHED = "summary.json"


def queries_written(folder: Path) -> bool:
    """Whether a run's own queries are all there.

    Args:
        folder: of the run.

    Returns:
        True after ``ensure_queries``.
    """
    return (folder / FOLDER / _FINISHED).is_file()


def ensure_queries(
    data: DataArguments, synthesis: SynthesisArguments, retriever: RetrieverArguments, folder: Path, *, seed: int
) -> None:
    """Writes queries for the corpus where ``data_train`` names none; stopped, it goes on where it was.

    Args:
        data: the corpus; a plain ``corpus.json`` becomes documents in the folder. ``data_train`` is set to what was
            written.
        synthesis: who writes, and for how many passages.
        retriever: with an encoder, it is tried how many queries find their document among 10.
        folder: of the run.
        seed: of everything.

    Raises:
        ConfigError: a setting does not fit.
        DataError: the corpus is missing, empty or has bad rows.
        RunFolderError: the folder holds queries that came about otherwise.
        BackendError: the endpoint or the disk is broken.
    """
    made = folder / FOLDER
    if data.data_train:
        return
    report_queries(synthesize_queries(synthesis, data, made, seed=seed), synthesis, data, retriever, made)
    data.data_train = str(made)
