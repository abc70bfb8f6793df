"""The records of a run: its configuration, metrics and samples.

A run directory holds `config.json`, `metrics.jsonl` (one object a line: step, time, metrics), `samples.jsonl` (all
sample tables), `samples.md` (the newest table, for reading), `tokens/` (Parquet, one file for each step whose episodes
are recorded token by token) and TensorBoard events. Other modules add plots, `checkpoints/` and the model directory.

`write` leaves metrics on the device; they are copied to the host several steps at a time, so that logging never waits
for a step. After the copy they are checked: a loss or gradient norm that is not finite ends the run (or too many in a
row, if the optimiser skips such steps), and so does a metric above its bound in `Limits.at_most`.
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

from rlhf_jax.devices import progress
from rlhf_jax.runs import checkpoint, events, gcs, timing
from rlhf_jax.runs.directory import CHECKPOINTS, write_config, writing
from rlhf_jax.types import InputError

TOKENS = "tokens"  # the folder of what every token was worth, below the run directory
MUST_BE_FINITE = ("loss/", "grad_norm")  # prefixes of the names of metrics that may not be NaN or infinite


class BrokenRunError(ArithmeticError):
    """A metric is not finite or above its bound. The message names step, metric and last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Settings of the records of a run: what to show, derive and trace, and which metrics end the run."""

    show: tuple[str, ...] = ()  # names of metrics for the progress line; default: the first three
    at_most: Mapping[str, float] = dataclasses.field(default_factory=dict)  # metric to the bound that ends the run
    derive: Callable[[dict[str, Any]], dict[str, float]] = lambda metrics: {}  # a step's metrics to further ones
    skip_bad: int = 0  # allowed number of steps in a row with a loss or gradient norm that is not finite
    profile: int = 0  # steps to trace with the profiler after the first three, into `profile/`
    wandb: bool = False  # also log to Weights & Biases
    every: int = 10  # steps whose metrics are copied to the host together


NO_LIMITS = Limits()


class Records:
    """The open records of a run of `total` steps in a directory. Use it as a context manager, which closes the files.

    The run continues after `step`; records of later steps, from an earlier run, are removed. A run from step 0 thus
    starts with empty records. Metrics are copied to the host once `Limits.every` steps are pending or `PATIENCE`
    seconds have passed, always while the devices work on a later step. If something was compiled before a step, its
    record has the metric "seconds/compile". With several processes all check the metrics, and only the first one
    writes.
    """

    PATIENCE = 5.0  # seconds after which pending metrics are copied
    AHEAD = 2  # most steps that are unfinished: SIGTERM, and what shows progress, wait for no more
    WARMUP = 3  # first steps, which are not traced

    def __init__(self, directory: Path, config: Any, *, total: int, step: int = 0, limits: Limits = NO_LIMITS):
        """Open the records, and write the dataclass `config` to config.json."""
        client = _import_wandb() if limits.wandb else None
        main = jax.process_index() == 0
        write_config(directory, config)  # first, for it locks the directory
        if main or gcs.holds(directory):  # every host has its own local copy of a directory on GCS
            with writing(directory):
                _prepare(directory, step)
        if main and step:
            what = f"goes on after step {step}" if step < total else f"is trained: {step} steps"
            print(gcs.named(f"{directory} {what}"))
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
                # Its thread dies when the disk is full; a full queue that nobody reads would then block the run.
                max_queue=2**20,
            )
            self._bar = progress.bar(total, done=step)

    def write(self, step: int | jax.Array, metrics: Mapping[str, Any]) -> None:
        """Record scalars of a step by name, such as "loss/policy", without waiting for it.

        Waits for the step that is `AHEAD` before it, so that the devices always have another one to go on with.
        """
        total = timing.compile_seconds()
        compilation = {"seconds/compile": total - self._compiled} if total > self._compiled else {}
        self._compiled = total
        self._pending.append((step, time.time(), {**metrics, **compilation}))
        if self._traced:
            self._trace()
        if len(self._pending) > self.AHEAD:
            jax.block_until_ready(self._pending[-1 - self.AHEAD][2])
        if len(self._pending) > self._limits.every or time.monotonic() - self._flushed > self.PATIENCE:
            self._convert(len(self._pending) - 1)  # all but the last, whose step the devices are still working on

    def _trace(self) -> None:
        """Start or stop the profiler at its steps, once the devices have finished all earlier steps."""
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
        """Check and write all pending metrics; returns those of the last step.

        Call it before saving a checkpoint, so that only good states are saved. Raises `BrokenRunError` for the first
        step with a metric that must be finite and is not (unless `Limits.skip_bad` allows it), or that is above its
        bound. That step's line is written; lines of later steps are not.
        """
        self._convert(len(self._pending))
        return self._last

    def _convert(self, count: int) -> None:
        """Check and write the first `count` pending steps, as `flush` does."""
        pending, self._pending = self._pending[:count], self._pending[count:]
        for step, when, metrics in jax.device_get(pending):
            values = {name: _number(name, value) for name, value in metrics.items()}
            values |= self._limits.derive(values)
            if self._main:
                self._record(int(step), when, values)
            self._last = values
            not_finite = [
                name for name in values if name.startswith(MUST_BE_FINITE) and not math.isfinite(values[name])
            ]
            self._bad = self._bad + 1 if not_finite else 0
            if not_finite and self._bad > self._limits.skip_bad:
                self._stop(int(step), f"{not_finite[0]} is {values[not_finite[0]]}")
            if not_finite:
                where = f"step {int(step)}: {not_finite[0]} is {values[not_finite[0]]}"
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
        """Record a table of samples: rows of text or scalars by column, such as prompt, response, score and kl.

        The table goes to `samples.jsonl` (one line a row, replacing rows of the same step), `samples.md` (only this
        table) and TensorBoard. Flushes first; may raise `BrokenRunError`.
        """
        self.flush()  # Weights & Biases refuses a step smaller than one it has seen
        if not self._main or not rows:
            return
        table = [{k: v if isinstance(v, str | None) else _number(k, v) for k, v in row.items()} for row in rows]
        record = self.directory / "samples.jsonl"
        if int(step) in self._sampled:  # recorded by an earlier process that was killed later in this step
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

    def tokens(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows, one an episode, to `tokens/STEP.parquet`; their arrays become lists, with an entry a token."""
        if not self._main or not rows:
            return
        import pyarrow
        import pyarrow.parquet

        path = self.directory / TOKENS / f"{int(step):08d}.parquet"
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".tmp")
        table = pyarrow.Table.from_pylist([{"step": int(step), **row} for row in rows])
        pyarrow.parquet.write_table(table, partial, compression="zstd")
        os.replace(partial, path)

    def close(self) -> None:
        """Write pending metrics, and close the files even if that fails. May raise `BrokenRunError`."""
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
            error.add_note(f"and while closing the records: {late}")  # the user must see the first error, not this one

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
    """The objects of a record of the run in `directory`, one a line; a number that was not finite is None.

    Raises InputError for a missing file or a line that is not JSON.
    """
    path = directory / name
    if not path.is_file():
        runs = ", ".join(sorted(str(found.parent) for found in directory.glob(f"*/{name}")))
        hint = f"name one of the runs in it: {runs}" if runs else f"is {directory} the directory of a run?"
        raise InputError(f"{path} does not exist; {hint}")
    rows = []
    for number, line in enumerate(_lines(path), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} is not JSON: {error}") from error
    return rows


def read_tokens(directory: Path) -> list[dict[str, Any]]:
    """The rows that `Records.tokens` wrote in the run of this directory, in the order of their steps."""
    import pyarrow
    import pyarrow.parquet

    rows = []
    for path in sorted((directory / TOKENS).glob("*.parquet")):
        try:
            rows += pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise InputError(f"{path} cannot be read: {error}; delete it to do without its episodes") from error
    return rows


def without_timings(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics without timings: the part that is the same when a run is repeated."""
    return {name: value for name, value in row.items() if not timing.is_timing(name)}


def _prepare(directory: Path, step: int) -> None:
    """Create the directory, and remove the records of steps after `step` from it."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        _rewrite(directory / name, [line for line in _lines(directory / name) if step and _step(line) <= step])
    for path in (directory / TOKENS).glob("*.parquet"):
        if not step or int(path.stem) > step:
            path.unlink()
    if step == 0:  # a run that continues uses purge_step to hide later events instead
        shutil.rmtree(directory / "tensorboard", ignore_errors=True)
        (directory / "samples.md").unlink(missing_ok=True)


def _lines(path: Path) -> list[str]:
    """The lines of a file with their line ends; the last one has none if the process was killed while writing it."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:  # also a character may be cut
        return list(file)


def _rewrite(path: Path, lines: Sequence[str]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, path)


def _trailing_bad_steps(directory: Path) -> int:
    """The number of steps at the end of the record in a row with a loss or gradient norm that is not finite."""
    steps = [any(row[name] is None for name in row if name.startswith(MUST_BE_FINITE)) for row in read(directory)]
    return len(list(itertools.takewhile(bool, reversed(steps))))


def _step(line: str) -> int | float:
    """The step of a line; infinity, so that the line is removed, if it was cut short."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except json.JSONDecodeError:
        return math.inf


def _line(values: Mapping[str, Any]) -> str:
    """The values as a line of JSON, with null for NaN and infinity, which JSON lacks."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(clean, ensure_ascii=False) + "\n"


def _number(name: str, value: Any) -> int | float:
    """`value` as a Python number with the fewest decimals that give the same value in its own precision.

    Raises ValueError if it is not a scalar.
    """
    array = np.asarray(value)
    if array.shape:
        raise ValueError(f"metric {name} is not a scalar but has the shape {array.shape}")
    return float(str(array[()])) if jnp.issubdtype(array.dtype, jnp.floating) else array.item()


def _markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table with the columns of the first row."""

    def cell(value: Any) -> str:
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        return text.replace("|", r"\|").replace("\n", "<br>")

    columns = list(table[0])
    rows = [columns, ["---"] * len(columns), *([cell(row.get(c, "")) for c in columns] for row in table)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise InputError("--wandb needs Weights & Biases: pip install 'rlhf_jax[wandb]'") from error
