"""Simulated people who rank responses, each with a taste of their own and a noisy judgement.

A labeler reads a response as gold does (`World.gold`), weighs how helpful, honest, harmless and brief it is in an own
way, errs a little, and calls responses that seem about as good a tie. The error is calibrated so that two labelers
order a pair that neither ties the same way in 72-77 % of the cases, as people did (arXiv:2203.02155, section 3.4, on
responses of mixed quality).
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

from rlhf_jax.data.world import World
from rlhf_jax.types import InputError

NOISE = 0.66  # standard deviation of the error, where a good answer is worth about 1.5 more than a wrong one
TIE = 0.2  # responses that seem no further apart than this tie
LEAST, MOST = 4, 9  # responses to rank at once


@dataclasses.dataclass(frozen=True)
class Labeler:
    """One person's taste: the weights of gold's components, of each word, and the size of the error."""

    id: int
    helpful: float
    honest: float
    harmless: float
    brevity: float  # utility lost by each word
    noise: float = NOISE
    tie: float = TIE

    def utility(self, world: World, prompt_text: str, response: str, seed: int) -> float:
        """How good the response seems to this labeler, the error included."""
        gold = world.gold(prompt_text, response)
        virtue = self.helpful * gold.helpful + self.honest * gold.honest + self.harmless * gold.harmless
        key = f"{world.seed}/{seed}/{self.id}/{prompt_text}/{response}".encode(errors="surrogatepass")  # any text
        error = random.Random(key).gauss(0.0, self.noise)
        return virtue - self.brevity * len(response.split()) + error

    def rank(self, world: World, prompt_text: str, responses: Sequence[str], seed: int) -> list[int]:
        """Ranks of the responses: 0 is best, equal is a tie.

        A response shares the rank of the best one that it seems to be within `tie` of; so equal responses always tie.
        """
        utility = [self.utility(world, prompt_text, response, seed) for response in responses]
        ranks, rank, leader = [0] * len(responses), -1, float("inf")
        for i in sorted(range(len(responses)), key=lambda i: -utility[i]):
            if leader - utility[i] > self.tie:
                rank, leader = rank + 1, utility[i]
            ranks[i] = rank
        return ranks


def labelers(seed: int, n: int = 5) -> list[Labeler]:
    """`n` people, who differ in what they care about."""
    rng = random.Random(f"{seed}/labelers")
    return [
        Labeler(i, rng.uniform(1.0, 1.4), rng.uniform(0.15, 0.45), rng.uniform(0.3, 0.7), rng.uniform(0.0, 0.03))
        for i in range(n)
    ]


def agreement(rankings: Sequence[Sequence[Sequence[int]]], ties: bool = False) -> float:
    """Share of response pairs that two labelers order alike.

    `rankings[prompt][labeler][response]` is a rank, smaller is better. Pooled over all prompts, pairs of responses and
    pairs of labelers. A tie agrees with a tie only; without `ties`, combinations in which either ties are left out.
    """
    same = total = 0
    for signs in _signs(rankings):
        for ours, theirs in itertools.combinations(signs, 2):
            if ties or (ours and theirs):
                same, total = same + (ours == theirs), total + 1
    if not total:
        raise InputError("agreement needs two labelers who both ranked the same pair of responses: add rankings")
    return same / total


def kappa(rankings: Sequence[Sequence[Sequence[int]]]) -> float:
    """Fleiss' kappa: `agreement` with ties, in excess of what chance gives, as a share of what it leaves."""
    return fleiss_kappa([[signs.count(label) for label in (-1, 1, 0)] for signs in _signs(rankings)])


def fleiss_kappa(counts: Sequence[Sequence[int]]) -> float:
    """Fleiss' kappa from how many raters put each subject (row) into each category (column).

    Raises InputError unless every subject has the same number of raters, at least two, and there is more than one
    category that somebody chose.
    """
    raters = {sum(row) for row in counts}
    if len(raters) != 1 or max(raters) < 2:
        raise InputError(
            "kappa needs every pair of responses to be labelled by the same number of people, at least two"
        )
    (n,) = raters
    observed = sum(x * (x - 1) for row in counts for x in row) / (n * (n - 1) * len(counts))
    chance = sum((sum(column) / (n * len(counts))) ** 2 for column in zip(*counts, strict=True))
    if chance == 1:
        raise InputError("kappa is undefined where all labels are the same")
    return (observed - chance) / (1 - chance)


def _signs(rankings: Sequence[Sequence[Sequence[int]]]) -> Iterator[list[int]]:
    """Each labeler's word on each pair of responses to a prompt: -1 for the first, 1 for the second, 0 for a tie."""
    for labels in rankings:
        for i, j in itertools.combinations(range(len(labels[0]) if labels else 0), 2):
            yield [(ranks[i] > ranks[j]) - (ranks[i] < ranks[j]) for ranks in labels]


def rankings(
    world: World, n: int, seed: int, people: Sequence[Labeler] | None = None, held_out: bool = False
) -> Iterator[dict]:
    """`n` rows {"prompt": messages, "responses": [K], "ranks": [K], "labeler": id}, K drawn from 4 to 9.

    The responses are of the quality of the demonstrations; each row is ranked by one labeler.
    """
    people = people or labelers(seed)
    rng = random.Random(f"{world.seed}/rankings/{held_out}/{seed}")
    for prompt in world.prompts(n, seed, held_out):
        responses = world.sample_responses(prompt, rng.randint(LEAST, MOST), rng)
        labeler = rng.choice(people)
        ranks = labeler.rank(world, prompt.text, responses, seed)
        yield {"prompt": prompt.messages, "responses": responses, "ranks": ranks, "labeler": labeler.id}
