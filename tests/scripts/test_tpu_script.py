import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = {"TPU_NAME": "mine", "TPU_ZONE": "us-east5-b", "TPU_TYPE": "v5litepod-16"}
PLACE = ["mine", "--zone=us-east5-b"]

# A stand-in that records how it was called, says the next of the states that the test has set, and is the one worker.
GCLOUD = f"""#!{sys.executable}
import json, os, pathlib, subprocess, sys
here = pathlib.Path(__file__).parent
with (here / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
said = dict(word.split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
home = here / "home"
if "describe" in sys.argv:
    states = (here / "states").read_text().split()
    (here / "states").write_text(" ".join(states[1:]))
    if states[0] == "ABSENT":
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
    if states[0] == "DENIED":
        sys.exit("ERROR: PERMISSION_DENIED: ask for roles/tpu.admin")
    print("WARNING: gcloud has news", file=sys.stderr)
    print(states[0])
if "scp" in sys.argv:
    (home / "rlhf_jax.tar.gz").write_bytes(pathlib.Path(sys.argv[5]).read_bytes())
if "ssh" in sys.argv:
    env = os.environ | {{"HOME": str(home)}}
    sys.exit(subprocess.run(["bash", "-c", said["--command"]], cwd=home, env=env).returncode)
"""

# A stand-in for an experiment: notes its arguments, and ends with the next of the exit codes that the test has set.
PYTHON = f"""#!{sys.executable}
import json, pathlib, signal, sys, time
here = pathlib.Path.home()
def note(what):
    with (here / "runs").open("a") as runs:
        runs.write(json.dumps(what) + "\\n")
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), note("saved"), sys.exit(75)))
codes = (here / "codes").read_text().split()
(here / "codes").write_text(" ".join(codes[1:]))
note(sys.argv[1:])
if codes[0] == "wait":
    time.sleep(60)
if codes[0] == "killed":
    signal.raise_signal(signal.SIGKILL)
sys.exit(int(codes[0]))
"""


class Cloud:
    """scripts/tpu.sh with a stand-in for Google's side of it."""

    def __init__(self, directory: Path):
        self.directory, self.home = directory, directory / "home"
        for path, text in {
            "gcloud": GCLOUD,
            "crontab": '#!/bin/sh\nif [ "$1" = -l ]; then cat "$HOME/tab"; else cat >"$HOME/tab.new"; '
            'mv "$HOME/tab.new" "$HOME/tab"; fi\n',
            "home/.local/bin/uv": '#!/bin/sh\necho "$@" >>"$HOME/uv"\n',
            "home/venv/bin/python": PYTHON,
        }.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_text(text)
            (directory / path).chmod(0o755)

    def __call__(self, *words: str, states: str = "", codes: str = "0", **settings: str | None):
        (self.directory / "states").write_text(states)
        (self.home / "codes").write_text(codes)
        path = f"{self.directory}:{os.environ['PATH']}"
        env = {"PATH": path, "HOME": str(self.directory), "TMPDIR": str(self.directory), "TPU_INTERVAL": "0"}
        env |= {name: value for name, value in (SETTINGS | settings).items() if value is not None}
        return subprocess.run(["scripts/tpu.sh", *words], cwd=ROOT, env=env, capture_output=True, text=True)

    def calls(self) -> list[list[str]]:
        path = self.directory / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def names(self) -> list[str]:
        return [call[3] if call[0] == "compute" else call[1] for call in self.calls()]

    def runs(self, count: int) -> list[list[str]]:
        """What the worker ran, once it is `count` things and nothing runs any more."""
        path, lock = self.home / "runs", self.home / "rlhf_jax.lock"
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            seen = path.read_text().splitlines() if path.exists() else []
            if len(seen) >= count and not subprocess.run(["flock", "--nonblock", lock, "true"]).returncode:
                return [json.loads(line) for line in seen]
            time.sleep(0.05)
        raise AssertionError((self.home / "rlhf_jax.log").read_text())


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def printed(cloud: Cloud, *words: str, **settings: str | None) -> list[list[str]]:
    done = cloud("--dry-run", *words, **settings)
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == []
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_create_queues_for_the_slice_and_looks_when_it_is_there(cloud: Cloud):
    create, describe = printed(cloud, "--spot", "create", TPU_PROJECT="payer")
    group = ["gcloud", "compute", "tpus", "queued-resources"]
    place = [*PLACE, "--project=payer"]
    about = ["--node-id=mine", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    assert create == [*group, "create", *place, *about]
    assert describe == [*group, "describe", *place, "--format=value(state.state)"]
    assert "--spot" not in printed(cloud, "create")[0]


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [("v4-8", "tpu-ubuntu2204-base"), ("v5p-32", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e")],
)
def test_the_runtime_goes_with_the_kind_of_chip(cloud: Cloud, kind: str, runtime: str):
    assert f"--runtime-version={runtime}" in printed(cloud, "create", TPU_TYPE=kind)[0]
    assert "--runtime-version=other" in printed(cloud, "create", TPU_TYPE=kind, TPU_RUNTIME="other")[0]


def test_install_packs_copies_and_unpacks(cloud: Cloud):
    archive, copy, unpack = printed(cloud, "install")
    path = str(cloud.directory / "rlhf_jax.tar.gz")
    assert archive[:5] == ["tar", "-czf", path, "-C", str(ROOT)]
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert copy == [*tpu, "scp", path, "mine:rlhf_jax.tar.gz", PLACE[1], "--worker=all"]
    assert unpack[:7] == [*tpu, "ssh", *PLACE] and unpack[7] == "--worker=all"
    assert unpack[8].endswith("&& bash rlhf_jax/scripts/tpu_worker.sh install")


def test_run_quotes_the_flags_for_the_shell_on_the_worker(cloud: Cloud):
    flags = ["--data", "hh:my file.jsonl[:90%]", "--system", "it's $HOME"]
    (run,) = printed(cloud, "run", "ppo", *flags)
    assert run[:-1] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", *PLACE, "--worker=all"]
    command = run[-1].removeprefix("--command=")
    assert shlex.split(command) == ["bash", "rlhf_jax/scripts/tpu_worker.sh", "start", "experiments.ppo", *flags]


def test_log_stop_fetch_and_delete(cloud: Cloud, tmp_path: Path):
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", *PLACE]
    tail = "--command=tail -n 100 -F rlhf_jax.log"
    assert printed(cloud, "log") == [[*ssh, "--worker=0", tail]]
    assert printed(cloud, "log", "3") == [[*ssh, "--worker=3", tail]]
    assert printed(cloud, "stop") == [[*ssh, "--worker=all", "--command=bash rlhf_jax/scripts/tpu_worker.sh stop"]]
    assert printed(cloud, "delete") == [
        ["gcloud", "compute", "tpus", "queued-resources", "delete", *PLACE, "--force", "--quiet"]
    ]
    out = str(tmp_path / "some where")
    rsync = ["gcloud", "storage", "rsync", "--recursive", "gs://bucket/ppo", out]
    assert printed(cloud, "fetch", "gs://bucket/ppo", out, TPU_NAME=None) == [["mkdir", "-p", out], rsync]
    assert not Path(out).exists()


def test_resume_shows_all_that_a_preemption_takes(cloud: Cloud):
    shown = printed(cloud, "--spot", "resume", "ppo", "--steps", "9")
    names = [line[4] if line[:3] == ["gcloud", "compute", "tpus"] else line[0] for line in shown]
    assert names == ["describe", "delete", "create", "describe", "tar", "scp", "ssh", "ssh"]
    assert "--spot" in shown[2] and shown[-1] == printed(cloud, "run", "ppo", "--steps", "9")[0]


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["create"], {"TPU_NAME": None}, "TPU_NAME is not set: it should be what to call it"),
        (["run", "ppo"], {"TPU_ZONE": None}, "TPU_ZONE is not set: it should be where: us-east5-b"),
        (["create"], {"TPU_TYPE": None}, "TPU_TYPE is not set: it should be which and how large"),
        (["create"], {"TPU_TYPE": "h100-8"}, "TPU_TYPE=h100-8 is not known"),
        (["run"], {}, "which experiment?"),
        (["run", "poo"], {}, "there is no experiments/poo.py"),
        (["resume"], {}, "which experiment?"),
        (["fetch", "bucket/ppo", "runs"], {}, "from where, and to where?"),
        (["lunch"], {}, "unknown subcommand lunch"),
        (["--spto", "create"], {}, "unknown flag --spto"),
        ([], {}, "no subcommand"),
    ],
)
def test_what_is_missing_or_wrong_is_said_on_one_line(cloud: Cloud, words: list[str], settings: dict, message: str):
    done = cloud(*words, **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert cloud.calls() == []


def test_create_waits_until_the_slice_is_there(cloud: Cloud):
    done = cloud("create", states="WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    assert done.returncode == 0 and cloud.names() == ["create", *["describe"] * 4]
    assert done.stderr.splitlines() == ["mine: WAITING_FOR_RESOURCES", "mine: PROVISIONING", "mine: ACTIVE"]


def test_create_ends_when_the_slice_will_not_come(cloud: Cloud):
    done = cloud("create", states="WAITING_FOR_RESOURCES FAILED")
    assert done.returncode == 2 and "error: the request for mine is FAILED" in done.stderr


@pytest.mark.parametrize(
    ("states", "does"),
    [
        ("ACTIVE", []),
        ("PROVISIONING ACTIVE", ["describe", "scp", "ssh"]),
        ("SUSPENDED ACTIVE", ["delete", "create", "describe", "scp", "ssh"]),
        ("ABSENT ACTIVE", ["create", "describe", "scp", "ssh"]),
    ],
)
def test_resume_does_what_the_state_of_the_slice_asks_for(cloud: Cloud, states: str, does: list[str]):
    (cloud.home / "rlhf_jax").mkdir()
    (cloud.home / "rlhf_jax" / "scripts").symlink_to(ROOT / "scripts")
    done = cloud("--spot", "resume", "ppo", "--steps", "9", states=states)
    assert done.returncode == 0, done.stderr
    assert cloud.names() == ["describe", *does, "ssh"]
    assert cloud.runs(1) == [["-m", "experiments.ppo", "--steps", "9"]]


def test_a_state_that_cannot_be_read_is_an_error(cloud: Cloud):
    done = cloud("resume", "ppo", states="DENIED")
    assert done.returncode != 0 and "cannot be read: ERROR: PERMISSION_DENIED" in done.stderr
    assert cloud.names() == ["describe"]


def test_install_replaces_the_code_on_the_worker(cloud: Cloud):
    (cloud.home / "rlhf_jax").mkdir()
    (cloud.home / "rlhf_jax" / "old.py").touch()
    assert cloud("install").returncode == 0
    assert (cloud.home / "rlhf_jax" / "experiments" / "ppo.py").is_file()
    assert not (cloud.home / "rlhf_jax" / "old.py").exists()
    assert "--editable rlhf_jax[tpu]" in (cloud.home / "uv").read_text()


@pytest.fixture
def worker(cloud: Cloud) -> Cloud:
    (cloud.home / "rlhf_jax").mkdir()
    (cloud.home / "rlhf_jax" / "scripts").symlink_to(ROOT / "scripts")
    return cloud


def test_what_asks_to_come_back_is_run_again_with_the_same_words(worker: Cloud):
    flags = ["--data", "hh:my file.jsonl[:90%]", "--system", "it's $HOME", ""]
    assert worker("run", "ppo", *flags, codes="75 killed 0").returncode == 0
    assert worker.runs(3) == [["-m", "experiments.ppo", *flags]] * 3
    log = (worker.home / "rlhf_jax.log").read_text()
    assert [line.split()[-1] for line in log.splitlines() if " end: " in line] == ["75", "137", "0"]
    assert (worker.home / "tab").read_text().count("@reboot bash rlhf_jax/scripts/tpu_worker.sh loop") == 1


@pytest.mark.parametrize(("codes", "count"), [("2 0", 1), ("1 0", 1), ("75 " * 9, 5)])
def test_what_failed_is_not_run_for_ever(worker: Cloud, codes: str, count: int):
    assert worker("run", "ppo", codes=codes).returncode == 0
    assert len(worker.runs(count)) == count
    assert not (worker.home / "rlhf_jax.job").exists()


def test_one_thing_runs_at_a_time_until_stop_has_it_save(worker: Cloud):
    assert worker("run", "sft", codes="wait 0").returncode == 0
    while not (worker.home / "runs").exists():
        time.sleep(0.05)
    assert worker("run", "sft").returncode == 0  # the same: nothing to do
    other = worker("run", "ppo")
    assert other.returncode == 2 and "still runs something else" in other.stderr
    assert worker("stop").returncode == 0
    assert worker.runs(2) == [["-m", "experiments.sft"], "saved"]
    assert worker("stop").returncode == 0  # nothing runs: nothing to do


def test_a_worker_that_comes_back_goes_on(worker: Cloud):
    (worker.home / "rlhf_jax.job").write_bytes(b"experiments.sft\0--seed\0001\0")
    (worker.home / "codes").write_text("0")
    loop = ["bash", "rlhf_jax/scripts/tpu_worker.sh", "loop"]
    assert subprocess.run(loop, cwd=worker.home, env=os.environ | {"HOME": str(worker.home)}).returncode == 0
    assert worker.runs(1) == [["-m", "experiments.sft", "--seed", "1"]]
