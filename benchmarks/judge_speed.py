"""What the judge costs on top of the openai client: a ratio, both sides timed in one run.

Both sides put the same cases to the same server, which takes 50 ms for each, with at most 32 at once. The bare side is
an ``AsyncOpenAI`` client, a semaphore and ``json.loads``. Ours is ``LLMJudge`` with everything on: an empty cache, a
budget and a log on disk, repeats, and the loop in a thread of its own. Clients are made and connections opened before
the clock starts. Runs are interleaved in pairs (ours, bare, bare, ours, ...); the ratio is the median over the pairs,
with a bootstrap interval. Bound: 1.3 (holds where the interval's lower end is within it).

    python benchmarks/judge_speed.py [--pairs 9] [--cases 512] [--latency_ms 50] [--concurrency 32]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rag_rl.judges import Budget, LLMJudge, OpenAIChat, VerdictCache, VerdictLog
from rag_rl.types import JudgeCase, Verdict

BOUND = 1.3
REPLY = json.dumps({"score": 1.0, "reason": "It is the same."})


def serve(latency_s: float) -> None:
    """Answers every chat completion with ``REPLY`` after ``latency_s``; prints its port."""
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": REPLY}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
    }
    payload = json.dumps(body).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n".encode()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                return
            length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
            await reader.readexactly(length)
            await asyncio.sleep(latency_s)
            writer.write(head + payload)

    async def forever() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0, backlog=512)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(forever())


class OneScore:
    """The least that a rubric can be."""

    name = "one_score"
    version = "1"

    def group(self, cases: Sequence[JudgeCase]) -> list[list[int]]:
        """Each case alone."""
        return [[i] for i in range(len(cases))]

    def prompt(self, cases: Sequence[JudgeCase]) -> str:
        """Question and answer."""
        return prompt_of(cases[0])

    def parse(self, reply: str, cases: Sequence[JudgeCase]) -> list[Verdict]:
        """The score."""
        return [Verdict(json.loads(reply)["score"])]


def prompt_of(case: JudgeCase) -> str:
    """What both sides send."""
    return f"Judge the answer.\nQuestion: {case.question}\nGiven answer: {case.answer}"


async def time_bare(url: str, cases: Sequence[JudgeCase], concurrency: int) -> float:
    """Seconds of the plain client."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(api_key="EMPTY", base_url=url)
    slots = asyncio.Semaphore(concurrency)

    async def one(case: JudgeCase) -> float:
        async with slots:
            reply = await client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": prompt_of(case)}],
                temperature=0.0,
                max_tokens=1024,
            )
            return float(json.loads(reply.choices[0].message.content or "")["score"])

    async def all_of(some: Sequence[JudgeCase]) -> list[float]:
        return await asyncio.gather(*(one(case) for case in some))

    await all_of(warm_up(concurrency))
    started = time.perf_counter()
    scores = await all_of(cases)
    seconds = time.perf_counter() - started
    await client.close()
    assert scores == [1.0] * len(cases)
    return seconds


async def time_ours(url: str, cases: Sequence[JudgeCase], concurrency: int) -> float:
    """Seconds of the judge."""
    with tempfile.TemporaryDirectory() as folder:
        judge = LLMJudge(
            OpenAIChat("m", base_url=url),
            OneScore(),
            concurrency=concurrency,
            cache=VerdictCache(Path(folder) / "verdicts.sqlite3"),
            budget=Budget(max_calls=100_000, path=Path(folder) / "budget.sqlite3"),
            log=VerdictLog(Path(folder) / "verdicts.jsonl"),
        )
        await judge.judge(warm_up(concurrency))
        started = time.perf_counter()
        verdicts = await judge.judge(cases)
        seconds = time.perf_counter() - started
        judge.close()
    assert [verdict.score for verdict in verdicts] == [1.0] * len(cases)
    return seconds


def warm_up(count: int) -> list[JudgeCase]:
    """As many cases as there shall be connections, unlike those that are timed."""
    return [JudgeCase("Warm?", str(i)) for i in range(count)]


def main() -> None:
    """Prints the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--cases", type=int, default=512)
    parser.add_argument("--latency_ms", type=float, default=50.0)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.latency_ms / 1000.0)
        return
    cases = [JudgeCase(f"Which river flows through town {i}?", f"Mira {i}") for i in range(args.cases)]
    command = [sys.executable, __file__, "--serve", "--latency_ms", str(args.latency_ms)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        sides = {"ours": time_ours, "bare": time_bare}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(args.pairs):
            for name in sides if i % 2 == 0 else reversed(sides):
                seconds[name].append(asyncio.run(sides[name](url, cases, args.concurrency)))
            print(f"pair {i + 1}: ours / bare {seconds['ours'][-1] / seconds['bare'][-1]:.3f}", file=sys.stderr)
    finally:
        server.terminate()
        server.wait()
    ratios = np.array(seconds["ours"]) / np.array(seconds["bare"])
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, size=(10_000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    verdict = "OK" if low <= BOUND else "MISS"
    print(f"judge / bare AsyncOpenAI: {np.median(ratios):.3f} [{low:.3f}, {high:.3f}] bound {BOUND} {verdict}")
    least = args.cases / args.concurrency * args.latency_ms / 1000.0
    shown = ", ".join(f"{name} {np.median(some):.2f}" for name, some in seconds.items())
    print(f"median seconds: {shown}; waiting for the server alone is {least:.2f}")


if __name__ == "__main__":
    main()
