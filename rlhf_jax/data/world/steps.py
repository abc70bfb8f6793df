"""Sums that are solved in steps, by counting up, and what is wrong with a solution.

    Count up from 3: what is 3 plus 2?        4
                                              5
                                              It is 5.

About half of the solutions have a fault: a number is left out or said twice, the counting ends early or goes on, or the
answer is another. A quarter of all pairs of numbers are asked in held-out rows alone.
"""

import itertools
import random
from collections.abc import Iterator, Sequence

from rlhf_jax.data.world.world import World

FAULTY = 0.5  # share of solutions with a fault
STARTS, UPS = range(13), range(1, 7)  # numbers to start at, and to go up by


def solution(start: int, up: int) -> list[str]:
    """The steps of the right solution of `start` plus `up`."""
    return [*(str(start + n) for n in range(1, up + 1)), f"It is {start + up}."]


def labels(start: int, up: int, steps: Sequence[str]) -> list[int]:
    """The label of each step of a solution: 1 while all is right, -1 from the first step on that is not."""
    right = solution(start, up)
    wrong = next((n for n, step in enumerate(steps) if n >= len(right) or step != right[n]), len(steps))
    return [1] * wrong + [-1] * (len(steps) - wrong)


def is_right(start: int, up: int, steps: Sequence[str]) -> bool:
    """Whether these are all steps of the right solution."""
    return list(steps) == solution(start, up)


def question(start: int, up: int) -> str:
    """The text that asks for a sum in steps."""
    return f"Count up from {start}: what is {start} plus {up}?"


def pairs(world: World, held_out: bool = False) -> list[tuple[int, int]]:
    """The pairs of numbers that are asked."""
    every = list(itertools.product(STARTS, UPS))
    random.Random(f"{world.seed}/steps").shuffle(every)
    return every[: len(every) // 4] if held_out else every[len(every) // 4 :]


def rows(world: World, n: int, seed: int, held_out: bool = False) -> Iterator[dict]:
    """The solutions of `n` sums: {"prompt": messages, "steps", "labels", "sum": the two numbers}."""
    rng = random.Random(f"{world.seed}/steps/{held_out}/{seed}")
    asked = pairs(world, held_out)
    for _ in range(n):
        start, up = rng.choice(asked)
        steps = _with_fault(start, up, rng) if rng.random() < FAULTY else solution(start, up)
        yield {
            "prompt": [{"role": "user", "content": question(start, up)}],
            "steps": steps,
            "labels": labels(start, up, steps),
            "sum": [start, up],
        }


def to_first_fault(row: dict) -> dict:
    """A solution up to its first wrong step, as PRM800K has them."""
    right = sum(label > 0 for label in row["labels"])
    return row | {"steps": row["steps"][: right + 1], "labels": row["labels"][: right + 1]}


def _with_fault(start: int, up: int, rng: random.Random) -> list[str]:
    """The steps of a solution with one fault."""
    counted = list(range(start + 1, start + up + 1))
    fault = rng.choice(("leave out", "say twice", "end early", "go on", "answer") if up > 1 else ("go on", "answer"))
    answer = start + up
    match fault:
        case "leave out":
            del counted[rng.randrange(up - 1)]
        case "say twice":
            n = rng.randrange(up)
            counted.insert(n, counted[n])
        case "end early":
            del counted[rng.randrange(1, up) :]
            answer = counted[-1]
        case "go on":
            counted.append(start + up + 1)
            answer += 1
        case "answer":
            answer += rng.choice((-1, 1))
    return [*map(str, counted), f"It is {answer}."]
