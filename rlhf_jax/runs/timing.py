"""The time that the devices take for each part of an iteration, measured without blocking the loop.

JAX dispatches work asynchronously: a loop that waited for each part would leave the devices idle after it. So a thread
waits instead, and notes when each part is finished. The times are futures until then, which can be recorded like
metrics that are still on the device.
"""

import queue
import threading
import time
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

NAMES = "time", "seconds/", "tokens_per_s/", "tflops/", "mfu/"  # prefixes of metrics that depend on the clock


def is_timing(name: str) -> bool:
    """Whether a metric of this name depends on the clock, so that it differs when a run is repeated."""
    return name.startswith(NAMES)


_compiling = {"seconds": 0.0}


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    if event.startswith("/jax/core/compile/"):
        _compiling["seconds"] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """The seconds this process has spent on tracing, lowering and compiling so far, including cache look-ups."""
    return _compiling["seconds"]


class Pending:
    """A number that is still being computed; reading it with numpy or jax waits for it."""

    def __init__(self, future: "Future[float]"):
        self._future = future

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._future.result(), np.float32)


class Clock:
    """A clock for the parts of an iteration. Use it as a context manager, which ends its thread.

    Call `start` before the first part of an iteration is dispatched, `done` after each part has been dispatched, and
    `seconds` after the last one.
    """

    def __init__(self) -> None:
        self._parts: dict[str, Future[float]] = {}
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name="clock", daemon=True)
        self._free = self._called = time.perf_counter()
        self._compiled = compile_seconds()
        self._thread.start()

    def start(self) -> None:
        """Start an iteration, and measure how long the devices have been idle before it, as the part "host"."""
        self._hand_over("host", None)

    def done(self, part: str, results: Any) -> None:
        """Measure a part until `results` are computed: arrays of the part that no later step takes by donation."""
        self._hand_over(part, results)

    def seconds(self) -> dict[str, Pending]:
        """The seconds of each part since the last call, as "seconds/<part>", without the time of compilation."""
        parts, self._parts = self._parts, {}
        return {f"seconds/{part}": Pending(future) for part, future in parts.items()}

    def _hand_over(self, part: str, results: Any) -> None:
        self._parts[part] = Future()
        now, compiled = time.perf_counter(), compile_seconds()
        start = now if results is None else self._called
        self._work.put((self._parts[part], min(start + compiled - self._compiled, now), results))
        self._called, self._compiled = now, compiled

    def _wait(self) -> None:
        while (work := self._work.get()) is not None:
            future, start, results = work
            if results is None:
                future.set_result(max(start - self._free, 0.0))
                continue
            try:
                jax.block_until_ready(results)
            except Exception as error:
                future.set_exception(error)
                continue
            end = time.perf_counter()
            future.set_result(end - max(self._free, start))
            self._free = end

    def __enter__(self) -> "Clock":
        return self

    def __exit__(self, *_: Any) -> None:
        self._work.put(None)
        self._thread.join()
