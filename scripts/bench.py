"""How fast training, sampling and PPO iterations are, beside other libraries and beside the machine's limit.

    python scripts/bench.py
    python scripts/bench.py --only sft,decode --peer other=/path/to/bin/python:/path/to/peer.py
    python scripts/bench.py --only sft --profile

Every workload runs in a process of its own, on random weights and tokens, with the functions that the experiments use.
A peer is a script that takes `--only NAME` and ends with a line of JSON, {"peer", "versions", "results"}, as this one
does; rounds of it alternate with ours, and the table then has a column `x peer`: our median over the best median that
the peer reports for that workload under any of its variants. "Of limit" is the share that we reach of what the machine
can do: in training the limit is the time of the model's matrix products alone, at rates that this run measures for each
of their shapes; in decoding the larger of that and of reading the weights, plus reading the cache, at the bandwidth of
a copy.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `scripts` is, of the processes that measure too

from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count, Positive
from rlhf_jax.types import InputError
from scripts.benchmark import peers, profile, sizes, workloads

# Read when a process starts, ours or a peer's: the allocator keeps what is freed, in huge pages, as in scripts/_env.sh.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclasses.dataclass(frozen=True)
class Config(sizes.Config):
    # Workloads, by name.
    only: str = ",".join(workloads.WORKLOADS)
    peer: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # NAME=PYTHON:SCRIPT, any number of times
    rounds: Count = 2  # in each of which every workload runs once, here and at every peer
    timeout: Positive = 1200.0  # seconds after which a run is given up
    workload: Path | None = None  # JSON file of the sizes of the workloads, by the same names
    scaling: Path | None = None  # instead, draw here how the cost grows with each of SCALES
    profile: bool = False  # instead, print in which operations the time goes, on CPUs

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.only.split(",") if name not in workloads.WORKLOADS]:
            known = ",".join(workloads.WORKLOADS)
            raise InputError(f"only: {unknown[0]!r} is no workload: expected some of {known}")
        for peer in self.peer:
            peers.parse(peer)


def main(cfg: Config) -> dict[str, Any]:
    """Run every workload, here and at the peers in turn; print the table and the line of JSON."""
    cfg = with_sizes(cfg)
    if cfg.scaling is not None:
        return draw_scaling(cfg, cfg.scaling)
    if cfg.profile:
        shares = {name: profile.shares(cfg, name) for name in cfg.only.split(",")}
        print(profile.table(shares))
        return shares
    others = [peers.parse(flag) for flag in cfg.peer]
    ours: dict[str, list[dict]] = {name: [] for name in cfg.only.split(",")}
    theirs: dict[str, dict[str, list[dict]]] = {peer.name: {name: [] for name in ours} for peer in others}
    versions: dict[str, Any] = {package: metadata.version(package) for package in ("jax", "flax", "optax")}
    for _ in range(cfg.rounds):
        for name, found in ours.items():
            found.append(measure_alone(cfg, name))
            for peer in others if name in peers.WORKLOADS else ():
                if result := peer.run(name, cfg.timeout):
                    versions[peer.name] = result["versions"]
                    theirs[peer.name][name].append(result["results"][name])
    results = {name: merge(found) for name, found in ours.items()}
    print(table(results, theirs))
    report = {"peer": "rlhf_jax", "versions": versions, "results": results} | ({"peers": theirs} if theirs else {})
    print(json.dumps(report), flush=True)
    return report


def with_sizes(cfg: Config) -> Config:
    """The configuration with the sizes of the file `workload`, where one is named."""
    if cfg.workload is None:
        return cfg
    try:
        given = json.loads(cfg.workload.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{cfg.workload}: expected a JSON file of sizes: {error}") from error
    for name in (*workloads.WORKLOADS, "model"):
        section = getattr(cfg, name)
        for field in dataclasses.fields(section):
            if field.name in given.get(name, {}):
                value = given[name][field.name]
                section = with_field(section, field.name, tuple(value) if isinstance(value, list) else value)
        cfg = with_field(cfg, name, section)
    return dataclasses.replace(cfg, learning_rate=given.get("learning_rate", cfg.learning_rate))


def with_field(config: Any, field: str, value: Any) -> Any:
    """A copy of a dataclass with one field changed."""
    return dataclasses.replace(config, **{field: value})


def measure_alone(cfg: Config, name: str) -> dict[str, Any]:
    """`workloads.measure` in a process of its own, so that its peak of memory is its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(workloads.measure, cfg, name).result(timeout=cfg.timeout)


# What grows, by its name (a space tells two of one name apart): the workload, its section and field, and the values.
SCALES: dict[str, tuple[str, str, str, tuple[float, ...]]] = {
    "rows": ("sft", "sft", "batch", (4, 8, 16, 32, 64)),
    "tokens of a row": ("sft", "sft", "target_tokens", (32, 64, 128, 256, 512)),
    "vocabulary": ("sft", "model", "vocab", (1024, 4096, 16384, 65536)),
    "layers": ("sft", "model", "layers", (1, 2, 4, 8, 16)),
    "rows ": ("decode", "decode", "batch", (1, 4, 16, 32, 64, 128)),
    "new tokens": ("decode", "decode", "new", (32, 64, 128, 256, 512)),
    "vocabulary ": ("decode", "model", "vocab", (1024, 4096, 16384, 65536)),
    "layers ": ("decode", "model", "layers", (1, 2, 4, 8, 16)),
    "share of tokens that end": ("decode_ragged", "decode_ragged", "eos_fraction", (0.01, 0.03, 0.1, 0.3)),
}


def draw_scaling(cfg: Config, path: Path) -> dict[str, Any]:
    """Measure microseconds a token and the peak of memory as each of SCALES grows alone, and draw them to `path`."""
    found: dict[str, list[tuple[float, float, float]]] = {}  # value, microseconds, MiB
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for label, (name, section, field, values) in SCALES.items():
        points = []
        for value in values:
            changed = with_field(cfg, section, with_field(getattr(cfg, section), field, value))
            result = measure_alone(changed, name)
            points.append((float(value), 1e6 / result[f"median_{unit(result)}"], result["peak_mib"]))
            print(
                f"{name}, {label.strip()} {value:g}: {points[-1][1]:.1f} us a token, {points[-1][2]:.0f} MiB",
                flush=True,
            )
        found[f"{name} by {label.strip()}"] = points
        panels[f"{name}: us a token, by {label.strip()}"] = {name: [point[:2] for point in points]}
        if label == "vocabulary":
            panels[f"{name}: peak MiB, by {label}"] = {name: [(point[0], point[2]) for point in points]}
    plots.lines(path, panels, x="")
    return found


def unit(result: dict[str, Any]) -> str:
    """The unit in which a result counts, such as tokens_per_s."""
    return next(key.removeprefix("median_") for key in result if key.startswith("median_"))


def merge(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several rounds: the median of medians, the best of bests, the median of the rest."""
    merged = {}
    for key in found[0]:
        values = [result[key] for result in found]
        merged[key] = max(values) if key.startswith("best_") else statistics.median(values)
    return merged


def table(results: dict[str, dict], theirs: dict[str, dict[str, list[dict]]]) -> str:
    """The results as a table in Markdown, and a line for each comparison with ourselves."""
    head = ["workload", "unit", "median", "best", "of limit", "peak MiB", *(f"x {peer}" for peer in theirs)]
    lines = [head, ["---"] * len(head)]
    for name, result in results.items():
        counted = unit(result)
        line = [
            name,
            counted.replace("_per_s", "/s"),
            f"{result[f'median_{counted}']:.1f}",
            f"{result[f'best_{counted}']:.1f}",
            f"{result['of_limit']:.0%}",
            f"{result['peak_mib']:.0f}",
        ]
        for peer in theirs.values():
            best = peers.best_median(peer[name], counted)
            line.append("" if best is None else f"{result[f'median_{counted}'] / best:.2f}")
        lines.append(line)
    notes = [
        f"{name}: {value:.2f} x {key.removeprefix('times_').replace('_', ' ')}"
        for name, result in results.items()
        for key, value in result.items()
        if key.startswith("times_")
    ]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + notes)


if __name__ == "__main__":
    for name, value in ALLOCATOR.items():
        os.environ.setdefault(name, value)
    cli.run(main, Config())
