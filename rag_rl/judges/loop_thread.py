"""One event loop in a thread of its own, so that asynchronous code can be awaited from any loop, or from none."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")

_open: weakref.WeakSet[LoopThread] = weakref.WeakSet()


class LoopThread:
    """A daemon thread with an event loop, started when first needed and ended with the interpreter at the latest.

    Clients and semaphores belong to the loop that they were first used in. A caller whose loops come and go, or that
    asks from several at once, hands its work in here.

    Args:
        name: of the thread.
        closing: awaited in the loop before it ends, to close what lives there.
    """

    def __init__(self, name: str, closing: Callable[[], Awaitable[object]] | None = None) -> None:
        self._name = name
        self._closing = closing
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker: threading.Thread | None = None
        self._stop_when_lost: weakref.finalize[[asyncio.AbstractEventLoop], LoopThread] | None = None

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        """Starts a coroutine in the loop.

        Args:
            coroutine: what to run.

        Returns:
            Its result to come; cancelling it cancels the coroutine. ``asyncio.wrap_future`` makes it awaitable.
        """
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                # The thread must not hold this object: nobody could lose it then, and the thread would never end.
                self._worker = threading.Thread(
                    target=_serve, args=(self._loop, self._closing), name=self._name, daemon=True
                )
                self._worker.start()
                # Garbage is collected in any thread at any moment, so that path only asks the loop to stop.
                self._stop_when_lost = weakref.finalize(self, _stop, self._loop)
                self._stop_when_lost.atexit = False
                _open.add(self)
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Cancels what is still running, closes what lives in the loop and ends the thread; may be called again.

        The next ``submit`` starts anew.
        """
        with self._lock:
            loop, worker, self._loop, self._worker = self._loop, self._worker, None, None
            if self._stop_when_lost is not None:
                self._stop_when_lost.detach()
        if loop is None or worker is None:
            return
        _stop(loop)
        if worker is not threading.current_thread():
            worker.join()


def _serve(loop: asyncio.AbstractEventLoop, closing: Callable[[], Awaitable[object]] | None) -> None:
    try:
        loop.run_forever()
    finally:
        try:
            loop.run_until_complete(_wind_up(closing))
        finally:
            loop.close()


async def _wind_up(closing: Callable[[], Awaitable[object]] | None) -> None:
    rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    if closing is not None:
        await closing()
    await asyncio.get_running_loop().shutdown_asyncgens()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)


@atexit.register
def _close_all() -> None:
    # A daemon thread is frozen where it stands when the interpreter ends: connections and tasks would be torn down
    # in no order, with warnings.
    for thread in list(_open):
        thread.close()
