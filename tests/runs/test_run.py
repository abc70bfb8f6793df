"""The frame of a training loop, with a state and batches of a few numbers."""

import dataclasses
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import runs
from rlhf_jax.devices import parallel
from rlhf_jax.runs import checkpoint, log
from rlhf_jax.settings import Count
from rlhf_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class Algorithm:
    coef: float = 0.5
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Config(runs.Config):
    out: Path = Path("run")
    steps: Count = 4
    algorithm: Algorithm = Algorithm()
    saves: checkpoint.Config = checkpoint.Config(every=2)


def state_of(cfg: Config) -> TrainState:
    return TrainState(
        step=jnp.int32(0),
        params={"total": jnp.float32(0.0)},
        opt_state={"coef": jnp.float32(cfg.algorithm.coef)},
        rng=jax.random.key(cfg.seed),
    )


def batches(count: int = 100) -> grain.IterDataset:
    return grain.MapDataset.range(1, count + 1).map(np.float32).to_iter_dataset()


def train(cfg: Config, stop_after: int = 10**6) -> TrainState:
    """The sum of the batches times the coefficient that the state holds, which shrinks by a tenth each step."""
    runs.claim(cfg.out, cfg)
    layout = parallel.layout(parallel.Config(data=8))
    in_state = runs.SEED | {"algorithm.coef": "opt_state/coef"}
    with runs.Run(cfg, layout, state_of(cfg), {"data": batches()}, cfg.steps, in_state=in_state) as run:
        state = run.state
        for step in run:
            coef = state.opt_state["coef"]
            total = state.params["total"] + coef * next(run.streams["data"])
            state = state.replace(
                step=state.step + 1, params={"total": total}, opt_state={"coef": coef * (1 - cfg.algorithm.rate)}
            )
            run.record(step, state, {"loss/a": total})
            if step == stop_after:
                raise KeyboardInterrupt
        return layout.get(state)


def test_a_run_that_was_stopped_ends_where_it_would_have(tmp_path):
    whole = train(Config(out=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(Config(out=tmp_path / "parts"), stop_after=3)
    parts = train(Config(out=tmp_path / "parts"))
    assert float(parts.params["total"]) == float(whole.params["total"]) == pytest.approx(4.073, abs=1e-5)
    untimed = [[log.without_timings(row) for row in log.read(tmp_path / name)] for name in ("whole", "parts")]
    assert untimed[0] == untimed[1] and [row["step"] for row in untimed[0]] == [1, 2, 3, 4]
    assert train(Config(out=tmp_path / "whole")).params == whole.params  # it is trained: nothing is done


CHANGED = checkpoint.Config(every=2, resume="changed")


def test_a_changed_setting_that_the_state_holds_is_taken_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(Config(out=tmp_path), stop_after=2)
    more = Config(out=tmp_path, saves=CHANGED, steps=3, seed=5, algorithm=Algorithm(coef=2.0))
    state = train(more)
    # 0.5 * 1 + 0.45 * 2 before, then the new coefficient, not the one that had shrunk.
    assert float(state.params["total"]) == pytest.approx(1.4 + 2.0 * 3)
    assert float(state.opt_state["coef"]) == pytest.approx(1.8)
    np.testing.assert_array_equal(jax.random.key_data(state.rng), jax.random.key_data(jax.random.key(5)))


def test_a_changed_setting_is_taken_anew_also_after_a_run_that_saved_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(Config(out=tmp_path), stop_after=2)
    more = Config(out=tmp_path, saves=CHANGED, seed=5, algorithm=Algorithm(coef=2.0))
    with pytest.raises(KeyboardInterrupt):
        train(more, stop_after=3)  # config.json has the new settings by now, and no checkpoint has
    state = train(more)
    assert float(state.params["total"]) == pytest.approx(1.4 + 2.0 * 3 + 1.8 * 4)


def test_what_the_state_made_of_a_setting_stays_where_that_is_the_same(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(Config(out=tmp_path), stop_after=2)
    state = train(Config(out=tmp_path, saves=CHANGED, steps=3, algorithm=Algorithm(rate=0.2)))
    assert float(state.params["total"]) == pytest.approx(1.4 + 0.405 * 3)


def test_a_run_that_is_asked_for_fewer_steps_is_trained(tmp_path, capsys):
    train(Config(out=tmp_path))
    state = train(Config(out=tmp_path, saves=CHANGED, steps=2))
    assert int(state.step) == 4 and "is trained: 4 steps" in capsys.readouterr().out


def test_records_and_checkpoints_are_closed_where_the_loop_breaks(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        runs.Run(
            Config(out=tmp_path), parallel.layout(parallel.Config(data=8)), state_of(Config()), {"data": batches()}, 4
        ) as run,
    ):
        for step in run:
            run.record(step, run.state, {"loss/a": jnp.float32(step)})
            if step == 2:
                raise ZeroDivisionError
    assert [row["step"] for row in log.read(tmp_path)] == [1, 2]
