"""Tests of rlhf_jax.data.hub, without a network: a server on this machine has the routes of the Hub."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax.data import hub, sources
from rlhf_jax.runs import directory
from rlhf_jax.types import InputError

needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the package datasets")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hub:", "expected hub:OWNER/NAME@REVISION"),
        ("hub:a/b/c", "expected hub:OWNER/NAME@REVISION"),
        ("hub:a/../b", "expected hub:OWNER/NAME@REVISION"),
        ("hub:../b", "expected hub:OWNER/NAME@REVISION"),
        ("hub:a/b?colour=red", "expected, for instance, .config=main&split=train, got 'colour=red'"),
        ("hub:a/b?split=", "got 'split='"),
        ("cot:hub:a/b", "cot is read from .tsv files"),
    ],
)
def test_names_that_are_wrong(tmp_path, spec, message):
    with pytest.raises(InputError, match=message) as error:
        sources.rows(spec, "examples" if "cot" in spec else "text", data_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_what_a_name_says():
    assert hub._parsed("hub:a/b") == ("a/b", None, None, "train")
    assert hub._parsed("hub:a/b-c.d@refs/pr/1?split=test&config=en") == ("a/b-c.d", "refs/pr/1", "en", "test")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach\n'a/b'"), "not in the cache, and the Hub cannot be reached .* reach 'a/b'."),
        (RuntimeError("Dataset 'a/b' is a gated dataset"), "gated: accept its terms at the Hub, and set HF_TOKEN"),
        (ValueError("Config name is missing.\nPick one among: ['x']"), r"as in hub:a/b\?config=NAME .*\['x'\]"),
        (ValueError("Unknown split \"train\". Should be one of ['y']."), r"as in hub:a/b\?split=NAME .*\['y'\]"),
        (RuntimeError("Dataset 'a/b' doesn't exist"), "cannot be read from the Hub .RuntimeError: Dataset 'a/b'"),
    ],
)  # fmt: skip
def test_why_a_data_set_cannot_be_read(error, message):
    said = hub._reason(error, hub._parsed("hub:a/b"))
    assert re.search(message, said) and "\n" not in said


# What follows runs in processes of its own: the libraries of the Hub read their settings when they are imported.
READ = """
import sys
from rlhf_jax.data import sources
from rlhf_jax.types import InputError
for name in sys.argv[2:]:
    where, _, spec = name.partition(" ")
    try:
        rows = sources.rows(spec, "demonstrations", data_dir=f"{sys.argv[1]}/{where}")
        print(len(rows), rows[0], rows.where(0))
    except InputError as error:
        print(error)
"""
SERVE = '''
import http.server, json, os, pathlib, sys, urllib.parse

FOLDER, SHA = pathlib.Path(sys.argv[1]), "0" * 40
class Hub(http.server.BaseHTTPRequestHandler):
    """One data set, "me/talk", of files in FOLDER; "me/closed" is gated."""

    def do_GET(self, body=True):
        path = urllib.parse.urlsplit(self.path).path
        files = [one.name for one in sorted(FOLDER.iterdir())]
        if path.startswith("/api/datasets/me/closed") or "/me/closed/" in path:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, body)
        if not ("/me/talk" in path):
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "none"}, body)
        if "/tree/" in path or "/paths-info/" in path:
            return self.answer(200, json.dumps([self.about(name) for name in files]).encode(), {}, body)
        if path.startswith("/api/"):
            about = {"_id": "1", "id": "me/talk", "sha": SHA, "private": False, "gated": False, "disabled": False,
                     "downloads": 0, "likes": 0, "tags": [], "lastModified": "2024-01-01T00:00:00.000Z",
                     "createdAt": "2024-01-01T00:00:00.000Z", "siblings": [{"rfilename": name} for name in files]}
            return self.answer(200, json.dumps(about).encode(), {}, body)
        name = path.rpartition("/")[2]
        if name not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA}, body)
        content = (FOLDER / name).read_bytes()
        self.answer(200, content, {"ETag": f'"{self.about(name)["oid"]}"', "X-Repo-Commit": SHA}, body)

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = urllib.parse.parse_qs(asked).get("paths") or json.loads(asked).get("paths", []) if asked else []
        here = [self.about(name) for name in names if (FOLDER / name).is_file()]
        self.answer(200 if "/me/talk" in self.path else 404, json.dumps(here).encode(), {}, True)

    def about(self, name):
        oid = name.encode().hex().ljust(40, "0")
        return {"type": "file", "path": name, "size": (FOLDER / name).stat().st_size, "oid": oid}

    def answer(self, status, content, headers, body):
        self.send_response(status)
        for key, value in {"Content-Length": len(content), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(server.server_port, flush=True)
server.serve_forever()
'''


def read(folder: Path, *names: str, **settings: str) -> list[str]:
    """What a process with these settings says of each data directory and spec."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = kept | {"HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"} | settings
    command = [sys.executable, "-c", READ, str(folder), *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@needs_datasets
def test_a_data_set_of_the_hub(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    row = {"prompt": [{"role": "user", "content": "p"}], "completion": "c"}
    (files / "train.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"completion": "d"}) + "\n")
    with subprocess.Popen([sys.executable, "-c", SERVE, str(files)], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
            said = read(tmp_path, "data hub:me/talk", "data hub:me/talk?split=test", "data hub:me/none",
                        "data hub:me/closed", HF_ENDPOINT=endpoint)  # fmt: skip
        finally:
            server.kill()
    assert said[0] == f"2 {row} data 'hub:me/talk', row 1"
    assert "data 'hub:me/talk?split=test': name its split" in said[1] and "'train'" in said[1]
    assert "data 'hub:me/none': " in said[2] and "doesn't exist" in said[2]
    assert "data 'hub:me/closed': it is gated: accept its terms" in said[3]
    # Without the server: from what is prepared, then from the library's cache, and not at all.
    said = read(tmp_path, "data hub:me/talk[1:]", "other hub:me/talk", "other hub:me/none", HF_HUB_OFFLINE="1")
    assert said[0].startswith("1 ") and said[1].startswith("2 ")
    assert "data 'hub:me/none': it is not in the cache, and the Hub cannot be reached" in said[2]
    found = directory._files_in("hub:me/talk=0.5,hub:me/none=0.5", tmp_path / "data")
    assert list(found) == ["hub:me/talk"] and found["hub:me/talk"]
