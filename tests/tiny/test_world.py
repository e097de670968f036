"""The synthetic world is seeded, closed, and asks nothing that cannot be answered."""

from __future__ import annotations

import itertools
import random

import pytest

from rag_rl.metrics import contains_match
from rag_rl.tiny.world import (
    KINDS,
    NOUNS,
    OF_KIND,
    PREFIXES,
    REGIONS,
    RELATION,
    RELATIONS,
    SUFFIXES,
    draw_world,
    names,
    passage_text,
    questions,
    statement,
)

SIZES = {"person": 20, "town": 12, "guild": 8, "river": 8}
WORLD = draw_world(7, region="demo", sizes=SIZES)


def asked(hops, seed=3):
    return list(questions(WORLD, hops=hops, rng=random.Random(seed)))


def test_the_same_seed_gives_the_same_world():
    assert draw_world(7, region="demo", sizes=SIZES) == WORLD
    assert draw_world(8, region="demo", sizes=SIZES).entities != WORLD.entities
    assert list(questions(WORLD, hops=2, rng=random.Random(3))) == asked(2)
    assert list(questions(WORLD, hops=2, rng=random.Random(4))) != asked(2)


def test_the_seed_alone_counts():
    random.seed(1)
    before = random.getstate()
    draw_world(7, region="demo", sizes=SIZES, rival_share=0.5)
    assert random.getstate() == before


def test_regions_share_no_name():
    everything = [name for region in REGIONS for kind in KINDS for name in names(kind, region)]
    assert len(everything) == len(set(everything)) == len(PREFIXES) * sum(map(len, SUFFIXES.values()))
    assert all(len(names(kind, region)) >= 60 for region in REGIONS for kind in KINDS)


def test_every_name_part_is_seen_in_training():
    seen = [name for kind in KINDS for name in names(kind, "train")]
    assert all(any(name.startswith(prefix) for name in seen) for prefix in PREFIXES)
    for kind in KINDS:
        assert all(any(name.endswith(suffix) for name in names(kind, "train")) for suffix in SUFFIXES[kind])


def test_the_ending_tells_the_kind():
    for one, other in itertools.combinations(KINDS, 2):
        assert not {name for region in REGIONS for name in names(one, region)} & {
            name for region in REGIONS for name in names(other, region)
        }


def test_every_name_splits_into_its_parts_in_one_way():
    endings = set(itertools.chain(*SUFFIXES.values()))
    for kind in KINDS:
        for name in (name for region in REGIONS for name in names(kind, region)):
            ((_, suffix),) = [
                (p, name[len(p) :]) for p in PREFIXES if name.startswith(p) and name[len(p) :] in endings
            ]
            assert suffix in SUFFIXES[kind]


def test_every_name_is_exactly_two_tokens_and_nearly_always_its_parts(tokenizer):
    count, otherwise = 0, set()
    for kind in KINDS:
        for name in (name for region in REGIONS for name in names(kind, region)):
            prefix = next(p for p in PREFIXES if name.startswith(p) and name[len(p) :] in SUFFIXES[kind])
            count += 1
            for space in ("", "Ġ"):  # at the beginning of a text, and inside one
                tokens = tokenizer.tokenize((space + name).replace("Ġ", " "))
                assert len(tokens) == 2, tokens
                if tokens != [space + prefix, name[len(prefix) :]]:
                    otherwise.add(name)
    # Where another piece of the vocabulary begins the name ("No|ra..." for "Nor|a...") both ways cost the same.
    assert len(otherwise) < 0.01 * count, sorted(otherwise)


@pytest.mark.parametrize(
    "sentence", ["{} meets in Falton.", "The home of {} is Falton.", "[1] {}", "it is {}, I am sure."]
)
def test_a_name_stays_two_tokens_in_any_sentence(tokenizer, sentence):
    around = len(tokenizer(sentence.format(names("town", "train")[0])).input_ids)
    for kind in KINDS:
        for name in names(kind, "heldout"):
            assert len(tokenizer(sentence.format(name)).input_ids) == around


def test_words_of_the_world_are_single_tokens(tokenizer):
    for noun in itertools.chain(*NOUNS.values()):
        assert len(tokenizer.tokenize(f" {noun}")) == 1
    nouns = list(itertools.chain(*NOUNS.values()))
    assert len(nouns) == len(set(nouns))


def test_sizes_are_kept():
    for kind, size in SIZES.items():
        assert sum(entity.kind == kind for entity in WORLD.entities.values()) == size
    assert len(WORLD.passages) == sum(SIZES.values())
    assert {p.doc_id for p in WORLD.passages} == {f"demo/{name}" for name in WORLD.entities}


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_facts_are_closed_in_the_world(share):
    world = draw_world(1, region="heldout", sizes=SIZES, rival_share=share)
    for entity in world.entities.values():
        assert set(entity.facts) == {relation.name for relation in OF_KIND[entity.kind]}
        for name, value in entity.facts.items():
            target = RELATION[name].target
            assert world.entities[value].kind == target if target in KINDS else value in NOUNS[target]
            assert value != entity.name


def test_a_passage_tells_every_fact_once(facts_of):
    for entity in WORLD.entities.values():
        told = facts_of(entity.text)
        assert sorted(told) == sorted((name, entity.name, value) for name, value in entity.facts.items())


def test_wordings_and_order_differ():
    entity = next(iter(WORLD.entities.values()))
    texts = {passage_text(entity, random.Random(seed)) for seed in range(1000)}
    assert len(texts) == 6 * 8  # orders of three facts, two wordings each


def test_the_restated_fact_is_the_first_phrasing(facts_of):
    for relation in RELATIONS:
        value = "Falton" if relation.target in KINDS else NOUNS[relation.target][0]
        assert facts_of(statement(relation, "Elmwyn", value)) == [(relation.name, "Elmwyn", value)]


def test_too_many_names():
    with pytest.raises(ValueError, match=r"region 'demo' has \d+ names of kind 'river', 100000 were asked for"):
        draw_world(1, region="demo", sizes={**SIZES, "river": 100_000})


def test_rivals_are_alike():
    def alike(share):
        world = draw_world(5, region="train", sizes=SIZES, rival_share=share)
        return sum(
            a.kind == b.kind and a.name[:3] == b.name[:3]
            for a, b in itertools.combinations(world.entities.values(), 2)
        )

    assert alike(0.9) > 2 * alike(0.0)


@pytest.mark.parametrize("hops", [1, 2])
def test_questions_are_complete_and_unique(hops):
    found = asked(hops)
    assert len({q.qid for q in found}) == len({tuple(q.meta["chain"][:1] + q.meta["relations"]) for q in found})
    assert len({q.qid for q in found}) == len(found)
    entities = WORLD.entities.values()
    if hops == 1:
        assert len(found) == sum(len(OF_KIND[e.kind]) for e in entities)
    else:
        possible = sum(len(OF_KIND[r.target]) for e in entities for r in OF_KIND[e.kind] if r.target in KINDS)
        assert 0.9 * possible < len(found) <= possible


@pytest.mark.parametrize("hops", [1, 2])
def test_no_answer_stands_in_its_own_question(hops):
    for question in asked(hops):
        assert contains_match(question.question, question.answers) == 0.0, question
        assert question.meta["chain"][0] in question.question


@pytest.mark.parametrize("hops", [1, 2])
def test_gold_passages_exist_and_hold_the_evidence(hops, facts_of):
    texts = {p.doc_id: p.text for p in WORLD.passages}
    for question in asked(hops):
        assert question.hops == hops == len(question.gold_doc_ids)
        told = [fact for doc_id in question.gold_doc_ids for fact in facts_of(texts[doc_id])]
        chain = question.meta["chain"]
        for i, relation in enumerate(question.meta["relations"]):
            assert (relation, chain[i], chain[i + 1]) in told
        assert question.answers == (chain[-1],)


@pytest.mark.parametrize("hops", [1, 2])
def test_decompositions_lead_to_the_answer(hops):
    for question in asked(hops):
        parts, answers = question.meta["decomposition"], []
        assert len(parts) == hops
        for i, part in enumerate(parts):
            # "#1" stands for the first answer; put in, it is a question of its own about one fact.
            text = part["question"]
            assert ("#" in text) == (i > 0)
            for number, answer in enumerate(answers, start=1):
                text = text.replace(f"#{number}", answer)
            relation = RELATION[question.meta["relations"][i]]
            subject = question.meta["chain"][i]
            assert text == relation.questions[0].format(s=subject)
            assert WORLD.entities[subject].facts[relation.name] == part["answer"]
            assert part["gold_doc_id"] == question.gold_doc_ids[i] == WORLD.doc_id(subject)
            assert part["follow_up"] == relation.follow_up
            answers.append(part["answer"])
        assert answers[-1] == question.answers[0]
