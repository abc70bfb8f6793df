"""Being taken away: machines that are lent for less say SIGTERM, and are gone half a minute later.

While a run trains, the signal is noted, and the loop saves after the step that it is in (`checkpoint.Writer`). At any
other time there is nothing to save, and `Preempted` is raised where the program is, as control-C would be. Either way
the process ends with `EXIT`, which tells a launcher to run the same command again.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

EXIT = os.EX_TEMPFAIL  # 75

_asked = threading.Event()
_deferred = 0  # loops that will look at `asked` themselves


class Preempted(BaseException):
    """The process was asked to end, and what there was to save is saved. Not an error, so no `Exception`."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """SIGTERM is heeded within. Elsewhere than on the main thread, where Python takes no signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked.clear()
    former = signal.signal(signal.SIGTERM, _heed)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
        _asked.clear()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within, the signal is only noted, for `asked` to tell; `Preempted` is raised on leaving."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
    if asked() and not _deferred:
        raise Preempted


def asked() -> bool:
    """Whether the signal has come. A flag on the host: nothing waits for the device."""
    return _asked.is_set()


def _heed(*_: Any) -> None:
    _asked.set()
    if not _deferred:
        raise Preempted
