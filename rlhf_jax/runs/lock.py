"""One run at a time in a directory: a lock that is gone when its process is, however it ends.

It is an flock on the hidden file `.lock`, which is never deleted, sent to a bucket or looked at by anything else. The
first process of a run takes it for all of them, by `hosts.first_does`. Where a file system has no locks, there is none.
"""

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path

from rlhf_jax.devices import hosts
from rlhf_jax.types import InputError

_NAME = ".lock"
_held: dict[tuple[int, int], int] = {}  # descriptors of the locks of this process, by device and inode


def take(directory: Path) -> bool:
    """Lock the existing `directory` for this process; False if that has it already, or nobody can.

    Raises InputError if another process has it.
    """
    if not hosts.first():
        return False
    descriptor = os.open(directory / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
    identity = _identity(descriptor)
    if identity in _held:
        os.close(descriptor)
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise InputError(
                f"{directory} is in use by {holder}: wait until that has ended, or name another --out"
            ) from None
        return False  # a file system without locks
    _held[identity] = descriptor
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return True


def release(directory: Path) -> None:
    """Let other processes use `directory`, if this one has its lock."""
    with contextlib.suppress(OSError):
        about = os.stat(directory / _NAME)
        if (descriptor := _held.pop((about.st_dev, about.st_ino), None)) is not None:
            os.close(descriptor)


def _identity(descriptor: int) -> tuple[int, int]:
    about = os.fstat(descriptor)
    return about.st_dev, about.st_ino
