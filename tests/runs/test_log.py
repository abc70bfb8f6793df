import dataclasses
import gzip
import json
import math
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.runs import checkpoint, log
from rlhf_jax.types import InputError, TrainState


@dataclasses.dataclass(frozen=True)
class Inner:
    clip: float = 0.2


@dataclasses.dataclass(frozen=True)
class Config:
    init: Path = Path("models/base")
    sizes: tuple[int, ...] = (1, 2)
    ppo: Inner = Inner()


def without_time(rows):
    return [log.without_timings(row) for row in rows]


def test_records_config_and_metrics(tmp_path):
    with log.Records(tmp_path / "a" / "run", Config(), total=3) as run:
        run.write(1, {"loss/policy": jnp.float32(0.1), "reward/score": jnp.asarray(-1.5, jnp.bfloat16)})
        run.write(jnp.int32(2), {"loss/policy": np.float32(1e-8), "count": jnp.int32(7), "eval/nll": 0.3})
    directory = tmp_path / "a" / "run"
    config = json.loads((directory / "config.json").read_text())
    assert config.pop("environment")
    assert config == {"init": "models/base", "sizes": [1, 2], "ppo": {"clip": 0.2}}
    rows = log.read(directory)
    assert without_time(rows) == [
        {"step": 1, "loss/policy": 0.1, "reward/score": -1.5},
        {"step": 2, "loss/policy": 1e-8, "count": 7, "eval/nll": 0.3},
    ]
    assert rows[0]["time"] <= rows[1]["time"]
    assert np.float32(rows[0]["loss/policy"]) == np.float32(0.1)
    assert list((directory / "tensorboard").glob("events*"))


def test_metrics_stay_on_the_device_until_there_are_enough(tmp_path):
    step = jax.jit(lambda x: {"loss/total": x, "grad_norm": x * 2})
    with log.Records(tmp_path, Config(), total=8, limits=log.Limits(every=4)) as run:
        run.write(0, step(jnp.float32(0)))  # compiles
        with jax.transfer_guard_device_to_host("disallow_explicit"):
            for i in (1, 2):
                run.write(i, step(run_value(i)))
        assert log.read(tmp_path) == []
        run.write(3, step(run_value(3)))
        assert log.read(tmp_path) == []
        run.write(4, step(run_value(4)))
        assert [row["step"] for row in log.read(tmp_path)] == [0, 1, 2, 3]  # with the next one under way
        run.flush()
        assert log.read(tmp_path)[-1]["grad_norm"] == 8.0


def run_value(i):
    return jax.device_put(np.float32(i))


def test_one_transfer_a_batch(tmp_path, monkeypatch):
    calls = []
    real = jax.device_get
    monkeypatch.setattr(log.jax, "device_get", lambda tree: calls.append(tree) or real(tree))
    with log.Records(tmp_path, Config(), total=7, limits=log.Limits(every=3)) as run:
        for i in range(1, 8):
            run.write(i, {"loss/a": jnp.float32(i), "loss/b": jnp.float32(i)})
        assert len(calls) == 2


def test_few_steps_are_unfinished(tmp_path):
    waited = []

    class Metric(float):
        def block_until_ready(self):
            waited.append(float(self))
            return self

    with log.Records(tmp_path, Config(), total=9) as run:
        for i in range(1, 6):
            run.write(i, {"loss/a": Metric(i)})
    assert waited == [1.0, 2.0, 3.0]


def test_slow_steps_are_recorded_when_the_next_is_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr(log.Records, "PATIENCE", 0.0)
    with log.Records(tmp_path, Config(), total=2, limits=log.Limits(every=100)) as run:
        run.write(1, {"loss/a": 0.5})
        assert log.read(tmp_path) == []
        run.write(2, {"loss/a": 0.5})
        assert len(log.read(tmp_path)) == 1


@pytest.mark.parametrize("name", ["loss/value", "grad_norm", "grad_norm/policy"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("every", [1, 10])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, name, value, every):
    with (
        pytest.raises(log.BrokenRunError) as raised,
        log.Records(tmp_path, Config(), total=9, limits=log.Limits(every=every)) as run,
    ):
        run.write(4, {"loss/policy": jnp.float32(0.5), "kl": jnp.float32(0.25)})
        run.write(5, {"loss/policy": jnp.float32(0.5), name: jnp.float32(value)})
        run.write(6, {"loss/policy": jnp.float32(0.5)})
    assert str(raised.value) == f"step 5: {name} is {value}; there is no checkpoint yet"
    assert without_time(log.read(tmp_path)) == [
        {"step": 4, "loss/policy": 0.5, "kl": 0.25},
        {"step": 5, "loss/policy": 0.5, name: None},
    ]


def test_steps_in_a_row_that_are_not_finite_may_be_skipped(tmp_path, capsys):
    def run_from(step, losses):
        with log.Records(
            tmp_path, Config(), total=9, step=step, limits=log.Limits(skip_bad=2, at_most={"off": 1.0})
        ) as run:
            for n, loss in enumerate(losses, step + 1):
                run.write(n, {"loss/a": jnp.float32(loss), "off": math.nan if math.isnan(loss) else 0.5})

    run_from(0, [0.5, math.nan, math.nan, 0.5, math.nan])
    assert "warning: step 3: loss/a is nan; skipped, 2 of 2 in a row" in capsys.readouterr().err
    with pytest.raises(log.BrokenRunError, match="step 7: loss/a is nan; there is no checkpoint yet"):
        run_from(5, [math.nan, math.nan, 0.5])  # those before the restart count
    assert [row["step"] for row in log.read(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_flushing_tells_the_last_metrics(tmp_path):
    with log.Records(tmp_path, Config(), total=2) as run:
        run.write(1, {"loss/a": 0.5})
        run.write(2, {"loss/a": 0.25})
        assert run.flush() == run.flush() == {"loss/a": 0.25}


def test_samples_come_after_the_metrics_of_earlier_steps(tmp_path):
    with log.Records(tmp_path, Config(), total=9) as run:
        run.write(1, {"loss/a": 0.5})
        run.samples(2, [{"prompt": "p", "response": "r"}])
        assert len(log.read(tmp_path)) == 1


@pytest.mark.parametrize("value", [0.25, math.nan])
def test_a_metric_above_its_bound_stops_the_run(tmp_path, value):
    with (
        pytest.raises(log.BrokenRunError) as raised,
        log.Records(tmp_path, Config(), total=9, limits=log.Limits(at_most={"off": 0.2})) as run,
    ):
        run.write(1, {"off": jnp.float32(0.2)})
        run.write(2, {"off": jnp.float32(value)})
    assert str(raised.value) == f"step 2: off is {value:.3g}, which should be at most 0.2; there is no checkpoint yet"
    assert len(log.read(tmp_path)) == 2


def test_other_metrics_may_be_undefined(tmp_path):
    with log.Records(tmp_path, Config(), total=1) as run:
        run.write(1, {"loss/policy": 0.5, "reward/accuracy": jnp.float32(jnp.nan)})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"reward/accuracy": null' in text
    assert "NaN" not in text


def test_the_last_good_checkpoint_is_named(tmp_path):
    def state(step):
        return TrainState(step=jnp.int32(step), params={"w": jnp.ones(2)}, opt_state=(), rng=jax.random.key(0))

    with (
        pytest.raises(log.BrokenRunError, match=re.escape(f"the last good checkpoint is {tmp_path}/checkpoints/4")),
        checkpoint.Writer(tmp_path / log.CHECKPOINTS, checkpoint.Config(keep=3)) as writer,
        log.Records(tmp_path, Config(), total=9) as run,
    ):
        for step in (2, 4, 6):
            writer.save(state(step))
        writer.wait()
        run.write(5, {"loss/total": jnp.float32(jnp.nan)})


def test_the_first_error_wins_and_nothing_is_lost(tmp_path):
    with pytest.raises(KeyError) as raised, log.Records(tmp_path, Config(), total=9) as run:
        run.write(1, {"loss/a": 0.5})
        run.write(2, {"loss/a": math.nan})
        raise KeyError("bug")
    assert "step 2: loss/a is nan" in raised.value.__notes__[0]
    assert [row["step"] for row in log.read(tmp_path)] == [1, 2]
    assert run._metrics.closed


def test_a_metric_that_is_not_a_scalar_is_refused(tmp_path):
    run = log.Records(tmp_path, Config(), total=1)
    run.write(1, {"kl": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"metric kl is not a scalar but has the shape \(3,\)"):
        run.close()


def test_a_new_run_does_not_mix_with_the_old_one(tmp_path):
    for value in (1.0, 2.0):
        with log.Records(tmp_path, Config(), total=2) as run:
            run.write(1, {"kl": value})
            run.samples(1, [{"prompt": "a", "response": "b", "score": value, "kl": 0.0}])
    assert [row["kl"] for row in log.read(tmp_path)] == [2.0]
    assert [row["score"] for row in log.read(tmp_path, "samples.jsonl")] == [2.0]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_run_that_continues_has_no_gaps_and_no_duplicates(tmp_path):
    with log.Records(tmp_path, Config(), total=6) as run:
        for step in (1, 2, 3, 4):
            run.write(step, {"kl": step / 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time"')  # cut short by a kill
    with log.Records(tmp_path, Config(), total=6, step=2) as run:
        for step in (3, 4, 5):
            run.write(step, {"kl": step / 4})
    assert [(row["step"], row["kl"]) for row in log.read(tmp_path)] == [
        (1, 0.5),
        (2, 1.0),
        (3, 0.75),
        (4, 1.0),
        (5, 1.25),
    ]


def test_samples(tmp_path):
    first = [
        {"prompt": "Who | what?", "response": "Ann.\nBob.", "score": jnp.float32(0.25), "kl": 1.5, "gold": math.nan}
    ]
    with log.Records(tmp_path, Config(), total=2) as run:
        run.samples(1, [{"prompt": "old", "response": "x", "score": 0.0, "kl": 0.0}])
        run.samples(2, first)
        run.samples(2, [])
    assert log.read(tmp_path, "samples.jsonl") == [
        {"step": 1, "prompt": "old", "response": "x", "score": 0.0, "kl": 0.0},
        {"step": 2, "prompt": "Who | what?", "response": "Ann.\nBob.", "score": 0.25, "kl": 1.5, "gold": None},
    ]
    assert (tmp_path / "samples.md").read_text() == (
        "Step 2\n\n| prompt | response | score | kl | gold |\n| --- | --- | --- | --- | --- |\n"
        "| Who \\| what? | Ann.<br>Bob. | 0.25 | 1.5 | nan |\n"
    )


def test_samples_of_a_step_replace_those_of_an_earlier_process(tmp_path):
    for score in (0.25, 0.75):
        with log.Records(tmp_path, Config(), total=2, step=2 if score > 0.5 else 0) as run:
            for step in (1, 2) if score < 0.5 else (2,):
                run.samples(step, [{"prompt": f"a\u2028{step}", "response": "b", "score": score}] * 2)
    rows = log.read(tmp_path, "samples.jsonl")
    assert [(row["step"], row["score"]) for row in rows] == [(1, 0.25)] * 2 + [(2, 0.75)] * 2


def test_progress_off_a_terminal_is_a_few_lines(tmp_path, capsys):
    with log.Records(tmp_path, Config(), total=50, limits=log.Limits(every=1, show=("reward/score",))) as run:
        for step in range(1, 51):
            run.write(step, {"loss/policy": 0.5, "reward/score": step / 64})
    printed, said = capsys.readouterr()
    assert "\r" not in said and not printed
    assert len(said.splitlines()) <= 3
    assert re.search(r"^100% 50/50 \[\d\d:\d\d<00:00, .* step/s, reward/score 0.7812\]$", said, re.MULTILINE)


def test_other_processes_check_but_do_not_write(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(log.jax, "process_index", lambda: 1)
    with pytest.raises(log.BrokenRunError), log.Records(tmp_path / "run", Config(), total=1) as run:
        run.samples(1, [{"prompt": "a"}])
        run.write(1, {"loss/a": math.nan})
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_weights_and_biases(tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: calls.append(("init", settings["config"]["ppo"], settings["name"]))
    fake.log = lambda values, step: calls.append(("log", values, step))
    fake.Table = lambda columns, data: (columns, data)
    fake.finish = lambda: calls.append(("finish",))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with log.Records(tmp_path / "run", Config(), total=1, limits=log.Limits(wandb=True)) as run:
        run.write(1, {"loss/a": jnp.float32(0.5), "kl": math.nan})
        run.flush()
        run.samples(1, [{"prompt": "a", "response": "b"}])
    assert calls == [
        ("init", {"clip": 0.2}, "run"),
        ("log", {"loss/a": 0.5}, 1),
        ("log", {"samples": (["prompt", "response"], [["a", "b"]])}, 1),
        ("finish",),
    ]


def test_bad_input(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'rlhf_jax\[wandb\]'"):
        log.Records(tmp_path / "run", Config(), total=1, limits=log.Limits(wandb=True))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"records cannot be written to .*file: "):
        log.Records(tmp_path / "file", Config(), total=1)
    with pytest.raises(InputError, match=r"does not exist; is .* the directory of a run"):
        log.read(tmp_path)
    for name in ("sft", "ppo"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.jsonl").write_text("")
    with pytest.raises(
        InputError, match=r"metrics.jsonl does not exist; name one of the runs in it: \S+/runs/ppo, \S+/runs/sft$"
    ):
        log.read(tmp_path / "runs")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2 is not JSON"):
        log.read(tmp_path)


@pytest.mark.parametrize("steps", [8, 4])  # the second ends within what is to be traced
def test_steps_are_traced(tmp_path, capsys, steps):
    double = jax.jit(lambda x: x + x)
    with log.Records(tmp_path, Config(), total=steps, limits=log.Limits(profile=2)) as run:
        for step in range(1, steps + 1):
            run.write(step, {"loss/a": double(jnp.float32(step))})
    assert [row["loss/a"] for row in log.read(tmp_path)] == [2.0 * step for step in range(1, steps + 1)]
    assert (f"2 steps are traced in {tmp_path / 'profile'}" in capsys.readouterr().out) == (steps == 8)
    (perfetto,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    names = {event.get("name") for event in json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]}
    assert any("double" in str(name) or "lambda" in str(name) for name in names)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_too_short_to_be_traced_says_so(tmp_path, capsys):
    with log.Records(tmp_path, Config(), total=2, limits=log.Limits(profile=2)) as run:
        run.write(1, {"loss/a": 1.0})
    assert "nothing is traced: the run ended before its step 4" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()
