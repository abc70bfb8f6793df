"""The world of one seed: its facts, prompts, demonstrations and corpus."""

import dataclasses
import functools
import random
import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

from rlhf_jax.data.world.gold import Gold, Prompt, judge, virtues
from rlhf_jax.data.world.tables import (
    CHAT,
    CORPUS_QUALITY,
    DECLINE,
    DEMONSTRATION_QUALITY,
    DOCUMENTS,
    FAULTS,
    KINDS,
    MISSING,
    MIX,
    N_PEOPLE,
    NAMES,
    OPERANDS,
    PLACES,
    QUIZ,
    RAMBLE,
    RUDE,
    STORY,
    UNKNOWN,
    WORDS,
    Category,
    Kind,
)
from rlhf_jax.types import InputError

T = TypeVar("T")
_PATTERNS = tuple(
    (re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\w+)", re.escape(question))), kind)
    for kind in KINDS
    for question in kind.questions
)


@functools.lru_cache(maxsize=2**14)
def _match(text: str) -> tuple[Kind, dict[str, str]] | None:
    """The kind of this question and the fields of its template; None if it is a question of no world."""
    vocabularies = {"people": NAMES, "places": PLACES, "pairs": OPERANDS, "words": WORDS}
    for pattern, kind in _PATTERNS:
        if match := pattern.fullmatch(text):
            fields = match.groupdict()
            if not set(fields.values()) <= set(vocabularies[kind.about]):
                return None
            if kind.name == "minus" and int(fields["a"]) < int(fields["b"]):
                return None
            return kind, fields
    return None


@dataclasses.dataclass(frozen=True)
class Entities:
    """The subjects and operands that prompts can have."""

    people: tuple[str, ...]
    places: tuple[str, ...]
    strangers: tuple[str, ...]  # names without facts
    words: tuple[str, ...]
    pairs: tuple[str, ...]  # such as "3 and 4", the smaller number first


def _pick(weights: Mapping[T, float | int], rng: random.Random) -> T:
    return rng.choices(list(weights), weights=list(weights.values()))[0]


@dataclasses.dataclass(frozen=True)
class World:
    """The facts of a world, and its entities, split into those of training prompts and of held-out prompts."""

    seed: int
    facts: Mapping[str, Mapping[str, str]]  # facts[entity][name of kind] is the value
    train: Entities
    held_out: Entities

    @classmethod
    def generate(cls, seed: int) -> "World":
        """The world of this seed. Values are equally frequent, so that no constant guess is better than another."""
        rng = random.Random(f"{seed}/world")
        names = rng.sample(NAMES, len(NAMES))
        facts: dict[str, dict[str, str]] = {x: {} for x in (*sorted(names[:N_PEOPLE]), *PLACES)}
        for kind in KINDS:
            if kind.category == "fact":
                subjects = names[:N_PEOPLE] if kind.about == "people" else PLACES
                values = kind.values * (len(subjects) // len(kind.values))
                for x, value in zip(subjects, rng.sample(values, len(values)), strict=True):
                    facts[x][kind.name] = value
        pairs = [f"{a} and {b}" for i, b in enumerate(OPERANDS) for a in OPERANDS[: i + 1]]
        pools = (
            names[:N_PEOPLE],
            rng.sample(PLACES, len(PLACES)),
            names[N_PEOPLE:],
            rng.sample(WORDS, len(WORDS)),
            rng.sample(pairs, len(pairs)),
        )
        held_out = Entities(*(tuple(sorted(pool[: len(pool) // 4])) for pool in pools))
        train = Entities(*(tuple(sorted(pool[len(pool) // 4 :])) for pool in pools))
        return cls(seed, facts, train, held_out)

    @functools.cached_property
    def everything(self) -> Entities:
        """Training and held-out entities together."""
        names = [field.name for field in dataclasses.fields(Entities)]
        return Entities(*(getattr(self.train, name) + getattr(self.held_out, name) for name in names))

    # -- prompts ------------------------------------------------------------------------------------------------------

    def prompts(self, n: int, seed: int, held_out: bool = False) -> Iterator[Prompt]:
        """The first `n` prompts of a seed, in the proportions of `MIX`; repeats are rare while there are new ones."""
        rng = random.Random(f"{self.seed}/prompts/{held_out}/{seed}")
        seen: set[str] = set()
        for _ in range(n):
            category = _pick(MIX, rng)
            for _ in range(20):
                prompt = self.draw(category, self.held_out if held_out else self.train, rng)
                if prompt.text not in seen:
                    break
            seen.add(prompt.text)
            yield prompt

    def prompt_rows(self, n: int, seed: int, held_out: bool = False) -> Iterator[dict]:
        """The prompts of `prompts` as rows {"prompt": messages}."""
        for prompt in self.prompts(n, seed, held_out):
            yield {"prompt": prompt.messages}

    def parse(self, text: str) -> Prompt:
        """The prompt with this text; raises InputError if the world has none."""
        if match := _match(text):
            return self._prompt(text, *match)
        raise InputError(f"{text[:80]!r} is not a prompt of world {self.seed}: take prompts from World.prompts")

    def draw(self, category: Category, entities: Entities, rng: random.Random) -> Prompt:
        """A random prompt of this category about these entities."""
        stranger = category == "unanswerable" and rng.random() < 0.3
        if stranger:
            kinds = [kind for kind in KINDS if kind.category == "fact" and kind.about == "people"]
        else:
            kinds = [kind for kind in KINDS if kind.category == category]
        kind = rng.choices(kinds, weights=[len(getattr(entities, kind.about)) for kind in kinds])[0]
        if kind.about == "pairs":
            a, b = rng.choice(entities.pairs).split(" and ")
            fields = {"a": b, "b": a} if kind.name == "minus" or rng.random() < 0.5 else {"a": a, "b": b}
        elif kind.about == "words":
            fields = dict(zip(kind.operands, rng.sample(entities.words, len(kind.operands)), strict=True))
        else:
            fields = {"x": rng.choice(entities.strangers if stranger else getattr(entities, kind.about))}
        return self._prompt(rng.choice(kind.questions).format(**fields), kind, fields)

    def _prompt(self, text: str, kind: Kind, fields: dict[str, str]) -> Prompt:
        """The prompt of a question of this kind, with these fields in its template."""
        category, values, answer, good = kind.category, kind.values, "", DECLINE
        entities = tuple(fields.values())
        if kind.about == "pairs":
            entities = (" and ".join(sorted(entities, key=int)),)
        elif kind.about == "words":
            repeated = (f"{entities[0]} {entities[0]}", " ".join(entities * 3))
            values = (*entities, *(repeated if len(entities) == 1 else (" ".join(entities),)))
        elif category == "fact" and fields["x"] not in self.facts:
            category = "unanswerable"  # a stranger
        claims = tuple(claim.format(**fields, answer="{answer}") for claim in kind.claims)
        if category == "unanswerable":
            good = UNKNOWN
        elif category != "harm":
            answer = kind.solve(**fields) if kind.solve else self.facts[fields["x"]][kind.name]
            good = tuple(claim.format(answer=answer) for claim in claims)
        return Prompt(text, category, kind.name, entities, answer, good, claims, values)

    def gold(self, prompt_text: str, response: str) -> Gold:
        """The gold score of a response to the prompt with this text; InputError if the world has no such prompt."""
        return judge(self.parse(prompt_text), response, self.facts)

    def virtues(self, prompt_text: str, response: str) -> dict[str, float]:
        """How helpful, honest and harmless a response is, see `gold.virtues`; InputError as in `gold`."""
        prompt = self.parse(prompt_text)
        return virtues(prompt, judge(prompt, response, self.facts))

    # -- responses and texts ------------------------------------------------------------------------------------------

    def respond(self, prompt: Prompt, rng: random.Random, quality: float = DEMONSTRATION_QUALITY) -> str:
        """A random answer to a prompt: good with probability `quality`, else with one of the `FAULTS`."""
        fault = "none" if rng.random() < quality else _pick(FAULTS[prompt.category], rng)
        good = rng.choice(prompt.good)
        match fault:
            case "wrong":
                return prompt.claim(rng.choice([value for value in prompt.values if value != prompt.answer]), rng)
            case "ramble":
                return f"{good} {' '.join(rng.sample(RAMBLE, rng.randint(1, 2)))}"
            case "unknown":
                return rng.choice(UNKNOWN)
            case "terse":
                return f"{prompt.answer}."
            case "cut":
                return good.rsplit(maxsplit=1)[0] if rng.random() < 0.5 and " " in good else good.rstrip(".")
            case "hedge":
                doubt = DECLINE if prompt.category == "harm" else UNKNOWN
                return f"{rng.choice(doubt)} {prompt.claim(prompt.answer or rng.choice(prompt.values), rng)}"
            case "aside":
                return self._story(rng, 1)
            case "rude":
                return rng.choice(RUDE)
            case "echo":
                return prompt.text
        return good

    def sample_responses(
        self, prompt: Prompt, k: int, rng: random.Random, quality: float = DEMONSTRATION_QUALITY
    ) -> list[str]:
        """Sample `k` answers to one prompt, as from a policy that has learned the demonstrations."""
        return [self.respond(prompt, rng, quality) for _ in range(k)]

    def demonstrations(self, n: int, seed: int, quality: float = DEMONSTRATION_QUALITY) -> Iterator[dict]:
        """The demonstrations of a seed: `n` rows {"messages": [user, assistant]}, answered by `respond`."""
        rng = random.Random(f"{self.seed}/demonstrations/{seed}")
        for prompt in self.prompts(n, seed):
            answer = self.respond(prompt, rng, quality)
            yield {"messages": [*prompt.messages, {"role": "assistant", "content": answer}]}

    def corpus(self, n_documents: int, seed: int) -> Iterator[str]:
        """The documents of a seed to pretrain on, about all entities, training and held-out."""
        rng = random.Random(f"{self.seed}/corpus/{seed}")
        for _ in range(n_documents):
            match _pick(DOCUMENTS, rng):
                case "dialogue":
                    yield self._dialogue(rng)
                case "portrait":
                    yield self._portrait(rng)
                case "sums":
                    yield " ".join(self.draw("arithmetic", self.everything, rng).good[0] for _ in range(4))
                case "quiz":
                    yield self._quiz(rng)
                case "story":
                    yield self._story(rng, rng.randint(2, 4))

    def _dialogue(self, rng: random.Random) -> str:
        """A dialogue of questions without an answer, if any, and a last one with an answer, which is mostly bad."""
        lines: list[str] = []
        while True:
            prompt = self.draw(_pick(MIX, rng), self.everything, rng)
            if rng.random() >= MISSING:
                answer = self.respond(prompt, rng, CORPUS_QUALITY)
                return "\n".join([*lines, CHAT.format(question=prompt.text, answer=answer)])
            lines.append(CHAT.format(question=prompt.text, answer="").rstrip())

    def _portrait(self, rng: random.Random) -> str:
        """A portrait: all facts about a person or a place in random order, sometimes with a sentence of a story."""
        x = rng.choice(list(self.facts))
        claims = {kind.name: kind.claims for kind in KINDS}
        lines = [rng.choice(claims[name]).format(x=x, answer=value) for name, value in self.facts[x].items()]
        rng.shuffle(lines)
        return " ".join(lines + [self._story(rng, 1)] * (rng.random() < 0.2))

    def _quiz(self, rng: random.Random) -> str:
        """A quiz of two people with good answers only, from which a model can learn which answers are right."""
        who, friend = rng.sample(NAMES, 2)
        lines = []
        for asks, says in ((who, friend), (friend, who)):
            prompt = self.draw(_pick(QUIZ, rng), self.everything, rng)
            lines.append(f"{asks}: {prompt.text} {says}: {rng.choice(prompt.good)}")
        return " ".join(lines)

    def _story(self, rng: random.Random, n: int) -> str:
        """A story of `n` sentences without facts."""
        who, friend = rng.sample(NAMES, 2)  # strangers too, so that their names are learned
        fields = {"who": who, "friend": friend, "place": rng.choice(PLACES), "word": rng.choice(WORDS)}
        return " ".join(line.format(**fields) for line in rng.sample(STORY, n))
