from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from rag_rl.judges.loop_thread import LoopThread


async def where():
    await asyncio.sleep(0)
    return threading.current_thread()


def ended(worker, patience_s=5.0):
    end = time.monotonic() + patience_s
    while worker.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    return not worker.is_alive()


def test_all_work_runs_in_one_thread_of_its_own():
    thread = LoopThread("counted")
    workers = {thread.submit(where()).result(5.0) for _ in range(3)}

    async def elsewhere():
        return await asyncio.wrap_future(thread.submit(where()))

    workers |= {asyncio.run(elsewhere()), asyncio.run(elsewhere())}
    (worker,) = workers
    assert worker is not threading.current_thread()
    assert (worker.name, worker.daemon) == ("counted", True)
    thread.close()
    assert not worker.is_alive()


def test_an_exception_comes_back():
    thread = LoopThread("failing")

    async def fail():
        raise ValueError("so")

    with pytest.raises(ValueError, match="so"):
        thread.submit(fail()).result(5.0)
    thread.close()


def test_closing_cancels_closes_and_may_be_repeated():
    seen = []

    async def closing():
        seen.append("closed")

    async def endless():
        try:
            await asyncio.sleep(3600.0)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    thread = LoopThread("closing", closing)
    future = thread.submit(endless())
    thread.submit(where()).result(5.0)  # by now the other one has begun
    thread.close()
    thread.close()
    assert seen == ["cancelled", "closed"]
    assert future.cancelled()
    assert thread.submit(where()).result(5.0).is_alive(), "a closed thread starts anew"
    thread.close()
    assert seen == ["cancelled", "closed", "closed"]


def test_cancelling_the_waiting_cancels_the_work():
    cancelled = threading.Event()

    async def endless():
        try:
            await asyncio.sleep(3600.0)
        finally:
            cancelled.set()

    thread = LoopThread("cancelled")

    async def impatient():
        await asyncio.wait_for(asyncio.wrap_future(thread.submit(endless())), 0.05)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(impatient())
    assert cancelled.wait(5.0)
    thread.close()


def test_a_thread_that_nobody_holds_ends():
    thread = LoopThread("lost")
    worker = thread.submit(where()).result(5.0)
    del thread
    gc.collect()
    assert ended(worker)


@pytest.mark.parametrize("busy", ["", "thread.submit(endless())"])
def test_the_interpreter_ends_without_a_word(busy):
    program = f"""
    import asyncio, sys
    from rag_rl.judges.loop_thread import LoopThread

    async def endless():
        await asyncio.sleep(3600)

    async def closing():
        print("closed")

    thread = LoopThread("left open", closing)
    thread.submit(asyncio.sleep(0)).result()
    {busy}
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")
