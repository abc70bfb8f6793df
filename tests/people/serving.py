"""A server in a process of its own, as `scripts/people.sh` starts it, or in a thread of the test."""

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from rlhf_jax.people import __main__ as command
from rlhf_jax.people import access, chat, server
from rlhf_jax.people.endpoint import Endpoint
from rlhf_jax.people.store import Store

ROOT = Path(__file__).parents[2]


class Server:
    """A running server."""

    def __init__(self, db: Path, *flags: Any, port: int = 0):
        command = [sys.executable, "-m", "rlhf_jax.people", "--db", str(db), "--port", str(port), *map(str, flags)]
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout
        self.said: list[str] = []
        for line in self.process.stdout:
            self.said.append(line)
            if found := re.search(r"administrator: (https?://\S+:(\d+))/enter#(\S+)", line):
                self.url, self.port, self.token = found[1], int(found[2]), found[3]
                break
        else:
            raise AssertionError("".join(self.said))
        self._reader = threading.Thread(target=self._drain)
        self._reader.start()

    def _drain(self) -> None:
        assert self.process.stdout
        with self.process.stdout as out:
            self.said.extend(out)

    def kill(self) -> None:
        """End the server as a power cut would."""
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def close(self) -> None:
        """End the server."""
        self.process.terminate()
        try:
            self.process.wait(10)
        finally:
            self.kill()


@contextlib.contextmanager
def serving(db: Path, *flags: Any, port: int = 0) -> Iterator[Server]:
    """A server for as long as the context lasts."""
    server = Server(db, *flags, port=port)
    try:
        yield server
    finally:
        server.close()


class Thread:
    """A server in a thread of the test, which starts many times faster than a process."""

    def __init__(self, db: Path, endpoint: str = ""):
        self._store = Store(db)
        self.said: list[str] = []
        self.token = access.invite(self._store, "administrator", "administrator", replaces=False)
        self._listening = command.listening("127.0.0.1", 0)
        self._listener = self._listening.__enter__()
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        app = server.app(self._store, None, *([chat.part(Endpoint(endpoint))] if endpoint else []))
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],))
        self._thread.start()

    def close(self) -> None:
        """End the server."""
        self._server.should_exit = True
        self._thread.join()
        self._listening.__exit__(None, None, None)
        self._store.close()
