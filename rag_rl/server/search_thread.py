"""A retriever in a thread of its own, searched there in batches for all who wait."""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from rag_rl.errors import BackendError
from rag_rl.types import Hit, Query, Retriever

# A probe is a search like any other: often enough to notice, too seldom to cost anything.
_PROBE_EVERY_S = 5.0
_PROBE_PATIENCE_S = 30.0
_PROBE_TOP_K = 3


@dataclass(frozen=True)
class About:
    """What a retriever that is open says of itself.

    Attributes:
        passages: how many it holds, None where it cannot tell.
        fingerprint: of index and encoder (of a plain index: what its manifest says), None where it has none.
        encoder: of what makes its scores: the encoders of documents and queries, and what reorders the hits; None
            where it cannot tell. Only scores of the same can be merged.
    """

    passages: int | None
    fingerprint: str | None
    encoder: str | None


@dataclass
class _Waiting:
    """A request in the queue."""

    queries: Sequence[str | Query]
    top_k: int
    exclude: Sequence[Collection[str]] | None
    write: Callable[[list[list[Hit]]], bytes]
    reply: asyncio.Future[bytes]


class SearchThread:
    """Opens a retriever in a thread of its own and searches it there for all who ask.

    Requests that wait at the same time and want equally many hits are searched in one call, and each gets the part of
    the result that is its own. Where such a call fails for another reason than the backend, each is searched alone, so
    that no request fails for another's sake.

    Args:
        open_retriever: gives the retriever; may take minutes.
        max_batch: queries after which no further request joins a call.

    Attributes:
        about: of the retriever; None until it is open and has answered its probe.
        failure: why it could not be opened.
        batches: calls of the retriever so far, probes included.
    """

    def __init__(self, open_retriever: Callable[[], Retriever], *, max_batch: int = 1024) -> None:
        self._open = open_retriever
        self._max_batch = max_batch
        self.about: About | None = None
        self.failure: BaseException | None = None
        self.batches = 0
        self._probe: tuple[str, list[float]] = ("", [])
        self._trouble = ""  # of the last call, "" where it was sound
        self._probed = -math.inf
        self._changed = threading.Condition()
        self._queue: deque[_Waiting] = deque()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self, opened: Callable[[], object]) -> None:
        """Starts the thread; called in the event loop that will ask.

        Args:
            opened: called in that loop when the retriever is open, or could not be opened.
        """
        self._loop = asyncio.get_running_loop()
        self._checking = asyncio.Lock()
        # A daemon: a search that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, args=(opened,), name="search", daemon=True)
        self._thread.start()

    def submit(
        self,
        queries: Sequence[str | Query],
        top_k: int,
        exclude: Sequence[Collection[str]] | None,
        write: Callable[[list[list[Hit]]], bytes],
    ) -> asyncio.Future[bytes]:
        """Queues a search; called in the event loop.

        Args:
            queries: B queries.
            top_k: hits a query.
            exclude: B collections of document ids that must not be returned.
            write: makes the reply of the B lists of hits; runs in the thread, so that the loop is free.

        Returns:
            What ``write`` returned, or the error, to come.
        """
        waiting = _Waiting(queries, top_k, exclude, write, self._loop.create_future())
        with self._changed:
            self._queue.append(waiting)
            self._changed.notify()
        return waiting.reply

    async def check(self) -> str:
        """Asks the probe query again, unless that was done in the last seconds.

        Returns:
            What is wrong, "" where nothing is.
        """
        if self.about is None:
            return f"cannot be opened: {one_line(self.failure)}" if self.failure else "loading"
        async with self._checking:
            if not self._trouble and time.monotonic() - self._probed < _PROBE_EVERY_S:
                return ""
            text, scores = self._probe
            try:
                await asyncio.wait_for(
                    self.submit([text], max(1, len(scores)), None, self._compare), _PROBE_PATIENCE_S
                )
            except asyncio.TimeoutError:
                return f"a search does not come back within {_PROBE_PATIENCE_S:g} s"
            except Exception as error:  # whatever it is, the answer is "not healthy"
                return one_line(error)
            return ""

    def stop(self, patience_s: float = 60.0) -> None:
        """Ends the thread when it has answered what waits, and closes the retriever.

        Args:
            patience_s: how long that may take, in seconds; a retriever that is still being opened is not waited for.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None and self.about is not None:
            self._thread.join(patience_s)

    def _run(self, opened: Callable[[], object]) -> None:
        try:
            self._retriever = self._open()
            text, top_k, about = _describe(self._retriever)
            self.batches += 1
            (hits,) = self._retriever.search([text], top_k=top_k)
            self._probe = text, [float(hit.score) for hit in hits]
            self._probed = time.monotonic()
            self.about = about
        except Exception as error:  # the edge of a thread: the process reports it
            self.failure = error
        self._tell(opened)
        while self.about is not None and (batch := self._next()):
            done = self._answered(batch)
            self._tell(partial(_deliver, done))
        if self.about is not None and hasattr(self._retriever, "close"):
            self._retriever.close()

    def _tell(self, call: Callable[[], object]) -> None:
        # Closed: the process was forced to end, and nobody waits any more.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)

    def _next(self) -> list[_Waiting]:
        """What is searched together next; empty at the end."""
        with self._changed:
            while not self._queue and not self._stopping:
                self._changed.wait()
            batch: list[_Waiting] = []
            rest: deque[_Waiting] = deque()
            count = 0
            for waiting in self._queue:
                # An approximate index or a reranker may give other hits for another k, so k is never raised and cut.
                alike = not batch or (waiting.top_k, waiting.exclude is None) == (
                    batch[0].top_k, batch[0].exclude is None,
                )  # fmt: skip
                if alike and (not batch or count + len(waiting.queries) <= self._max_batch):
                    batch.append(waiting)
                    count += len(waiting.queries)
                else:
                    rest.append(waiting)
            self._queue = rest
            return batch

    def _answered(self, batch: Sequence[_Waiting]) -> list[tuple[_Waiting, bytes | Exception]]:
        queries = [query for waiting in batch for query in waiting.queries]
        exclude = None
        if batch[0].exclude is not None:
            exclude = [ids for waiting in batch for ids in waiting.exclude or ()]
        try:
            self.batches += 1
            found = self._retriever.search(queries, top_k=batch[0].top_k, exclude=exclude)
            if len(found) != len(queries):
                raise BackendError(f"the retriever gave {len(found)} lists of hits for {len(queries)} queries")
        except BackendError as error:
            self._trouble = one_line(error)
            return [(waiting, error) for waiting in batch]
        except Exception as error:  # the edge of a thread: whoever asked reports it
            if len(batch) > 1:
                return [done for waiting in batch for done in self._answered([waiting])]
            return [(batch[0], error)]
        self._trouble = ""
        done: list[tuple[_Waiting, bytes | Exception]] = []
        first = 0
        for waiting in batch:
            end = first + len(waiting.queries)
            try:
                done.append((waiting, waiting.write(found[first:end])))
            except Exception as error:  # as above
                done.append((waiting, error))
            first = end
        return done

    def _compare(self, found: list[list[Hit]]) -> bytes:
        scores = [float(hit.score) for hit in found[0]]
        expected = self._probe[1]
        tolerance = 1e-3 * max([1.0, *map(abs, expected)])
        sound = len(scores) == len(expected) and all(
            abs(here - there) <= tolerance for here, there in zip(scores, expected, strict=True)
        )
        if not sound:
            raise BackendError("the probe query is answered otherwise than when the retriever was opened")
        self._probed = time.monotonic()
        return b""


def _deliver(done: Sequence[tuple[_Waiting, bytes | Exception]]) -> None:
    for waiting, outcome in done:
        if waiting.reply.done():  # cancelled: nobody waits any more
            continue
        if isinstance(outcome, Exception):
            waiting.reply.set_exception(outcome)
        else:
            waiting.reply.set_result(outcome)


def _describe(retriever: Retriever) -> tuple[str, int, About]:
    """A query to probe with, how many hits it should ask for, and what the retriever says of itself."""
    inner: Any = retriever
    wrappers = []
    # A reranker or another wrapper: what it is made over holds the index.
    while not hasattr(inner, "manifest") and hasattr(inner, "retriever"):
        wrappers.append(type(inner).__name__)
        inner = inner.retriever
    passages = len(inner) if hasattr(inner, "__len__") else None
    manifest = getattr(inner, "manifest", None)
    text, encoder = "probe", None
    if manifest is not None:
        text, encoder = manifest.probes[0].text, manifest.encoder
        asking = getattr(inner.encoder, "query_fingerprint", None) or inner.encoder.fingerprint
        if wrappers or asking != encoder:
            encoder = hashlib.sha256("\n".join([encoder, asking, *wrappers]).encode()).hexdigest()
    about = About(passages, getattr(retriever, "fingerprint", None), encoder)
    return text, min(_PROBE_TOP_K, passages or _PROBE_TOP_K), about


def one_line(told: object) -> str:
    """An error, or anything else, for a message.

    Args:
        told: what has a text.

    Returns:
        The text on one line, cut to 300 characters; of an error without a text its kind.

    Example:
        >>> one_line(ValueError("a" + chr(10) + "b")), one_line(KeyboardInterrupt())
        ('a b', 'KeyboardInterrupt')
    """
    text = " ".join(str(told).split()) or type(told).__name__
    return text if len(text) <= 300 else text[:297] + "..."
