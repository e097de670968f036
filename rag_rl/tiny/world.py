"""A small synthetic world: people, towns, guilds and rivers, one passage each, questions with exact answers.

Worlds are seeded. Names are two-part (``Fal`` + ``ton``) and every two-part name belongs to exactly one *region*
(training, demo, held-out), so worlds of different regions share no entity, while every name part is seen in training.
The ending of a name tells its kind (``-ton`` is a town), as in many real languages.

Because everything is known, an oracle can judge any answer, and process rewards are exact.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from rag_rl.types import Passage, Question

# Few beginnings and many endings, so that the last piece of a name, which stands right before its fact, carries most
# of its identity. Meant to make binding easier for a small transformer; not shown apart (docs/decisions.md).
# A test checks that every name splits in one way only.
PREFIXES = tuple(
    "Ald Bel Bran Cor Dal Dun Elm Fal Gar Gil Hal Jor Kel Lor Mar Nor Os Quin Ral Sel Tam Ul Ver Wal".split()
)
MIDDLES = tuple("a be da e fi ga ho i ka le ma mi na ne o pa ra ri sa so ta u va ze".split())
CODAS = {
    "person": ("dric", "bert", "lin"),
    "town": ("ton", "ham", "wick"),
    "guild": ("hold", "ward", "crest"),
    "river": ("brook", "beck", "water"),
}
SUFFIXES: dict[str, tuple[str, ...]] = {
    kind: tuple(middle + coda for middle in MIDDLES for coda in codas) for kind, codas in CODAS.items()
}
NOUNS: dict[str, tuple[str, ...]] = {
    "craft": tuple("weaver miller baker potter smith mason tanner cooper scribe sailor hunter painter".split()),
    "goods": tuple("amber tin wool salt honey glass silk cheese paper copper marble candles".split()),
    "emblem": tuple("heron anchor lion rose wolf bell crown stag raven tower key serpent".split()),
    "fish": tuple("trout pike perch eel salmon carp bream roach tench barbel".split()),
    "colour": tuple("green brown black silver blue yellow grey red".split()),
}
REGIONS = ("train", "demo", "heldout")


@dataclass(frozen=True, slots=True)
class Relation:
    """One fact that every entity of a kind has.

    Attributes:
        name: unique over all kinds.
        kind: kind of the subject.
        target: kind of the value: an entity kind, or a key of ``NOUNS``.
        phrasings: sentences with ``{s}`` and ``{v}``; the first is the one that answers restate. What tells the
            relation stands within five tokens before the value, the reach of one convolution of the tiny model.
        questions: ways to ask for the value, with ``{s}``.
        noun: the value as a noun phrase of the subject, for questions over two hops.
        follow_up: the question when the subject is only pointed at ("it"), as in a conversation.
    """

    name: str
    kind: str
    target: str
    phrasings: tuple[str, ...]
    questions: tuple[str, ...]
    noun: str
    follow_up: str


RELATIONS = (
    Relation(
        "home",
        "person",
        "town",
        ("{s} lives in {v}.", "The home of {s} is {v}."),
        ("Where does {s} live?", "In which town does {s} live?"),
        "the home of {s}",
        "Where is the home?",
    ),
    Relation(
        "guild",
        "person",
        "guild",
        ("{s} belongs to {v}.", "The guild of {s} is {v}."),
        ("Which guild does {s} belong to?", "What is the guild of {s}?"),
        "the guild of {s}",
        "Which guild is it?",
    ),
    Relation(
        "craft",
        "person",
        "craft",
        ("{s} works as a {v}.", "{s} is by craft a {v}."),
        ("What does {s} work as?", "What is the craft of {s}?"),
        "the craft of {s}",
        "What is the craft?",
    ),
    Relation(
        "river",
        "town",
        "river",
        ("{s} lies on the {v}.", "The river of {s} is {v}."),
        ("Which river does {s} lie on?", "What is the river of {s}?"),
        "the river of {s}",
        "Which river is it?",
    ),
    Relation(
        "goods",
        "town",
        "goods",
        ("{s} is known for {v}.", "The pride of {s} is {v}."),
        ("What is {s} known for?", "What is the pride of {s}?"),
        "the pride of {s}",
        "What is it known for?",
    ),
    Relation(
        "mayor",
        "town",
        "person",
        ("{s} is ruled by {v}.", "The mayor of {s} is {v}."),
        ("Who rules {s}?", "Who is the mayor of {s}?"),
        "the mayor of {s}",
        "Who is in charge?",
    ),
    Relation(
        "seat",
        "guild",
        "town",
        ("{s} meets in {v}.", "The seat of {s} is {v}."),
        ("Where does {s} meet?", "What is the seat of {s}?"),
        "the seat of {s}",
        "Where is the seat?",
    ),
    Relation(
        "master",
        "guild",
        "person",
        ("{s} is led by {v}.", "The master of {s} is {v}."),
        ("Who leads {s}?", "Who is the master of {s}?"),
        "the master of {s}",
        "Who is in charge?",
    ),
    Relation(
        "emblem",
        "guild",
        "emblem",
        ("{s} bears a {v}.", "{s} has as emblem a {v}."),
        ("What does {s} bear?", "What is the emblem of {s}?"),
        "the emblem of {s}",
        "What is the emblem?",
    ),
    Relation(
        "fish",
        "river",
        "fish",
        ("{s} is full of {v}.", "The fish of {s} is {v}."),
        ("What is {s} full of?", "What is the fish of {s}?"),
        "the fish of {s}",
        "What is it full of?",
    ),
    Relation(
        "colour",
        "river",
        "colour",
        ("{s} runs {v}.", "The colour of {s} is {v}."),
        ("What colour does {s} run?", "What is the colour of {s}?"),
        "the colour of {s}",
        "What colour is it?",
    ),
    Relation(
        "ferry",
        "river",
        "town",
        ("{s} is crossed at {v}.", "{s} has its ferry at {v}."),
        ("Where is {s} crossed?", "Where is the ferry of {s}?"),
        "the ferry of {s}",
        "Where is the ferry?",
    ),
)
RELATION = {relation.name: relation for relation in RELATIONS}
KINDS = tuple(SUFFIXES)
OF_KIND = {kind: tuple(r for r in RELATIONS if r.kind == kind) for kind in KINDS}


@dataclass(slots=True)
class Entity:
    """A person, town, guild or river with one value for each relation of its kind, and its passage."""

    name: str
    kind: str
    facts: dict[str, str] = field(default_factory=dict)
    text: str = ""


@cache
def names(kind: str, region: str) -> tuple[str, ...]:
    """All names of a kind that belong to one region: six parts of eight for training, one each for the others.

    Args:
        kind: one of ``KINDS``.
        region: one of ``REGIONS``.

    Returns:
        Two-part names, in a fixed order.
    """
    part = {"demo": (6,), "heldout": (7,), "train": (0, 1, 2, 3, 4, 5)}[region]
    return tuple(
        prefix + suffix
        for i, prefix in enumerate(PREFIXES)
        for j, suffix in enumerate(SUFFIXES[kind])
        if (3 * i + 5 * j + i // 8 + j // 8) % 8 in part
    )


@dataclass(slots=True)
class World:
    """A closed set of entities whose facts point only at entities of the same world.

    Attributes:
        entities: by name, in creation order.
        seed: what the world was drawn with.
    """

    entities: dict[str, Entity]
    seed: int
    region: str

    @property
    def passages(self) -> list[Passage]:
        """One passage an entity; the document id is the region and the name."""
        return [Passage(self.doc_id(e.name), e.text) for e in self.entities.values()]

    def doc_id(self, name: str) -> str:
        """Document id of an entity of this world."""
        return f"{self.region}/{name}"


def statement(relation: Relation, subject: str, value: str) -> str:
    """A fact in the phrasing that answers restate.

    Args:
        relation: which fact.
        subject: whose.
        value: its value.

    Returns:
        One sentence.
    """
    return relation.phrasings[0].format(s=subject, v=value)


def draw_world(
    seed: int, *, region: str, sizes: dict[str, int], rival_share: float = 0.0, alike_in: str = "beginning"
) -> World:
    """Draws a world: names, facts and the wording of each passage.

    Args:
        seed: any integer; the same one gives the same world.
        region: which names may be used, one of ``REGIONS``.
        sizes: how many entities of each kind, at least one each.
        rival_share: probability that a new name is drawn among those like an earlier one of its kind, in [0, 1].
        alike_in: what "like" means: the same ``"beginning"``, or the same part in ``"either"`` place.

    Returns:
        The world.

    Raises:
        ValueError: the region has too few names of a kind.
    """
    rng = random.Random(f"{region}/{seed}")
    chosen: dict[str, list[str]] = {}
    for kind in KINDS:
        pool = names(kind, region)
        if sizes[kind] > len(pool):
            raise ValueError(f"region {region!r} has {len(pool)} names of kind {kind!r}, {sizes[kind]} were asked for")
        if rival_share:
            chosen[kind] = _with_rivals(rng, pool, sizes[kind], rival_share, alike_in)
        else:
            chosen[kind] = rng.sample(pool, sizes[kind])
    entities = {name: Entity(name, kind) for kind in KINDS for name in chosen[kind]}
    for entity in entities.values():
        for relation in OF_KIND[entity.kind]:
            values: Sequence[str] = chosen.get(relation.target) or NOUNS[relation.target]
            entity.facts[relation.name] = rng.choice(values)
        entity.text = passage_text(entity, rng)
    return World(entities, seed, region)


def _with_rivals(rng: random.Random, pool: Sequence[str], size: int, share: float, alike_in: str) -> list[str]:
    picked = [rng.choice(pool)]
    while len(picked) < size:
        name = rng.choice(alike(rng.choice(picked), tuple(pool), alike_in) if rng.random() < share else pool)
        if name not in picked:
            picked.append(name)
    return picked


@cache
def alike(name: str, pool: tuple[str, ...], alike_in: str) -> tuple[str, ...]:
    """Names that are easily taken for another one.

    Args:
        name: of any kind; itself among the result where it is in the pool.
        pool: names to choose from.
        alike_in: ``"beginning"``, or ``"either"`` part.

    Returns:
        Those that share that part with it, in the order of the pool.
    """
    start, ending = name_parts(name)
    if alike_in == "beginning":
        return tuple(other for other in pool if name_parts(other)[0] == start)
    return tuple(other for other in pool if start == name_parts(other)[0] or ending == name_parts(other)[1])


@cache
def name_parts(name: str) -> tuple[str, str]:
    """Splits a name into its two parts.

    Args:
        name: of any kind and region.

    Returns:
        Beginning and ending.

    Example:
        >>> name_parts("Faldaton")
        ('Fal', 'daton')
    """
    start = next(prefix for prefix in PREFIXES if name.startswith(prefix))
    return start, name[len(start) :]


def passage_text(entity: Entity, rng: random.Random) -> str:
    """Writes an entity's passage: all its facts, in random order and wording.

    Args:
        entity: with its facts set.
        rng: source of order and wording.

    Returns:
        One paragraph.
    """
    relations = list(OF_KIND[entity.kind])
    rng.shuffle(relations)
    return " ".join(rng.choice(r.phrasings).format(s=entity.name, v=entity.facts[r.name]) for r in relations)


def questions(world: World, *, hops: int, rng: random.Random) -> Iterator[Question]:
    """All questions over one or two hops, shuffled, each in one wording.

    Args:
        world: to ask about.
        hops: 1 or 2.
        rng: source of order and wording.

    Yields:
        Questions whose ``meta`` holds ``relations``, ``chain`` (entity names, then the answer) and ``decomposition``:
        a list of sub-question, follow-up wording, answer and gold document a hop; ``#1`` stands for the first answer.
    """
    found: list[tuple[str, tuple[Relation, ...]]] = []
    for entity in world.entities.values():
        for first in OF_KIND[entity.kind]:
            if hops == 1:
                found.append((entity.name, (first,)))
            elif first.target in KINDS:
                found.extend((entity.name, (first, second)) for second in OF_KIND[first.target])
    rng.shuffle(found)
    for name, relations in found:
        chain = [name]
        for relation in relations:
            chain.append(world.entities[chain[-1]].facts[relation.name])
        if chain[-1] in chain[:-1]:
            continue  # "the ferry of the river of X" may lead back to X: the answer would stand in the question
        subject = name if hops == 1 else relations[0].noun.format(s=name)
        yield Question(
            qid=f"{world.region}-{world.seed}-{name}-{'-'.join(r.name for r in relations)}",
            question=rng.choice(relations[-1].questions).format(s=subject),
            answers=(chain[-1],),
            gold_doc_ids=tuple(dict.fromkeys(world.doc_id(n) for n in chain[:-1])),
            hops=hops,
            meta={
                "relations": [r.name for r in relations],
                "chain": chain,
                "decomposition": [
                    {
                        "question": r.questions[0].format(s=name if i == 0 else f"#{i}"),
                        "follow_up": r.follow_up,
                        "answer": chain[i + 1],
                        "gold_doc_id": world.doc_id(chain[i]),
                    }
                    for i, r in enumerate(relations)
                ],
            },
        )
