"""Preemption: spot machines get SIGTERM about 30 seconds before they are taken away.

While a run trains, the signal only sets a flag, and the loop saves a checkpoint after the current step
(`checkpoint.Writer`). At any other time there is nothing to save, and `Preempted` is raised at once, as control-C
raises KeyboardInterrupt. Either way the process ends with status `EXIT`, which tells a launcher to run the same command
again.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

EXIT = os.EX_TEMPFAIL  # 75

_requested = threading.Event()
_deferred = 0  # number of open `defer` blocks, which check `requested` themselves


class Preempted(BaseException):
    """The process got SIGTERM and has saved its state. It derives from BaseException, since it is not an error."""


@contextlib.contextmanager
def handle_sigterm() -> Iterator[None]:
    """Handle SIGTERM inside the block. No effect outside the main thread, where Python handles no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _requested.clear()
    former = signal.signal(signal.SIGTERM, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
        _requested.clear()


@contextlib.contextmanager
def defer() -> Iterator[None]:
    """Inside the block SIGTERM only makes `requested` true; `Preempted` is raised when the outermost block ends."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
    if requested() and not _deferred:
        raise Preempted


def requested() -> bool:
    """Whether SIGTERM has arrived. The flag is on the host, so reading it does not wait for the device."""
    return _requested.is_set()


def _handle(*_: Any) -> None:
    _requested.set()
    if not _deferred:
        raise Preempted
