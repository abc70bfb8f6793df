"""Does a run that is killed again and again end where one that was left alone does? For pretrain, sft, reward and ppo.

    python scripts/survive.py                       # 20 times kill -9 and 10 times SIGTERM in each, about half an hour
    python scripts/survive.py --stages sft --kills 3 --terms 1

Each stage runs once undisturbed, at a tiny size. Then its command is started, killed, and started again until it is
done, as often as it takes for all the kills. A moment is drawn either from the whole life of the process, from the
imports to the export, or as a little after some step is on record. What comes out must be the same: the bytes of the
model, the last checkpoint to the bit, samples.jsonl, and metrics.jsonl but for `time`. Prints a table; exits with 1 if
anything differs.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from rlhf_jax.devices import preemption
from rlhf_jax.runs import checkpoint, cli, log
from rlhf_jax.settings import Count, Seed, Settings, Whole
from rlhf_jax.types import InputError

ROOT = Path(__file__).parents[1]
STAGES = ("pretrain", "sft", "reward", "ppo")
STEPS = 24  # of each stage


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    stages: tuple[str, ...] = STAGES  # which to kill; those that they start from are run undisturbed
    kills: Whole = 20  # kill -9 of each stage
    terms: Whole = 10  # SIGTERM of each stage
    seed: Seed = 0  # of the moments
    patience: Count = 600  # seconds that a process may take
    work: Path | None = None  # folder to work in, kept; None is a temporary one

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.stages) - set(STAGES):
            raise InputError(f"stages: {', '.join(sorted(unknown))} is not one of {', '.join(STAGES)}")


def command(stage: str, out: Path, home: Path, rankings: Path) -> list[str]:
    """The command line that trains a stage in `out`; `home` has the models to start from."""
    base, tuned, judge = (str(home / name / "model") for name in ("pretrain", "sft", "reward"))
    flags = {
        "pretrain": ["--data", "world:rows=200", "--preset", "tiny", "--vocab-size", "512", "--steps", str(STEPS)],
        "sft": ["--init", base, "--data", "world:rows=240", "--epochs", "2", "--text", "world:rows=200"],
        "reward": ["--init", tuned, "--data", str(rankings), "--held-out", str(rankings), "--length", "64"],
        "ppo": ["--init", tuned, "--reward", judge, "--data", "world:rows=100", "--text", "world:rows=200", "--steps",
                str(STEPS), "--prompt-length", "40", "--max-new-tokens", "8", "--samples-every", "5"],
    }  # fmt: skip
    if stage == "reward":
        flags[stage] += ["--epochs", "8"]
    if stage == "ppo":
        flags[stage] += ["--algorithm.minibatches", "2", "--algorithm.ema", "0.9", "--algorithm.kl-target", "1"]
    common = ["--batch", "8", "--saves.every", "4", "--out", str(out), "--data-dir", str(out.parent / f"data-{stage}")]
    return [sys.executable, "-m", f"experiments.{stage}", *flags[stage], *common]


def write_rankings(path: Path) -> Path:
    """Write rankings of made-up answers, and return where."""
    rng = random.Random(0)
    words = ["yes", "no", "perhaps", "never", "it is", "they are", "seven", "a town"]
    with path.open("w") as file:
        for n in range(24):
            responses = [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(4)]
            ranks = rng.sample(range(4), 4)
            file.write(json.dumps({"prompt": f"Question {n}?", "responses": responses, "ranks": ranks}) + "\n")
    return path


@contextlib.contextmanager
def started(stage: str, out: Path, home: Path) -> Iterator[subprocess.Popen]:
    """Start the process of a stage, which does not outlive the block."""
    env = os.environ | {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),  # what one process compiled, the next one finds
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # processes mostly compile
    }
    arguments = command(stage, out, home, home / "rankings.jsonl")
    with (home / f"{out.parent.name}-{stage}.log").open("a") as log_file:
        process = subprocess.Popen(arguments, cwd=home, env=env, stdout=log_file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def undisturbed(stage: str, out: Path, home: Path, patience: float) -> float:
    """Run a stage, and return the seconds that it took. Raises InputError if it fails."""
    begun = time.monotonic()
    with started(stage, out, home) as process:
        status = ended(process, patience)
    if status != 0:
        lines = (home / f"{out.parent.name}-{stage}.log").read_text(encoding="utf-8").splitlines()
        what = f"did not end within {patience:g} s" if status is None else f"ended with {status}"
        raise InputError(f"{stage} {what}: {lines[-1] if lines else 'it printed nothing'}")
    return time.monotonic() - begun


def ended(process: subprocess.Popen, patience: float) -> int | None:
    """The exit status of a process; None if it is still running after `patience` seconds."""
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        return None


def recorded(out: Path) -> int:
    """The number of steps on record."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def disturb(process: subprocess.Popen, out: Path, number: int, life: float, rng: random.Random) -> str:
    """Send the signal at some moment; returns what the process was doing, or nothing if it ended before."""
    begun, step, wait = time.monotonic(), None, rng.uniform(0, 1.05 * life)
    if rng.random() < 0.5:
        step, wait = rng.randint(1, STEPS), rng.uniform(0, 0.3)
    while process.poll() is None and time.monotonic() - begun < 3 * life + 60:
        if step is not None and recorded(out) >= step:
            step, begun = None, time.monotonic()
        if step is None and time.monotonic() - begun >= wait:
            phase = "start" if not recorded(out) else "export" if recorded(out) >= STEPS else "training"
            process.send_signal(number)
            return phase if process.poll() is None or process.returncode == -number else ""
        time.sleep(0.002)
    return ""


def last_checkpoint(out: Path) -> dict[str, bytes]:
    """The arrays of the newest checkpoint as bytes, its step, and the positions of its streams."""
    path = checkpoint.latest(out / log.CHECKPOINTS)
    if path is None:
        return {}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), about=ocp.args.JsonRestore())
        found = orbax.restore(path.absolute(), args=items)
    arrays = {name: np.asarray(x).tobytes() for name, x in found["state"].items()}
    return arrays | {"step": path.name.encode(), "about": json.dumps(found["about"], sort_keys=True).encode()}


def differences(out: Path, expected: Path) -> list[str]:
    """The names of the outcomes in which two runs differ."""

    def timeless(directory: Path) -> list[dict]:
        return [log.without_timings(row) for row in log.read(directory)]

    same = {
        "metrics.jsonl": timeless(out) == timeless(expected),
        "the last checkpoint": last_checkpoint(out) == last_checkpoint(expected) != {},
    }
    for name in ("model/model.safetensors", "samples.jsonl"):
        same[name] = (out / name).read_bytes() == (expected / name).read_bytes()
    return [name for name, is_same in same.items() if not is_same]


def torment(stage: str, number: int, count: int, life: float, home: Path, cfg: Config) -> tuple[Counter, list[str]]:
    """Signal a stage `count` times, over as many runs as that takes; returns how often where, and what differed."""
    rng, counts, differing, run = random.Random(f"{cfg.seed}/{stage}/{number}"), Counter[str](), [], 0
    while counts["signals"] < count or not counts["runs"]:
        run += 1
        out = home / f"{signal.Signals(number).name}-{run}" / stage
        out.parent.mkdir(exist_ok=True)
        while True:
            with started(stage, out, home) as process:
                if counts["signals"] < count and (where := disturb(process, out, number, life, rng)):
                    counts["signals"] += 1
                    counts[where] += 1
                status = ended(process, cfg.patience)
            counts[f"status {status}"] += 1
            if status == 0:
                break
            # By default SIGTERM kills, so it does until the program has begun.
            if status not in (-number, preemption.EXIT if number == signal.SIGTERM else -number):
                differing.append(f"run {run} ended with {status}")
                return counts, differing
        counts["runs"] += 1
        differing += [f"{name} of run {run}" for name in differences(out, home / stage)]
        print(
            f"{stage}: {counts['signals']} of {count} {signal.Signals(number).name}, {counts['runs']} runs", flush=True
        )
        if not differing:
            shutil.rmtree(out.parent)
    return counts, differing


def main(cfg: Config) -> dict[str, list[str]]:
    """Run, disturb and compare the stages; returns what differed, by stage and signal."""
    with tempfile.TemporaryDirectory() as temporary:
        home = (cfg.work or Path(temporary)).absolute()
        home.mkdir(parents=True, exist_ok=True)
        write_rankings(home / "rankings.jsonl")
        rows, found = [], {}
        for stage in STAGES[: max(STAGES.index(stage) for stage in cfg.stages) + 1]:
            undisturbed(stage, home / stage, home, cfg.patience)
            if stage not in cfg.stages:
                continue
            life = undisturbed(stage, home / "again" / stage, home, cfg.patience)  # nothing left to compile
            found[f"{stage} twice"] = differences(home / "again" / stage, home / stage)
            print(f"{stage}: {life:.1f} s undisturbed", flush=True)
            for number, count in ((signal.SIGKILL, cfg.kills), (signal.SIGTERM, cfg.terms)):
                if count:
                    counts, differing = torment(stage, number, count, life, home, cfg)
                    found[f"{stage} {number.name}"] = differing
                    rows.append((stage, number.name, counts, differing))
    return report(rows, found)


def report(rows: Sequence[tuple[str, str, Counter, list[str]]], found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Print the table, and on stderr what differed; returns `found`."""
    places = ("start", "training", "export")
    print("\n| stage | signal | sent | " + " | ".join(f"at {x}" for x in places) + " | ended with | runs | differs |")
    print("| --- " * (len(places) + 6) + "|")
    for stage, name, counts, differing in rows:
        ended = ", ".join(f"{key.split()[1]} ({counts[key]})" for key in sorted(counts) if key.startswith("status"))
        cells = [stage, name, counts["signals"], *(counts[place] for place in places), ended, counts["runs"]]
        print("| " + " | ".join(map(str, cells)) + f" | {'; '.join(differing) or 'nothing'} |")
    for what, differing in found.items():
        if differing:
            print(f"{what}: {'; '.join(differing)}", file=sys.stderr)
    return found


if __name__ == "__main__":
    raise SystemExit(1 if any(cli.run(main, Config()).values()) else 0)
