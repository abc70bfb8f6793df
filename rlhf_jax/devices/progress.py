"""The progress of long work, on standard error: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tqdm

from rlhf_jax.devices import hosts

T = TypeVar("T")


def bar(total: int | None, *, done: int = 0, what: str = "", unit: str = "step", delay: float = 0.0) -> Any:
    """A progress bar with rate and time left, which `update` moves on; it does not show before `delay` seconds."""
    terminal = sys.stderr.isatty()
    return tqdm.tqdm(
        desc=what and f"{what}: ",
        total=total,
        initial=done,
        unit=f" {unit}",
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.1 if terminal else 10.0,
        miniters=1,
        dynamic_ncols=terminal,
        delay=delay,
        disable=not hosts.first(),
        bar_format="{desc}{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    )


def of(batches: Sequence[T], what: str) -> Iterator[T]:
    """Yield the batches, and show how many are done where all of them take more than ten seconds."""
    with bar(len(batches), what=what, unit="batch", delay=10.0) as shown:
        for batch in batches:
            yield batch
            shown.update()


class _Lines:
    """A stream that gets each redrawing of a bar as a line of its own."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> None:
        self._stream.write(text.strip("\r").rstrip(" ") + "\n" if text.strip() else "")

    def flush(self) -> None:
        self._stream.flush()
