"""Retrievers: passages in, an index folder, hits out.

Importing this package loads neither torch nor faiss nor chromadb; each is imported by the function that needs it.
"""

from __future__ import annotations

from rag_rl.retrieval.augmented import AugmentedRetriever, mix_vectors, tune_weight
from rag_rl.retrieval.bm25 import BM25Retriever
from rag_rl.retrieval.build import build_index
from rag_rl.retrieval.cached import CachedRetriever
from rag_rl.retrieval.dense import DenseRetriever, open_index
from rag_rl.retrieval.encoder import Encoder, SentenceEncoder
from rag_rl.retrieval.history import HistoryEncoder
from rag_rl.retrieval.http import HTTPRetriever
from rag_rl.retrieval.index_settings import IndexSettings
from rag_rl.retrieval.negatives import mine_negatives, text_groups
from rag_rl.retrieval.reranked import PairScorer, RerankedRetriever
from rag_rl.retrieval.static import ShuffledRetriever, StaticRetriever

__all__ = [
    "AugmentedRetriever",
    "BM25Retriever",
    "CachedRetriever",
    "DenseRetriever",
    "Encoder",
    "HTTPRetriever",
    "HistoryEncoder",
    "IndexSettings",
    "PairScorer",
    "RerankedRetriever",
    "SentenceEncoder",
    "ShuffledRetriever",
    "StaticRetriever",
    "build_index",
    "mine_negatives",
    "mix_vectors",
    "open_index",
    "text_groups",
    "tune_weight",
]
