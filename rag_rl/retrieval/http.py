"""The client of ``rag-rl serve``: an index that lies elsewhere, or in several pieces, searched over HTTP."""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import json
import logging
import math
import os
import random
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rag_rl.errors import BackendError, ConfigError, IndexMismatchError
from rag_rl.types import Hit, Passage, Query

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

TOKEN_ENV = "RAG_RL_RETRIEVER_TOKEN"
"""The environment variable in which server and client look for the bearer token, unless told otherwise."""

_LONGEST_PAUSE_S = 5.0
# What may go away by itself: a full queue, a server that loads or is restarted, a proxy without a server behind it.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_REFUSED = frozenset({400, 413, 415, 422})
_LIMITS = ("top_k", "queries", "query_chars", "exclude", "body_bytes")


@dataclass(frozen=True, slots=True)
class _Shard:
    """A server that is ready, and what it says of itself.

    Attributes:
        url: its address, without a slash at the end.
        client: with its open connections.
        passages: how many it holds, None where it cannot tell.
        fingerprint: of its index, None where it has none.
        encoder: of what makes its scores, None where it cannot tell.
        limits: the most that it takes in a request: ``top_k``, ``queries``, ``query_chars``, ``exclude``,
            ``body_bytes``.
    """

    url: str
    client: httpx.Client
    passages: int | None
    fingerprint: str | None
    encoder: str | None
    limits: dict[str, int]


class HTTPRetriever:
    """Searches indexes that ``rag-rl serve`` serves.

    Several servers are shards: each holds a part of the corpus, embedded by the same encoder, all are asked, and the
    hits are merged by score. (Copies of one index belong behind a load balancer, under one address.)

    What may go away by itself (a server that still loads, is restarted, or has a full queue; a lost connection; a
    timeout) is tried again, with pauses that double from ``backoff_s`` to 5 s or as the server asks
    (``Retry-After``), until it has gone on for ``wait_s``. Everything else fails at once. A search reads only, so that
    asking again does no harm.

    A query that is longer than the server takes is cut at its end, as an encoder cuts it.

    Args:
        urls: one address, such as ``http://127.0.0.1:8000``, or one a shard.
        fingerprints: what the servers' indexes must be, in the order of ``urls``; empty: whatever they are at first.
            ``rag-rl serve`` and ``/health`` tell them. A server whose index changes under way is an error in any case.
        token_env: name of the environment variable with the bearer token, read at each request; it goes to no log and
            into no message. Where it is not set, none is sent.
        timeout_s: patience for one request, in seconds, > 0.
        wait_s: how long a server may give no answer before that is an error, in seconds, >= 0.
        backoff_s: first pause in seconds, > 0.
        max_concurrency: requests in flight, >= 1; a search is split where it exceeds what a server takes at once.

    Attributes:
        urls: the addresses.
        retries: requests that were repeated so far.

    Raises:
        ConfigError: no or a malformed address, one that occurs twice, or a value out of range.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        fingerprints: Sequence[str] = (),
        token_env: str = TOKEN_ENV,
        timeout_s: float = 60.0,
        wait_s: float = 120.0,
        backoff_s: float = 0.25,
        max_concurrency: int = 8,
    ) -> None:
        listed = [urls] if isinstance(urls, str) else list(urls)
        self.urls = tuple(_checked_url(url) for url in listed)
        if not self.urls:
            raise ConfigError("retriever_url is empty: name a server, as http://host:port")
        if len(set(self.urls)) != len(self.urls):
            raise ConfigError(f"retriever_url names a server twice: {', '.join(self.urls)}")
        if fingerprints and len(fingerprints) != len(self.urls):
            raise ConfigError(
                f"retriever_fingerprint needs one fingerprint an address: {len(fingerprints)} for {len(self.urls)}"
            )
        if timeout_s <= 0.0 or wait_s < 0.0 or backoff_s <= 0.0:
            raise ConfigError(
                "retriever_timeout_s and backoff_s must be above 0 and retriever_wait_s 0 or more, got "
                f"{timeout_s}, {backoff_s} and {wait_s}"
            )
        if max_concurrency < 1:
            raise ConfigError(f"max_concurrency must be at least 1, got {max_concurrency}")
        self.fingerprints = tuple(fingerprints)
        self.token_env = token_env
        self.timeout_s, self.wait_s, self.backoff_s = timeout_s, wait_s, backoff_s
        self.max_concurrency = max_concurrency
        self.retries = 0
        self._jitter = random.Random()  # its own, so that no repeat moves the global random state
        self._lock = threading.Lock()
        self._shards: list[_Shard] = []
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        """Passages of all servers together."""
        return sum(shard.passages or 0 for shard in self._ready())

    @property
    def fingerprint(self) -> str:
        """Of one server its own, so that a cache serves both ways to the same index; of shards a hash over theirs."""
        told = [shard.fingerprint for shard in self._ready()]
        known = [one for one in told if one is not None]
        if len(known) < len(told):
            raise AttributeError(f"{', '.join(self.urls)}: the retriever that is served has no fingerprint")
        return known[0] if len(known) == 1 else hashlib.sha256("\n".join(["shards", *known]).encode()).hexdigest()

    def wait_until_ready(self) -> None:
        """Returns when every server is ready and serves what it should; later calls return at once.

        Raises:
            BackendError: one is not ready within ``wait_s``, or refuses the token; names its address.
            IndexMismatchError: one serves another index than expected, or the shards do not go together.
        """
        self._ready()

    def search(
        self,
        queries: Sequence[str | Query],
        *,
        top_k: int,
        exclude: Sequence[Collection[str]] | None = None,
    ) -> list[list[Hit]]:
        """The best passages of each query over all servers.

        Args:
            queries: B queries.
            top_k: how many, from 1 to the number of passages.
            exclude: B collections of document ids that must not be returned.

        Returns:
            A list of hits a query, best first; of equal scores those of the earlier address first.

        Raises:
            ConfigError: ``top_k`` is out of range or more than a server gives, ``exclude`` has another length than
                ``queries``, or a server refuses the request.
            BackendError: a server gives no answer, or another one than it should; names its address.
            IndexMismatchError: as in ``wait_until_ready``.
        """
        if top_k < 1:
            raise ConfigError(f"retriever_top_k must be at least 1, got {top_k}")
        if exclude is not None and len(exclude) != len(queries):
            raise ConfigError(
                f"exclude must have one collection of doc ids a query: {len(exclude)} for {len(queries)}"
            )
        shards = self._ready()
        sizes = [shard.passages for shard in shards if shard.passages is not None]
        if len(sizes) == len(shards) and top_k > sum(sizes):
            raise ConfigError(
                f"retriever_top_k must be between 1 and {sum(sizes)}, the number of passages at "
                f"{', '.join(self.urls)}, got {top_k}"
            )
        if not queries:
            return []
        jobs: list[tuple[int, int, int, bytes]] = []  # shard, first query, number of queries, body
        for place, shard in enumerate(shards):
            wanted = top_k if shard.passages is None else min(top_k, shard.passages)
            if wanted > shard.limits["top_k"]:
                raise ConfigError(
                    f"{shard.url} gives at most {shard.limits['top_k']} hits a query, {wanted} were asked for: "
                    "start it with a higher --max_top_k"
                )
            jobs += [(place, *chunk) for chunk in _bodies(shard, queries, exclude, wanted)]
        found: list[list[list[Hit]]] = [[[] for _ in queries] for _ in shards]
        for (place, first, count, _), hits in zip(jobs, self._ask_all(shards, jobs), strict=True):
            found[place][first : first + count] = hits
        return found[0] if len(shards) == 1 else [_merged(lists, top_k) for lists in zip(*found, strict=True)]

    def close(self) -> None:
        """Closes the connections; the next call opens them anew."""
        with self._lock:
            shards, self._shards = self._shards, []
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        for shard in shards:
            shard.client.close()

    def _ready(self) -> list[_Shard]:
        with self._lock:
            if not self._shards:
                self._shards = self._connect()
            return self._shards

    def _connect(self) -> list[_Shard]:
        import httpx

        shards: list[_Shard] = []
        with ExitStack() as stack:
            for place, url in enumerate(self.urls):
                client = httpx.Client(
                    base_url=url,
                    timeout=self.timeout_s,
                    # A proxy that the environment names is none for this machine.
                    trust_env=not is_loopback(urlsplit(url).hostname or ""),
                    limits=httpx.Limits(max_connections=self.max_concurrency, keepalive_expiry=30.0),
                )
                stack.callback(client.close)
                shard = _shard(url, client, self._request(url, client, "GET", "/health", None, threading.Event()))
                expected = self.fingerprints[place] if self.fingerprints else shard.fingerprint
                if shard.fingerprint != expected:
                    raise IndexMismatchError(
                        f"{url} serves the index {shard.fingerprint}, expected {expected} (retriever_fingerprint): "
                        "start it over that index, or change what is expected"
                    )
                shards.append(shard)
                logger.info("%s: ready, %s passages, fingerprint %s", url, shard.passages, shard.fingerprint)
            _check_shards(shards)
            stack.pop_all()
        return shards

    def _ask_all(self, shards: Sequence[_Shard], jobs: Sequence[tuple[int, int, int, bytes]]) -> list[list[list[Hit]]]:
        given_up = threading.Event()
        if len(jobs) == 1:
            return [self._ask(shards[jobs[0][0]], jobs[0][2], jobs[0][3], given_up)]
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.max_concurrency, thread_name_prefix="http-retriever")
            pool = self._pool
        futures = [pool.submit(self._ask, shards[place], count, body, given_up) for place, _, count, body in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            # One that failed comes before those that were told to stop because of it.
            for future in done:
                future.result()
            return [future.result() for future in futures]
        finally:
            given_up.set()
            for future in futures:
                future.cancel()

    def _ask(self, shard: _Shard, count: int, body: bytes, given_up: threading.Event) -> list[list[Hit]]:
        reply = self._request(shard.url, shard.client, "POST", "/search", body, given_up)
        try:
            fingerprint, rows = reply["fingerprint"], reply["results"]
            hits = [_hits(row) for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise BackendError(f"{shard.url} answers with something else than hits: {_shown(reply)}") from error
        if fingerprint != shard.fingerprint:
            raise BackendError(
                f"{shard.url} serves another index than before: {fingerprint}, at first {shard.fingerprint}"
            )
        if len(hits) != count:
            raise BackendError(f"{shard.url} answers {len(hits)} queries of {count}")
        return hits

    def _authorization(self) -> dict[str, str]:
        token = os.environ.get(self.token_env, "") if self.token_env else ""
        if not token:
            return {}
        return {"Authorization": f"Bearer {check_token(token, f'the environment variable {self.token_env}')}"}

    def _request(
        self, url: str, client: httpx.Client, method: str, path: str, body: bytes | None, given_up: threading.Event
    ) -> Any:
        import httpx

        started = time.monotonic()
        attempt = 0
        while True:
            headers = {"Content-Type": "application/json", **self._authorization()}
            asked_for: float | None = None
            response: httpx.Response | None = None
            try:
                response = client.request(method, path, content=body, headers=headers)
            except httpx.TimeoutException:
                trouble = f"no reply within {self.timeout_s:g} s"
            except httpx.HTTPError as error:
                trouble = f"cannot connect ({error or type(error).__name__})"
            # Raised outside of the handlers: httpx' own errors hold the request, and with it the token.
            if response is not None:
                if response.status_code == 200:
                    return _decoded(url, response.content)
                trouble = f"HTTP {response.status_code}: {_detail(response)}"
                if response.status_code in (401, 403):
                    raise BackendError(
                        f"{url}: {trouble} (the token is read from the environment variable "
                        f"{self.token_env or '(none)'})"
                    )
                if response.status_code in _REFUSED:
                    raise ConfigError(f"{url} refuses the request: {trouble}")
                if response.status_code not in _PASSING:
                    raise BackendError(f"{url}: {trouble}: is this a server of rag-rl (rag-rl serve)?")
                asked_for = _retry_after(response)
            pause = asked_for
            if pause is None:
                pause = min(_LONGEST_PAUSE_S, self.backoff_s * 2**attempt) * self._jitter.uniform(0.75, 1.0)
            passed = time.monotonic() - started
            if passed + pause > self.wait_s:
                raise BackendError(
                    f"the retriever {url} gives no answer ({attempt + 1} request{'s' if attempt else ''} in "
                    f"{passed:.0f} s): {trouble}"
                )
            logger.log(
                logging.INFO if attempt else logging.WARNING,
                "%s: %s; asking again for up to %.0f s", url, trouble, self.wait_s - passed,
            )  # fmt: skip
            attempt += 1
            self.retries += 1
            if given_up.wait(pause):
                raise BackendError(f"{url}: given up, since another request failed")


def check_token(token: str, where: str) -> str:
    """A bearer token that a header can hold.

    Args:
        token: the token.
        where: where it was read, for the message, which does not hold it.

    Returns:
        The same.

    Raises:
        ConfigError: it is empty, or has spaces or characters other than printable ASCII.
    """
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"the token in {where} must be printable ASCII without spaces, and not empty")
    return token


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - its getter is what checks it
    except ValueError as error:
        raise ConfigError(f"retriever_url {url!r} is no address: {error}") from error
    if parts.username or parts.password:
        raise ConfigError(
            "retriever_url must not hold a name or a password: a token goes into an environment variable"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"retriever_url must look like http://127.0.0.1:8000, got {url!r}")
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server there.

    Args:
        host: a name or an address.

    Returns:
        True for loopback addresses and ``localhost``.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
        (True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _shard(url: str, client: httpx.Client, about: Any) -> _Shard:
    try:
        limits = {name: int(about["limits"][name]) for name in _LIMITS}
        return _Shard(url, client, about["passages"], about["fingerprint"], about["encoder"], limits)
    except (KeyError, TypeError, ValueError) as error:
        raise BackendError(f"{url}: this is no server of rag-rl: /health tells {_shown(about)}") from error


def _check_shards(shards: Sequence[_Shard]) -> None:
    first = shards[0]
    for place, shard in enumerate(shards):
        if shard.encoder != first.encoder:
            raise IndexMismatchError(
                f"{first.url} and {shard.url} have different encoders, so that their scores cannot be merged"
            )
        for other in shards[:place]:
            if shard.fingerprint is not None and shard.fingerprint == other.fingerprint:
                raise IndexMismatchError(
                    f"{other.url} and {shard.url} serve the same index, so that every hit would come twice: "
                    "several addresses are shards; copies belong behind a load balancer"
                )


def _bodies(
    shard: _Shard, queries: Sequence[str | Query], exclude: Sequence[Collection[str]] | None, top_k: int
) -> Iterator[tuple[int, int, bytes]]:
    """Requests that the server takes: first query, number of queries, body."""
    tail = f'],"top_k":{top_k}'
    room = shard.limits["body_bytes"] - len(f'{{"queries":[{tail},"exclude":[]}}')
    texts: list[str] = []
    ids: list[str] = []
    first = size = 0
    for place, query in enumerate(queries):
        text = _written(query, shard)
        without = "[]" if exclude is None else json.dumps(sorted(set(exclude[place])))
        if exclude is not None and len(exclude[place]) > shard.limits["exclude"]:
            raise ConfigError(
                f"{shard.url} takes at most {shard.limits['exclude']} excluded ids a query, got {len(exclude[place])}"
            )
        more = len(text) + len(without) + 2
        if more > room:
            raise ConfigError(f"{shard.url} takes at most {shard.limits['body_bytes']} bytes, one query has {more}")
        if texts and (size + more > room or len(texts) == shard.limits["queries"]):
            yield first, len(texts), _body(texts, ids, tail, exclude is not None)
            texts, ids, first, size = [], [], place, 0
        texts.append(text)
        ids.append(without)
        size += more
    yield first, len(texts), _body(texts, ids, tail, exclude is not None)


def _body(texts: Sequence[str], ids: Sequence[str], tail: str, excluding: bool) -> bytes:
    excluded = f',"exclude":[{",".join(ids)}]' if excluding else ""
    return f'{{"queries":[{",".join(texts)}{tail}{excluded}}}'.encode("ascii")


def _written(query: str | Query, shard: _Shard) -> str:
    asked = query if isinstance(query, Query) else Query(query)
    others = len(asked.question) + sum(len(one) + len(two) for one, two in asked.history)
    room = shard.limits["query_chars"] - others
    if room < 0:
        raise ConfigError(
            f"{shard.url} takes at most {shard.limits['query_chars']} characters a query: "
            f"the question and the hops before it have {others}"
        )
    text = asked.text
    if len(text) > room:
        _warn_of_cuts(shard.url, shard.limits["query_chars"])
        text = text[:room]
    if not asked.question and not asked.history:
        return json.dumps(text)
    return json.dumps({"text": text, "question": asked.question, "history": asked.history})


@functools.cache  # once
def _warn_of_cuts(url: str, most: int) -> None:
    logger.warning("%s takes %d characters a query: longer ones are cut at their end", url, most)


def _decoded(url: str, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise BackendError(f"{url}: this is no server of rag-rl: it answers with no JSON ({error})") from error


def _hits(row: Any) -> list[Hit]:
    hits = []
    for rank, one in enumerate(row, start=1):
        passage, score = one["passage"], float(one["score"])
        if not math.isfinite(score):
            raise ValueError("a score is not finite")
        hits.append(Hit(Passage(passage["doc_id"], passage["text"], passage["title"], passage["chunk"]), score, rank))
    return hits


def _merged(lists: Sequence[Sequence[Hit]], top_k: int) -> list[Hit]:
    # The sort is stable: equal scores stay in the order of the addresses and of their ranks.
    best = sorted((hit for hits in lists for hit in hits), key=lambda hit: -hit.score)[:top_k]
    for rank, hit in enumerate(best, start=1):
        hit.rank = rank
    return best


def _detail(response: httpx.Response) -> str:
    try:
        told = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        told = response.text
    return _shown(told)


def _shown(told: Any) -> str:
    text = " ".join((told if isinstance(told, str) else json.dumps(told)).split())
    return text if len(text) <= 200 else text[:197] + "..."


def _retry_after(response: httpx.Response) -> float | None:
    told = response.headers.get("Retry-After", "")
    return float(told) if told.isdigit() and len(told) < 6 else None
