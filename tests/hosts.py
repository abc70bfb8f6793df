"""python -m tests.hosts START PROCESSES [FLAGS]: stages in several processes on this machine, against the same in one.

START is a folder in which the tiny quickstart has run or is to run. The processes have eight devices together; flags,
such as --devices.fsdp 4, are for them alone.
"""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
DEVICES = 8


def config(stage: str, start: Path, out: Path) -> Any:
    """What the tiny quickstart in `start` gave this stage, with another place for its results."""
    from tests.quickstart import TINY

    tuned, ranked = start / "sft" / "model", start / "rank"
    given: dict[str, dict] = {
        "pretrain": {},
        "sft": {"init": start / "pretrain" / "model"},
        "rank": {"init": tuned},
        "reward": {"init": tuned, "data": str(ranked / "train.jsonl"), "held_out": str(ranked / "held_out.jsonl")},
        "ppo": {"init": tuned, "reward": (start / "reward" / "model",)},
    }
    answers = {"temperature": TINY.ppo.algorithm.temperature} if stage == "rank" else {}
    to = {"out": out / stage, "data_dir": start / "data"}
    return dataclasses.replace(getattr(TINY, stage), **given[stage], **answers, **to)


def launch(processes: int, *words: object, **settings: str) -> list[subprocess.Popen]:
    """`python -m tests.hosts WORDS` in so many processes that find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    share = f"--xla_force_host_platform_device_count={DEVICES // processes}"
    env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {share}", "PYTHONPATH": str(ROOT)}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    cache = "jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs"
    env |= {name.upper(): str(value) for name in cache if (value := jax.config.values[name]) is not None}
    command = [sys.executable, "-m", "tests.hosts", *map(str, words)]
    return [
        subprocess.Popen(
            command,
            env=env | {"JAX_PROCESS_ID": str(n)} | settings,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for n in range(processes)
    ]


def ends(running: list[subprocess.Popen], timeout: float) -> list[tuple[int, str]]:
    """The exit code of each and what it said, after all of them have ended; TimeoutExpired if they do not."""
    deadline = time.monotonic() + timeout
    try:
        said = [one.communicate(timeout=max(0.1, deadline - time.monotonic()))[0] for one in running]
    finally:
        for one in running:
            one.kill()
    return [(one.returncode, text) for one, text in zip(running, said, strict=True)]


def difference(stage: str, one: Path, other: Path) -> float:
    """The largest difference of a metric, relative where it is above 1; infinite where samples or rankings differ."""
    from rlhf_jax.runs import log
    from tests.quickstart import metrics_of

    if stage == "rank":
        same = all(log.read(one / stage, name) == log.read(other / stage, name) for name in RANKINGS)
        return 0.0 if same else np.inf
    said = [
        [(row["prompt"], row["response"]) for row in log.read(run / stage, "samples.jsonl")] for run in (one, other)
    ]
    if said[0] != said[1]:
        return np.inf
    rows = zip(metrics_of(one / stage), metrics_of(other / stage), strict=True)
    return max(abs(a[name] - b[name]) / max(1.0, abs(a[name])) for a, b in rows for name in a | b)


RANKINGS = "train.jsonl", "held_out.jsonl"
STAGES = "pretrain", "sft", "rank", "reward", "ppo"


def child(start: Path, out: Path, stage: str, *flags: str) -> None:
    """One of the processes."""
    import importlib

    from rlhf_jax.runs import cli

    cli.run(importlib.import_module(f"experiments.{stage}").main, config(stage, start, out), list(flags))


@dataclasses.dataclass(frozen=True)
class Count:
    """A run that only counts, over all devices, ten steps a second at most."""

    out: Path = Path("count")
    steps: int = 10**6


def count(cfg: Count) -> None:
    """One of the processes of it."""
    import jax.numpy as jnp

    from rlhf_jax.devices import parallel
    from rlhf_jax.runs import checkpoint
    from rlhf_jax.types import TrainState

    def add(state: TrainState, axis: str | None) -> TrainState:
        ones = jax.tree.map(jnp.ones_like, state.params)
        share = jax.tree.map(lambda x: x / DEVICES, ones)
        params = jax.tree.map(jnp.add, state.params, parallel.psum(share, axis))
        return state.replace(step=state.step + 1, params=params)

    state = TrainState(step=jnp.int32(0), params={"a": jnp.zeros(3)}, opt_state=(), rng=jax.random.key(0))
    state = checkpoint.resume(cfg.out, state)
    start, state, step_fn = int(state.step), parallel.replicate(state), parallel.pmap(add)
    print(f"starts at {start} with {state.params['a'][0, 0]}", flush=True)
    with checkpoint.Writer(cfg.out, start=start, total=cfg.steps) as saves:
        for step in range(start + 1, cfg.steps + 1):
            state = step_fn(state)
            jax.block_until_ready(state)
            print("step", flush=True)
            if saves.due(step):
                saves.save(parallel.unreplicate(state))
            time.sleep(0.1)


if __name__ == "__main__":
    if sys.argv[1] == "child":
        child(Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
    elif sys.argv[1] == "count":
        from rlhf_jax.runs import cli

        cli.run(count, Count(), sys.argv[2:])
    else:
        begin, number, given = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
        alone = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
        for name in STAGES:
            if not (begin / name / "config.json").exists():
                print(name, "in one process:", [code for code, _ in ends(launch(1, "child", begin, begin, name), 900)])
            out = begin / "-".join([str(number), *given])
            found = ends(launch(number, "child", begin, out, name, *given), 900)
            if any(code for code, _ in found):
                sys.exit("\n".join(said for _, said in found))
            print(f"{name} in {number} processes: differs by {difference(name, begin, out):.1e}", flush=True)
