"""How long each part of an iteration takes on the devices, told without waiting for them.

A loop hands its work to the devices faster than they do it, and to wait for a part would leave them idle after it. So a
thread waits in the loop's place, and notes when each part was done. What it notes are numbers of the future: they can
be recorded like metrics that are still on the device.
"""

import queue
import threading
import time
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

NAMES = "time", "seconds/", "tokens_per_s/", "tflops/", "mfu/"  # beginnings of the names of what differs between runs


def is_timing(name: str) -> bool:
    """Whether a metric of this name is of the clock, so that it differs where a run is repeated."""
    return name.startswith(NAMES)


_compiling = {"seconds": 0.0}


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    if event.startswith("/jax/core/compile/"):
        _compiling["seconds"] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """What this process has spent so far on tracing, lowering and compiling, or on finding what was compiled before."""
    return _compiling["seconds"]


class Later:
    """A number that is not known yet. It waits where numpy or jax read it."""

    def __init__(self, future: "Future[float]"):
        self._future = future

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._future.result(), np.float32)


class Clock:
    """The seconds of each part of an iteration. Use it as a context manager: leaving it ends its thread.

    Call `start` when an iteration's first part is about to be handed to the devices, `done` when a part has been handed
    over, and `seconds` after the last one.
    """

    def __init__(self) -> None:
        self._parts: dict[str, Future[float]] = {}
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name="clock", daemon=True)
        self._free = self._called = time.perf_counter()
        self._compiled = compile_seconds()
        self._thread.start()

    def start(self) -> None:
        """Notes how long the devices have been idle: the part "host"."""
        self._hand_over("host", None)

    def done(self, part: str, results: Any) -> None:
        """`results` are arrays that the part makes, and that no later one takes over by donation."""
        self._hand_over(part, results)

    def seconds(self) -> dict[str, Later]:
        """Of each part since the last call, as "seconds/part", without what its compilation took."""
        parts, self._parts = self._parts, {}
        return {f"seconds/{part}": Later(future) for part, future in parts.items()}

    def _hand_over(self, part: str, results: Any) -> None:
        self._parts[part] = Future()
        now, compiled = time.perf_counter(), compile_seconds()
        since = now if results is None else self._called
        self._work.put((self._parts[part], min(since + compiled - self._compiled, now), results))
        self._called, self._compiled = now, compiled

    def _wait(self) -> None:
        while (work := self._work.get()) is not None:
            future, begun, results = work
            if results is None:
                future.set_result(max(begun - self._free, 0.0))
                continue
            try:
                jax.block_until_ready(results)
            except Exception as error:
                future.set_exception(error)
                continue
            end = time.perf_counter()
            future.set_result(end - max(self._free, begun))
            self._free = end

    def __enter__(self) -> "Clock":
        return self

    def __exit__(self, *_: Any) -> None:
        self._work.put(None)
        self._thread.join()
