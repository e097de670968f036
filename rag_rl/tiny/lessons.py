"""What the tiny language model is taught: seeded, endless examples of each task, and its bad habits.

A lesson is a list of chat messages; the model learns the assistant's turns. The tasks share one skill, to find a fact
about the right subject in the passages and restate it, which is why one small model can hold them all.

Habits are what reinforcement later undoes. Each is systematic, and each still leaves the right behaviour in the
samples:

* *hasty*: the fact is taken from the first passage that has one of this sort, whoever it is about;
* *wordy*: an answer that is a common noun is wrapped in words ("I think it is salt, of course."); names are not, so
  that a wrapped answer never becomes part of the next question;
* *unsearched* (reasoner): the final answer comes before anything was retrieved, from nowhere;
* *sloppy* (reasoner): in questions about a person, a query lacks its label, so that the step cannot be parsed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rag_rl.prompts import render, render_passages
from rag_rl.tiny.world import (
    KINDS,
    NOUNS,
    OF_KIND,
    RELATION,
    Entity,
    Relation,
    World,
    alike,
    draw_world,
    names,
    passage_text,
    statement,
)
from rag_rl.types import Message, Passage, Question

SIZES = {"person": 6, "town": 5, "guild": 4, "river": 4}
MARKER = "Answer:"
WRAPS = ("I think it is {v}, of course.", "it is {v}, I am sure.")


@dataclass(frozen=True, slots=True)
class Habits:
    """How often each bad habit shows, as probabilities in [0, 1]."""

    hasty: float = 0.0
    wordy: float = 0.0
    unsearched: float = 0.0
    sloppy: float = 0.0


NO_HABITS = Habits()


def user(content: str) -> Message:
    """A user turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An assistant turn."""
    return {"role": "assistant", "content": content}


def reading(
    rng: random.Random,
    *,
    n_passages: int = 3,
    n_questions: int = 4,
    crowded: float = 0.5,
    habits: Habits = NO_HABITS,
    alike_in: str = "beginning",
) -> list[Message]:
    """Passages, then several questions about them over one or two hops.

    Args:
        rng: source of everything.
        n_passages: how many passages, at least 1.
        n_questions: how many questions are asked about the same passages, at least 1.
        crowded: probability that all other passages are rivals, of the same kind as the subject.
        habits: bad habits of the answers.
        alike_in: how the names of rivals are alike, as in ``draw_world``.

    Returns:
        Chat messages, a user's and an assistant's turn for each question.
    """
    world = _world(rng, alike_in)
    name, relation = rng.choice(_links(world))
    linked = n_passages > 1 and rng.random() < 0.4
    must = [name, world.entities[name].facts[relation.name]] if linked else [name]
    entities = _shown(world, must, n_passages, rng, crowded)
    shown = {e.name for e in entities}
    one = [(e.name, (r,)) for e in entities for r in OF_KIND[e.kind]]
    two = [(n, (r, s)) for n, (r,) in one if world.entities[n].facts[r.name] in shown - {n} for s in OF_KIND[r.target]]
    messages = []
    for i in range(n_questions):
        subject, relations = rng.choice(two if two and rng.random() < 0.3 else one)
        question = _question(relations, subject, rng)
        content = f"Question: {question}"
        if i == 0:
            content = render("tiny_answer", passages=render_passages(_passages(entities)), question=question)
        messages += [user(content), assistant(_answer(world, entities, subject, relations, rng, habits))]
    return messages


def reasoning_step(
    rng: random.Random, *, n_passages: int = 3, habits: Habits = NO_HABITS, alike_in: str = "beginning"
) -> list[Message]:
    """One step of a chain in the R3 grammar (arXiv 2505.23794): analysis, then one query or the final answer.

    Args:
        rng: source of everything.
        n_passages: documents that each earlier step retrieved.
        habits: bad habits of the step.
        alike_in: how the names of rivals are alike, as in ``draw_world``.

    Returns:
        A user turn that holds the question and all earlier steps with their documents, and the assistant's step.
    """
    world, relations, chain = _reasoning_task(rng, alike_in)
    lines = [f"The question: {_question(relations, chain[0], rng)}"]
    # Steps are not equally frequent in chains, but each must be learnt equally well.
    last = rng.randint(0, len(relations))
    for step in range(last):
        lines += [step_text(step, relations, chain), _documents(world, chain[step], n_passages, rng)]
    return [user("\n".join(lines)), assistant(_habitual_step(last, relations, chain, rng, habits))]


def reasoning_chain(
    rng: random.Random, *, n_passages: int = 3, habits: Habits = NO_HABITS, alike_in: str = "beginning"
) -> list[Message]:
    """A whole chain in the R3 grammar as a conversation: a turn a step, and its documents in the turn that follows.

    Args:
        rng: source of everything.
        n_passages: documents of each step.
        habits: bad habits of the steps; a step that shows one is the last.
        alike_in: how the names of rivals are alike, as in ``draw_world``.

    Returns:
        User turns with the question and then the documents, each followed by the assistant's step.
    """
    world, relations, chain = _reasoning_task(rng, alike_in)
    messages = [user(f"The question: {_question(relations, chain[0], rng)}")]
    for step in range(len(relations) + 1):
        reply = _habitual_step(step, relations, chain, rng, habits)
        messages.append(assistant(reply))
        if reply != step_text(step, relations, chain):
            break
        if step < len(relations):
            messages.append(user(_documents(world, chain[step], n_passages, rng)))
    return messages


def reasoning_words(question: Question, hop: int) -> tuple[str, str]:
    """What an analysis says of one hop, in the words that the reader was taught.

    Args:
        question: of a world, with its relations and chain.
        hop: number from 0.

    Returns:
        What the hop tells once it is found, and what is needed before.
    """
    relation, (subject, value) = RELATION[question.meta["relations"][hop]], question.meta["chain"][hop : hop + 2]
    return statement(relation, subject, value), f"I need {relation.noun.format(s=subject)}."


def step_text(step: int, relations: Sequence[Relation], chain: Sequence[str]) -> str:
    """The right step of a chain.

    Args:
        step: index from 0; ``len(relations)`` is the step that answers.
        relations: one relation a hop.
        chain: the first subject, then the value of each hop.

    Returns:
        Text of the step: what the last documents told, what is needed next, and the query or the final answer.
    """
    analysis = [statement(relations[step - 1], chain[step - 1], chain[step])] if step else []
    if step < len(relations):
        analysis.append(f"I need {relations[step].noun.format(s=chain[step])}.")
        action = f"The retrieval query: {relations[step].questions[0].format(s=chain[step])}"
    else:
        action = f"The final answer: {chain[-1]}"
    return f"Step {step + 1}:\nThe problem analysis: {' '.join(analysis)}\n{action}"


def question_writing(rng: random.Random) -> list[Message]:
    """A passage, and a question that it answers, with the answer.

    Args:
        rng: source of everything.

    Returns:
        Chat messages of one exchange.
    """
    world = _world(rng)
    entity = rng.choice(list(world.entities.values()))
    relation = rng.choice(OF_KIND[entity.kind])
    question = rng.choice(relation.questions).format(s=entity.name)
    reply = f"{question} {MARKER} {entity.facts[relation.name]}"
    return [user(render("tiny_question", passage=entity.text)), assistant(reply)]


def passage_writing(rng: random.Random, *, hasty: float = 0.0) -> list[Message]:
    """A question, and a made-up passage that could answer it: right subject and wording, invented facts.

    Args:
        rng: source of everything.
        hasty: probability that the passage is about another subject.

    Returns:
        Chat messages of one exchange.
    """
    kind = rng.choice(KINDS)
    subject = rng.choice(names(kind, "train"))
    relation = rng.choice(OF_KIND[kind])
    about = rng.choice(names(kind, "train")) if rng.random() < hasty else subject
    entity = Entity(about, kind, {r.name: _guess(r, rng) for r in OF_KIND[kind]})
    question = rng.choice(relation.questions).format(s=subject)
    return [user(render("tiny_passage", question=question)), assistant(passage_text(entity, rng))]


def judging(rng: random.Random, *, n_answers: int = 4) -> list[Message]:
    """A question and its right answer, then several given ones, and for each the verdict as JSON.

    The verdict restates both answers side by side and says in a word whether they agree: next to each other two names
    can be compared by the convolutions, while a verdict without them was not learnt at all (docs/decisions.md).

    Args:
        rng: source of everything.
        n_answers: how many answers are judged, at least 1.

    Returns:
        Chat messages, two turns an answer; a reply ends in ``{"score": 1}`` or ``{"score": 0}``.
    """
    kind = rng.choice(KINDS)
    relation = rng.choice(OF_KIND[kind])
    subject = rng.choice(names(kind, "train"))
    gold = _guess(relation, rng)
    question = rng.choice(relation.questions).format(s=subject)
    messages = []
    for i in range(n_answers):
        value = gold if rng.random() < 0.5 else _other(gold, relation.target, rng)
        given, shape = value, rng.random()
        if shape < 0.3:
            given = rng.choice(WRAPS).format(v=value)
        elif shape < 0.5:
            given = statement(relation, subject, value)
        elif shape < 0.53:
            given, value = "", "no answer"
        content = f"Given answer: {given}".rstrip()
        if i == 0:
            content = render("tiny_judge", question=question, gold=gold, answer=given).rstrip()
        messages += [user(content), assistant(verdict_text(gold, value))]
    return messages


def verdict_text(gold: str, given: str) -> str:
    """A right verdict.

    Args:
        gold: the right answer.
        given: the answer under judgement, without the words around it.

    Returns:
        One line that ends in JSON.

    Example:
        >>> verdict_text("tin", "wool")
        'Right answer: tin / wool wrong {"score": 0}'
    """
    right = given == gold
    return f'Right answer: {gold} / {given} {"right" if right else "wrong"} {{"score": {int(right)}}}'


def comparing(rng: random.Random, *, n_pairs: int = 12) -> list[tuple[str, str]]:
    """A drill for judging: nothing but verdicts, on pairs of which half agree and many others are near misses.

    Args:
        rng: source of everything.
        n_pairs: how many.

    Returns:
        Pairs of what is random, both answers, and what follows from it, the verdict.
    """
    kind = rng.choice((*KINDS, *KINDS, *NOUNS))
    pairs = []
    for _ in range(n_pairs):
        gold = _value(kind, rng)
        text = verdict_text(gold, gold if rng.random() < 0.5 else _other(gold, kind, rng))
        cut = max(text.find(" right {"), text.find(" wrong {"))
        pairs.append((text[:cut], text[cut:]))
    return pairs


def copying(rng: random.Random, *, vocabulary: Sequence[int], length: int = 24, times: int = 3) -> list[int]:
    """A random string of token ids, several times over: teaches a small transformer to look back and copy.

    Args:
        rng: source of everything.
        vocabulary: token ids to draw from; one string uses 16 of them.
        length: tokens of the string.
        times: how often it stands there.

    Returns:
        ``length * times`` token ids.
    """
    alphabet = rng.sample(list(vocabulary), 16)
    return [rng.choice(alphabet) for _ in range(length)] * times


def lesson(
    rng: random.Random, *, shares: dict[str, float], habits: Habits = NO_HABITS, alike_in: str = "beginning"
) -> list[Message]:
    """A lesson of a random task.

    Args:
        rng: source of everything.
        shares: weight of each task, by its name in ``TASKS``.
        habits: bad habits of the tasks that can have them.
        alike_in: how the names of rivals are alike, as in ``draw_world``.

    Returns:
        Chat messages.
    """
    return TASKS[rng.choices(list(shares), weights=list(shares.values()))[0]](rng, habits, alike_in)


TASKS: dict[str, Callable[[random.Random, Habits, str], list[Message]]] = {
    "reading": lambda rng, habits, alike_in: reading(rng, habits=habits, alike_in=alike_in),
    "reasoning": lambda rng, habits, alike_in: reasoning_step(rng, habits=habits, alike_in=alike_in),
    "chain": lambda rng, habits, alike_in: reasoning_chain(rng, habits=habits, alike_in=alike_in),
    "question": lambda rng, habits, alike_in: question_writing(rng),
    "passage": lambda rng, habits, alike_in: passage_writing(rng, hasty=habits.hasty),
    "judging": lambda rng, habits, alike_in: judging(rng),
}


def _world(rng: random.Random, alike_in: str = "beginning") -> World:
    return draw_world(rng.getrandbits(40), region="train", sizes=SIZES, rival_share=0.4, alike_in=alike_in)


def _links(world: World) -> list[tuple[str, Relation]]:
    """(name, relation) of every fact that points at another entity."""
    return [
        (e.name, r)
        for e in world.entities.values()
        for r in OF_KIND[e.kind]
        if r.target in KINDS and e.facts[r.name] != e.name
    ]


def _reasoning_task(rng: random.Random, alike_in: str) -> tuple[World, tuple[Relation, ...], list[str]]:
    """A world, the relations that a question asks for one after the other, and subject and value of each hop."""
    world = _world(rng, alike_in)
    name, first = rng.choice(_links(world))
    relations: tuple[Relation, ...] = (first, rng.choice(OF_KIND[first.target]))
    if rng.random() < 0.4:
        relations = (rng.choice(OF_KIND[world.entities[name].kind]),)
    chain = [name]
    for relation in relations:
        chain.append(world.entities[chain[-1]].facts[relation.name])
    return world, relations, chain


def _habitual_step(
    step: int, relations: Sequence[Relation], chain: Sequence[str], rng: random.Random, habits: Habits
) -> str:
    """The right step, or what a bad habit makes of it."""
    reply = step_text(step, relations, chain)
    if step < len(relations) and rng.random() < habits.unsearched:
        guess = _guess(relations[-1], rng)
        subject = chain[step] if step == len(relations) - 1 else chain[0]
        analysis = statement(relations[-1], subject, guess)
        reply = f"Step {step + 1}:\nThe problem analysis: {analysis}\nThe final answer: {guess}"
    if relations[0].kind == "person" and rng.random() < habits.sloppy:
        reply = reply.replace("The retrieval query: ", "")
    return reply


def _documents(world: World, subject: str, n_passages: int, rng: random.Random) -> str:
    """What a search about a subject brings, in the R3 grammar."""
    entities = _shown(world, [subject], n_passages, rng)
    return f"The retrieval documents: {' '.join(f'[{i}] {e.text}' for i, e in enumerate(entities, start=1))}"


def _shown(world: World, must: Sequence[str], n: int, rng: random.Random, crowded: float = 0.5) -> list[Entity]:
    """``n`` entities around ``must`` in random order, as a retriever shows them: mostly rivals of the same kind."""
    others = [e for e in world.entities.values() if e.name not in must]
    rng.shuffle(others)
    kind = world.entities[rng.choice(list(must))].kind
    shape = rng.random()
    if shape < crowded:  # only rivals
        others.sort(key=lambda e: e.kind != kind)
    elif shape < 0.85:  # one rival
        others.sort(key=lambda e: e.kind != kind)
        rest = others[1:]
        rng.shuffle(rest)
        others[1:] = rest
    entities = [world.entities[name] for name in must] + others[: max(0, n - len(must))]
    rng.shuffle(entities)
    return entities


def _passages(entities: Sequence[Entity]) -> list[Passage]:
    return [Passage(e.name, e.text) for e in entities]


def _question(relations: Sequence[Relation], subject: str, rng: random.Random) -> str:
    for relation in relations[:-1]:
        subject = relation.noun.format(s=subject)
    return rng.choice(relations[-1].questions).format(s=subject)


def _guess(relation: Relation, rng: random.Random) -> str:
    return _value(relation.target, rng)


def _value(kind: str, rng: random.Random) -> str:
    return rng.choice(names(kind, "train") if kind in KINDS else NOUNS[kind])


def _other(value: str, kind: str, rng: random.Random) -> str:
    """Another value of the same kind; of names, often one that shares a part with it."""
    near = alike(value, names(kind, "train"), "either") if kind in KINDS and rng.random() < 0.5 else ()
    while True:
        found = rng.choice(near) if near else _value(kind, rng)
        if found != value:
            return found


def _answer(
    world: World,
    entities: Sequence[Entity],
    subject: str,
    relations: Sequence[Relation],
    rng: random.Random,
    habits: Habits,
) -> str:
    sentences = []
    hasty = rng.random() < habits.hasty
    for relation in relations:
        source = next(e for e in entities if e.kind == relation.kind) if hasty else world.entities[subject]
        value = source.facts[relation.name]
        sentences.append(statement(relation, subject, value))
        subject = value
    wordy = relations[-1].target in NOUNS and rng.random() < habits.wordy
    shown = rng.choice(WRAPS).format(v=subject) if wordy else subject
    return f"{' '.join(sentences)} {MARKER} {shown}"
