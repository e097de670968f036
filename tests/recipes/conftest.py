"""Recipes inside the test process, in several processes, killed in the middle; and what the tests of each share.

The second part is for files that test one recipe: they name it in RECIPE and say in SHORT what makes its runs short.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.recipes.run_folders import KEYS, RUN_FILES, SGD, leftovers_in, metrics_of, names_in, times_of
from tests.scripts import load

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


@pytest.fixture(scope="session")
def load_recipe() -> Callable[[str], ModuleType]:
    """Imports recipes by name, each once."""
    recipe = functools.cache(lambda name: load(RECIPES / f"{name}.py"))
    recipe("grpo_generator")  # here, not in a test: transformers' log handler keeps the stderr that it meets at import
    return recipe


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


# ------------------------------------------------------------------------------------------------------------------
# For the file that tests one recipe: RECIPE is its name, SHORT the settings that make its runs short.


@pytest.fixture(scope="module")
def brief(request, short) -> Callable[..., list[str]]:
    """Makes the flags of a short run, as SHORT has them; ``brief(max_steps=1)`` changes one, None leaves it out."""
    return lambda **changes: short(**{**request.module.SHORT, **changes})


@pytest.fixture(scope="module")
def trained_run(request, run_recipe, brief, tmp_path_factory) -> Path:
    """The folder of a short, finished run in a process of its own, without a launcher; its stderr.txt lies beside it.

    Tests that write to it take a copy.
    """
    folder = tmp_path_factory.mktemp(request.module.RECIPE) / "run"
    done = run_recipe(request.module.RECIPE, *brief(), "--output_dir", folder, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder.parent / "stderr.txt").write_text(done.stderr)
    return folder


@pytest.fixture
def bad(request, refused, brief, tmp_path) -> Callable[..., str]:
    """Runs the recipe on input that it must refuse: ``bad("--flag", value, setting=value)``; gives its one line.

    The output folder, ``tmp_path / "run"``, must hold no run afterwards that could be taken for a finished one.
    """

    def run(*flags: object, code: int = 2, **changes: object) -> str:
        output = tmp_path / "run"
        line = refused(request.module.RECIPE, *brief(**changes), "--output_dir", output, *flags, code=code)
        assert not (output / "metrics.json").exists()
        return line

    return run


@pytest.fixture
def bad_at_once(bad, tmp_path) -> Callable[..., str]:
    """As ``bad``, of input that must be refused before anything is measured."""

    def run(*flags: object, code: int = 2, **changes: object) -> str:
        line = bad(*flags, code=code, **changes)
        assert not (tmp_path / "run" / "before.json").exists()
        return line

    return run


@pytest.fixture
def check_metrics(request) -> Callable[..., dict[str, Any]]:
    """Looks at what is the same in the ``metrics.json`` of every finished short run, and gives all of it.

    ``check_metrics(folder, n_eval=20, more={"baselines"})``: ``more`` are the keys that this recipe adds.
    """

    def check(folder: Path, *, n_eval: int, config: str = "tiny", more: Collection[str] = ()) -> dict[str, Any]:
        found = metrics_of(folder)
        assert set(found) == KEYS | set(more)
        assert (found["recipe"], found["config"], found["seed"]) == (request.module.RECIPE, config, 42)
        assert (found["status"], found["n_eval"], found["num_processes"]) == ("complete", n_eval, 1)
        shown = load(ROOT / "tools" / "learning_table.py").METRICS[request.module.RECIPE]
        assert set(shown) <= set(found["ci95"]), "what the learning table shows"
        return found

    return check


@pytest.fixture(scope="session")
def check_run_folder() -> Callable[..., None]:
    """Looks at the files of a finished run: those of every run and ``more`` are there, and nothing half-written.

    Weights are never pickled; TRL's PPO trainer leaves its arguments so (``pickled``). The texts, ``portable`` among
    them, must not name a path of this machine.
    """

    def check(
        folder: Path,
        more: Collection[str],
        *,
        portable: Collection[str] = ("config.json",),
        pickled: Collection[str] = (),
    ) -> None:
        assert names_in(folder) >= RUN_FILES | set(more)
        assert set(leftovers_in(folder)) <= set(pickled)
        for name in ("README.md", "resolved_config.yaml", *portable):
            assert str(ROOT) not in (folder / name).read_text(), f"{name} names a path of this machine"

    return check


@pytest.fixture
def check_started_again(request, run_recipe, run_here, brief, capsys) -> Callable[..., None]:
    """Starts a finished run again, by the flags that made it: it says so, ends well and touches nothing."""

    def check(folder: Path, *, own_process: bool = False) -> None:
        before = times_of(folder)
        words = [*brief(), "--output_dir", folder]
        if own_process:
            done = run_recipe(request.module.RECIPE, *words)
            assert done.returncode == 0, done.stderr
            said = done.stdout
        else:
            assert run_here(request.module.RECIPE, *words) == 0
            said = capsys.readouterr().out
        assert f"{folder} is already finished" in said
        assert times_of(folder) == before

    return check


@pytest.fixture
def check_plain_launch(request, brief, tmp_path) -> Callable[[], None]:
    """Runs the recipe by ``accelerate launch`` without arguments; it says where the report is."""

    def check() -> None:
        recipe = request.module.RECIPE
        program = str(Path(sys.executable).parent / "accelerate")
        command = [program, "launch", str(RECIPES / f"{recipe}.py"), *brief()]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        folder = tmp_path / "runs" / f"{recipe}-tiny-seed42"
        assert metrics_of(folder)["status"] == "complete"
        assert f"report  {folder.relative_to(tmp_path) / 'report.html'}" in done.stdout

    return check


@pytest.fixture
def check_copy_elsewhere(request, run_recipe, brief, tmp_path) -> Callable[..., None]:
    """Runs a copy of the recipe with a copy of its config, from a third folder, which the run goes to."""

    def check(*flags: object, **changes: object) -> None:
        recipe = request.module.RECIPE
        project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
        project.mkdir()
        elsewhere.mkdir()
        shutil.copy(RECIPES / f"{recipe}.py", project / "mine.py")
        shutil.copy(RECIPES / "configs" / recipe / "tiny.yaml", project / "my.yaml")
        words = ["--config", "../project/my.yaml", *brief(**changes), *flags]
        done = run_recipe(project / "mine.py", *words, cwd=elsewhere)
        assert done.returncode == 0, done.stderr[-3000:]
        found = metrics_of(elsewhere / "runs" / "mine-my-seed42")
        assert (found["recipe"], found["config"], found["status"]) == ("mine", "my", "complete")

    return check


@pytest.fixture
def alone_and_both(request, run_recipe, launch_recipe, brief, tmp_path) -> Callable[..., tuple[Path, Path, str]]:
    """Trains in one process, and in two with half of each batch, by plain gradient descent.

    ``alone_and_both(16, max_steps=5)`` gives both folders and what the two processes printed; ``config`` is the
    launch file of the two.
    """

    def train(batch: int, config: str = "cpu_2proc", **changes: object) -> tuple[Path, Path, str]:
        recipe, same = request.module.RECIPE, {**SGD, **changes}
        alone, both = tmp_path / "alone", tmp_path / "both"
        flags = brief(**same, per_device_train_batch_size=batch)
        done = run_recipe(recipe, *flags, "--output_dir", alone, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        flags = brief(**same, per_device_train_batch_size=batch // 2)
        done = launch_recipe(recipe, *flags, "--output_dir", both, config=config, cwd=tmp_path)
        assert (metrics_of(alone)["num_processes"], metrics_of(both)["num_processes"]) == (1, 2)
        return alone, both, done.stdout

    return train
