"""Load on ``rag-rl serve``, every reply checked against a direct search, next to what that search takes in-process.

    python benchmarks/serve.py [--seconds 60] [--clients 64] [--queries 8] [--top_k 5] [--index DIR [--encoder MODEL]]

A server is started in a process of its own over an index (by default one of the tiny world, with its encoder). Each of
the clients sends one request after the other on a connection that it keeps: batches of ``--queries`` queries, drawn
from a pool whose hits a direct search has found before. A reply is wrong where a score is off by more than 1e-4 or
another passage stands in a place (of two whose scores are that near, either may come first: a text in a larger batch
is padded, which moves its vector in the seventh digit).

Printed are errors and wrong replies (neither may occur), throughput, latency at the client, and the same batches
searched one after the other in this process, alone and, for comparison with a server that gathers what waits, 64 at
a time, before and after the load. Wall time says little where other work or the clients themselves share the cores, so
that the processor time of a query is printed as well: of the server alone, and of the search in-process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

from rag_rl.config.arguments import DataArguments, RetrieverArguments
from rag_rl.config.parts import build_corpus, build_encoder
from rag_rl.retrieval import build_index
from rag_rl.server import open_folder
from rag_rl.tiny import FOLDER
from rag_rl.types import Hit, Retriever

BATCHES = 512
TOLERANCE = 1e-4


def make_index(folder: Path) -> None:
    """An index of the tiny world."""
    encoder = build_encoder(RetrieverArguments(retriever_encoder="${tiny}/encoder"))
    build_index(build_corpus(DataArguments(data_corpus="${tiny}/data/corpus.jsonl")), encoder, folder, progress=False)


def make_batches(size: int) -> list[list[str]]:
    """Questions of the tiny world, drawn at random."""
    lines = [line for path in sorted((FOLDER / "data").glob("*hop.jsonl")) for line in path.read_text().splitlines()]
    questions = [json.loads(line)["question"] for line in lines]
    draw = random.Random(0)
    return [draw.choices(questions, k=size) for _ in range(BATCHES)]


def in_process(
    retriever: Retriever, batches: Sequence[list[str]], top_k: int
) -> tuple[list[list[list[Hit]]], list[float], float]:
    """Hits of each batch, the seconds that each took, and the processor seconds of all."""
    found, seconds = [], []
    cpu = time.process_time()
    for batch in batches:
        start = time.perf_counter()
        found.append(retriever.search(batch, top_k=top_k))
        seconds.append(time.perf_counter() - start)
    return found, seconds, time.process_time() - cpu


def agrees(served: list[dict], direct: Sequence[Hit]) -> bool:
    """Whether one query's hits are those of the direct search, but for the order of near ties."""
    if len(served) != len(direct):
        return False
    known = {(hit.passage.doc_id, hit.passage.chunk): hit for hit in direct}
    last = direct[-1].score
    for here, there in zip(served, direct, strict=True):
        if abs(here["score"] - there.score) > TOLERANCE:
            return False
        hit = known.get((here["passage"]["doc_id"], here["passage"]["chunk"]))
        # One that the direct search has not shown can only be a near tie of its last one.
        if abs((hit.score if hit else last) - here["score"]) > TOLERANCE:
            return False
        if hit and hit.passage.text != here["passage"]["text"]:
            return False
    return True


class Load:
    """Clients that ask until the time is over.

    Args:
        port: of the server.
        batches: what they ask.
        direct: what the replies must be.
        top_k: hits a query.
    """

    def __init__(self, port: int, batches: Sequence[list[str]], direct: Sequence[list[list[Hit]]], top_k: int) -> None:
        self.port, self.direct = port, direct
        self.requests = []
        for batch in batches:
            body = json.dumps({"queries": batch, "top_k": top_k}).encode()
            head = f"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
            self.requests.append(head.encode() + body)
        self.checked: list[set[bytes]] = [set() for _ in batches]  # parsing every reply would be most of the load
        self.outcomes: Counter[str] = Counter()
        self.latencies: list[float] = []

    async def run(self, clients: int, seconds: float) -> float:
        """Asks; returns the seconds that it took."""
        start = time.perf_counter()
        await asyncio.gather(*(self._client(number, start + seconds) for number in range(clients)))
        return time.perf_counter() - start

    async def _client(self, number: int, end: float) -> None:
        draw = random.Random(number)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        while time.perf_counter() < end:
            place = draw.randrange(len(self.requests))
            start = time.perf_counter()
            try:
                writer.write(self.requests[place])
                head = await reader.readuntil(b"\r\n\r\n")
                size = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(size.group(1)) if size else 0)
            except (OSError, asyncio.IncompleteReadError) as error:
                self.outcomes[f"error: {error!r}"] += 1
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                continue
            self.latencies.append(time.perf_counter() - start)
            self._check(place, int(head[9:12]), body)
        writer.close()

    def _check(self, place: int, status: int, body: bytes) -> None:
        if status != 200:
            self.outcomes[f"error: HTTP {status}"] += 1
            return
        if body not in self.checked[place]:
            results = json.loads(body)["results"]
            direct = self.direct[place]
            if len(results) != len(direct) or not all(map(agrees, results, direct)):
                self.outcomes["wrong"] += 1
                return
            self.checked[place].add(body)
        self.outcomes["right"] += 1


def line(name: str, queries: int, seconds: float, cpu: float, latencies: Sequence[float]) -> None:
    """Prints one row."""
    p50, p99 = (1000 * float(np.quantile(latencies, q)) for q in (0.5, 0.99))
    print(
        f"{name:<40}{queries / seconds:9.0f} queries/s   p50 {p50:7.1f} ms   p99 {p99:7.1f} ms"
        f"   {1000 * cpu / queries:.3f} ms of processor a query",
        flush=True,
    )


def main() -> int:
    """Runs it; 1 after an error or a wrong reply."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--queries", type=int, default=8, help="a request")
    parser.add_argument("--top_k", type=int, default=5)
    parser.add_argument("--index", type=Path, help="an index folder; by default one of the tiny world is made")
    parser.add_argument("--encoder", help="with --index: where its encoder lies now")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        index = args.index or Path(folder) / "index"
        if args.index is None:
            make_index(index)
        retriever = open_folder(index, encoder=args.encoder)
        batches = make_batches(args.queries)
        in_process(retriever, batches[:20], args.top_k)  # warm
        direct, alone, cpu_alone = in_process(retriever, batches, args.top_k)
        merged = [
            [query for batch in batches[first : first + args.clients] for query in batch]
            for first in range(0, BATCHES, args.clients)
        ]
        _, together, cpu_together = in_process(retriever, merged, args.top_k)

        command = [sys.executable, "-m", "rag_rl.cli", "serve", "--index", str(index), "--port", "0"]
        command += ["--encoder", args.encoder] if args.encoder else []
        env = {name: value for name, value in os.environ.items() if name != "RAG_RL_RETRIEVER_TOKEN"}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as server:
            port, seen = 0, []
            for text in server.stderr or ():
                seen.append(text)
                if found := re.search(r"listening on http://127.0.0.1:(\d+)", text):
                    port = int(found.group(1))
                if "ready: " in text:
                    break
            else:
                print("".join(seen), file=sys.stderr)
                return 1
            load = Load(port, batches, direct, args.top_k)
            asyncio.run(load.run(4, 1.0))  # warm
            load.outcomes.clear()
            load.latencies.clear()
            process = psutil.Process(server.pid)
            before = process.cpu_times()
            seconds = asyncio.run(load.run(args.clients, args.seconds))
            after = process.cpu_times()
            cpu_served = after.user + after.system - before.user - before.system
            server.terminate()
            stopped = (server.stderr.read() if server.stderr else "").strip().splitlines()[-1:]

        # Once more, since other work on the machine comes and goes.
        _, again, cpu_again = in_process(retriever, batches, args.top_k)
        _, again_together, cpu_again_together = in_process(retriever, merged, args.top_k)

    errors = {name: count for name, count in load.outcomes.items() if name.startswith("error")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{args.clients} clients, {args.queries} queries a request, k = {args.top_k}, {seconds:.0f} s, {cores} cores"
    )
    print(f"replies {sum(load.outcomes.values())}, errors {sum(errors.values())}, wrong {load.outcomes['wrong']}")
    for name, count in errors.items():
        print(f"  {name}: {count}")
    queries = len(load.latencies) * args.queries
    alone, cpu_alone = alone + again, cpu_alone + cpu_again
    together, cpu_together = together + again_together, cpu_together + cpu_again_together
    asked = 2 * BATCHES * args.queries
    line("served", queries, seconds, cpu_served, load.latencies)
    line("in-process, one batch after the other", asked, sum(alone), cpu_alone, alone)
    line(f"in-process, {args.clients} batches in one search", asked, sum(together), cpu_together, together)
    for name, wall, cpu in (("one by one", sum(alone), cpu_alone), ("gathered", sum(together), cpu_together)):
        print(
            f"served / in-process {name}: throughput {queries / seconds * wall / asked:.2f}, "
            f"processor time a query {cpu_served / queries * asked / cpu:.2f}"
        )
    print(*stopped, sep="\n")
    return 1 if errors or load.outcomes["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
