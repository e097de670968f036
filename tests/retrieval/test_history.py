from __future__ import annotations

import math

import numpy as np
import pytest

from rag_rl.errors import ConfigError
from rag_rl.prompts import load_prompt
from rag_rl.retrieval import CachedRetriever, Encoder, SentenceEncoder, build_index, open_index
from rag_rl.retrieval.history import HistoryEncoder, render_state, render_states, token_counter
from rag_rl.types import Query

QUESTION = "Which fish is the river of the home of Falbert full of?"
HOPS = (("Where does Falbert live?", "Elmton"), ("Elmton >> river", "Mirbrook"), ("Who built it?", "not found"))
QUERY = Query("What is it full of?", QUESTION, HOPS)
FULL = (
    f"Question: {QUESTION}\n"
    "History: Where does Falbert live? Elmton; Elmton >> river: Mirbrook; Who built it? not found\n"
    "Query: What is it full of?"
)


class Words:
    """Counts words as tokens, and its calls."""

    def __init__(self):
        self.calls = 0
        self.texts = 0

    def __call__(self, texts):
        self.calls += 1
        self.texts += len(texts)
        return [len(text.split()) for text in texts]


def test_three_labelled_fields_the_query_last():
    assert render_state(QUERY) == FULL


def test_before_the_first_hop_there_is_no_history_line():
    assert render_state(Query("Who?", "Who built it?")) == "Question: Who built it?\nQuery: Who?"
    assert render_state(Query("Who?", history=HOPS[:1])) == "History: Where does Falbert live? Elmton\nQuery: Who?"


@pytest.mark.parametrize("bare", ["Who?", Query("Who?")])
def test_a_query_without_a_state_is_its_text(bare):
    assert render_state(bare) == "Who?"


def test_history_can_be_switched_off():
    assert render_states([QUERY, "Who?"], history=False) == ["What is it full of?", "Who?"]


@pytest.mark.parametrize("limit", range(1, 37))
def test_hops_give_way_first_then_the_question_never_the_query(limit):
    state = render_state(QUERY, count_tokens=Words(), max_tokens=limit)
    words = QUESTION.split()
    # Labels cost a word each, a hop its words.
    if limit >= 34:
        expected = FULL
    elif limit >= 29:
        expected = FULL.replace("Where does Falbert live? Elmton; ", "")
    elif limit >= 25:
        expected = FULL.replace("Where does Falbert live? Elmton; Elmton >> river: Mirbrook; ", "")
    elif limit >= 19:
        expected = f"Question: {QUESTION}\nQuery: {QUERY.text}"
    elif limit >= 8:
        expected = f"Question: {' '.join(words[: limit - 7])}\nQuery: {QUERY.text}"
    elif limit >= 6:
        expected = f"Query: {QUERY.text}"
    else:
        expected = QUERY.text  # 5 words, kept whole below that as well
    assert state == expected


def test_many_queries_cost_few_calls():
    long = [Query(f"q{i}?", " ".join(f"w{j}" for j in range(i)), HOPS[: i % 4]) for i in range(200)]
    queries = ["plain", *long, Query("bare")]
    count = Words()
    states = render_states(queries, count_tokens=count, max_tokens=20)
    assert states == [render_state(query, count_tokens=Words(), max_tokens=20) for query in queries]
    assert max(len(state.split()) for state in states) == 20
    steps = math.ceil(math.log2(max(len(q.question.split()) + len(q.history) for q in long)))
    assert count.calls <= 1 + steps
    # What fits at once is counted once, and what has no state not at all.
    few = Words()
    render_states(["plain", Query("bare"), Query("q?", "w w")], count_tokens=few, max_tokens=20)
    assert (few.calls, few.texts) == (1, 1)
    assert render_states([], count_tokens=few, max_tokens=1) == []


def test_the_template_can_be_replaced(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Instruct: find it for $$5\n${history}\nAsked: $question / $query\n", encoding="utf-8")
    assert render_state(Query("Who?", "Who built it?"), template=str(path)) == (
        "Instruct: find it for $5\nAsked: Who built it? / Who?"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Question: $question", r"has no \$query"),
        ("$query $passages", r"asks for \$passages, but a state has only \$question, \$history, \$query"),
        ("$query costs 5$", r"write \$\$ for a dollar sign"),
    ],
)
def test_a_template_that_does_not_fit(tmp_path, text, message):
    path = tmp_path / "mine.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        render_state(QUERY, template=str(path))


def test_bad_settings():
    with pytest.raises(ConfigError, match="at least 1 token, got max_tokens 0"):
        render_state(QUERY, count_tokens=Words(), max_tokens=0)
    with pytest.raises(ConfigError, match="needs count_tokens"):
        render_state(QUERY, max_tokens=5)
    with pytest.raises(ConfigError, match="'no-such'"):
        render_state(QUERY, template="no-such")


def test_token_counter_counts_prompt_and_text():
    from rag_rl.tiny.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    count = token_counter(tokenizer, prompt="query: ")
    assert count([]) == []
    assert count(["Who?", FULL]) == [len(tokenizer(f"query: {text}")["input_ids"]) for text in ("Who?", FULL)]


def test_the_tiny_encoder_reads_the_labels_as_words():
    from rag_rl.tiny.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    pieces = [
        tokenizer.decode([i]) for i in tokenizer(render_state(Query("Who?", "Who?", (("Who?", "tin"),))))["input_ids"]
    ]
    assert pieces == [
        "Question", ":", " Who", "?", "\n", "History", ":", " Who", "?", " tin", "\n", "Query", ":", " Who", "?",
    ]  # fmt: skip


class TestHistoryEncoder:
    @pytest.fixture
    def folder(self, tmp_path, passages, encoder):
        pytest.importorskip("faiss", reason="faiss is not installed")
        build_index(passages, encoder, tmp_path / "index", progress=False)
        return tmp_path / "index"

    def test_it_is_the_encoder_for_everything_but_states(self, encoder):
        aware = HistoryEncoder(encoder)
        assert isinstance(aware, Encoder)
        assert (aware.dimension, aware.fingerprint, aware.settings) == (32, encoder.fingerprint, encoder.settings)
        np.testing.assert_array_equal(aware.encode_documents(["a", "b"]), encoder.encode_documents(["a", "b"]))
        np.testing.assert_array_equal(
            aware.encode_queries(["who", Query("who"), QUERY]), encoder.encode_queries(["who", "who", FULL])
        )

    def test_switched_off_it_is_the_encoder(self, encoder):
        off = HistoryEncoder(encoder, enabled=False)
        np.testing.assert_array_equal(off.encode_queries([QUERY]), encoder.encode_queries([QUERY.text]))

    def test_it_opens_the_encoders_index_and_searches_by_history(self, folder, encoder):
        plain, aware = open_index(folder, encoder), open_index(folder, HistoryEncoder(encoder))
        queries = [Query("what", "who", (("where", f"alpha{i} beta{i * 7} gamma{i * 13}"),)) for i in range(20)]
        found = aware.search(queries, top_k=3)
        assert found == plain.search([render_state(query) for query in queries], top_k=3)
        assert sum(hits[0].passage.doc_id == f"d{i}" for i, hits in enumerate(found)) >= 5, "chance: 0.07"
        off = aware.with_query_encoder(HistoryEncoder(encoder, enabled=False))
        assert off.search(queries, top_k=3) == plain.search(["what"] * 20, top_k=3)

    def test_answers_with_and_without_history_are_never_mixed(self, folder, encoder, tmp_path):
        (tmp_path / "mine.txt").write_text("$question $history $query")
        plain = open_index(folder, encoder)
        makers = {
            "history": HistoryEncoder(encoder),
            "none": HistoryEncoder(encoder, enabled=False),
            "another template": HistoryEncoder(encoder, template=str(tmp_path / "mine.txt")),
            "shorter": HistoryEncoder(encoder, max_tokens=19, count_tokens=Words()),
        }
        retrievers = {name: plain.with_query_encoder(maker) for name, maker in makers.items()}
        assert len({plain.fingerprint, *(r.fingerprint for r in retrievers.values())}) == 5
        again = plain.with_query_encoder(HistoryEncoder(encoder))
        assert again.fingerprint == retrievers["history"].fingerprint
        assert open_index(folder, HistoryEncoder(encoder)).fingerprint == again.fingerprint, "it opens, and differs"
        # The same folder of answers under both: each gets its own.
        queries = [Query("what", "who", (("where", f"alpha{i} beta{i * 7} gamma{i * 13}"),)) for i in range(20)]
        found = {
            name: CachedRetriever(retrievers[name], tmp_path / "cache").search(queries, top_k=3)
            for name in ("history", "none")
        }
        assert found["history"] == retrievers["history"].search(queries, top_k=3)
        assert found["none"] == retrievers["none"].search(queries, top_k=3)
        assert found["history"] != found["none"]

    def test_a_template_that_changes_under_its_name_changes_the_fingerprint(self, encoder, tmp_path):
        prints = set()
        for text in ("$question $query", "$query $question"):
            load_prompt.cache_clear()  # another process
            (tmp_path / "mine.txt").write_text(text)
            prints.add(HistoryEncoder(encoder, template=str(tmp_path / "mine.txt")).query_fingerprint)
        assert len(prints) == 2

    def test_an_encoder_without_a_tokenizer(self, encoder):
        with pytest.raises(ConfigError, match="needs count_tokens"):
            HistoryEncoder(encoder, max_tokens=8)
        aware = HistoryEncoder(encoder, max_tokens=19, count_tokens=Words())
        assert aware.states([QUERY]) == [f"Question: {QUESTION}\nQuery: {QUERY.text}"]
        assert HistoryEncoder(encoder, count_tokens=Words()).states([QUERY]) == [FULL]
        with pytest.raises(ConfigError, match="'no-such'"):
            HistoryEncoder(encoder, template="no-such")

    def test_the_packaged_encoder_never_cuts_a_query(self):
        from rag_rl.tiny import FOLDER

        encoder = SentenceEncoder(FOLDER / "encoder", devices="cpu")
        aware = HistoryEncoder(encoder)
        assert aware.max_tokens == encoder.max_length == 256
        hops = tuple((f"Where does Falbert live in the year {i}?", f"Elmton {i}") for i in range(40))
        query = Query("Which river is it?", QUESTION, hops)
        (state,) = aware.states([query])
        assert 240 < token_counter(encoder.model.tokenizer)([state])[0] <= 256
        assert state.startswith(f"Question: {QUESTION}\n")
        assert state.endswith("Elmton 39\nQuery: Which river is it?")
        other = Query("What is the home of Falbert?", QUESTION, hops)
        vectors = aware.encode_queries([query, other])
        np.testing.assert_allclose(vectors[0], encoder.encode_queries([state])[0], atol=1e-6)
        assert vectors[0] @ vectors[1] < 0.999, "the end of the text, the query, was read"
        prompted = SentenceEncoder(FOLDER / "encoder", query_prompt="Query: Query: Query: ", devices="cpu")
        assert len(HistoryEncoder(prompted).states([query])[0]) < len(state)
        with pytest.raises(ConfigError, match="at most 256, the encoder's own length, got 257"):
            HistoryEncoder(encoder, max_tokens=257)
