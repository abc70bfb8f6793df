"""Where the time of a workload goes on CPUs: the seconds of XLA's threads by kind of operation, from JAX's profiler."""

import re
import tempfile
from collections import Counter
from pathlib import Path

import jax

from scripts.benchmark import workloads
from scripts.benchmark.parts import architecture
from scripts.benchmark.sizes import Config

PRODUCTS = "matrix products"


def kind(event: str) -> str | None:
    """The kind of an operation of this name in a trace; None for what encloses operations or waits for them."""
    name = re.sub(r"[.\d]+$", "", event)
    if "::" in name or name in ("while", "call", "conditional"):
        return None
    return PRODUCTS if name.startswith(("dot", "ynn_fusion")) else name


def shares(cfg: Config, name: str, repetitions: int = 5) -> dict[str, float]:
    """The share of all operations' seconds that each kind takes, the largest first."""
    run, spent = workloads.WORKLOADS[name](architecture(cfg), cfg), Counter[str]()
    for i in range(2):
        run.repeat(i)  # compiles
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for i in range(repetitions):
                run.repeat(2 + i)
        (path,) = Path(folder).rglob("*.xplane.pb")
        lines = (line for plane in jax.profiler.ProfileData.from_file(str(path)).planes for line in plane.lines)
        for event in (event for line in lines if "XLA" in line.name for event in line.events):
            if found := kind(event.name):
                spent[found] += event.duration_ns
    return {name: seconds / spent.total() for name, seconds in spent.most_common()}


def table(found: dict[str, dict[str, float]], most: int = 8) -> str:
    """The largest shares of each workload, as a table in Markdown."""
    lines = ["| workload | share of the threads' time |", "| --- | --- |"]
    for workload, parts in found.items():
        largest = ", ".join(f"{name} {share:.1%}" for name, share in [*parts.items()][:most])
        lines.append(f"| {workload} | {largest} |")
    return "\n".join(lines)
