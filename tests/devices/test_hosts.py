import os
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax import models, runs
from rlhf_jax.devices import hosts, parallel, preemption
from rlhf_jax.runs import checkpoint
from rlhf_jax.types import InputError
from tests import hosts as several
from tests import tiny


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that speaks of no other process, whatever this one is run under."""
    for name in list(os.environ):
        if name.startswith(("JAX_COORD", "JAX_NUM", "JAX_PROC", "SLURM_", "JOB_", "TPU_")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "others"),
    [
        ({}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a shell in a pod
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, False),  # the batch script itself
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "8"}, True),
        ({"JOB_COMPLETION_INDEX": "3"}, True),
        ({"TPU_ML_PLATFORM": "JAX"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, True),
    ],
)
def test_the_environment_says_whether_there_are_others(alone, environment, others):
    asked = []
    alone.setattr(jax.distributed, "initialize", lambda **settings: asked.append(settings))
    for name, value in environment.items():
        alone.setenv(name, value)
    hosts.start()
    assert bool(asked) == others
    if "JAX_COORDINATOR_ADDRESS" in environment:
        assert asked[0]["num_processes"] == 2 and asked[0]["process_id"] == 1
    assert all(settings["heartbeat_timeout_seconds"] <= 45 for settings in asked)


@pytest.mark.parametrize("given", [{"JAX_NUM_PROCESSES": "2"}, {"JAX_PROCESS_ID": "one"}])
def test_half_of_the_settings_are_refused(alone, given):
    for name, value in given.items():
        alone.setenv(name, value)
    with pytest.raises(InputError, match=r"JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        hosts.start()


def test_the_first_process_decides(monkeypatch):
    assert hosts.first_decides(lambda: True) and not hosts.first_decides(lambda: False)
    sent: list[bool] = []

    def broadcast(value):
        sent.append(bool(value))
        return value

    monkeypatch.setattr(hosts.multihost_utils, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert hosts.first_decides(lambda: True) and sent == [False, True]  # no error, and the answer
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert not hosts.first_decides(lambda: True)  # is not asked


def test_each_process_has_its_share_of_a_batch(monkeypatch):
    rows = {"a": np.arange(12).reshape(6, 2)}
    assert hosts.share(rows) is rows and hosts.join(rows) is rows
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert hosts.share(rows)["a"].tolist() == [[4, 5], [6, 7]]
    with pytest.raises(InputError, match="a batch of 4 rows does not divide over 3 processes"):
        hosts.share(np.zeros(4))


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch):
    met: list[str] = []
    monkeypatch.setattr(hosts, "meet", met.append)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    runs.write(tmp_path / "a" / "b", "text")
    models.save(models.Model(tiny.GPT, tiny.policy(), None, lambda: None), tiny.policy(), tmp_path / "model")
    assert not list(tmp_path.iterdir()) and len(met) == 2
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    runs.write(tmp_path / "a" / "b", "text")
    assert (tmp_path / "a" / "b").read_text() == "text" and len(met) == 3


def test_the_first_process_lets_the_others_go_on_after_an_error(monkeypatch):
    met: list[str] = []
    monkeypatch.setattr(hosts, "meet", met.append)
    with pytest.raises(InputError), hosts.first_before_others():
        assert not met
        raise InputError("a bad row")
    assert len(met) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "mesh"),
    [
        pytest.param("sft", (), id="pmap", marks=pytest.mark.full),
        pytest.param("ppo", ("--devices.fsdp", 4, "--devices.tensor", 2), id="mesh"),
    ],
)
def test_two_processes_train_as_one_does(done, tmp_path: Path, stage, mesh):
    """With dropout, sampling, the mix of pretraining text and checkpoints, from the models of the quickstart."""
    start = done[0].out
    ends = several.ends(several.launch(2, "child", start, tmp_path, stage, *mesh), 300)
    assert [code for code, _ in ends] == [0, 0], ends
    assert several.difference(stage, start, tmp_path) < 1e-5
    ours, theirs = (models.load(run / stage / "model").params for run in (start, tmp_path))
    tiny.assert_close(ours, theirs, atol=1e-5)
    saved = tmp_path / stage / "checkpoints"
    assert checkpoint.steps(saved) == [2]
    parts = {path.name for path in saved.glob("2/state/ocdbt.process_*")}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}  # both wrote


def stepping(out: Path, *flags: object) -> list[subprocess.Popen]:
    """Two processes of a run that counts, when both have begun to."""
    running = several.launch(2, "count", "--out", out, *flags)
    for one in running:
        assert one.stdout is not None
        while "step" not in (said := one.stdout.readline()):
            assert said, several.ends(running, 10)
    return running


@pytest.mark.slow
def test_all_save_the_same_step_when_one_is_asked_to_end(tmp_path: Path):
    running = stepping(tmp_path)
    running[1].send_signal(signal.SIGTERM)
    ends = several.ends(running, 60)
    assert [code for code, _ in ends] == [preemption.EXIT] * 2, ends
    (step,) = checkpoint.steps(tmp_path)
    ends = several.ends(several.launch(2, "count", "--out", tmp_path, "--steps", step + 2), 60)
    assert [code for code, _ in ends] == [0, 0], ends
    assert all(f"starts at {step} with {float(step)}" in said for _, said in ends)
    assert checkpoint.steps(tmp_path) == [step, step + 2]


@pytest.mark.slow
def test_the_others_end_when_one_dies(tmp_path: Path):
    """The first is the one by whom they know each other."""
    running = stepping(tmp_path)
    began = time.monotonic()
    running[0].send_signal(signal.SIGKILL)
    (first, _), (other, said) = several.ends(running, 60)
    assert first == -signal.SIGKILL
    assert other in (preemption.EXIT, -signal.SIGABRT), said
    assert time.monotonic() - began < 60


def test_devices_are_in_the_order_of_the_rows_they_hold():
    assert hosts.devices() == jax.devices()
    rows = np.arange(16)
    np.testing.assert_array_equal(parallel.gather(parallel.shard(rows)), rows)
