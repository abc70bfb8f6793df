"""Programs that run beside the server: one after another, and no longer than it does, however it ends."""

import functools
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")

from rlhf_jax.people import __main__ as command
from rlhf_jax.people import beside
from rlhf_jax.people.beside import Program
from rlhf_jax.people.store import Store
from tests.people.serving import ROOT
from tests.people.visiting import Browser


def until(out: IO[str], line: str) -> None:
    """Read up to a line."""
    assert any(said == line for said in out)


def test_processes_run_one_after_another_and_end_with_the_server(tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    touch = f"import pathlib, time; time.sleep(0.1); pathlib.Path({str(first)!r}).touch()"
    wait = f"import pathlib, time; found = pathlib.Path({str(first)!r}).exists()"
    wait += f"; pathlib.Path({str(second)!r}).write_text(str(found)); time.sleep(60)"
    start = time.monotonic()
    with beside.running([Program([sys.executable, "-Sc", touch]), Program([sys.executable, "-Sc", wait])]):
        while not second.exists() or not second.read_text():
            time.sleep(0.01)
            assert time.monotonic() - start < 10
    assert second.read_text() == "True" and time.monotonic() - start < 10
    sleep = [sys.executable, "-Sc", "import time; time.sleep(60)"]
    with beside.running([Program(sleep), Program([sys.executable, "-Sc", touch])]):
        first.unlink()
    assert not first.exists() and time.monotonic() - start < 10


@pytest.mark.slow
def test_a_terminated_server_ends_what_it_started(tmp_path: Path):
    child = [sys.executable, "-Sc", "import time; print('child', flush=True); time.sleep(60)"]
    script = (
        "from rlhf_jax.people import __main__ as command\n"
        "from rlhf_jax.people.beside import Program\n"
        f"command._talking = lambda cfg: ('', [Program({child!r})])\n"
        f"command.main(['--chat', 'http://127.0.0.1:9', '--db', {str(tmp_path / 'x.db')!r}, '--port', '0',"
        f" '--responses', {str(tmp_path / 'r.jsonl')!r}])\n"
    )
    (tmp_path / "r.jsonl").write_text('{"prompt": "p"}')
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    with process.stdout as out:
        until(out, "child\n")
        time.sleep(0.3)  # the server's own handler of signals is there
        process.terminate()
        assert out.read() is not None  # ends when the last process that may write does
    assert process.wait(10) == 128 + 15


def test_a_program_ends_with_a_server_that_is_killed():
    said = "import time; print('child', flush=True); time.sleep(60)"
    script = (
        "import time\n"
        "from rlhf_jax.people import beside\n"
        f"child = beside.command('timeit', '-n1', '-r1', {said!r})\n"
        "with beside.running([beside.Program(child)]):\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    with process.stdout as out:
        until(out, "child\n")
        process.kill()
        start = time.monotonic()
        assert out.read() is not None  # ends when the last process that may write does
    process.wait()
    assert time.monotonic() - start < 8


def test_why_a_program_failed_is_told_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture):
    """The next one runs all the same."""
    fail = "import sys; print('loading', file=sys.stderr); sys.exit('error: runs/a/model: <no> params')"
    programs = [
        Program([sys.executable, "-Sc", fail], "serve"),
        Program([sys.executable, "-Sc", "raise SystemExit(3)"]),
    ]
    with beside.running(programs):
        end = time.monotonic() + 10
        while not programs[-1].failed and time.monotonic() < end:
            time.sleep(0.02)
    assert [program.failed for program in programs] == ["runs/a/model: <no> params", "its process ended with status 3"]
    assert capsys.readouterr().err.splitlines() == ["loading", "error: runs/a/model: <no> params"]
    with Store(tmp_path / "people.db") as store:
        part = functools.partial(command._noted, programs)
        page = Browser(store, "eve", "administrator", part).client.get("/admin").text
        assert "could not be loaded: runs/a/model: &lt;no&gt; params" in page
        assert "No more answers are sampled: its process ended with status 3" in page
