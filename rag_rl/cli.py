"""The command ``rag-rl``: look at runs, ask them, and see what this machine can do.

Everything heavy is imported inside the command that needs it, so that ``rag-rl --help`` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path

from rag_rl.config.parsing import one_line_errors
from rag_rl.errors import BackendError, RunFolderError


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
    description = "Look at runs, ask them, see what this machine can do."
    parser = argparse.ArgumentParser(prog="rag-rl", description=description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="answer a question with a finished run", allow_abbrev=False)
    ask.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="folder of a finished run of a generator or a reasoner"
    )
    ask.add_argument("--best_of", type=int, default=1, metavar="N", help="draw N answers and choose the best")
    ask.add_argument("--seed", type=int, default=0, help="of the drawing (default: 0)")
    ask.add_argument("--json", action="store_true", help="print JSON instead of text")
    ask.add_argument("question", help="in quotes")
    ask.set_defaults(command=_ask)

    show = commands.add_parser("show", help="print the before/after table of a finished run", allow_abbrev=False)
    show.add_argument("run", type=Path, metavar="DIR", help="run folder")
    show.set_defaults(command=_show)

    doctor = commands.add_parser("doctor", help="what is installed, which devices there are, what each config needs")
    doctor.set_defaults(command=_doctor)
    return parser


def _ask(args: argparse.Namespace) -> None:
    from rag_rl.ask import open_run

    _quiet()
    reply = open_run(args.run).ask(args.question, best_of=args.best_of, seed=args.seed)
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
    print(results_table(json.loads(path.read_text(encoding="utf-8")), args.run))


PACKAGES = {
    "torch": "", "transformers": "", "trl": "", "peft": "", "accelerate": "", "datasets": "",
    "sentence-transformers": "", "chromadb": "", "bitsandbytes": "", "openai": "",
    "faiss": "pip install 'rag-rl[cpu]' or [gpu]",
    "deepspeed": "pip install 'rag-rl[gpu]' (ZeRO configs)", "vllm": "pip install 'rag-rl[gpu]' (use_vllm)",
}  # fmt: skip


def _doctor(args: argparse.Namespace) -> None:
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
    for root in (Path("recipes"), Path(__file__).resolve().parents[1] / "recipes"):
        found = []
        for path in sorted((root / "configs").rglob("*.yaml")):
            _, _, after = path.read_text(encoding="utf-8").partition("Needs:")
            # The entry may go on over several lines of the header; "Measured:" comes after it.
            lines = after.partition("\n# Measured")[0].splitlines()
            needs = " ".join(line.lstrip("# ").strip() for line in lines) or "not stated"
            found.append(f"  {path.parent.name}/{path.stem}: {needs}")
        if found:
            return found
    return ["  no recipes folder here"]


def _quiet() -> None:
    import logging

    logging.disable(logging.WARNING)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()


if __name__ == "__main__":
    main()
