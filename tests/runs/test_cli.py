import dataclasses
import importlib.machinery
import io
import os
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Literal

import jax
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


@dataclasses.dataclass(frozen=True)
class Fork(Config):
    # where results go
    init: str = "runs"  # type: ignore[assignment]
    wandb: str = "off"  # type: ignore[assignment]  # the project to log to
    batch_size: float = 64  # type: ignore[assignment]


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


def test_help_shows_no_comment_for_tools(capsys):
    with pytest.raises(SystemExit):
        cli.run(same, Fork(), ["--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--init STR where results go (default: runs)" in said and "--batch-size FLOAT (default: 64" in said
    assert "--wandb STR the project to log to (default: off)" in said and "of everything random (default: 0)" in said
    assert "type:" not in said


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


@pytest.mark.slow
def test_a_fresh_process_says_nothing_of_its_own(tmp_path):
    (tmp_path / "fork.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "fork", "--seed", "4"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("4\n", "", 0)


def test_a_python_without_the_packages_is_told_where_they_are():
    bare = [sys.executable, "-S", "-m", "experiments.ppo"]  # -S: without site-packages
    done = subprocess.run(bare, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{sys.executable} has no jax: activate the environment" in done.stderr.splitlines()[-1]


@pytest.mark.slow
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
    text = "Does it help?\n\nA paragraph\nof two lines.\n\nRun:     python a.py\nParent:  none\n"
    module = types.ModuleType("__main__", text)
    module.__spec__ = importlib.machinery.ModuleSpec("experiments.fork", None)
    monkeypatch.setitem(sys.modules, "__main__", module)
    with pytest.raises(SystemExit):
        cli.run(same, Config(), ["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m experiments.fork ")
    assert "Does it help?" in said
    assert "\nA paragraph of two lines.\n" in said and "\n  Run:     python a.py\n  Parent:  none\n" in said


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


TALKER = """
import dataclasses
import sys
from pathlib import Path
from rlhf_jax.runs import cli

@dataclasses.dataclass(frozen=True)
class Config:
    out: Path = Path("run")  # directory
    rewards: tuple[Path, ...] = ()  # models
    system: str = ""  # text
    lines: int = 100_000  # to print

def main(config):
    for number in range(config.lines):
        print(number)
    print(config.system, repr(sys.stdin.read() if config.lines == 0 else ""))

if __name__ == "__main__":
    cli.run(main, Config())
"""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def talk(folder: Path, *cases: tuple[bytes, bytes, dict[str, str]]) -> list[tuple[int, bytes, bytes]]:
    """Runs shell commands at once, in which $TALK is an experiment that prints: status, output and errors of each."""
    (folder / "talk.py").write_text(TALKER)
    paths = {"PYTHONPATH": str(Path(__file__).parents[2]), "TALK": f"{sys.executable} talk.py"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [
        subprocess.Popen([b"bash", b"-c", command], cwd=folder, env=os.environ | paths | env, **pipes)
        for command, _, env in cases
    ]
    ended = [process.communicate(stdin) for process, (_, stdin, _) in zip(started, cases, strict=True)]
    return [(process.returncode, *output) for process, output in zip(started, ended, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.full)])
def test_an_output_that_nobody_reads_ends_in_silence(tmp_path, unbuffered):
    expected = {
        b"$TALK | head -n 1 > /dev/null; exit ${PIPESTATUS[0]}": (cli.UNREAD, b"", b""),
        b"$TALK --lines 1 | true; exit ${PIPESTATUS[0]}": (cli.UNREAD, b"", b""),  # flushed at the end
        b"$TALK --lines 1 >&-": (0, b"", b""),
        b"$TALK --lines x 2>&-": (cli.USAGE, b"", b""),
    }
    done = talk(tmp_path, *((command, b"", {"PYTHONUNBUFFERED": unbuffered}) for command in expected))
    assert dict(zip(expected, done, strict=True)) == expected


@pytest.mark.slow
def test_help_that_nobody_reads_and_a_full_disk(tmp_path):
    env = {"PYTHONUNBUFFERED": ""}
    help_, full = talk(
        tmp_path,
        (b"$TALK --help | true; exit ${PIPESTATUS[0]}", b"", env),
        (b"$TALK --lines 1 > /dev/full", b"", env),
    )
    assert help_[0] in (0, cli.UNREAD) and help_[1:] == (b"", b"")
    assert full == (1, b"", b"error: the output cannot be written: No space left on device\n")


@pytest.mark.slow
def test_text_is_utf_8_whatever_the_locale(tmp_path):
    command = "$TALK --lines 0 --system 'wörld 字'".encode()
    expected = "wörld 字 '\N{REPLACEMENT CHARACTER}a\\x00b'\n".encode()
    for done in talk(tmp_path, (command, b"\xffa\x00b", {}), (command, b"\xffa\x00b", ASCII)):
        assert done == (0, expected, b"")


@pytest.mark.slow
def test_an_argument_that_the_locale_has_no_name_for_is_one_line(tmp_path):
    strange, named = talk(
        tmp_path, (b"$TALK --system $'a\\xffb'", b"", ASCII), ("$TALK --lines 0 --out wörld".encode(), b"", ASCII)
    )
    assert strange == (2, b"", b"error: argument a\\udcffb: expected UTF-8; rename the file, if it names one\n")
    assert named == (2, b"", b"error: --out w\\xf6rld: this locale has no such names; set PYTHONUTF8=1\n")


@pytest.mark.parametrize("flags", [["--init", "a\udcffb"], ["--ppo.kl-kind=a\udcffb"], ["--n\udcff"], ["\udcff"]])
def test_an_argument_that_is_not_utf_8_is_one_line(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        cli.run(same, Config(), flags)
    said = capsys.readouterr().err
    assert stop.value.code == cli.USAGE and said.count("\n") == 1
    assert said.startswith("error: argument ") and "\\udcff" in said and "expected UTF-8" in said


@pytest.mark.parametrize("flags", [["--init", ""], ["--init="], ["--ppo.clip", "0.1", "--init="]])
def test_an_empty_path_is_one_line(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        cli.run(same, Config(), flags)
    assert stop.value.code == cli.USAGE
    assert capsys.readouterr().err == "error: --init is empty: expected a path, such as . for the working directory\n"
    assert cli.run(same, Config(), ["--init", "."]).init == Path(".")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (PermissionError(13, "Permission denied", "a/b"), 2, "error: a/b: Permission denied\n"),
        (OSError(28, "No space left on device", "a"), 1, "error: the disk is full: [Errno 28] No space left on device"),
        (OSError(27, "File too large"), 1, "error: the disk is full: [Errno 27] File too large; make room, and run"),
    ],
)
def test_the_file_system_refuses_in_one_line(capsys, error, status, message):
    def main(config):
        raise error

    def prepare(config):
        try:
            raise error
        except OSError as cause:
            raise InputError("rows.jsonl: cannot be prepared") from cause

    for function in (main, prepare) if status == 1 else (main,):
        with pytest.raises(SystemExit) as stop:
            cli.run(function, Config(), [])
        said = capsys.readouterr().err
        assert stop.value.code == status and said.count("\n") == 1
        assert said.startswith(message) or function is prepare


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 57982058 bytes.\nAt this"),
            "bytes",
        ),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20G"), "Used 20G"),
        (MemoryError("Unable to allocate 80.0 GiB for an array"), "an array"),
        (MemoryError(), "no memory is left"),
    ],
)
def test_a_full_memory_is_one_line(capsys, error, said):
    def main(config):
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main, Config(), [])
    assert stop.value.code == cli.FAILURE
    assert capsys.readouterr().err.endswith(
        f"{said}; what needs less is in docs/troubleshooting.md, under Out of memory\n"
    )


def test_other_errors_of_the_runtime_keep_their_traceback():
    def main(config):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too many files")

    with pytest.raises(jax.errors.JaxRuntimeError):
        cli.run(main, Config(), [])


@pytest.mark.parametrize(("number", "tells"), [(28, False), (5, True)])
def test_threads_do_not_tell_of_a_full_disk(capsys, number, tells):
    """The main one does."""

    def main(config):
        def fail():
            raise OSError(number, os.strerror(number))

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    told = []
    former, threading.excepthook = threading.excepthook, told.append
    try:
        cli.run(main, Config(), [])
        assert bool(told) == tells and threading.excepthook == told.append
    finally:
        threading.excepthook = former
