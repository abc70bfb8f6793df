"""How training scales over several processes of this machine, each with one device: rows a second in 1, 2, 4 of them.

    python scripts/processes.py

Each process trains on as many rows as one process alone does, on one core (they share cores where there are fewer
cores than processes). In `pmap` each has all parameters, and gradients are summed; in `fsdp` each has its part of the
parameters, which are gathered in each step. Rounds alternate between the numbers of processes. Prints medians.
"""

import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rlhf_jax.runs import cli
from rlhf_jax.settings import Count, Settings
from rlhf_jax.types import InputError

ROOT = Path(__file__).parents[1]
LAYOUTS = ("pmap", "fsdp")
WARMUP = 10  # first steps, which are not timed


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    processes: tuple[Count, ...] = (1, 2, 4)  # numbers of processes to compare with the first
    rows: Count = 16  # rows of each process, of 128 tokens
    steps: Count = 40  # timed steps of each run
    rounds: Count = 3


def train(cfg: Config, processes: int, layout: str, home: Path) -> float:
    """Rows a second of so many processes together, after the first steps, in a run directory of its own in `home`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    out = Path(tempfile.mkdtemp(dir=home)) / "run"
    given = {
        "--data": "world:rows=8000",
        "--data-dir": home / "data",
        "--held-out-every": 0,
        "--length": 128,
        "--batch": cfg.rows * processes,
        "--steps": cfg.steps + WARMUP,
        "--warmup": 1,
        "--saves.every": cfg.steps + WARMUP,
        "--out": out,
    } | ({"--devices.fsdp": processes} if layout == "fsdp" else {})
    command = [sys.executable, "-m", "experiments.pretrain", *(str(word) for pair in given.items() for word in pair)]
    cores = sorted(os.sched_getaffinity(0))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"), "XLA_FLAGS": flags}
    if processes > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    running = [
        subprocess.Popen(
            ["taskset", "-c", str(cores[n % len(cores)]), *command],
            env=env | ({"JAX_PROCESS_ID": str(n)} if processes > 1 else {}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(processes)
    ]
    said = [one.communicate()[0] for one in running]
    if failed := [text for one, text in zip(running, said, strict=True) if one.returncode]:
        raise InputError(f"a run in {processes} processes ({layout}) failed: {failed[0].strip().splitlines()[-1]}")
    times = [json.loads(line)["time"] for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return cfg.rows * processes * cfg.steps / (times[-1] - times[WARMUP - 1])


def main(cfg: Config) -> dict[str, dict[int, float]]:
    """Print a row for each layout and number of processes; returns the medians of rows a second."""
    found: dict[str, dict[int, list[float]]] = {layout: {n: [] for n in cfg.processes} for layout in LAYOUTS}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(cfg.rounds):
            for layout, rates in found.items():
                for processes, measured in rates.items():
                    measured.append(train(cfg, processes, layout, Path(scratch)))
                    print(f"{layout}, {processes} processes: {measured[-1]:.1f} rows a second", flush=True)
    medians = {layout: {n: statistics.median(rates) for n, rates in each.items()} for layout, each in found.items()}
    print(f"\n| layout | processes | rows a second | x {cfg.processes[0]} |\n|---|---|---|---|")
    for layout, each in medians.items():
        for n, rate in each.items():
            print(f"| {layout} | {n} | {rate:.1f} | {rate / each[cfg.processes[0]]:.2f} |")
    return medians


if __name__ == "__main__":
    cli.run(main, Config())
