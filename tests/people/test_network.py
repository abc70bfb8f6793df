"""The server over a network: by https of its own, and behind a reverse proxy that serves https."""

import contextlib
import http.client
import http.server
import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")

from tests.people.serving import Server, serving

HOST = "labels.example.org"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for this machine, signed by itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("certificate")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    subprocess.run([*command, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    return certificate, key


def enter(connection: http.client.HTTPConnection, server: Server, **headers: str) -> tuple[int, str]:
    """The status of an entrance by the administrator's link, and the cookie that it sets."""
    body = json.dumps({"token": server.token})
    connection.request("POST", "/enter", body, {"Content-Type": "application/json", **headers})
    response = connection.getresponse()
    response.read()
    return response.status, response.headers.get("Set-Cookie", "")


@pytest.mark.slow
def test_a_certificate_serves_https_alone(certificate: tuple[Path, Path], tmp_path: Path):
    path, key = certificate
    flags = "--prompts", 0, "--host", "0.0.0.0", "--certificate", path, "--key", key
    with serving(tmp_path / "people.db", *flags) as server:
        assert server.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(path))
        connection = http.client.HTTPSConnection("localhost", server.port, context=trusting)
        status, cookie = enter(connection, server)
        assert status == 200 and "Secure" in cookie and "HttpOnly" in cookie
        connection.request("GET", "/admin", headers={"Cookie": cookie.partition(";")[0]})
        assert connection.getresponse().status == 200
        connection.close()
        plain = http.client.HTTPConnection("localhost", server.port)
        with pytest.raises((http.client.HTTPException, OSError)):
            enter(plain, server)
        plain.close()


@contextlib.contextmanager
def proxy(to: int, certificate: Path, key: Path) -> Iterator[int]:
    """A reverse proxy that serves https and hands requests on to a port; its own port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            passed = {name: self.headers[name] for name in ("Host", "Content-Type")}
            passed |= {"X-Forwarded-For": self.headers["X-Client"], "X-Forwarded-Proto": "https"}
            connection = http.client.HTTPConnection("127.0.0.1", to)
            connection.request("POST", self.path, body, passed)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(content)))
            for cookie in answer.headers.get_all("Set-Cookie", []):
                self.send_header("Set-Cookie", cookie)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    front = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    front.socket = context.wrap_socket(front.socket, server_side=True)
    thread = threading.Thread(target=front.serve_forever)
    thread.start()
    try:
        yield front.server_port
    finally:
        front.shutdown()
        thread.join()
        front.server_close()


@pytest.mark.slow
def test_a_reverse_proxy_hands_on_who_asks(certificate: tuple[Path, Path], tmp_path: Path):
    """By the public name, with cookies for https alone; wrong links are counted for each address apart."""
    path, key = certificate
    with (
        serving(tmp_path / "people.db", "--prompts", 0, "--behind-proxy") as server,
        proxy(server.port, path, key) as port,
    ):
        trusting = ssl.create_default_context(cafile=str(path))

        def ask(client: str, token: str) -> tuple[int, str]:
            connection = http.client.HTTPSConnection("localhost", port, context=trusting)
            body = json.dumps({"token": token})
            headers = {"Host": HOST, "Content-Type": "application/json", "X-Client": client}
            connection.request("POST", "/enter", body, headers)
            response = connection.getresponse()
            response.read()
            connection.close()
            return response.status, response.headers.get("Set-Cookie", "")

        statuses = [ask("203.0.113.7", "wrong")[0] for _ in range(25)]
        assert statuses[0] == 401 and statuses[-1] == 429
        status, cookie = ask("203.0.113.8", server.token)
        assert status == 200 and "Secure" in cookie
