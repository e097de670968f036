"""The command ``rag-rl``: look at runs, ask them, serve retrievers, and see what this machine can do.

Everything heavy is imported inside the command that needs it, so that ``rag-rl --help`` is quick.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

from rag_rl.config.parsing import one_line_errors
from rag_rl.errors import BackendError, ConfigError, RunFolderError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        argv: arguments; None for the process's own.

    Raises:
        SystemExit: code 2 after bad input, 1 after a backend failed.
    """
    args = _parser().parse_args(argv)
    with one_line_errors("rag-rl"):
        try:
            args.command(args)
        except BackendError as error:
            print(f"rag-rl: stopped: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(1) from error


def _parser() -> argparse.ArgumentParser:
    description = "Look at runs, ask them, serve retrievers, see what this machine can do."
    parser = argparse.ArgumentParser(prog="rag-rl", description=description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="answer a question with a finished run", allow_abbrev=False)
    source = ask.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--run", type=Path, metavar="DIR", help="folder of a finished run of a generator or a reasoner"
    )
    source.add_argument(
        "--config", metavar="FILE", help="YAML file of an assembly, as recipes/evaluate_rag.py takes it"
    )
    ask.add_argument("--best_of", type=int, default=1, metavar="N", help="draw N answers and choose the best")
    ask.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")
    ask.add_argument("--json", action="store_true", help="print JSON instead of text")
    ask.add_argument("question", help="in quotes")
    ask.set_defaults(command=_ask)

    _add_compare(commands)

    show = commands.add_parser("show", help="print the before/after table of a finished run", allow_abbrev=False)
    show.add_argument("run", type=Path, metavar="DIR", help="run folder")
    show.set_defaults(command=_show)

    _add_serve(commands)

    _add_doctor(commands)
    return parser


SERVE_HELP = """\
Serve a retriever over HTTP, so that it is opened once and searched by all processes of a training.

  rag-rl serve --index indexes/wiki                    an index folder of recipes/build_index.py
  rag-rl serve --config recipes/configs/R/C.yaml       what a recipe's config names (built first where it is missing)
  rag-rl serve --run runs/grpo_retriever-tiny-seed0    what a finished run used; a retriever that it trained as well

GET /health is green (200) when the retriever is open and answers its probe query. POST /search takes our queries,
POST /retrieve those of Search-R1. A recipe uses it by --retriever_name http --retriever_url http://HOST:PORT.
SIGTERM ends it after the last reply. docs/serving.md has the rest."""


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a retriever over HTTP",
        description=SERVE_HELP,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = serve.add_argument_group("what is served (one of them)").add_mutually_exclusive_group(required=True)
    what.add_argument("--index", type=Path, metavar="DIR", help="index folder; its manifest names the encoder")
    what.add_argument("--config", type=Path, metavar="FILE", help="YAML file with retriever_ and data_ settings")
    what.add_argument("--run", type=Path, metavar="DIR", help="folder of a finished run")
    how = serve.add_argument_group("how it is opened")
    how.add_argument("--encoder", metavar="MODEL", help="with --index: where the encoder lies now")
    how.add_argument("--chroma_url", metavar="URL", help="with --index: where the Chroma server is now")
    how.add_argument("--devices", nargs="+", default=[], metavar="D", help="devices of the encoder, e.g. cuda:0")
    where = serve.add_argument_group("where it listens, and to whom")
    where.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine only")
    where.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0 takes a free one and tells it")
    where.add_argument(
        "--token_env",
        default="RAG_RL_RETRIEVER_TOKEN",
        metavar="NAME",
        help="environment variable with the bearer token that clients must bring (default: %(default)s); "
        "where it is not set, none is asked for",
    )
    where.add_argument(
        "--token_file", type=Path, metavar="FILE", help="file with that token, in place of the variable"
    )
    limits = serve.add_argument_group("limits; what goes beyond is refused (413, 422, or 503 where it is full)")
    for name, default, text in (
        ("top_k", None, "hits a query where a request does not say (default: retriever_top_k, with --index 3)"),
        ("max_top_k", 100, "hits a query"),
        ("max_queries", 1024, "queries a request"),
        ("max_query_chars", 32_768, "characters a query, its history included"),
        ("max_exclude", 1000, "excluded document ids a query"),
        ("max_body_bytes", 8 << 20, "bytes a request"),
        ("max_requests", 256, "requests that are read, searched or waiting; the next is told to come back"),
    ):
        told = text if default is None else f"{text} (default: {default})"
        limits.add_argument(f"--{name}", type=int, default=default, metavar="N", help=told)
    serve.set_defaults(command=_serve)


def _serve(args: argparse.Namespace) -> None:
    import logging
    from functools import partial

    if args.index is None and (args.encoder or args.chroma_url):
        raise ConfigError("--encoder and --chroma_url go with --index: a config or a run has settings of its own")
    logging.basicConfig(level=logging.WARNING, format="rag-rl serve: %(message)s")
    logging.getLogger("rag_rl").setLevel(logging.INFO)
    from rag_rl import server

    names = ("max_top_k", "max_queries", "max_query_chars", "max_exclude", "max_body_bytes", "max_requests")
    limits = server.Limits(**{name: getattr(args, name) for name in names})
    token = server.read_token(args.token_env, args.token_file)
    if args.index is not None:
        from rag_rl.retrieval.manifest import read_manifest

        read_manifest(args.index)  # so that a folder that is no index is an error at once
        default_top_k = 3
        opened = partial(
            server.open_folder, args.index, encoder=args.encoder, chroma_url=args.chroma_url, devices=args.devices
        )
    else:
        if args.run is not None:
            from rag_rl.ask import read_settings

            settings = read_settings(args.run)
        else:
            settings = server.read_config(args.config)
        default_top_k = min(settings.get("retriever_top_k", 3), limits.max_top_k)
        opened = partial(server.open_settings, settings, devices=args.devices, run=args.run)
    search = server.SearchThread(opened)
    top_k = default_top_k if args.top_k is None else args.top_k
    service = server.Service(search, limits=limits, token=token, top_k=top_k)
    sock = server.bind(args.host, args.port)
    if token is None and not server.is_loopback(args.host):
        logging.getLogger("rag_rl").warning("no token is set: whoever can reach %s can search", args.host)
    server.serve(service, sock)


COMPARE_HELP = """\
Compare runs question by question: one table here, and one HTML page that needs nothing else.

  rag-rl compare runs/grpo_generator-tiny-seed42              before and after a training
  rag-rl compare runs/evaluate_rag-tiny                       an evaluation and its baselines
  rag-rl compare start=runs/a trained=runs/b                  two of them, by names of your own
  rag-rl compare runs/a:after runs/b:after runs/c:baseline_bm25

A RUN is a folder of a training or of recipes/evaluate_rag.py; :SIDE takes one side of it (before, after, assembly or
baseline_NAME). Of a single RUN the baselines are shown as well. All runs must be about the same questions."""


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare finished runs, in a table and as a page",
        description=COMPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compare.add_argument("runs", nargs="+", metavar="[NAME=]RUN[:SIDE]", help="run folders, the measure first")
    compare.add_argument(
        "--against",
        choices=["first", "previous"],
        default="first",
        help="what each is measured by (default: first); previous, where part after part was added",
    )
    compare.add_argument(
        "--common", action="store_true", help="leave out questions that not all have, in place of an error"
    )
    compare.add_argument("--metric", help="what right and wrong are told by (default: em, or what is closest to it)")
    compare.add_argument(
        "--output", type=Path, default=Path("comparison.html"), metavar="FILE", help="page (default: comparison.html)"
    )
    compare.add_argument("--title", default="", help="of the page")
    compare.add_argument(
        "--examples", type=int, default=20, metavar="N", help="flipped questions on the page, a pair (default: 20)"
    )
    compare.add_argument("--json", action="store_true", help="print JSON instead of the table")
    compare.set_defaults(command=_compare)


def _compare(args: argparse.Namespace) -> None:
    import shlex

    from rag_rl.evaluation.comparison import compare, comparison_summary, comparison_table, open_sides
    from rag_rl.evaluation.comparison_page import write_comparison

    alone = len(args.runs) == 1
    sides = [side for run in args.runs for side in open_sides(run, baselines=alone)]
    found = compare(sides, against=args.against, common=args.common, main=args.metric)
    command = shlex.join(["rag-rl", "compare", *args.runs])
    page = write_comparison(args.output, found, title=args.title, n_examples=args.examples, command=command)
    if args.json:
        print(json.dumps({**comparison_summary(found), "page": str(page)}, indent=2, ensure_ascii=False))
        return
    print(comparison_table(found))
    print(f"page    {page}")


def _ask(args: argparse.Namespace) -> None:
    from rag_rl.ask import open_assembly, open_run

    _quiet()
    rag = open_run(args.run) if args.config is None else open_assembly(args.config)
    reply = rag.ask(args.question, best_of=args.best_of, seed=args.seed)
    if args.json:
        passages = [
            {"doc_id": h.passage.doc_id, "title": h.passage.title, "text": h.passage.text, "score": h.score}
            for h in reply.hits
        ]
        content = {"answer": reply.answer, "text": reply.text, "scores": dict(reply.scores), "passages": passages}
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return
    lines = [f"answer:  {reply.answer if reply.answer is not None else '(none)'}", f"reply:   {reply.text.strip()}"]
    if reply.scores:
        lines.append("scores:  " + "  ".join(f"{name} {value:.2f}" for name, value in reply.scores.items()))
    for number, hit in enumerate(reply.hits, start=1):
        contents = " ".join(hit.passage.contents.split())
        lines.append(f"[{number}] {hit.score:.3f}  {hit.passage.doc_id}: {contents[:160]}")
    print("\n".join(lines))


def _show(args: argparse.Namespace) -> None:
    from rag_rl.run import results_table

    path = args.run / "metrics.json"
    if not path.is_file():
        raise RunFolderError(f"{args.run} holds no finished run (there is no metrics.json in it)")
    summary = json.loads(path.read_text(encoding="utf-8"))
    if "after" in summary:
        print(results_table(summary, args.run))
        return
    from rag_rl.evaluation.comparison import compare, comparison_table, open_sides

    print(comparison_table(compare(open_sides(str(args.run), baselines=True))))
    print(f"report  {args.run / 'report.html'}")


PACKAGES = {
    "torch": "", "transformers": "", "trl": "", "peft": "", "accelerate": "", "datasets": "",
    "sentence-transformers": "", "chromadb": "", "bitsandbytes": "", "openai": "",
    "faiss": "pip install 'rag-rl[cpu]' or [gpu]",
    "bm25s": "pip install 'rag-rl[bm25]' (a baseline of evaluate_rag)",
    "deepspeed": "pip install 'rag-rl[gpu]' (ZeRO configs)", "vllm": "pip install 'rag-rl[gpu]' (use_vllm)",
}  # fmt: skip


DOCTOR_HELP = """\
See what this machine can do; with --config, what a config will need, before anything is loaded.

  rag-rl doctor
  rag-rl doctor --config grpo_generator/qwen2.5-7b_hotpotqa_lora
  rag-rl doctor --config mine/sft_reasoner/big.yaml --launch accelerate_configs/zero3.yaml --gpu_memory 80

Of the model only its config.json is read, from a folder or the Hub's cache. docs/clusters.md has the formulas."""


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="what is installed, which devices there are, what each config needs",
        description=DOCTOR_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    doctor.add_argument(
        "--config", metavar="FILE", help="estimate the memory of a recipe's config: a path, or recipe/name"
    )
    doctor.add_argument("--launch", metavar="FILE", help="launch file of accelerate (default: one process)")
    doctor.add_argument("--processes", type=int, metavar="N", help="in place of the launch file's number")
    doctor.add_argument(
        "--gpu_memory", type=float, metavar="GB", help="GiB of a card (default: the smallest that is there)"
    )
    doctor.add_argument("--prompt_tokens", type=int, metavar="N", help="length of a prompt, where no setting tells it")
    doctor.set_defaults(command=_doctor)


def _size(args: argparse.Namespace) -> None:
    """What one config needs."""
    from rag_rl.config.memory import GIB
    from rag_rl.config.sizing import describe, find_config, read_launch, size_config

    for name in ("processes", "gpu_memory", "prompt_tokens"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name} must be above 0, got {value:g}")
    _quiet()
    config, recipe = find_config(args.config, _recipe_folders())
    launch = read_launch(args.launch, args.processes)
    card, gpu = (args.gpu_memory * GIB, "a card") if args.gpu_memory else _smallest_gpu()
    sizing = size_config(
        config,
        recipe,
        launch=launch,
        gpu_bytes=card,
        prompt_tokens=args.prompt_tokens,
        needs=_needs(config),
    )
    print("\n".join(describe(sizing, gpu_bytes=card, gpu=gpu)))
    if card is None:
        print("  no GPU here: --gpu_memory 24 says which preset fits a card of 24 GiB")


def _smallest_gpu() -> tuple[float | None, str]:
    import torch

    if not torch.cuda.is_available():
        return None, ""
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    smallest = min(found, key=lambda card: card.total_memory)
    return float(smallest.total_memory), smallest.name


def _recipe_folders() -> list[Path]:
    return [Path("recipes"), Path(__file__).resolve().parents[1] / "recipes"]


def _doctor(args: argparse.Namespace) -> None:
    if args.config is not None:
        _size(args)
        return
    for name in ("launch", "processes", "gpu_memory", "prompt_tokens"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name} goes with --config: it says something about the estimate")
    lines = [f"python      {platform.python_version()} on {platform.system()} {platform.machine()}", "", "packages"]
    for name, remedy in PACKAGES.items():
        if util.find_spec(name.replace("-", "_")) is None:
            lines.append(f"  {name:22} missing{': ' + remedy if remedy else ''}")
        else:
            lines.append(f"  {name:22} {_version(name)}")
    lines += ["", "devices", f"  {os.cpu_count()} CPU cores, {_memory_gib():.0f} GiB of memory"]
    lines += _gpus()
    compiler = shutil.which("c++") or shutil.which("g++")
    lines.append(f"  C++ compiler: {'yes' if compiler else 'none (DeepSpeed builds parts of itself when it starts)'}")
    lines += ["", "data", f"  RAG_RL_DATA  {os.environ.get('RAG_RL_DATA', 'not set: ${data} is ./data')}"]
    lines += ["", "configs", *_configs()]
    print("\n".join(lines))


def _version(name: str) -> str:
    for distribution in (name, f"{name}-cpu", f"{name}-gpu"):
        try:
            return f"{metadata.version(distribution)}{f' ({distribution})' if distribution != name else ''}"
        except metadata.PackageNotFoundError:
            continue
    return "installed"


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _gpus() -> list[str]:
    if util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return ["  no GPU: the tiny configs run all the same"]
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "fp16 only"
        found.append(f"  cuda:{i} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {bf16}")
    return found


def _configs() -> list[str]:
    """Each config with the ``Needs:`` line of its header."""
    for root in _recipe_folders():
        paths = sorted((root / "configs").rglob("*.yaml"))
        if paths:
            return [f"  {path.parent.name}/{path.stem}: {_needs(path) or 'not stated'}" for path in paths]
    return ["  no recipes folder here"]


def _needs(path: Path) -> str:
    """The ``Needs:`` entry of a config's header."""
    _, _, after = path.read_text(encoding="utf-8").partition("# Needs:")
    # The entry may go on over several lines of the header; "Measured:" comes after it.
    first, *rest = after.partition("\n# Measured")[0].splitlines() or [""]
    lines = [first, *itertools.takewhile(lambda line: line.startswith("#"), rest)]
    return " ".join(line.lstrip("# ").strip() for line in lines)


def _quiet() -> None:
    import logging

    logging.disable(logging.WARNING)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()


if __name__ == "__main__":
    main()
