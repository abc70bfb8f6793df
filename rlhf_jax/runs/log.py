"""The records of a run: what it was, how it went, what it said.

A run directory holds `config.json`, `metrics.jsonl` (an object a line: step, time, metrics), `samples.jsonl` and
`samples.md` (all sample tables, and the newest to read), TensorBoard events, and what other modules put there: plots,
`checkpoints/`, the model directory.

Metrics stay on the device when they are written and cross to the host in batches, so that logging a step does not wait
for it. On crossing they are checked: a loss or gradient norm that is not finite stops the run (several in a row, where
the optimiser skips such steps), and so does a metric above the bound that the run was given for it.
"""

import dataclasses
import importlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
import tqdm

from rlhf_jax.runs import checkpoint, events, gcs, timing
from rlhf_jax.runs.directory import CHECKPOINTS, write_config, writing
from rlhf_jax.types import InputError

MUST_BE_FINITE = ("loss/", "grad_norm")  # beginnings of the names of metrics that may not be NaN or infinite


class BrokenRunError(ArithmeticError):
    """A metric is not finite, or above its bound. The message names the step, the metric and the last checkpoint."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is recorded of a run beside its metrics, and what ends it."""

    show: tuple[str, ...] = ()  # metrics of the progress line; by default the first three
    at_most: Mapping[str, float] = dataclasses.field(default_factory=dict)  # metric to the bound that ends the run
    derive: Callable[[dict[str, Any]], dict[str, float]] = lambda metrics: {}  # a step's metrics to further ones
    skip_bad: int = 0  # steps in a row whose loss or gradient norm may be not finite
    profile: int = 0  # steps to trace after the first three, into `profile/`, for TensorBoard and ui.perfetto.dev
    wandb: bool = False  # log to Weights & Biases too
    every: int = 10  # steps between conversions of metrics, which cross to the host together


NO_LIMITS = Limits()


class Records:
    """The open records of a run of `total` steps in a directory.

    The run continues after `step`: records of later steps, left by an earlier run, are removed. So a run from step 0
    starts anew and never mixes with what was there. Metrics are converted when those of `Limits.every` steps wait for
    it or `PATIENCE` seconds have passed, and always while the devices are at work on a later step. The record of a step
    before which something was compiled has "seconds/compile". Under several processes all check the metrics, and the
    first one writes. Use it as a context manager: leaving it flushes and closes everything.
    """

    PATIENCE = 5.0  # seconds
    WARMUP = 3  # steps that are not traced

    def __init__(self, directory: Path, config: Any, *, total: int, step: int = 0, limits: Limits = NO_LIMITS):
        """Opens the records; `config` is the dataclass that the run was made with, for config.json."""
        client = _import_wandb() if limits.wandb else None
        main = jax.process_index() == 0
        if main or gcs.holds(directory):  # of which every host has its own
            with writing(directory):
                _prepare(directory, step)
        if main and step:
            what = f"goes on after step {step}" if step < total else f"is trained: {step} steps"
            print(gcs.named(f"{directory} {what}"))
        write_config(directory, config)
        if client and main:
            settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            client.init(project="rlhf_jax", name=directory.resolve().name, dir=str(directory), config=settings)
        self.directory = directory
        self._limits = limits
        self._compiled = timing.compile_seconds()
        self._bad = _trailing_bad_steps(directory) if limits.skip_bad and step else 0
        self._last: dict[str, int | float] = {}
        self._show = limits.show
        self._shown: dict[str, int | float] = {}
        self._pending: list[tuple[Any, float, dict[str, Any]]] = []
        self._flushed = time.monotonic()
        self._main = main
        self._wandb = client if main else None
        self._written = 0
        self._traced = range(self.WARMUP, self.WARMUP + limits.profile) if main else range(0)
        if main:
            self._metrics = (directory / "metrics.jsonl").open("a", encoding="utf-8")
            self._sampled = {_step(line) for line in _lines(directory / "samples.jsonl")}
            self._tensorboard = tensorboardX.SummaryWriter(
                str(directory / "tensorboard"),
                purge_step=step + 1,
                # Its thread dies where the disk is full, and a queue that nobody empties must not block the run.
                max_queue=2**20,
            )
            self._bar = _progress(total, step)

    def write(self, step: int | jax.Array, metrics: Mapping[str, Any]) -> None:
        """Records scalars by name, such as "loss/policy", for `step`. Does not wait for the device."""
        compiled, before = timing.compile_seconds(), self._compiled
        spent, self._compiled = {"seconds/compile": compiled - before} if compiled > before else {}, compiled
        self._pending.append((step, time.time(), {**metrics, **spent}))
        if self._traced:
            self._trace()
        if len(self._pending) > self._limits.every or time.monotonic() - self._flushed > self.PATIENCE:
            self._convert(len(self._pending) - 1)  # the devices are at work on the last, and shall not wait for this

    def _trace(self) -> None:
        """Begins or ends the trace, when what was handed to the devices before is done."""
        self._written += 1
        if self._written in (self._traced.start, self._traced.stop):
            self.flush()
            folder = self.directory / "profile"
            if self._written == self._traced.start:
                jax.profiler.start_trace(folder, create_perfetto_trace=True)
            else:
                jax.profiler.stop_trace()
                print(f"{len(self._traced)} steps are traced in {folder}: tensorboard --logdir, or ui.perfetto.dev")

    def flush(self) -> dict[str, int | float]:
        """Converts and writes what is pending; returns the metrics of the last step.

        Call it before saving a checkpoint, so that only good states are saved. Raises `BrokenRunError` at the first
        step with a metric of `MUST_BE_FINITE` that is not (unless it may be skipped), or one above its bound; its line
        is written before, and the lines of later steps are not.
        """
        self._convert(len(self._pending))
        return self._last

    def _convert(self, count: int) -> None:
        """`flush` of the first so many that are pending."""
        pending, self._pending = self._pending[:count], self._pending[count:]
        for step, when, metrics in jax.device_get(pending):
            values = {name: _number(name, value) for name, value in metrics.items()}
            values |= self._limits.derive(values)
            if self._main:
                self._record(int(step), when, values)
            self._last = values
            broken = [name for name in values if name.startswith(MUST_BE_FINITE) and not math.isfinite(values[name])]
            self._bad = self._bad + 1 if broken else 0
            if broken and self._bad > self._limits.skip_bad:
                self._stop(int(step), f"{broken[0]} is {values[broken[0]]}")
            if broken:
                where = f"step {int(step)}: {broken[0]} is {values[broken[0]]}"
                print(f"warning: {where}; skipped, {self._bad} of {self._limits.skip_bad} in a row", file=sys.stderr)
                continue
            for name, bound in self._limits.at_most.items():
                if name in values and not values[name] <= bound:
                    self._stop(int(step), f"{name} is {values[name]:.3g}, which should be at most {bound:g}")
        if pending and self._main:
            self._bar.set_postfix_str("  ".join(f"{k} {v:.4g}" for k, v in self._shown.items()), refresh=False)
            self._bar.update(int(step) - self._bar.n)
        self._flushed = time.monotonic()

    def _stop(self, step: int, why: str) -> NoReturn:
        self._pending = []
        good = checkpoint.latest(self.directory / CHECKPOINTS, before=step)
        last = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise BrokenRunError(f"step {step}: {why}; {last}")

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records a table of samples. Each row has prompt, response, score, kl and whatever else, as text or scalars.

        It goes to `samples.jsonl` (a line a row, in place of those of this step that are there), `samples.md` (this
        table only) and TensorBoard.
        """
        self.flush()  # Weights & Biases takes no step after a later one
        if not self._main or not rows:
            return
        table = [{k: v if isinstance(v, str | None) else _number(k, v) for k, v in row.items()} for row in rows]
        record = self.directory / "samples.jsonl"
        if int(step) in self._sampled:  # by an earlier process, which was killed later in this step
            _rewrite(record, [line for line in _lines(record) if _step(line) != int(step)])
        self._sampled.add(int(step))
        with record.open("a", encoding="utf-8") as file:
            file.write("".join(_line({"step": int(step), **row}) for row in table))
        text = _markdown(table)
        (self.directory / "samples.md").write_text(f"Step {int(step)}\n\n{text}", encoding="utf-8")
        self._tensorboard.add_text("samples", text, int(step))
        if self._wandb:
            columns = list(table[0])
            data = [[row.get(column) for column in columns] for row in table]
            self._wandb.log({"samples": self._wandb.Table(columns=columns, data=data)}, step=int(step))

    def close(self) -> None:
        """Writes what is pending, then closes the files, whatever happens. May raise `BrokenRunError`."""
        try:
            if self._traced.start <= self._written < self._traced.stop:
                jax.profiler.stop_trace()
            if self._traced and self._written < self._traced.start:
                print(f"nothing is traced: the run ended before its step {self._traced.start + 1}")
            self.flush()
        finally:
            if self._main:
                self._bar.close()
                self._metrics.close()
                events.close(self._tensorboard)
            if self._wandb:
                self._wandb.finish()

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except Exception as late:
            if error is None:
                raise
            error.add_note(f"and while closing the records: {late}")  # the first error is the one to see

    def _record(self, step: int, when: float, values: Mapping[str, int | float]) -> None:
        self._metrics.write(_line({"step": step, "time": round(when, 3), **values}))
        self._metrics.flush()
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for name, value in finite.items():
            self._tensorboard.add_scalar(name, value, step, walltime=when)
        if self._wandb:
            self._wandb.log(finite, step=step)
        self._show = self._show or tuple(name for name in values if not timing.is_timing(name))[:3]
        self._shown |= {name: values[name] for name in self._show if name in values}


def read(directory: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a record of the run in `directory`; what was not finite is None."""
    path = directory / name
    if not path.is_file():
        raise InputError(f"{path} does not exist; is {directory} the directory of a run?")
    rows = []
    for number, line in enumerate(_lines(path), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} is not JSON: {error}") from error
    return rows


def without_timings(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics without what the clock says: what is the same wherever a run is repeated."""
    return {name: value for name, value in row.items() if not timing.is_timing(name)}


def _prepare(directory: Path, step: int) -> None:
    """Makes the directory, and removes from it the records of steps after `step`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        _rewrite(directory / name, [line for line in _lines(directory / name) if step and _step(line) <= step])
    if step == 0:  # a run that continues tells TensorBoard to hide the later events instead
        shutil.rmtree(directory / "tensorboard", ignore_errors=True)
        (directory / "samples.md").unlink(missing_ok=True)


def _lines(path: Path) -> list[str]:
    """With their ends: the last one has none if a kill cut it short."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:  # a kill may also cut a character
        return list(file)


def _rewrite(path: Path, lines: Sequence[str]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, path)


def _trailing_bad_steps(directory: Path) -> int:
    """How many of the last steps recorded there have a loss or gradient norm that is not finite."""
    steps = [any(row[name] is None for name in row if name.startswith(MUST_BE_FINITE)) for row in read(directory)]
    return len(list(itertools.takewhile(bool, reversed(steps))))


def _step(line: str) -> int | float:
    """The step of a line; infinite, so never kept, if the line was cut short by a kill."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except json.JSONDecodeError:
        return math.inf


def _line(values: Mapping[str, Any]) -> str:
    """JSON has no NaN and no infinity: they become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(clean, ensure_ascii=False) + "\n"


def _number(name: str, value: Any) -> int | float:
    """A Python number with the shortest decimals that give `value` back in its own precision."""
    array = np.asarray(value)
    if array.shape:
        raise ValueError(f"metric {name} is not a scalar but has the shape {array.shape}")
    return float(str(array[()])) if jnp.issubdtype(array.dtype, jnp.floating) else array.item()


def _markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table; columns are those of the first row."""

    def cell(value: Any) -> str:
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        return text.replace("|", r"\|").replace("\n", "<br>")

    columns = list(table[0])
    rows = [columns, ["---"] * len(columns), *([cell(row.get(c, "")) for c in columns] for row in table)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


class _Lines:
    """A stream for `tqdm` that is not a terminal: each state of the bar becomes a line."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> None:
        self._stream.write(text.strip("\r").rstrip(" ") + "\n" if text.strip() else "")

    def flush(self) -> None:
        self._stream.flush()


def _progress(total: int, step: int) -> Any:
    """A bar with rate and time left on a terminal, and a line each ten seconds elsewhere."""
    terminal = sys.stderr.isatty()
    return tqdm.tqdm(
        total=total,
        initial=step,
        unit=" step",
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.1 if terminal else 10.0,
        miniters=1,
        dynamic_ncols=terminal,
        bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    )


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise InputError("--wandb needs Weights & Biases: pip install 'rlhf_jax[wandb]'") from error
