"""Programs with JAX that run beside the server, one after another, each in a process of its own.

So a model is in memory once, and of an accelerator that has room for one process the next finds it free. A program
ends with the server, however that ends: it is run by this module, which reads a pipe from the server to its end.

    python -m rlhf_jax.people.beside experiments.answers --db people.db ...
"""

import contextlib
import dataclasses
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Literal

_GRACE = 10.0  # seconds after SIGTERM, before a program whose server is gone is ended at once
_LONGEST = 500  # characters of a reason


def command(module: str, *flags: str) -> list[str]:
    """The command that runs a module for as long as the pipe that is its standard input is open."""
    return [sys.executable, "-m", "rlhf_jax.people.beside", module, *flags]


@dataclasses.dataclass
class Program:
    """A command that runs beside the server, and what became of it."""

    command: Sequence[str]
    name: Literal["answers", "serve"] = "answers"
    failed: str = ""  # why it failed, in a line


@contextlib.contextmanager
def running(programs: Sequence[Program]) -> Iterator[None]:
    """Within, the programs run one after another."""
    lock, started, ended = threading.Lock(), list[subprocess.Popen[bytes]](), threading.Event()

    def run() -> None:
        for program in programs:
            with lock:
                if ended.is_set():
                    return
                process = subprocess.Popen(program.command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
                started.append(process)
            with process:
                said = _copied(process)
                status = process.wait()
            if ended.is_set():
                return
            if status:
                program.failed = said or f"its process ended with status {status}"

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        with lock:
            ended.set()
            for process in started:
                process.terminate()
        thread.join()


def _copied(process: "subprocess.Popen[bytes]") -> str:
    """The last line of what a process says of errors, all of which is passed on as it comes."""
    last = ""
    assert process.stderr
    for line in process.stderr:
        text = line.decode(errors="replace")
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            sys.stderr.write(text)
            sys.stderr.flush()
        last = text.strip() or last
    return last.removeprefix("error: ")[:_LONGEST]


def _end_with(pipe: int) -> None:
    """End this process when the pipe is closed at its other end, by a server that ends or is killed."""
    while os.read(pipe, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(1)


def main() -> None:
    """Run the module that the arguments name, with the rest of them."""
    pipe = os.dup(sys.stdin.fileno())
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    _, module, *flags = sys.argv
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
