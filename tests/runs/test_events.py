import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorboardX

from rlhf_jax.runs import events

# A writer beyond the largest file that the process may write, which ends as a full disk does.
FULL = """
import resource, sys, threading
import tensorboardX
from rlhf_jax.runs import events
threading.excepthook = lambda args: print("thread", args.exc_type.__name__, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
writer = tensorboardX.SummaryWriter(sys.argv[1], max_queue=2**20, flush_secs=0)
for step in range(10_000):
    writer.add_scalar("loss", 1.0, step)
for file in writer.all_writers.values():
    file.event_writer._worker.join(60)
events.close(writer)
"""


@pytest.mark.slow
def test_a_writer_whose_thread_is_dead_is_let_go(tmp_path):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.stdout == "thread OSError\n" and done.returncode == 0
    assert done.stderr == "warning: TensorBoard's events are not complete: they could not be written\n"


def test_a_flush_that_fails_is_raised(tmp_path, monkeypatch):
    writer = tensorboardX.SummaryWriter(str(tmp_path))
    file = writer.file_writer.event_writer

    def full():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(file, "flush", full)
        with pytest.raises(OSError, match="No space left on device"):
            events.close(writer)
    file.close()  # as at the exit of the process: nothing is left to do


def test_a_writer_is_closed(tmp_path):
    writer = tensorboardX.SummaryWriter(str(tmp_path))
    writer.add_scalar("loss", 1.0, 1)
    events.close(writer)
    assert writer.all_writers is None and any(path.stat().st_size > 0 for path in tmp_path.iterdir())
