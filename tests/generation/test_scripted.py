from __future__ import annotations

import pytest

from rag_rl.errors import DataError
from rag_rl.generation import ScriptedGenerator
from rag_rl.types import Generator


def texts(generator, prompts, **more):
    rows = generator.generate(prompts, max_new_tokens=4, temperature=0.0, **more)
    return [[one.text for one in row] for row in rows]


def test_a_mapping_answers_by_prompt():
    generator = ScriptedGenerator({"Who?": "Mira.", "system\n\nWhere?": "Here."})
    chat = [{"role": "system", "content": "system"}, {"role": "user", "content": "Where?"}]
    by_last_turn = [{"role": "system", "content": "other"}, {"role": "user", "content": "Who?"}]
    assert isinstance(generator, Generator)
    assert texts(generator, ["Who?", chat, by_last_turn], n=2) == [["Mira."] * 2, ["Here."] * 2, ["Mira."] * 2]
    assert generator.prompts == ["Who?", chat, by_last_turn]
    with pytest.raises(DataError, match="When"):
        texts(generator, ["When?"])


def test_a_list_is_used_up_in_order_over_calls():
    generator = ScriptedGenerator(["a", "b", "c"])
    assert texts(generator, ["x"], n=2) == [["a", "b"]]
    assert texts(generator, ["y"]) == [["c"]]
    with pytest.raises(DataError, match="all 3 scripted replies are used up"):
        texts(generator, ["z"])


def test_a_function_sees_the_text_and_a_running_number():
    generator = ScriptedGenerator(lambda text, index: f"{text}{index}")
    assert texts(generator, ["x", "y"], n=2) == [["x0", "x1"], ["y2", "y3"]]
    assert texts(generator, ["z"]) == [["z4"]]


def test_stop_strings_cut():
    assert texts(ScriptedGenerator(["one. two."]), ["x"], stop=["."]) == [["one"]]
