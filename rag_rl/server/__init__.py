"""Retrieval as a service: one retriever, opened once, searched over HTTP by as many processes as there are.

``rag-rl serve`` starts it, ``rag_rl.retrieval.http.HTTPRetriever`` is its client, and docs/serving.md describes the
routes. Two threads share the work. The event loop takes requests, checks them and writes replies. The other thread
opens the retriever and searches: it takes whatever waits when it comes back from the last search, and searches it in
one call. So there is no pause to tune: a lone request is searched at once, and many together in one batch.
"""

from __future__ import annotations

from rag_rl.retrieval.http import is_loopback
from rag_rl.server.opening import open_folder, open_settings, read_config
from rag_rl.server.process import Server, bind, read_token, serve
from rag_rl.server.search_thread import About, SearchThread
from rag_rl.server.service import Limits, Service, make_app

__all__ = [
    "About",
    "Limits",
    "SearchThread",
    "Server",
    "Service",
    "bind",
    "is_loopback",
    "make_app",
    "open_folder",
    "open_settings",
    "read_config",
    "read_token",
    "serve",
]
