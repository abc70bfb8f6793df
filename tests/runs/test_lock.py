import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax.runs import lock
from rlhf_jax.types import InputError

HOLD = """
import sys
from pathlib import Path
from rlhf_jax.runs import lock
lock.take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of `tmp_path`."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_one_is_dead(tmp_path, holder):
    with pytest.raises(InputError, match=rf"^{tmp_path} is in use by process {holder.pid} on .*: wait until") as raised:
        lock.take(tmp_path)
    assert "\n" not in str(raised.value)
    holder.kill()
    holder.wait()
    assert lock.take(tmp_path)
    lock.release(tmp_path)


@pytest.mark.slow
def test_by_another_name_it_is_the_same(tmp_path, holder):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="is in use by"):
        lock.take(tmp_path / "link")


def test_one_process_takes_it_as_often_as_it_likes(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    assert lock.take(out)
    assert not lock.take(out)
    moved = out.rename(tmp_path / "moved")
    assert not lock.take(moved)
    lock.release(moved)
    assert lock.take(moved)
    (moved / ".lock").unlink()
    assert lock.take(moved)  # another file
    lock.release(moved)
    lock.release(tmp_path / "nowhere")


@pytest.mark.slow
def test_only_the_first_of_several_processes_takes_it(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock.hosts, "first", lambda: False)
    assert not lock.take(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert not lock.take(tmp_path)
