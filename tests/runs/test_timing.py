import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.runs import log, timing


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0


class Work:
    """Stands for arrays on a device that is done with them after so many seconds."""

    def __init__(self, seconds):
        self.end = time.perf_counter() + seconds

    def block_until_ready(self):
        time.sleep(max(self.end - time.perf_counter(), 0))
        return self


def test_parts_are_timed_while_the_loop_goes_on():
    with timing.Clock() as clock:
        time.sleep(0.5)  # the devices have nothing to do
        clock.start()
        begun = time.perf_counter()
        clock.done("generate", Work(0.6))
        clock.done("update", Work(0.9))  # handed over at once, and done 0.3 s after
        seconds = clock.seconds()
        assert time.perf_counter() - begun < 0.6  # nothing was waited for
        found = {name: float(np.asarray(later)) for name, later in seconds.items()}
        clock.start()  # the devices have been idle for no more than this took
        clock.done("generate", Work(0.3))
        again = {name: float(np.asarray(later)) for name, later in clock.seconds().items()}
    expected = {"seconds/host": 0.5, "seconds/generate": 0.6, "seconds/update": 0.3}
    assert found == pytest.approx(expected, abs=0.2)
    assert again == pytest.approx({"seconds/host": 0.0, "seconds/generate": 0.3}, abs=0.2)


def test_a_failure_on_the_device_is_seen_where_the_number_is_read():
    class Broken:
        def block_until_ready(self):
            raise RuntimeError("out of memory")

    with timing.Clock() as clock:
        clock.start()
        clock.done("generate", Broken())
        clock.done("update", Work(0.0))
        seconds = clock.seconds()
        assert np.asarray(seconds["seconds/update"]) >= 0
        with pytest.raises(RuntimeError, match="out of memory"):
            jax.device_get(seconds)


def test_what_is_compiled_is_told_apart(tmp_path):
    work, x = jax.jit(lambda x: jnp.sort(jnp.cumsum(x)[::-1])), np.ones(7, np.float32)
    with timing.Clock() as clock, log.Records(tmp_path, Config(), total=2) as run:
        for step in (1, 2):
            clock.start()
            clock.done("update", work(x))
            run.write(step, clock.seconds())
    first, second = log.read(tmp_path)
    assert first["seconds/update"] < first["seconds/compile"] / 2
    assert "seconds/compile" not in second
    assert log.without_timings(second) == {"step": 2}


def test_names_of_the_clock():
    row = json.loads('{"step": 1, "time": 2, "seconds/host": 1, "mfu/update": 1, "response/tokens": 3}')
    assert log.without_timings(row) == {"step": 1, "response/tokens": 3}
