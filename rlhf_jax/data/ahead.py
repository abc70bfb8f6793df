"""Work that is done ahead of whoever needs it: values in batches, and a function of each on other threads."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def batches(values: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Yield the values, as many at a time as reach a limit of their sizes together."""
    some, total = list[T](), 0
    for value in values:
        some.append(value)
        total += size(value)
        if total >= limit:
            yield some
            some, total = [], 0
    if some:
        yield some


def results(function: Callable[[S], T], values: Iterable[S], threads: int) -> Iterator[T]:
    """Yield the function of each value, in their order. The threads work on the next ones meanwhile, which are few."""
    pending = collections.deque[concurrent.futures.Future[T]]()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for value in values:
            pending.append(pool.submit(function, value))
            if len(pending) > threads + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
