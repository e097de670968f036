"""Recipes inside the test process, in several processes, and killed in the middle."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


@pytest.fixture(scope="session")
def load_recipe() -> Callable[[str], ModuleType]:
    """Imports recipes by name, each once."""
    loaded: dict[str, ModuleType] = {}

    def load(name: str) -> ModuleType:
        if name not in loaded:
            specification = importlib.util.spec_from_file_location(f"tested_{name}", RECIPES / f"{name}.py")
            assert specification is not None
            assert specification.loader is not None
            module = importlib.util.module_from_spec(specification)
            sys.modules[specification.name] = module  # where dataclasses and typing look a class's module up
            specification.loader.exec_module(module)
            loaded[name] = module
        return loaded[name]

    load("grpo_generator")  # here, not in a test: transformers' log handler keeps the stderr that it meets at import
    return load


@pytest.fixture
def run_here(load_recipe, monkeypatch) -> Callable[..., int]:
    """Runs a recipe as its command line does, in this process: ``run_here("grpo_generator", *flags)`` -> exit code."""
    from rag_rl.run import launch

    def run(name: str, *flags: object) -> int:
        module = load_recipe(name)
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        try:
            launch(module.main)
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


@pytest.fixture
def refused(run_here, capsys) -> Callable[..., str]:
    """Runs a recipe that must refuse its input; gives its one line, which names the recipe first."""

    def run(name: str, *flags: object, code: int = 2) -> str:
        capsys.readouterr()
        found = run_here(name, *flags)
        error = capsys.readouterr().err
        ours = [line for line in error.splitlines() if f"{name}.py: " in line]
        assert (found, len(ours)) == (code, 1), error
        assert "Traceback" not in error
        return ours[0]

    return run


@pytest.fixture(scope="session")
def accelerate_command() -> Callable[..., list[str]]:
    """Makes the command line of a recipe in two processes on this machine's CPU, under a launch file as shipped.

    ``accelerate_command("sft_reasoner", *flags, config="zero3", folder=tmp_path, machines=1)``; a script in place of
    the recipe's name as well. Started from anywhere; the launch file, where it is made for GPUs, is copied to
    ``folder`` with the number of processes and ``use_cpu`` changed, and nothing else.
    """

    def command(
        script: str | Path, *flags: object, config: str = "cpu_2proc", folder: Path, machine: tuple[int, int] = (0, 0)
    ) -> list[str]:
        path = ROOT / "accelerate_configs" / f"{config}.yaml"
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        more: list[object] = []
        if config != "cpu_2proc":
            rank, port = machine
            settings |= {"use_cpu": True, "num_processes": 2, "main_process_port": port}
            if settings["num_machines"] > 1:
                more = ["--machine_rank", rank, "--main_process_ip", "127.0.0.1"]
            path = folder / f"{config}-{rank}.yaml"
            path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        recipe = RECIPES / f"{script}.py" if isinstance(script, str) else script
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path, *more]
        return [str(word) for word in (*launch, recipe, *flags)]

    return command


@pytest.fixture(scope="session")
def cpu_environment() -> dict[str, str]:
    """For processes that may start DeepSpeed: its compiler finds ninja where the environment is not activated."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="session")
def launch_recipe(accelerate_command, cpu_environment) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a recipe in two processes on the CPU: ``launch_recipe("sft_reasoner", *flags, cwd=tmp_path)``.

    The run must end with the exit code ``code`` (None: with another one than 0). That there were two processes, its
    ``metrics.json`` says, which the test has to look at.
    """

    def launch(
        recipe: str | Path,
        *flags: object,
        cwd: Path,
        config: str = "cpu_2proc",
        env: dict[str, str] | None = None,
        code: int | None = 0,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            accelerate_command(recipe, *flags, config=config, folder=cwd),
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            cwd=cwd,
            env={**cpu_environment, **(env or {})},
        )
        assert done.returncode == code if code is not None else done.returncode, done.stderr[-4000:]
        return done

    return launch


@pytest.fixture(scope="session")
def kill_when() -> Callable[..., None]:
    """Starts a recipe and kills it as soon as something has happened: ``kill_when(happened, "recipe", *flags, cwd=)``.

    It must still be running then.
    """

    def run(
        happened: Callable[[], bool], recipe: str, *flags: object, cwd: Path, env: dict[str, str] | None = None
    ) -> None:
        log = cwd / f"{recipe}-killed.log"
        command = [sys.executable, str(RECIPES / f"{recipe}.py"), *map(str, flags)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=cwd, env={**os.environ, **(env or {})}
            )
            try:
                deadline = time.monotonic() + 600
                while not happened():
                    assert process.poll() is None, log.read_text()[-3000:]
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
            finally:
                process.send_signal(signal.SIGKILL)
                code = process.wait()
        assert code == -signal.SIGKILL

    return run


@pytest.fixture(scope="session")
def kill_and_resume(kill_when, run_recipe) -> Callable[..., int]:
    """Kills a recipe after a checkpoint and lets it go on: ``kill_and_resume("recipe", *flags, folder=run, cwd=)``.

    Checks what holds for all: it was killed in the middle, a second start names the flag and touches nothing, the
    resumed run goes on from the last checkpoint, and the files of ``once`` are as the killed run had left them. Gives
    the step of that checkpoint.
    """
    from rag_rl.run import last_checkpoint

    def run(
        recipe: str,
        *flags: object,
        folder: Path,
        cwd: Path,
        happened: Callable[[], bool] | None = None,
        env: dict[str, str] | None = None,
        once: tuple[str, ...] = ("before.json",),
    ) -> int:
        words = [*flags, "--output_dir", folder]
        kill_when(happened or (lambda: last_checkpoint(folder) is not None), recipe, *words, cwd=cwd, env=env)
        checkpoint = last_checkpoint(folder)
        assert checkpoint is not None
        assert not (folder / "metrics.json").exists(), "killed in the middle"
        left = {name: (folder / name).read_bytes() for name in once}
        refused = run_recipe(recipe, *words, cwd=cwd, env=env)
        assert refused.returncode == 2
        assert "go on with --resume_from_checkpoint true" in refused.stderr.splitlines()[-1]
        assert "Traceback" not in refused.stderr
        done = run_recipe(recipe, *words, "--resume_from_checkpoint", "true", cwd=cwd, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"going on from {checkpoint}" in done.stderr
        for name, content in left.items():
            assert (folder / name).read_bytes() == content, f"{name} is made once"
        return int(Path(checkpoint).name.split("-")[1])

    return run
