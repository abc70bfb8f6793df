import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm.sh"


def submitted(tmp_path: Path, *words: str, code: int = 0, restarts: int = 0, srun: str = "") -> tuple[int, list[str]]:
    """The exit code of the job, and what it called, where `srun` ends with `code`."""
    for name, body in {"srun": f'{srun}\nexit "$CODE"', "scontrol": ""}.items():
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\necho {name} "${{@@Q}}" >>"$SLURM_SUBMIT_DIR/calls"\n{body}\n')
        path.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    env |= {"CODE": str(code), "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(["bash", SCRIPT, *words], env=env, capture_output=True, text=True)
    calls = tmp_path / "calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, False), (1, 0, False), (2, 0, False), (75, 0, True), (75, 100, False), (134, 0, True), (137, 3, True)],
)
def test_the_job_is_queued_again_when_it_asks_for_it(tmp_path: Path, code: int, restarts: int, again: bool):
    left, calls = submitted(tmp_path, "ppo", "--data", "my file", code=code, restarts=restarts)
    assert left == code
    run = [".venv/bin/python", "-m", "experiments.ppo", "--data", "my file"]
    assert shlex.split(calls[0])[-len(run) :] == run and shlex.split(calls[0])[0] == "srun"
    assert [shlex.split(call) for call in calls[1:]] == [["scontrol", "requeue", "7"]] * again


def test_the_job_waits_for_the_processes_to_save(tmp_path: Path):
    """SIGTERM to the script itself, while they are still at it."""
    left, calls = submitted(tmp_path, "ppo", code=75, srun="kill -TERM $PPID; sleep 0.3")
    assert left == 75 and len(calls) == 2


def test_an_experiment_must_be_named(tmp_path: Path):
    assert submitted(tmp_path) == (2, [])
