from __future__ import annotations

import dataclasses

import pytest

from rag_rl.config.parsing import read_arguments
from rag_rl.config.teacher_arguments import ColdStartArguments, TeacherArguments
from rag_rl.errors import ConfigError

PREFIX = {TeacherArguments: "teacher_", ColdStartArguments: "coldstart_"}


@pytest.mark.parametrize("owner", PREFIX)
def test_every_flag_is_prefixed_and_explained(owner):
    for field in dataclasses.fields(owner):
        assert field.name.startswith(PREFIX[owner])
        assert field.metadata["help"]


def test_attempts_steps_and_temperature_are_the_papers():
    args = TeacherArguments()
    assert (args.teacher_max_attempts, args.teacher_max_steps, args.teacher_tries) == (7, 7, 2)
    assert (args.teacher_temperature, args.teacher_max_new_tokens) == (0.9, 256)


@pytest.mark.parametrize(
    ("owner", "changes", "message"),
    [
        (TeacherArguments, {"teacher_max_attempts": 0}, "teacher_max_attempts must be at least 1, got 0"),
        (TeacherArguments, {"teacher_max_steps": 0}, "teacher_max_steps must be at least 1, got 0"),
        (TeacherArguments, {"teacher_tries": 0}, "teacher_tries must be at least 1, got 0"),
        (TeacherArguments, {"teacher_max_new_tokens": 0}, "teacher_max_new_tokens must be at least 1"),
        (TeacherArguments, {"teacher_batch_size": 0}, "teacher_batch_size must be at least 1"),
        (TeacherArguments, {"teacher_concurrency": 0}, "teacher_concurrency must be at least 1"),
        (TeacherArguments, {"teacher_temperature": -0.1}, r"teacher_temperature must be at least 0, got -0\.1"),
        (ColdStartArguments, {"coldstart_states": []}, "coldstart_states must name one or more end states"),
        (ColdStartArguments, {"coldstart_size": 0}, "coldstart_size must be at least 1, got 0"),
        (ColdStartArguments, {"coldstart_validation": 1.0}, r"coldstart_validation must lie in \[0, 1\), got 1\.0"),
    ],
)
def test_values_out_of_range_are_refused(owner, changes, message):
    with pytest.raises(ConfigError, match=message):
        owner(**changes)


def test_an_end_state_that_there_is_not(tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text("")
    (tmp_path / "mine.yaml").write_text("coldstart_states: [correct, right]\n")
    with pytest.raises(ConfigError, match="coldstart_states: expected a list of one of correct, incorrect, fail"):
        read_arguments(recipe, ColdStartArguments, argv=["--config", str(tmp_path / "mine.yaml")])
