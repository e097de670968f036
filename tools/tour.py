"""The whole pipeline on the tiny world: train every part for a moment, then ask all assemblies the same questions.

    make tour                          the same as python tools/tour.py
    python tools/tour.py --dry_run     print the command lines and stop

Everything goes to runs/tour below the current folder. Each step is a command line of its own, printed before it runs,
and the next one builds on what it left. A finished step is not run again: a stopped tour goes on where it was, and a
step whose folder was deleted is run anew (delete the folders of those after it, too).

The parts are trained on one world of ``rag_rl.tiny`` and scored on 1,050 questions about another one that shares no
entity with it: 350 questions over one hop, 350 as two keywords, 350 over two hops, no two of them alike. Both worlds
are drawn here, and the passages of both are searched. What a training shows of itself on the way is measured on more
questions about the second world.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_rl.evaluation.comparison import Comparison
    from rag_rl.types import Question

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("runs/tour")
# The packaged held-out world was looked at while settings were chosen; this one has other facts.
WORLD_SEED = 2027
N_SCORED, N_DEV = 350, 50  # of each kind
# Of a small world a retriever learns the names by heart, and finds less in another one.
TIMES, TRAINED = 4, 1_500
ONE_HOP, KEYWORDS, TWO_HOPS = KINDS = ("one hop", "keywords", "two hops")
ENCODER, READER = "${tiny}/encoder", "${tiny}/reader"
DEFAULT_PORT = 8421  # which the configs name
# What the issue asks of the tour.
LEAST_GAIN, MOST_HARM = 0.25, -0.02
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Step:
    """One command of the tour.

    Attributes:
        name: of its row in the table of times.
        what: in a line.
        command: ``python`` or ``rag-rl``, then what follows it.
        done: the file that is there when it has finished.
        served: whether it searches the trained retriever's server.
        seed: of a training; None for what has none.
    """

    name: str
    what: str
    command: tuple[str, ...]
    done: Path
    served: bool = False
    seed: int | None = None

    @property
    def shown(self) -> str:
        """The command as one would type it."""
        return shlex.join(self.command)

    def finished(self) -> bool:
        """Whether there is nothing left to do.

        Returns:
            False as well where a run was begun and stopped.

        Raises:
            SystemExit: the folder holds a training with another seed.
        """
        if not self.done.is_file():
            return False
        if self.done.name != "metrics.json":
            return True
        summary = json.loads(self.done.read_text(encoding="utf-8"))
        if self.seed is not None and summary.get("seed") != self.seed:
            raise SystemExit(
                f"tour: {self.done.parent} was trained with seed {summary.get('seed')}, not {self.seed}: start the "
                "tour in another folder, or remove runs/tour"
            )
        return bool(summary.get("status") == "complete")


@dataclass(frozen=True, slots=True)
class Rung:
    """An assembly of the comparison.

    Attributes:
        name: as the comparison shows it.
        folder: of its evaluation, below ``assemblies``.
        part: the step that trained what is new in it; None where nothing is trained.
        flags: the parts, for ``evaluate_rag``.
    """

    name: str
    folder: str
    part: str | None
    flags: tuple[str, ...]


def rungs() -> list[Rung]:
    """The assemblies, each with one trained part more than the one before it.

    Returns:
        From nothing trained to everything trained; the last two have a reasoner in the generator's place.
    """
    run = {name: (FOLDER / name).as_posix() for name in ("retriever", "reranker", "augmenter", "generator")}
    chain = {name: (FOLDER / name).as_posix() for name in ("reasoner_sft", "reasoner")}
    plain, reader = ("--retriever_encoder", ENCODER), ("--generator_model", READER)
    trained = ("--retriever_run", run["retriever"])
    reranked = (*trained, "--retriever_reranker", run["reranker"])
    augmented = (*reranked, "--augmenter_model", run["augmenter"])
    return [
        Rung("untrained", "untrained", None, (*plain, *reader)),
        Rung("+ retriever", "retriever", "retriever", (*trained, *reader)),
        Rung("+ reranker", "reranker", "reranker", (*reranked, *reader)),
        Rung("+ augmenter", "augmenter", "augmenter", (*augmented, *reader)),
        Rung("+ generator", "generator", "generator", (*augmented, "--generator_model", run["generator"])),
        Rung("reasoner, SFT", "reasoner_sft", "reasoner_sft", (*augmented, "--reasoner_model", chain["reasoner_sft"])),
        Rung("reasoner, PPO", "reasoner", "reasoner", ()),  # the config tour_full
    ]


UNTRAINED_REASONER = Rung(
    "untrained, as a reasoner",
    "untrained_reasoner",
    None,
    ("--retriever_encoder", ENCODER, "--reasoner_model", READER),
)


def steps(seed: int, port: int) -> list[Step]:
    """All commands, in order.

    Args:
        seed: of every training.
        port: where the trained retriever is served.

    Returns:
        The steps.
    """
    served = ("--retriever_url", f"http://127.0.0.1:{port}")
    trainings = [
        ("retriever", "grpo_retriever", "the retriever: HARR, from whether every hop was found", False),
        ("reranker", "train_reranker", "the reranker, on what the trained retriever finds", True),
        ("augmenter", "dpo_augmenter", "the query augmenter, by DPO from the retriever's preferences", False),
        ("generator", "grpo_generator", "the generator: GRPO, over trained retriever and reranker", True),
        ("reasoner_sft", "sft_reasoner", "the reasoner's cold start, from the trained generator", True),
        ("reasoner", "ppo_reasoner", "the reasoner: PPO, from its cold start", True),
    ]
    command: tuple[str, ...]
    flags: tuple[str, ...]
    found = [
        Step(
            "data",
            "questions and documents of two worlds that share no name",
            ("python", _shown(Path(__file__)), "--write_data"),
            FOLDER / "data" / "heldout.jsonl",
        ),
        Step(
            "index",
            "the index",
            ("python", _recipe("build_index"), "--config", "tour"),
            FOLDER / "index" / "manifest.json",
        ),
    ]
    for name, recipe, what, is_served in trainings:
        flags = ("--config", "tour", "--seed", str(seed), "--resume_from_checkpoint", "true")
        command = ("python", _recipe(recipe), *flags, *(served if is_served else ()))
        found.append(Step(name, what, command, FOLDER / name / "metrics.json", is_served, seed))
    for rung in (*rungs(), UNTRAINED_REASONER):
        folder = FOLDER / "assemblies" / rung.folder
        flags = ("--config", "tour", "--output_dir", folder.as_posix(), *rung.flags)
        command = ("python", _recipe("evaluate_rag"), *(flags if rung.flags else ("--config", "tour_full")))
        found.append(Step(f"score: {rung.name}", f"scores: {rung.name}", command, folder / "metrics.json"))
    page = FOLDER / "comparison.html"
    sides = [f"{rung.name}={(FOLDER / 'assemblies' / rung.folder).as_posix()}" for rung in rungs()]
    command = (
        "rag-rl", "compare", "--against", "previous", "--title", "The whole pipeline on the tiny world",
        "--output", page.as_posix(), *sides,
    )  # fmt: skip
    found.append(Step("compare", "all assemblies against each other", command, page))
    return found


def write_data(folder: Path) -> None:
    """Draws the two worlds and writes corpus and questions.

    ``hops`` are questions over one and over two hops, ``facts`` questions over one hop and keywords, ``keywords`` the
    latter alone, ``all`` all three; ``train_`` is about the world that is trained on, ``dev_`` and ``heldout.jsonl``
    about the other one.

    Args:
        folder: where to; made where it is missing.
    """
    from rag_rl.data import write_corpus, write_questions
    from rag_rl.tiny.make_data import SIZES
    from rag_rl.tiny.world import draw_world, questions

    folder.mkdir(parents=True, exist_ok=True)
    trained = draw_world(WORLD_SEED, region="train", sizes={kind: TIMES * size for kind, size in SIZES.items()})
    held_out = draw_world(WORLD_SEED, region="heldout", sizes=SIZES)
    write_corpus(folder / "corpus.jsonl", [*trained.passages, *held_out.passages])
    rng = random.Random(WORLD_SEED)
    facts, chains = (list(questions(trained, hops=hops, rng=rng)) for hops in (1, 2))
    n = TRAINED
    sets = {"train": [_of(ONE_HOP, facts[:n], rng), _of(KEYWORDS, facts[-n:], rng), _of(TWO_HOPS, chains[:n], rng)]}
    facts, chains = (list(questions(held_out, hops=hops, rng=rng)) for hops in (1, 2))
    n, m = N_SCORED, N_DEV
    scored = [_of(ONE_HOP, facts[:n], rng), _of(KEYWORDS, facts[n : 2 * n], rng), _of(TWO_HOPS, chains[:n], rng)]
    rest, more = facts[2 * n :], chains[n:]
    sets["dev"] = [_of(ONE_HOP, rest[:m], rng), _of(KEYWORDS, rest[m : 2 * m], rng), _of(TWO_HOPS, more[:m], rng)]
    for name, (one, typed, two) in sets.items():
        for kind, found in (
            ("hops", [*one, *two]),
            ("facts", [*one, *typed]),
            ("keywords", typed),
            ("all", [*one, *typed, *two]),
        ):
            write_questions(folder / f"{name}_{kind}.jsonl", found)
    written = write_questions(folder / "heldout.jsonl", [question for part in scored for question in part])
    print(f"{folder}: {written} questions to score, and those to train on")


def _of(kind: str, found: Sequence[Question], rng: random.Random) -> list[Question]:
    """Questions marked with their kind; as keywords under ids of their own."""
    from rag_rl.tiny.make_data import keywords

    marked = [replace(question, meta={**question.meta, "kind": kind}) for question in found]
    if kind != KEYWORDS:
        return marked
    return [
        replace(q, qid=f"{q.qid}-keywords", question=keywords(q.meta["chain"][0], q.meta["relations"][0], rng))
        for q in marked
    ]


def summary_table(seconds: dict[str, dict[str, float]]) -> str:
    """What the tour has shown.

    Args:
        seconds: ``cpu`` and ``wall`` seconds of each step by name.

    Returns:
        A Markdown table, and below it in words whether the aims were met.
    """
    from rag_rl.evaluation.comparison import compare, open_sides

    names = [f"{rung.name}={FOLDER / 'assemblies' / rung.folder}" for rung in rungs()]
    sides = [side for name in names for side in open_sides(name)]
    added, over = compare(sides, against="previous", main="em"), compare(sides, main="em")
    lines = [
        f"| assembly | EM | {' | '.join(KINDS)} | recall@3 | change by this part | over the untrained | CPU s |",
        f"|{'---|' * (len(KINDS) + 6)}",
    ]
    for place, rung in enumerate(rungs()):
        cells = [rung.name, f"{over.sides[place].summary['metrics']['em']:.3f}", *_by_kind(over, place)]
        cells.append(f"{over.sides[place].summary['metrics']['recall@3']:.3f}")
        cells += [_change(found, place) for found in (added, over)]
        cells.append(f"{seconds[rung.part]['cpu']:.0f}" if rung.part in seconds else "")
        lines.append(f"| {' | '.join(cells)} |")
    (other,) = open_sides(str(FOLDER / "assemblies" / UNTRAINED_REASONER.folder))
    last = len(sides) - 1
    against = compare([other, sides[last]], main="em")
    gains = [over.differences[last - 1].metrics["em"], against.differences[0].metrics["em"]]
    start = [over.sides[0].summary["metrics"]["em"], against.sides[0].summary["metrics"]["em"]]
    least = min(gains, key=lambda gain: gain["difference"])
    harmful = [rungs()[d.other].name for d in added.differences if d.metrics["em"]["ci95"][1] < MOST_HARM]
    lines += [
        "",
        f"{over.n_eval:,} held-out questions. Untrained, EM is {start[0]:.3f} as a generator and {start[1]:.3f} as a "
        "reasoner.",
        f"The full assembly beats the better of the two by {_signed(least)} (aim: at least {LEAST_GAIN}): "
        f"{'met' if least['difference'] >= LEAST_GAIN else 'MISSED'}.",
        f"Parts whose change has an interval wholly below {MOST_HARM}: "
        f"{', '.join(harmful) if harmful else 'none'} (aim: none): {'MISSED' if harmful else 'met'}.",
        f"All steps together: {sum(s['cpu'] for s in seconds.values()) / 60:.1f} minutes of processor time, "
        f"{sum(s['wall'] for s in seconds.values()) / 60:.1f} minutes by the clock.",
    ]
    return "\n".join(lines)


def _by_kind(comparison: Comparison, place: int) -> list[str]:
    """Mean EM of each kind of question."""
    rows = (FOLDER / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    kinds = {row["qid"]: row["kind"] for row in map(json.loads, rows)}
    table = comparison.sides[place].table
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for (qid, _), value in zip(table.keys, table.columns["em"], strict=True):
        found[kinds[qid]].append(float(value))
    return [f"{sum(values) / len(values):.3f}" for values in found.values()]


def _change(comparison: Comparison, place: int) -> str:
    found = next((d for d in comparison.differences if d.other == place), None)
    return _signed(found.metrics["em"]) if found is not None else ""


def _signed(change: dict[str, Any]) -> str:
    low, high = change["ci95"]
    return f"{change['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _argv(command: Sequence[str]) -> list[str]:
    """The command in this interpreter."""
    programs = {"python": [sys.executable], "rag-rl": [sys.executable, "-m", "rag_rl.cli"]}
    return [*programs[command[0]], *command[1:]]


def _shown(path: Path) -> str:
    return Path(os.path.relpath(path)).as_posix()


def _recipe(name: str) -> str:
    return _shown(ROOT / "recipes" / f"{name}.py")


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@contextmanager
def _serving(port: int) -> Iterator[None]:
    """Serves the trained retriever meanwhile; recipes wait until it is ready."""
    command = ("rag-rl", "serve", "--run", (FOLDER / "retriever").as_posix(), "--port", str(port))
    log = FOLDER / "server.log"
    print(f"\n$ {shlex.join(command)} &    # log: {log}", flush=True)
    with log.open("ab") as output:
        server = subprocess.Popen(_argv(command), stdout=output, stderr=output)
    try:
        yield
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


class _Times:
    """Seconds of each step; those of a step that was stopped and gone on with are added up."""

    def __init__(self) -> None:
        self.path = FOLDER / "seconds.json"
        self.of: dict[str, dict[str, float]] = {}
        if self.path.is_file():
            self.of = json.loads(self.path.read_text(encoding="utf-8"))

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Adds what the processes that end meanwhile have used."""
        cpu, wall = _children_seconds(), time.monotonic()
        try:
            yield
        finally:
            known = self.of.get(name, {"cpu": 0.0, "wall": 0.0})
            spent = {"cpu": _children_seconds() - cpu, "wall": time.monotonic() - wall}
            self.of[name] = {unit: round(known[unit] + spent[unit], 2) for unit in spent}
            self.path.write_text(json.dumps(self.of, indent=2) + "\n", encoding="utf-8")


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_all(seed: int, port: int) -> dict[str, dict[str, float]]:
    """Runs what is not finished yet.

    Args:
        seed: of every training.
        port: where the trained retriever is served meanwhile.

    Returns:
        Seconds of each step by name.

    Raises:
        SystemExit: a step failed, or somebody stopped the tour.
    """
    todo = steps(seed, port)
    FOLDER.mkdir(parents=True, exist_ok=True)
    times = _Times()
    with ExitStack() as server:
        running = False
        for number, step in enumerate(todo, start=1):
            title = f"[{number}/{len(todo)}] {step.what}"
            if step.finished():
                print(f"{title}: done", flush=True)
                continue
            if step.served and not running:
                server.enter_context(_serving(port))
                running = True
            print(f"\n{title}\n$ {step.shown}", flush=True)
            try:
                with times.measured(step.name):
                    code = subprocess.run(_argv(step.command), check=False).returncode
            except KeyboardInterrupt:
                print(f"tour: stopped in step {number} ({step.name}): the same command goes on there", file=sys.stderr)
                raise SystemExit(INTERRUPTED) from None
            if code:
                print(
                    f"tour: step {number} ({step.name}) ended with exit code {code}, and says above why: the same "
                    "command goes on with it",
                    file=sys.stderr,
                )
                raise SystemExit(1)
            if running and not any(later.served for later in todo[number:]):
                with times.measured("server"):
                    server.close()
                running = False
    return times.of


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and goes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=42, help="of every training (default: 42)")
    parser.add_argument("--dry_run", action="store_true", help="print the command lines and stop")
    parser.add_argument(
        "--write_data", action="store_true", help="write the data of the tour and stop: its first step"
    )
    args = parser.parse_args(argv)
    if args.write_data:
        write_data(FOLDER / "data")
        return
    if args.dry_run:
        for step in steps(args.seed, DEFAULT_PORT):
            print(f"# {step.what}\n{step.shown}")
        return
    table = summary_table(run_all(args.seed, _free_port()))
    (FOLDER / "table.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\npage    {FOLDER / 'comparison.html'}\nask     rag-rl ask --config ", end="")
    print(f'{_shown(ROOT / "recipes/configs/evaluate_rag/tour_full.yaml")} "..."')


if __name__ == "__main__":
    main()
