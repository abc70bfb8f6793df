"""Where a server listens, and at which addresses it may do so without https."""

import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rlhf_jax.errors import InputError
from rlhf_jax.settings import Range

if TYPE_CHECKING:
    import uvicorn

Port = Annotated[int, Range(least=0, below=2**16)]
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})  # names by which a server at such an address is asked


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(host: str, protected: bool, what: str, page: str, port: int) -> None:
    """Raises InputError where `what` would cross a network readable, since nothing protects it by https."""
    if not is_loopback(host) and not protected:
        raise InputError(
            f"host={host}: without https, {what} would cross the network readable: keep the default and use an SSH"
            f" tunnel (ssh -L {port}:127.0.0.1:{port} HOST), or give --behind-proxy or --certificate ({page})"
        )


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens at an address; InputError where it cannot."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=256)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or an answer waits 40 ms; asyncio misses it
    except OSError as error:
        what = error.strerror or error
        raise InputError(f"host={host}, port={port}: cannot listen there ({what}); choose another --port") from error
    with listener:
        yield listener


def url(scheme: str, host: str, listener: socket.socket) -> str:
    """The address of a server, with the port at which it listens."""
    name = f"[{host}]" if ":" in host else host
    return f"{scheme}://{name}:{listener.getsockname()[1]}"


def config(app: Any, behind_proxy: bool, certificate: Path | None, key: Path | None) -> "uvicorn.Config":
    """The settings with which uvicorn serves an application, by https with a certificate."""
    import uvicorn  # which is slow to import

    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=behind_proxy,
        forwarded_allow_ips="127.0.0.1,::1",
        ssl_certfile=certificate,
        ssl_keyfile=key,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=2**16,
    )
