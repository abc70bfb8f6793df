"""Serves models by the OpenAI protocol, for chat pages, agents, evaluations and whatever else speaks it.

Run:     python -m experiments.serve --model runs/quickstart/ppo/model
Parent:  none
Result:  http://127.0.0.1:8001/v1 answers chats and completions until control-C: docs/serving.md
"""

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import Iterator
from pathlib import Path

import jax

from rlhf_jax import models
from rlhf_jax.devices import parallel, preemption
from rlhf_jax.devices.compute import Compute
from rlhf_jax.people import network
from rlhf_jax.runs import cli
from rlhf_jax.serving.engine import Engine
from rlhf_jax.settings import Count, Settings
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings of the server."""

    model: tuple[Path, ...] = (Path("runs/quickstart/ppo/model"),)  # model directories, named in requests as here
    host: str = "127.0.0.1"  # address to listen at
    port: network.Port = 8001  # port to listen at; 0: any that is free
    rows: Count = 8  # answers of one model at a time; further ones wait
    max_tokens: Count = 1024  # of an answer in a chat whose request names no limit
    columns: Count = 1024  # of the cache at the start, at most the context; a longer request is compiled for
    api_key: str | None = None  # that requests must carry
    behind_proxy: bool = False  # a reverse proxy on this machine serves https and hands requests on
    certificate: Path | None = None  # PEM file of a certificate, to serve https
    key: Path | None = None  # PEM file of its private key, unless it is in the same file
    compute: Compute = Compute()
    devices: parallel.Config = parallel.Config()  # without a mesh, the first device is used

    def __post_init__(self) -> None:
        super().__post_init__()
        protected = self.behind_proxy or self.certificate is not None
        network.check_host(self.host, protected, "what is asked and answered", "docs/serving.md", self.port)
        if not self.model or len(set(self.model)) < len(self.model):
            raise InputError("--model: expected one directory or several, each once")
        if self.api_key == "":
            raise InputError("--api-key is empty: expected a key, or leave it out")
        for name in ("certificate", "key"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise InputError(f"--{name} {path}: no such file")
        useless = {"data": self.devices.data not in (None, 1), "offload": self.devices.offload}
        useless["microbatches"] = self.devices.microbatches > 1
        for name in (name for name, given in useless.items() if given):
            raise InputError(f"devices.{name} does nothing for conversations: leave it out, and use fsdp or tensor")


def main(cfg: Config) -> None:
    """Serve until control-C or SIGTERM."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"serving needs the extra people: pip install -e .[people] ({error})") from error
    layout = parallel.layout(cfg.devices, jax.devices()[: cfg.devices.fsdp * cfg.devices.tensor])
    mesh = layout if isinstance(layout, parallel.Mesh) else None
    with network.listening(cfg.host, cfg.port) as listener:
        engines = {str(path): _engine(cfg, path, mesh) for path in cfg.model}
        with _running(engines):
            url = network.url("https" if cfg.certificate else "http", cfg.host, listener)
            print(f"serving {', '.join(engines)}: {url}/v1", flush=True)
            _serve(cfg, engines, listener)


def _engine(cfg: Config, path: Path, mesh: parallel.Mesh | None) -> Engine:
    """The engine of a model, whose programs are compiled."""
    place = (lambda path, shape: None) if mesh is None else mesh.sharding
    model = models.load(path, "bfloat16" if cfg.compute.frozen == "int8" else cfg.compute.frozen, cfg.compute, place)
    model = dataclasses.replace(model, params=cfg.compute.freeze(model.params))
    engine = Engine(model, cfg.rows, mesh)
    print(f"{path}: compiling for parts of prompts of", end="", flush=True)
    for width in engine.warm_up(cfg.columns):
        print(f" {width}", end="", flush=True)
    print(" tokens", flush=True)
    return engine


@contextlib.contextmanager
def _running(engines: dict[str, Engine]) -> Iterator[None]:
    """Within, the engines answer."""
    for engine in engines.values():
        engine.start()
    try:
        yield
    finally:
        for engine in engines.values():
            engine.close()


def _serve(cfg: Config, engines: dict[str, Engine], listener: socket.socket) -> None:
    import uvicorn

    from rlhf_jax.serving import server

    reached_directly = network.is_loopback(cfg.host) and not cfg.behind_proxy
    options = server.Options(cfg.max_tokens, cfg.api_key, network.LOOPBACK if reached_directly else None)
    config = network.config(server.app(engines, options), cfg.behind_proxy, cfg.certificate, cfg.key)
    with contextlib.suppress(KeyboardInterrupt, preemption.Preempted):
        asyncio.run(uvicorn.Server(config).serve([listener]))


if __name__ == "__main__":
    cli.run(main, Config())
