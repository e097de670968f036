"""Files in and out: corpora, questions and judgements in every form that docs/data_formats.md shows.

Bad input ends with one line that names the file, the line and the field of the first five bad rows. Files are written
whole or not at all. Nothing here loads torch, and ``datasets`` is loaded only for ``hub:`` sources.
"""

from rag_rl.data.beir import load_qrels
from rag_rl.data.chunking import chunk_passages
from rag_rl.data.corpus import Corpus, load_corpus, write_corpus
from rag_rl.data.fields import BadRows, Fields
from rag_rl.data.jsonl import read_json_array, read_jsonl, write_jsonl
from rag_rl.data.multihop import read_multihop
from rag_rl.data.pairs import (
    PairRow,
    PairSampler,
    check_leakage,
    load_pairs,
    mine_pairs,
    split_pairs,
    write_pairs,
)
from rag_rl.data.paths import data_root, resolve_data_path
from rag_rl.data.questions import load_questions, write_questions
from rag_rl.data.splits import fold_questions, split_questions

__all__ = [
    "BadRows",
    "Corpus",
    "Fields",
    "PairRow",
    "PairSampler",
    "check_leakage",
    "chunk_passages",
    "data_root",
    "fold_questions",
    "load_corpus",
    "load_pairs",
    "load_qrels",
    "load_questions",
    "mine_pairs",
    "read_json_array",
    "read_jsonl",
    "read_multihop",
    "resolve_data_path",
    "split_pairs",
    "split_questions",
    "write_corpus",
    "write_jsonl",
    "write_pairs",
    "write_questions",
]
