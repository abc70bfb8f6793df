import dataclasses
import importlib.machinery
import io
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Literal

import pytest

from rlhf_jax.runs import cli, log
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Ppo:
    clip: float = 0.2  # half-width of the ratio's range
    # nats a response, above which the penalty grows
    target: float = 6.0
    kl_kind: Literal["k1", "k2"] = "k1"  # estimator of the divergence


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0  # of everything random
    batch_size: int = 128  # prompts a step, over all devices
    init: Path | None = None  # model directory
    wandb: bool = False  # log there too
    ppo: Ppo = Ppo()

    def __post_init__(self):
        if self.seed < 0:
            raise InputError("--seed is -1 but must not be negative")


def same(config):
    return config


def test_flags_change_the_default():
    default = Config(batch_size=7, ppo=Ppo(target=3.0))
    assert cli.run(same, default, []) == default
    flags = ["--seed", "3", "--init", "a/b", "--wandb", "--ppo.clip=0.1", "--ppo.kl-kind", "k2"]
    assert cli.run(same, default, flags) == Config(3, 7, Path("a/b"), True, Ppo(0.1, 3.0, "k2"))
    assert cli.run(same, default, ["--batch_size", "9"]).batch_size == 9


def test_help_shows_each_flag_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(same, Config(batch_size=7), ["--help"])
    assert not stop.value.code
    said = " ".join(capsys.readouterr().out.split())
    for flag, comment in [
        ("--seed INT", "of everything random (default: 0)"),
        ("--batch-size INT", "prompts a step, over all devices (default: 7)"),
        ("--ppo.clip FLOAT", "half-width of the ratio's range (default: 0.2)"),
        ("--ppo.target FLOAT", "nats a response, above which the penalty grows (default: 6.0)"),
        ("--ppo.kl-kind {k1,k2}", "estimator of the divergence (default: k1)"),
    ]:
        assert f"{flag} {comment}" in said.replace("│ │ ", "").replace("│ ", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sed", "3"], "unknown flag --sed; did you mean --seed? see --help"),
        (["--ppo.clp=3"], "unknown flag --ppo.clp=3; did you mean --ppo.clip? see --help"),
        (["--batchsize", "3"], "unknown flag --batchsize; did you mean --batch-size? see --help"),
        (["--zzz"], "unknown flag --zzz; see --help"),
        (["extra"], "unknown argument extra; see --help"),
        (["--seed", "x"], "--seed: invalid literal for int() with base 10: 'x'; see --help"),
        (["--ppo.kl-kind", "k3"], "invalid choice 'k3' for argument '--ppo.kl-kind'. Expected one of ('k1', 'k2')"),
        (["--seed"], "Missing value for argument '--seed'"),
        (["--seed", "-1"], "--seed is -1 but must not be negative"),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        cli.run(same, Config(), flags)
    said = capsys.readouterr()
    assert stop.value.code == cli.USAGE
    assert said.err.startswith(f"error: {message}")
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("data.jsonl:3: no\nprompt"), 2, "error: data.jsonl:3: no prompt\n"),
        (log.BrokenRunError("step 5: loss/policy is nan"), 1, "error: step 5: loss/policy is nan\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_what_main_raises_is_one_line(capsys, error, status, message):
    def main(config):
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main, Config(), [])
    assert stop.value.code == status
    assert capsys.readouterr().err == message


def test_a_bug_keeps_its_traceback():
    def main(config):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(main, Config(), [])


SCRIPT = """
import dataclasses
from rlhf_jax.runs import cli

@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0  # of everything

def main(config):
    import transformers
    print(config.seed)

if __name__ == "__main__":
    cli.run(main, Config())
"""


def test_a_fresh_process_says_nothing_of_its_own(tmp_path):
    (tmp_path / "fork.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "fork", "--seed", "4"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("4\n", "", 0)


def test_a_second_start_compiles_nothing(tmp_path):
    """Not even what takes no time to compile."""
    code = """
import jax
from rlhf_jax.runs import cli
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rpartition("/")[2]))
cli.prepare()
jax.jit(lambda x: x + 1)(1.0)
print(events.count("cache_hits"), events.count("cache_misses"))
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env |= {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    said = [subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True) for _ in range(2)]
    assert [one.stdout for one in said] == ["0 1\n", "1 0\n"], said


def test_help_opens_with_the_experiment(monkeypatch, capsys):
    module = types.ModuleType("__main__", "Does it help?")
    module.__spec__ = importlib.machinery.ModuleSpec("experiments.fork", None)
    monkeypatch.setitem(sys.modules, "__main__", module)
    with pytest.raises(SystemExit):
        cli.run(same, Config(), ["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m experiments.fork ")
    assert "Does it help?" in said


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # tyro draws its boxes otherwise
def test_errors_do_not_depend_on_the_terminal(monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(InputError, match=r"^--seed: invalid literal for int\(\) with base 10: 'x'; see --help$"):
        cli.parse(Config(), ["--seed", "x"])


def test_a_stage_by_its_name(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "A recipe.")
    stages = {"one": (same, Config()), "two": (lambda config: config.seed, Config(seed=2))}
    assert cli.run_stage(stages, ["one", "--ppo.clip", "0.5"]) == Config(ppo=Ppo(clip=0.5))
    assert cli.run_stage(stages, ["two"]) == 2
    for args, said in {(): "no stage", ("three", "--seed", "1"): "unknown stage three"}.items():
        with pytest.raises(SystemExit) as stop:
            cli.run_stage(stages, args)
        assert stop.value.code == cli.USAGE
        assert capsys.readouterr().err == f"error: {said}: expected one of one, two, then its flags\n"
    with pytest.raises(SystemExit) as stop:
        cli.run_stage(stages, ["--help"])
    assert not stop.value.code and capsys.readouterr().out.startswith("A recipe.\nStages: one, two")
