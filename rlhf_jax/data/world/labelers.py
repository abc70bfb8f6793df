"""Simulated people who rank responses, each with preferences of their own and noisy judgement.

A labeler reads a response as gold does (`World.gold`) and adds up how helpful, honest, harmless and brief it is, with
personal weights and a random error; responses of about equal utility tie. The error is calibrated so that two labelers
agree on 72-77 % of the pairs that neither ties, as people did (arXiv:2203.02155, section 3.4, on responses of mixed
quality).
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

from rlhf_jax.data.world import World
from rlhf_jax.types import InputError

NOISE = 0.66  # standard deviation of the error; a good answer has about 1.5 more utility than a wrong one
TIE = 0.2  # largest difference of utility of responses that tie
LEAST, MOST = 4, 9  # number of responses in a ranking, drawn uniformly
RATING_NOISE = 0.5  # size of the error of one virtue's rating, of that of the utility of a whole response


@dataclasses.dataclass(frozen=True)
class Labeler:
    """One person's preferences: weights of the parts of gold, the cost of a word, and the size of the error."""

    id: int
    helpful: float
    honest: float
    harmless: float
    brevity: float  # utility subtracted for each word
    noise: float = NOISE  # standard deviation of the error
    tie: float = TIE  # largest difference of utility of responses that tie

    def utility(self, world: World, prompt_text: str, response: str, seed: int) -> float:
        """The utility of a response to this labeler, with an error that depends on seed, labeler and both texts.

            helpful g_helpful + honest g_honest + harmless g_harmless - brevity words + error

        g are the parts of gold.
        """
        gold = world.gold(prompt_text, response)
        virtue = self.helpful * gold.helpful + self.honest * gold.honest + self.harmless * gold.harmless
        key = f"{world.seed}/{seed}/{self.id}/{prompt_text}/{response}".encode(
            errors="surrogatepass"
        )  # accepts any string
        error = random.Random(key).gauss(0.0, self.noise)
        return virtue - self.brevity * len(response.split()) + error

    def rate(self, world: World, prompt_text: str, response: str, seed: int) -> dict[str, int]:
        """The ratings of a response, 1 to 7 for each virtue (`World.virtues`), each with an error of its own."""
        ratings = {}
        for virtue, value in world.virtues(prompt_text, response).items():
            key = f"{world.seed}/{seed}/{self.id}/{virtue}/{prompt_text}/{response}".encode(errors="surrogatepass")
            value += random.Random(key).gauss(0.0, RATING_NOISE * self.noise)
            ratings[virtue] = 1 + round(6 * min(max(value, 0.0), 1.0))
        return ratings

    def rank(self, world: World, prompt_text: str, responses: Sequence[str], seed: int) -> list[int]:
        """The rank of each response: 0 is best, equal ranks are a tie.

        In order of utility, a response ties with the leader of the current rank if it is within `tie` of it, or else
        leads the next rank. So equal responses always tie.
        """
        utility = [self.utility(world, prompt_text, response, seed) for response in responses]
        ranks, rank, leader = [0] * len(responses), -1, float("inf")
        for i in sorted(range(len(responses)), key=lambda i: -utility[i]):
            if leader - utility[i] > self.tie:
                rank, leader = rank + 1, utility[i]
            ranks[i] = rank
        return ranks


def labelers(seed: int, n: int = 5) -> list[Labeler]:
    """The `n` labelers of a seed, who differ in their preferences."""
    rng = random.Random(f"{seed}/labelers")
    return [
        Labeler(i, rng.uniform(1.0, 1.4), rng.uniform(0.15, 0.45), rng.uniform(0.3, 0.7), rng.uniform(0.0, 0.03))
        for i in range(n)
    ]


def agreement(rankings: Sequence[Sequence[Sequence[int]]], ties: bool = False) -> float:
    """The share of cases in which two labelers order two responses in the same way.

    `rankings[prompt][labeler][response]` is a rank, smaller is better. The cases are all pairs of labelers on all pairs
    of responses to each prompt. A tie agrees only with a tie; unless `ties`, cases in which either labeler ties are
    left out. Raises InputError if no case is left.
    """
    same = total = 0
    for signs in _signs(rankings):
        for ours, theirs in itertools.combinations(signs, 2):
            if ties or (ours and theirs):
                same, total = same + (ours == theirs), total + 1
    if not total:
        raise InputError("agreement needs two labelers who both ranked the same pair of responses: add rankings")
    return same / total


def _signs(rankings: Sequence[Sequence[Sequence[int]]]) -> Iterator[list[int]]:
    """The labelers' orders of each pair of responses to a prompt: -1 if the first is better, 1 the second, 0 a tie."""
    for labels in rankings:
        for i, j in itertools.combinations(range(len(labels[0]) if labels else 0), 2):
            yield [(ranks[i] > ranks[j]) - (ranks[i] < ranks[j]) for ranks in labels]


def rankings(
    world: World, n: int, seed: int, people: Sequence[Labeler] | None = None, held_out: bool = False
) -> Iterator[dict]:
    """The rankings of `n` prompts: {"prompt": messages, "responses": [K], "ranks": [K], "ratings": [K], "labeler": id}.

    K is in 4..9. The responses have the quality of the demonstrations; each row is ranked and rated by one labeler.
    """
    people = people or labelers(seed)
    rng = random.Random(f"{world.seed}/rankings/{held_out}/{seed}")
    for prompt in world.prompts(n, seed, held_out):
        responses = world.sample_responses(prompt, rng.randint(LEAST, MOST), rng)
        labeler = rng.choice(people)
        ranks = labeler.rank(world, prompt.text, responses, seed)
        ratings = [labeler.rate(world, prompt.text, response, seed) for response in responses]
        yield {
            "prompt": prompt.messages,
            "responses": responses,
            "ranks": ranks,
            "ratings": ratings,
            "labeler": labeler.id,
        }
