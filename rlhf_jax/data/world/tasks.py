"""Questions of the world as tasks in clusters, to be instructed with and tested on.

A row is {"question", "fields", "options", "answer", "rationale"}: the question in full, the parts of it that templates
name, the answers to choose from (none: free text), and a derivation of the answer that holds in this world. As in
`World.prompts`, what is asked about in held-out rows (people, towns, words, pairs of numbers) is never asked about in
training rows. Tasks share the wording of their options, so that what is learnt in one cluster can serve in another.
"""

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_jax.data.world.tables import AGES, KINDS, SUMS, Category
from rlhf_jax.data.world.world import Entities, World
from rlhf_jax.types import InputError

Row = dict[str, Any]
Maker = Callable[[World, Entities, random.Random], Row]

TRIES = 500  # draws without a new question after which there are taken to be none
NO_IDEA = "I do not know"
_KINDS = {kind.name: kind for kind in KINDS}
_ASKED = ("fact", "unanswerable")  # categories whose kinds have a name that can be said: "the pet of Mira"
# Kinds of facts that sentences in a question state. The value of "home" is a town, which is an entity of its own.
_STATED = {"people": ("job", "pet"), "places": ("product", "river", "landmark")}
_GROUPS = {"people": "a person", "places": "a town", "words": "a thing"}


def rows(world: World, task: str, n: int, held_out: bool = False) -> Iterator[Row]:
    """The first `n` rows of a task, or fewer where the world has no further questions; InputError as of `find`.

    No question comes twice, so that each counts once in a mean.
    """
    make = find(task)
    rng = random.Random(f"{world.seed}/tasks/{task}/{held_out}")
    seen: set[str] = set()
    tries = 0
    while len(seen) < n and tries < TRIES:
        row = make(world, world.held_out if held_out else world.train, rng)
        tries += 1
        if row["question"] not in seen:
            seen.add(row["question"])
            tries = 0
            yield row


def find(task: str) -> Maker:
    """The function that makes a row of a task; InputError if there is no such task."""
    if task not in MAKERS:
        raise InputError(f"no task {task!r} in the world; there are {', '.join(MAKERS)}")
    return MAKERS[task]


# -- parts -------------------------------------------------------------------------------------------------------------


def _row(question: str, answer: str, options: Sequence[str], rationale: str, **fields: str) -> Row:
    return {"question": question, "fields": fields, "options": [*options], "answer": answer, "rationale": rationale}


def _choices(answer: str, values: Sequence[str], rng: random.Random, n: int = 4) -> list[str]:
    """The answer among other values, `n` in all, in random order."""
    others = rng.sample([value for value in values if value != answer], n - 1)
    return rng.sample([answer, *others], n)


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


_YES_OR_NO = (_yes(True), _yes(False))


def _names(entities: Entities) -> tuple[str, ...]:
    """Names of people for stories, in which it does not matter whether the world knows them."""
    return entities.people + entities.strangers


def _pair(entities: Entities, rng: random.Random) -> tuple[str, str]:
    """Two numbers, the smaller first."""
    a, b = rng.choice(entities.pairs).split(" and ")
    return a, b


def _unequal(entities: Entities, rng: random.Random) -> tuple[str, str]:
    a, b = rng.choice([pair for pair in entities.pairs if len(set(pair.split(" and "))) == 2]).split(" and ")
    return a, b


def _subject(entities: Entities, rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """A person or a town, and the kinds of facts that sentences about it state."""
    about = rng.choice(("people", "places"))
    return rng.choice(getattr(entities, about)), _STATED[about]


def _count(number: str, thing: str) -> str:
    """A number of things, such as "3 lamps"."""
    return f"{number} {thing}" if number == "1" else f"{number} {thing}s"


# -- facts, and what follows from two of them --------------------------------------------------------------------------


def _fact(world: World, entities: Entities, rng: random.Random, *, name: str) -> Row:
    kind = _KINDS[name]
    x = rng.choice(getattr(entities, kind.about))
    answer = world.facts[x][name]
    return _row(
        rng.choice(kind.questions).format(x=x),
        answer,
        _choices(answer, kind.values, rng),
        rng.choice(kind.claims).format(x=x, answer=answer),
        subject=x,
    )


def _town_fact(world: World, entities: Entities, rng: random.Random, *, name: str) -> Row:
    """Ask for a fact about the town of a person; in training rows no derivation names a held-out town."""
    kind, home = _KINDS[name], _KINDS["home"]
    apart = world.held_out.places if entities is world.train else ()
    x = rng.choice([person for person in entities.people if world.facts[person]["home"] not in apart])
    town = world.facts[x]["home"]
    answer = world.facts[town][name]
    lives = rng.choice(home.claims).format(x=x, answer=town)
    return _row(
        rng.choice(kind.questions).format(x=f"the town of {x}"),
        answer,
        _choices(answer, kind.values, rng),
        f"{lives} {rng.choice(kind.claims).format(x=town, answer=answer)}",
        subject=x,
    )


# -- numbers -----------------------------------------------------------------------------------------------------------


def _plus(world: World, entities: Entities, rng: random.Random) -> Row:
    a, b = rng.sample(_pair(entities, rng), 2)
    start, steps = int(a), int(b)
    answer = str(start + steps)
    up = " ".join(str(start + i) for i in range(1, steps + 1))
    rationale = f"Start at {a} and go {b} up: {up}."
    question = rng.choice(_KINDS["plus"].questions).format(a=a, b=b)
    return _row(question, answer, _choices(answer, SUMS, rng), rationale, a=a, b=b)


def _minus(world: World, entities: Entities, rng: random.Random) -> Row:
    b, a = _pair(entities, rng)
    start, steps = int(a), int(b)
    answer = str(start - steps)
    down = " ".join(str(start - i) for i in range(1, steps + 1))
    rationale = f"Start at {a} and go {b} down: {down}."
    question = rng.choice(_KINDS["minus"].questions).format(a=a, b=b)
    return _row(question, answer, _choices(answer, SUMS, rng), rationale, a=a, b=b)


def _gets(world: World, entities: Entities, rng: random.Random) -> Row:
    a, b = rng.sample(_pair(entities, rng), 2)
    who, friend = rng.sample(_names(entities), 2)
    thing = rng.choice(entities.words)
    story = f"{who} has {_count(a, thing)}. {friend} gave {who} {_count(b, thing)}."
    ask, answer = f"How many {thing}s does {who} have?", str(int(a) + int(b))
    return _row(f"{story} {ask}", answer, (), f"{a} plus {b} is {answer}.", story=story, ask=ask, a=a, b=b)


def _more(world: World, entities: Entities, rng: random.Random) -> Row:
    small, large = _unequal(entities, rng)
    who, friend = rng.sample(_names(entities), 2)  # `who` has more
    thing = rng.choice(entities.words)
    story = " ".join(rng.sample((f"{who} has {_count(large, thing)}.", f"{friend} has {_count(small, thing)}."), 2))
    return _row(
        f"{story} Who has more {thing}s?",
        who,
        rng.sample((who, friend), 2),
        f"{large} is more than {small}.",
        story=story,
        thing=f"{thing}s",
    )


def _older(world: World, entities: Entities, rng: random.Random) -> Row:
    young, old = sorted(rng.sample(AGES, 2), key=int)
    who, friend = rng.sample(_names(entities), 2)  # `who` is older
    story = " ".join(rng.sample((f"{who} is {old} years old.", f"{friend} is {young} years old."), 2))
    return _row(
        f"{story} Who is older?",
        who,
        rng.sample((who, friend), 2),
        f"{old} is more than {young}.",
        story=story,
    )


# -- pairs of sentences ------------------------------------------------------------------------------------------------


def _follows(world: World, entities: Entities, rng: random.Random) -> Row:
    x, names = _subject(entities, rng)
    name, other = rng.sample(names, 2)
    kind, value = _KINDS[name], world.facts[x][name]
    ours, theirs = rng.sample(kind.claims, 2)
    answer = rng.choice((*_YES_OR_NO, NO_IDEA))
    match answer:
        case "yes":
            then, why = theirs.format(x=x, answer=value), f"The {name} of {x} is {value} in both."
        case "no":
            wrong = rng.choice([one for one in kind.values if one != value])
            then, why = theirs.format(x=x, answer=wrong), f"The {name} of {x} is {value}, not {wrong}."
        case _:
            then = rng.choice(_KINDS[other].claims).format(x=x, answer=rng.choice(_KINDS[other].values))
            why = f"The first does not say the {other} of {x}."
    return _entailment(ours.format(x=x, answer=value), then, answer, why)


def _order(world: World, entities: Entities, rng: random.Random) -> Row:
    a, b, c = rng.sample(_names(entities), 3)
    answer = rng.choice((*_YES_OR_NO, NO_IDEA))
    told = [f"{a} is older than {b}.", f"{a if answer == NO_IDEA else b} is older than {c}."]
    first, last = {"yes": (a, c), "no": (c, a), NO_IDEA: (b, c)}[answer]
    why = f"It is {a}, {b}, {c} in order."
    if answer == NO_IDEA:
        why = f"{a} is first, and nobody told me the order of {b} and {c}."
    return _entailment(" ".join(rng.sample(told, 2)), f"{first} is older than {last}.", answer, why)


def _entailment(premise: str, hypothesis: str, answer: str, rationale: str) -> Row:
    return _row(
        f"{premise} So, is this true? {hypothesis}",
        answer,
        (*_YES_OR_NO, NO_IDEA),
        rationale,
        premise=premise,
        hypothesis=hypothesis,
    )


def _same(
    entities: Entities, names: Mapping[str, Sequence[str]], say: Callable[[str, str], str], rng: random.Random
) -> Row:
    """Ask whether two sentences are about the same; `say` puts a kind and its subject into words."""
    about = rng.choice(("people", "places"))
    x, other = rng.sample(getattr(entities, about), 2)
    name, another = rng.sample(names[about], 2)
    same = rng.random() < 0.5
    first = last = say(name, x)
    theirs = (name, x) if same else rng.choice(((name, other), (another, x)))
    while last == first:
        last = say(*theirs)
    why = f"Both are about the {name} of {x}."
    if not same:
        why = f"One is about the {name} of {x}, one about the {theirs[0]} of {theirs[1]}."
    return _row(f"Do these say the same? {first} {last}", _yes(same), _YES_OR_NO, why, first=first, last=last)


def _same_claim(world: World, entities: Entities, rng: random.Random) -> Row:
    return _same(
        entities,
        _STATED,
        lambda name, x: rng.choice(_KINDS[name].claims).format(x=x, answer=world.facts[x][name]),
        rng,
    )


def _same_question(world: World, entities: Entities, rng: random.Random) -> Row:
    names = {
        about: [kind.name for kind in KINDS if kind.category in _ASKED and kind.about == about] for about in _STATED
    }
    return _same(entities, names, lambda name, x: rng.choice(_KINDS[name].questions).format(x=x), rng)


def _true_fact(world: World, entities: Entities, rng: random.Random) -> Row:
    x, names = _subject(entities, rng)
    name = rng.choice(names)
    kind, value, true = _KINDS[name], world.facts[x][name], rng.random() < 0.5
    said = value if true else rng.choice([one for one in kind.values if one != value])
    claim = rng.choice(kind.claims).format(x=x, answer=said)
    why = rng.choice(kind.claims).format(x=x, answer=value)
    return _row(f"Is this true? {claim}", _yes(true), _YES_OR_NO, why, claim=claim)


def _true_sum(world: World, entities: Entities, rng: random.Random) -> Row:
    a, b = rng.sample(_pair(entities, rng), 2)
    minus, true = int(a) >= int(b) and rng.random() < 0.5, rng.random() < 0.5
    sign, value = ("minus", int(a) - int(b)) if minus else ("plus", int(a) + int(b))
    # One false value a sum, so that half of all different claims are true.
    said = value if true else abs(value + (1 if int(a) < int(b) else -1))
    claim, why = f"{a} {sign} {b} is {said}.", f"{a} {sign} {b} is {value}."
    return _row(f"Is this true? {claim}", _yes(true), _YES_OR_NO, why, claim=claim)


# -- stories and lists -------------------------------------------------------------------------------------------------


def _gift(world: World, entities: Entities, rng: random.Random) -> Row:
    names, things = rng.sample(_names(entities), 4), rng.sample(entities.words, 2)
    lines = [
        f"{who} gave {friend} a {thing}." for who, friend, thing in zip(names[::2], names[1::2], things, strict=True)
    ]
    ask, answer = rng.choice(
        ((f"Who gave {names[1]} a {things[0]}?", names[0]), (f"Who has the {things[0]} of {names[0]}?", names[1]))
    )
    return _reading(" ".join(rng.sample(lines, 2)), ask, answer, rng.sample(names, 4), lines[0])


def _found(world: World, entities: Entities, rng: random.Random) -> Row:
    names, things = rng.sample(_names(entities), 2), rng.sample(entities.words, 4)
    lines = [f"{who} found a {thing} by the road." for who, thing in zip(names, things[:2], strict=True)]
    return _reading(
        " ".join(rng.sample(lines, 2)), f"What did {names[0]} find?", things[0], rng.sample(things, 4), lines[0]
    )


def _reading(story: str, ask: str, answer: str, options: Sequence[str], rationale: str) -> Row:
    return _row(f"{story} {ask}", answer, options, rationale, story=story, ask=ask)


def _how_many(world: World, entities: Entities, rng: random.Random) -> Row:
    listed = rng.sample(entities.words, rng.randint(2, 6))
    why = ", ".join(f"{word} {n}" for n, word in enumerate(listed, start=1))
    words, answer = " ".join(listed), str(len(listed))
    return _row(
        f"How many words are in {words}?", answer, _choices(answer, ("2", "3", "4", "5", "6"), rng), f"{why}.",
        words=words,
    )  # fmt: skip


def _times(world: World, entities: Entities, rng: random.Random) -> Row:
    word, *others = rng.sample(entities.words, 3)
    listed = [word] * rng.randint(1, 4) + rng.choices(others, k=rng.randint(1, 2))
    rng.shuffle(listed)
    why = ", ".join(f"{one} {listed[:n].count(word)}" if one == word else one for n, one in enumerate(listed, start=1))
    words, answer = " ".join(listed), str(listed.count(word))
    return _row(
        f"How many times is {word} in {words}?", answer, _choices(answer, ("1", "2", "3", "4"), rng), f"{why}.",
        word=word, words=words,
    )  # fmt: skip


def _after(world: World, entities: Entities, rng: random.Random) -> Row:
    listed = rng.sample(entities.words, rng.randint(3, 4))
    n = rng.randrange(len(listed) - 1)
    words, word, answer = " ".join(listed), listed[n], listed[n + 1]
    return _row(
        f"Which word comes after {word} in {words}?", answer, rng.sample(listed, len(listed)),
        f"There it says {word} {answer}.", word=word, words=words,
    )  # fmt: skip


def _in_list(world: World, entities: Entities, rng: random.Random) -> Row:
    *listed, other = rng.sample(entities.words, rng.randint(4, 5))
    held = rng.random() < 0.5
    word, words = rng.choice(listed) if held else other, " ".join(listed)
    why = ", ".join(f"{one} {'is' if one == word else 'is not'} {word}" for one in listed)
    return _row(f"Is the word {word} in {words}?", _yes(held), _YES_OR_NO, f"{why}.", word=word, words=words)


def _reversed(world: World, entities: Entities, rng: random.Random) -> Row:
    listed = rng.sample(entities.words, rng.randint(2, 4))
    words, answer = " ".join(listed), " ".join(reversed(listed))
    why = f"The last word is {', then '.join(reversed(listed))}."
    return _row(f"Write {words} in reverse order.", answer, (), why, words=words)


def _without(world: World, entities: Entities, rng: random.Random) -> Row:
    listed = rng.sample(entities.words, rng.randint(2, 4))
    word, words = rng.choice(listed), " ".join(listed)
    answer = " ".join(one for one in listed if one != word)
    why = f"{', '.join(f'no {one}' if one == word else one for one in listed)}."
    return _row(f"Say {words} without {word}.", answer, (), why, word=word, words=words)


# -- what a word or a wish is ------------------------------------------------------------------------------------------


def _group(world: World, entities: Entities, rng: random.Random) -> Row:
    about = rng.choice(list(_GROUPS))
    x, answer = rng.choice(getattr(entities, about)), _GROUPS[about]
    why = {"people": f"{x} has a home.", "places": f"There are houses in {x}.", "words": f"You can see a {x}."}[about]
    return _row(f"What is {x}?", answer, rng.sample(list(_GROUPS.values()), 3), why, word=x)


def _odd(world: World, entities: Entities, rng: random.Random) -> Row:
    about, other = rng.sample(list(_GROUPS), 2)
    alike, odd = rng.sample(getattr(entities, about), 3), rng.choice(getattr(entities, other))
    listed = rng.sample([*alike, odd], 4)
    why = f"{odd} is {_GROUPS[other]}. A word like {alike[0]} is {_GROUPS[about]}."
    words = " ".join(listed)
    return _row(f"Which word is not like the other words in {words}?", odd, listed, why, words=words)


def _harmful(world: World, entities: Entities, rng: random.Random) -> Row:
    harm = rng.random() < 0.5
    harmless: tuple[Category, ...] = ("fact", "arithmetic", "instruction", "unanswerable")
    wish = world.draw("harm" if harm else rng.choice(harmless), entities, rng).text
    why = "I will not help with that." if harm else "That is a good question."
    return _row(f"Would this hurt someone? {wish}", _yes(harm), _YES_OR_NO, why, wish=wish)


def _known(world: World, entities: Entities, rng: random.Random) -> Row:
    prompt = world.draw("fact" if rng.random() < 0.5 else "unanswerable", entities, rng)
    why = rng.choice(prompt.good) if prompt.answer else f"Nobody told me the {prompt.kind} of {prompt.entities[0]}."
    return _row(
        f"Do you know the answer to this? {prompt.text}",
        _yes(bool(prompt.answer)),
        _YES_OR_NO,
        why,
        wish=prompt.text,
    )


CLUSTERS: Mapping[str, Mapping[str, Maker]] = {
    "facts": {
        "job": functools.partial(_fact, name="job"),
        "pet": functools.partial(_fact, name="pet"),
        "product": functools.partial(_fact, name="product"),
    },
    "hops": {
        "town-product": functools.partial(_town_fact, name="product"),
        "town-river": functools.partial(_town_fact, name="river"),
    },
    "arithmetic": {"plus": _plus, "minus": _minus, "gets": _gets},
    "comparison": {"more": _more, "older": _older},
    "entailment": {"follows": _follows, "order": _order},
    "paraphrase": {"same-claim": _same_claim, "same-question": _same_question},
    "truth": {"true-fact": _true_fact, "true-sum": _true_sum},
    "reading": {"gift": _gift, "found": _found},
    "counting": {"how-many": _how_many, "times": _times},
    "lists": {"after": _after, "in-list": _in_list},
    "rewriting": {"reverse": _reversed, "without": _without},
    "classification": {"group": _group, "odd": _odd},
    "refusal": {"harmful": _harmful, "known": _known},
}
MAKERS: Mapping[str, Maker] = {name: make for makers in CLUSTERS.values() for name, make in makers.items()}
