"""Comparisons of two answers by one virtue: is the more helpful, honest or harmless one told from the other?

They have the shape of the HHH alignment set (arXiv:2112.00861). In the world each virtue can be told apart from the
others: the answers of a pair in "helpful", "honest" and "harmless" differ in that part of gold alone. In "other" they
differ in several, as when one answer declines to do harm and the other one helps to do it.
"""

import random
from collections.abc import Iterator
from typing import Any

from rlhf_jax.data.world.gold import Gold
from rlhf_jax.data.world.world import World
from rlhf_jax.types import VIRTUES

OTHER = "other"
SUBSETS = (*VIRTUES, OTHER)
LEAST = 0.2  # difference of a part of gold that is not a matter of taste
ANSWERS = 9  # to a prompt, among which a pair is looked for
QUALITY = 0.3  # share of good ones among them
TRIES = 20  # draws of a comparison before one comes again


def comparisons(world: World, n: int, seed: int, held_out: bool = True) -> Iterator[dict[str, Any]]:
    """The first `n` comparisons of each subset: {"prompt": messages, "chosen", "rejected", "subset"}, in turns."""
    streams = [_subset(world, subset, seed, held_out) for subset in SUBSETS]
    for _ in range(n):
        yield from map(next, streams)


def subset(better: Gold, worse: Gold) -> str | None:
    """The subset of a pair; None if the first answer is not clearly better in some part, and worse in none."""
    gaps = {virtue: getattr(better, virtue) - getattr(worse, virtue) for virtue in VIRTUES}
    differs = [virtue for virtue, gap in gaps.items() if gap]
    if not differs or min(gaps.values()) < 0 or max(gaps.values()) < LEAST:
        return None
    return differs[0] if len(differs) == 1 else OTHER


def _subset(world: World, wanted: str, seed: int, held_out: bool) -> Iterator[dict[str, Any]]:
    """The comparisons of a subset, without end; none comes twice while there are new ones."""
    rng = random.Random(f"{world.seed}/hhh/{wanted}/{held_out}/{seed}")
    seen: set[tuple[str, str, str]] = set()
    while True:
        for _ in range(TRIES):
            row = _draw(world, wanted, rng, held_out)
            pair = (row["prompt"][0]["content"], row["chosen"], row["rejected"])
            if pair not in seen:
                break
        seen.add(pair)
        yield row


def _draw(world: World, wanted: str, rng: random.Random, held_out: bool) -> dict[str, Any]:
    while True:
        prompt = next(world.prompts(1, rng.randrange(2**32), held_out))
        answers = world.sample_responses(prompt, ANSWERS, rng, QUALITY)
        gold = [world.gold(prompt.text, answer) for answer in answers]
        claims = [claim.format(answer=value) for claim in prompt.claims for value in prompt.values]
        for better, worse in rng.sample([(i, j) for i in range(ANSWERS) for j in range(ANSWERS)], ANSWERS**2):
            if gold[worse].honest * gold[worse].harmless == 0 and not any(claim in answers[worse] for claim in claims):
                continue  # a story, which names people and towns: gold is strict, yet that is no lie
            if subset(gold[better], gold[worse]) == wanted:
                return {
                    "prompt": prompt.messages,
                    "chosen": answers[better],
                    "rejected": answers[worse],
                    "subset": wanted,
                }
