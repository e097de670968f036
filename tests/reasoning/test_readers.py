from __future__ import annotations

import json
import socket

import pytest

from rag_rl.errors import BackendError, ConfigError, DataError
from rag_rl.generation import OpenAIGenerator, ScriptedGenerator
from rag_rl.generation.cached import CachedGenerator
from rag_rl.metrics import token_f1
from rag_rl.prompts import render, render_passages
from rag_rl.reasoning import DecompositionReader, Observation, ReActReader, TopK, f1_reward, rollout
from rag_rl.reasoning.readers import read_observation, read_search
from rag_rl.retrieval import StaticRetriever
from rag_rl.retrieval.history import HistoryEncoder
from rag_rl.tiny import FOLDER
from rag_rl.types import Passage, Query, Question

D1, D2, D3 = (Passage(f"d{i}", f"text {i}") for i in (1, 2, 3))


def step(question, answer, gold, **more):
    return {"question": question, "answer": answer, "gold_doc_id": gold, **more}


# In the form of MuSiQue: two branches that meet, and a number sign that refers to nothing.
BRANCHED = Question(
    "m1",
    "Whose #2 song ... ?",
    ("Ann", "A."),
    ("d1", "d2", "d3"),
    3,
    {
        "decomposition": [
            step("Who sang the #2 song?", "Bo", "d1"),
            step("Elmton >> river", "Mirbrook", "d2"),
            step("Who met #1 at #2?", "Ann", "d3"),
        ]
    },
)


def follow(question, retriever, *, max_hops=5, top_k=3, **more):
    (one,) = rollout([question], reader=DecompositionReader(**more), policy=TopK(retriever, top_k), max_hops=max_hops)
    return one


class TestScripted:
    def test_references_are_filled_in(self):
        one = follow(BRANCHED, StaticRetriever({}, default=[D1, D2, D3]))
        assert [hop.query.text for hop in one.hops] == [
            "Who sang the #2 song?",
            "Elmton >> river",
            "Who met Bo at Mirbrook?",
        ]
        assert [hop.observation for hop in one.hops] == ["Bo", "Mirbrook", "Ann"]
        assert [hop.gold_doc_ids for hop in one.hops] == [("d1",), ("d2",), ("d3",)]
        assert (one.answer, f1_reward(one)) == ("Ann", 1.0)
        assert one.hops[2].query.question == BRANCHED.question
        assert one.hops[2].query.history == (("Who sang the #2 song?", "Bo"), ("Elmton >> river", "Mirbrook"))

    def test_what_refers_to_a_hop_that_was_not_found_is_not_found_either(self):
        one = follow(BRANCHED, StaticRetriever({}, default=[D2, D3]))
        assert [hop.observation for hop in one.hops] == ["", "Mirbrook", ""]
        assert [hop.status for hop in one.hops] == ["not_found", "found", "not_found"]
        assert [hop.success for hop in one.hops] == [False, True, True]
        assert one.hops[2].query.text == "Who met unknown at Mirbrook?"
        assert one.hops[2].query.history[0] == ("Who sang the #2 song?", "not found")
        assert (one.answer, one.failure, f1_reward(one)) == ("", None, 0.0)

    def test_hops_that_max_hops_cuts_off_leave_no_answer(self):
        one = follow(BRANCHED, StaticRetriever({}, default=[D1, D2, D3]), max_hops=2)
        assert (len(one.hops), one.answer) == (2, "")

    def test_the_tiny_world_with_perfect_retrieval(self, tiny, gold_policy):
        policy = gold_policy()
        asked = tiny.questions[:60]
        found = rollout(asked, reader=DecompositionReader(), policy=policy, max_hops=3)
        assert [f1_reward(t) for t in found] == [1.0] * 60
        assert [len(call) for call in policy.calls] == [60, 60]
        for trajectory in found:
            first, second = trajectory.question.meta["decomposition"]
            value = trajectory.question.meta["chain"][1]
            assert trajectory.hops[0].query == Query(first["question"], trajectory.question.question)
            history = ((first["question"], value),)
            assert trajectory.hops[1].query == Query(second["follow_up"], trajectory.question.question, history)
            assert [hop.action for hop in trajectory.hops] == ["action 0", "action 1"]
        assert len({t.hops[1].query.text for t in found}) <= 12, "the same words mean another thing after another hop"

    def test_the_tiny_world_when_a_hop_is_lost(self, tiny, gold_policy):
        for lost in (0, 1):
            found = rollout(
                tiny.questions[:20], reader=DecompositionReader(), policy=gold_policy(lost=(lost,)), max_hops=3
            )
            assert [f1_reward(t) for t in found] == [0.0] * 20
            assert [bool(t.hops[0].observation) for t in found] == [lost == 1] * 20

    def test_in_full_and_without_history(self, tiny):
        reader = DecompositionReader(follow_up=False, history=False)
        found = rollout(tiny.questions[:40], reader=reader, policy=TopK(tiny.retriever, 3), max_hops=2)
        for trajectory in found:
            first, second = trajectory.question.meta["decomposition"]
            value = trajectory.hops[0].observation or "unknown"
            texts = [first["question"], second["question"].replace("#1", value)]
            assert [hop.query for hop in trajectory.hops] == [Query(text) for text in texts]

    def test_history_is_what_finds_a_follow_up(self, tiny):
        """The packaged encoder, frozen: with the state it finds more second hops than with the bare follow-up."""
        retriever = tiny.retriever.with_query_encoder(HistoryEncoder(tiny.encoder))
        found = {
            history: rollout(
                tiny.questions[:100],
                reader=DecompositionReader(history=history),
                policy=TopK(retriever, 3),
                max_hops=2,
            )
            for history in (True, False)
        }
        success = {key: sum(bool(t.hops[1].success) for t in rows) for key, rows in found.items()}
        assert success[True] > success[False]
        for rows in found.values():
            for trajectory in rows:
                reached = [hop.success for hop in trajectory.hops]
                assert bool(trajectory.hops[0].observation) is reached[0]
                assert f1_reward(trajectory) == float(all(reached))

    def test_questions_without_a_decomposition(self):
        bare = [Question(f"q{i}", "?", ("a",), ("d1",)) for i in range(7)]
        retriever = StaticRetriever({}, default=[D1])
        with pytest.raises(DataError, match=r"7 of 8 questions have no decomposition.*'q0', .*'q4' and 2 more"):
            rollout([BRANCHED, *bare, *bare], reader=DecompositionReader(), policy=TopK(retriever, 1), max_hops=2)

    @pytest.mark.parametrize(
        "steps",
        [
            [],
            "Who?",
            ["Who?"],
            [step("Who?", "Bo", None)],
            [step("Who?", "", "d1")],
            [step(" ", "Bo", "d1")],
            [step("Who?", "Bo", "d1"), {"answer": "Bo", "gold_doc_id": "d1"}],
        ],
    )
    def test_decompositions_that_cannot_be_followed(self, steps):
        broken = Question("q7", "?", ("a",), ("d1",), meta={"decomposition": steps})
        with pytest.raises(
            DataError, match="1 of 1 questions have no decomposition with question, answer, gold_doc_id"
        ):
            follow(broken, StaticRetriever({}, default=[D1]))


class TestReading:
    def test_the_generator_reads_the_passages_in_their_order(self):
        generator = ScriptedGenerator(["It says so. Answer: Bo\nTruly.", "<think>hm</think>", "Answer: Ann or Bea"])
        one = follow(
            BRANCHED,
            StaticRetriever({}, default=[D3, D1]),
            generator=generator,
            prompt="tiny_answer",
            max_new_tokens=9,
        )
        asked = ["Who sang the #2 song?", "Elmton >> river", "Who met Bo at unknown?"]
        passages = render_passages([D3, D1])
        assert generator.prompts == [
            [{"role": "user", "content": render("tiny_answer", passages=passages, question=text)}] for text in asked
        ]
        assert [hop.observation for hop in one.hops] == ["Bo", "", "Ann or Bea"]
        assert [hop.status for hop in one.hops] == ["found", "not_found", "found"]
        assert (one.answer, f1_reward(one)) == ("Ann or Bea", token_f1("Ann or Bea", ["Ann"]))

    def test_base_models_get_plain_text_and_only_questions_are_needed(self):
        generator = ScriptedGenerator(["=> Ann"])
        question = Question("q", "Who?", ("Ann",), meta={"decomposition": [{"question": "Who?"}]})
        one = follow(
            question, StaticRetriever({}, default=[D1]), generator=generator, generator_type="base", answer_marker="=>"
        )
        assert generator.prompts == [render("answer", passages="[1] text 1", question="Who?")]
        assert (one.answer, one.hops[0].gold_doc_ids) == ("Ann", ())

    def test_the_follow_up_is_searched_and_the_full_question_is_read(self, tiny, gold_policy):
        generator = ScriptedGenerator(lambda text, number: "Answer: Elmton")
        one, *_ = rollout(
            tiny.questions[:1],
            reader=DecompositionReader(generator, prompt="tiny_answer"),
            policy=gold_policy(),
            max_hops=2,
        )
        second = one.question.meta["decomposition"][1]
        assert one.hops[1].query.text == second["follow_up"]
        assert generator.prompts[1][0]["content"].endswith(f"Question: {second['question'].replace('#1', 'Elmton')}")

    def test_a_group_costs_no_more_than_its_different_prompts(self, tiny, gold_policy):
        inner = ScriptedGenerator(lambda text, number: "Answer: Elmton")
        cached = CachedGenerator(inner)
        for _ in range(2):
            reader = DecompositionReader(cached, prompt="tiny_answer")
            rollout([q for q in tiny.questions[:3] for _ in range(8)], reader=reader, policy=gold_policy(), max_hops=2)
        assert len(inner.prompts) == 6

    def test_the_packaged_reader_reads_what_it_is_shown(self, tiny, gold_policy):
        from rag_rl.generation import TransformersGenerator

        generator = TransformersGenerator.from_pretrained(str(FOLDER / "reader"), device="cpu")
        reader = DecompositionReader(generator, prompt="tiny_answer", max_new_tokens=32)
        scores = {}
        for name, policy in (("shown", gold_policy()), ("lost", gold_policy(lost=(0, 1)))):
            found = rollout(tiny.questions[:40], reader=reader, policy=policy, max_hops=2)
            scores[name] = sum(f1_reward(t) for t in found) / 40
        # Its habits (rag_rl/tiny/reader/README.md) leave it far from 1 even where the gold passage comes first.
        assert scores["shown"] > 0.5
        assert scores["lost"] < 0.15

    def test_a_prompt_without_its_placeholders(self):
        with pytest.raises(ConfigError, match=r"has no \$passages"):
            DecompositionReader(ScriptedGenerator([]), prompt="tiny_closed_book")
        with pytest.raises(ConfigError, match="'no-such'"):
            DecompositionReader(prompt="no-such")


CORPUS = {
    "Where does Falbert live?": [Passage("d1", "Falbert lives in Elmton.")],
    "Which river does Elmton lie on?": [Passage("d2", "Elmton lies on the Mirbrook.")],
}
RIVER = Question("q1", "Which river does the home of Falbert lie on?", ("Mirbrook",), ("d1", "d2"))


def plays_along(text: str, number: int = 0) -> str:
    """A model that does its part in all three prompts."""
    del number
    if "SEARCH:" in text:
        if "(none)" in text:
            return "<think>two facts</think>The home is missing.\nSEARCH: Where does Falbert live?"
        return "FINISH" if "Mirbrook" in text else "SEARCH: Which river does Elmton lie on?"
    if '"status"' in text:
        answer = "Elmton" if "lives in" in text else "Mirbrook"
        return f'Passage 1 says it.\n{{"status": "FOUND", "answer": "{answer}"}}'
    return "It follows from the searches.\nAnswer: the Mirbrook"


def react(questions, generator, *, retriever=None, max_hops=5, **more):
    policy = TopK(retriever or StaticRetriever(CORPUS, default=[Passage("d9", "Nothing.")]), 2)
    return rollout(questions, reader=ReActReader(generator, **more), policy=policy, max_hops=max_hops)


class TestReAct:
    def test_a_whole_trajectory(self):
        generator = ScriptedGenerator(plays_along)
        (one,) = react([RIVER], generator)
        first, second = one.hops
        assert first.query == Query("Where does Falbert live?", RIVER.question)
        assert second.query == Query(
            "Which river does Elmton lie on?", RIVER.question, (("Where does Falbert live?", "Elmton"),)
        )
        assert [(h.observation, h.status) for h in one.hops] == [("Elmton", "found"), ("Mirbrook", "found")]
        assert first.note.endswith("SEARCH: Where does Falbert live?")
        assert (one.answer, one.note, f1_reward(one)) == ("the Mirbrook", "FINISH", 1.0)
        assert first.gold_doc_ids == ("d1", "d2")

        lines = ["1. Where does Falbert live? -> Elmton", "2. Which river does Elmton lie on? -> Mirbrook"]
        expected = [
            render("react_query", question=RIVER.question, history="(none)"),
            render("react_observe", query=first.query.text, passages="[1] Falbert lives in Elmton."),
            render("react_query", question=RIVER.question, history=lines[0]),
            render("react_observe", query=second.query.text, passages="[1] Elmton lies on the Mirbrook."),
            render("react_query", question=RIVER.question, history="\n".join(lines)),
            render("react_answer", question=RIVER.question, history="\n".join(lines)),
        ]
        assert generator.prompts == [[{"role": "user", "content": text}] for text in expected]

    def test_a_group_asks_each_thing_once(self):
        generator = ScriptedGenerator(plays_along)
        found = react([RIVER] * 8, generator)
        assert len(generator.prompts) == 6
        assert [f1_reward(t) for t in found] == [1.0] * 8

    def test_history_off_is_off_for_the_retriever_only(self):
        generator = ScriptedGenerator(plays_along)
        (one,) = react([RIVER], generator, history=False)
        assert [hop.query for hop in one.hops] == [Query(text) for text in CORPUS]
        assert "Where does Falbert live? -> Elmton" in generator.prompts[2][0]["content"]

    def test_replies_that_hold_nothing(self):
        (one,) = react([RIVER], ScriptedGenerator(["I do not know what to do.", "Answer:"]))
        assert (one.searched, one.answer, one.failure, f1_reward(one)) == (False, "", None, 0.0)
        (two,) = react(
            [RIVER], ScriptedGenerator(["SEARCH: x", "no json", "SEARCH: y", "{}", "Answer: Elm"]), max_hops=2
        )
        assert [(hop.observation, hop.status) for hop in two.hops] == [("", "ambiguous")] * 2
        assert two.hops[1].query.history == (("x", "unclear"),)
        assert two.answer == "Elm"

    def test_base_models_get_plain_text(self):
        generator = ScriptedGenerator(plays_along)
        react([RIVER], generator, generator_type="base")
        assert all(isinstance(prompt, str) for prompt in generator.prompts)

    @pytest.mark.parametrize(
        ("change", "missing"),
        [
            ({"query_prompt": "react_observe"}, r"\$question and no \$history"),
            ({"observe_prompt": "answer"}, r"\$query"),
            ({"answer_prompt": "answer"}, r"\$history"),
        ],
    )
    def test_prompts_without_their_placeholders(self, change, missing):
        with pytest.raises(ConfigError, match=f"has no {missing}"):
            ReActReader(ScriptedGenerator([]), **change)

    def test_one_refused_call_drops_its_trajectory(self, serve):
        url, _ = serve(lambda text: None if "Halbert" in text else plays_along(text))
        generator = OpenAIGenerator("m", base_url=url, max_retries=0)
        refused = Question("q2", "Which river does the home of Halbert lie on?", ("Elmbrook",))
        questions = [RIVER, refused, RIVER, Question("q3", RIVER.question + " Say it.", ("Mirbrook",))]
        found = react(questions, generator)
        assert [f1_reward(t) for t in found] == [1.0, None, 1.0, 1.0]
        assert "content filter" in found[1].failure
        generator.close()

    def test_a_dead_endpoint_stops_the_run(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        generator = OpenAIGenerator("m", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0)
        for number in (2, 8):
            questions = [Question(f"q{i}", f"Who is {i}?", ("Ann",)) for i in range(number)]
            with pytest.raises(BackendError, match=rf"127\.0\.0\.1:{port}/v1"):
                react(questions, generator)
        generator.close()


@pytest.mark.parametrize(
    ("reply", "query"),
    [
        ("SEARCH: Who rules Elmton?", "Who rules Elmton?"),
        ("I need it.\n\n**Search:** Who rules Elmton?\nFINISH", "Who rules Elmton?"),
        ('- search:\n  Who wrote "Mira"?', 'Who wrote "Mira"?'),
        ("SEARCH: <Who rules Elmton?>", "Who rules Elmton?"),
        ("FINISH\nSEARCH: Who rules Elmton?", None),
        ("Finish.", None),
        ("SEARCH:", None),
        ("My search: none", None),
        ("SEARCH results tell it.", None),
        ("<think>SEARCH: a</think>FINISH", None),
        ("<think>SEARCH: a</think>SEARCH: b", "b"),
        ("<think>SEARCH: a", None),
        ("", None),
    ],
)
def test_read_search(reply, query):
    assert read_search(reply) == query


@pytest.mark.parametrize(
    ("reply", "text", "status"),
    [
        ('{"status": "FOUND", "answer": "Mira"}', "Mira", "found"),
        ('It says {so}. ```json\n{"status": "found", "answer": "Mira\\n Brook"}\n```', "Mira Brook", "found"),
        ('{"status": "FOUND", "answer": "a"} no: {"status": "AMBIGUOUS", "answer": "b"}', "b", "ambiguous"),
        ('{"status": "FOUND", "answer": 1907}', "1907", "found"),
        ('{"status": "NOT_FOUND", "answer": ""}', "", "not_found"),
        ('{"status": "NOT_FOUND", "answer": "none"}', "", "not_found"),
        ('{"status": "NOT_FOUND"}', "", "not_found"),
        ('{"status": "FOUND", "answer": ""}', "", "ambiguous"),
        ('{"status": "MAYBE", "answer": "Mira"}', "", "ambiguous"),
        ('{"status": "FOUND", "answer": ["Mira"]}', "", "ambiguous"),
        ('{"status": "FOUND", "answer": "Mira"', "", "ambiguous"),
        ('{"answer": "Mira"}', "", "ambiguous"),
        ('<think>{"status": "FOUND", "answer": "Mira"}', "", "ambiguous"),
        ("Mira", "", "ambiguous"),
        ("", "", "ambiguous"),
    ],
)
def test_read_observation(reply, text, status):
    assert read_observation(reply) == Observation(text, status)


def test_uncertain_answers_are_marked_for_the_model():
    verdict = json.dumps({"status": "AMBIGUOUS", "answer": "Elm"})
    generator = ScriptedGenerator(["SEARCH: x", verdict, "Answer: Elm"])
    react([RIVER], generator, max_hops=1)
    assert generator.prompts[-1][0]["content"].endswith("1. x -> Elm (uncertain)")
