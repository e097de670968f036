"""rag-rl: reinforcement learning for every part of a retrieval-augmented system, on top of TRL.

``import rag_rl`` loads no torch, faiss or openai: import the part that you need (``rag_rl.retrieval``, ...).
"""

__version__ = "0.1.0"
