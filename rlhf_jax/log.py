"""The records of a run: what it was, how it went, what it said.

A run directory holds `config.json`, `metrics.jsonl` (an object a line: step, time, metrics), `samples.jsonl` and
`samples.md` (all sample tables, and the newest to read), TensorBoard events, and what other modules put there: plots,
`checkpoints/`, the model directory.

Metrics stay on the device when they are written and cross to the host in batches, so that logging a step does not wait
for it. On crossing they are checked: a loss or gradient norm that is not finite stops the run, and so does a metric
above the bound that the run was given for it.
"""

import dataclasses
import importlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
import tqdm

from rlhf_jax import checkpoint
from rlhf_jax.types import InputError

MUST_BE_FINITE = ("loss/", "grad_norm")  # beginnings of the names of metrics that may not be NaN or infinite
CHECKPOINTS = "checkpoints"  # below the run directory, where the last good checkpoint is looked for


class BrokenRunError(ArithmeticError):
    """A metric is not finite, or above its bound. The message names the step, the metric and the last checkpoint."""


def start(
    directory: Path,
    config: Any,
    *,
    total: int,
    step: int = 0,
    every: int = 10,
    show: Sequence[str] = (),
    at_most: Mapping[str, float] | None = None,
    wandb: bool = False,
) -> "Run":
    """Opens the records of a run of `total` steps in `directory`.

    The run continues after `step`: records of later steps, left by an earlier run, are removed. So a run from step 0
    starts anew and never mixes with what was there. `config` is a dataclass; `show` names the metrics of the progress
    line, by default the first three; `at_most` bounds metrics by name. Metrics are converted when `every` writes have
    come together or `Run.PATIENCE` seconds have passed. Under several processes all of them check the metrics, and the
    first one writes.
    """
    client = _import_wandb() if wandb else None
    main = jax.process_index() == 0
    if main:
        try:
            _prepare(directory, step)
        except OSError as error:
            raise InputError(f"records cannot be written to {directory}: {error.strerror}") from error
        write_config(directory, config)
    if client and main:
        settings = json.loads((directory / "config.json").read_text())
        client.init(project="rlhf_jax", name=directory.name, dir=str(directory), config=settings)
    bounds = at_most or {}
    return Run(directory, total=total, step=step, every=every, show=show, at_most=bounds, wandb=client, main=main)


def write_config(directory: Path, config: Any) -> None:
    """Writes the dataclass `config` to the run directory's config.json."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(config), indent=2, default=str)
        (directory / "config.json").write_text(text + "\n")
    except OSError as error:
        raise InputError(f"records cannot be written to {directory}: {error.strerror}") from error


class Run:
    """The open records of a run; see `start`. Use it as a context manager: leaving it flushes and closes everything."""

    PATIENCE = 5.0  # seconds

    def __init__(
        self,
        directory: Path,
        *,
        total: int,
        step: int,
        every: int,
        show: Sequence[str],
        at_most: Mapping[str, float],
        wandb: Any,
        main: bool,
    ):
        self.directory = directory
        self._at_most = at_most
        self._every = every
        self._show = tuple(show)
        self._shown: dict[str, int | float] = {}
        self._pending: list[tuple[Any, float, dict[str, Any]]] = []
        self._flushed = time.monotonic()
        self._main = main
        self._wandb = wandb if main else None
        if main:
            self._metrics = (directory / "metrics.jsonl").open("a")
            self._samples = (directory / "samples.jsonl").open("a")
            self._tensorboard = tensorboardX.SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
            self._bar = _progress(total, step)

    def write(self, step: int | jax.Array, metrics: Mapping[str, Any]) -> None:
        """Records scalars by name, such as "loss/policy", for `step`. Does not wait for the device."""
        self._pending.append((step, time.time(), dict(metrics)))
        if len(self._pending) >= self._every or time.monotonic() - self._flushed > self.PATIENCE:
            self.flush()

    def flush(self) -> None:
        """Converts and writes what is pending. Call it before saving a checkpoint, so that only good states are saved.

        Raises `BrokenRunError` at the first step with a metric of `MUST_BE_FINITE` that is not, or one above its bound;
        its line is written before, and the lines of later steps are not.
        """
        pending, self._pending = self._pending, []
        for step, when, metrics in jax.device_get(pending):
            values = {name: _number(name, value) for name, value in metrics.items()}
            if self._main:
                self._record(int(step), when, values)
            for name, value in values.items():
                bound = self._at_most.get(name)
                if name.startswith(MUST_BE_FINITE) and not math.isfinite(value):
                    what = f"{value}"
                elif bound is not None and not value <= bound:
                    what = f"{value:.3g}, which should be at most {bound:g}"
                else:
                    continue
                good = checkpoint.latest(self.directory / CHECKPOINTS, before=int(step))
                last = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
                raise BrokenRunError(f"step {int(step)}: {name} is {what}; {last}")
        if pending and self._main:
            self._bar.set_postfix_str("  ".join(f"{k} {v:.4g}" for k, v in self._shown.items()), refresh=False)
            self._bar.update(int(step) - self._bar.n)
        self._flushed = time.monotonic()

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records a table of samples. Each row has prompt, response, score, kl and whatever else, as text or scalars.

        It goes to `samples.jsonl` (a line a row, after those of earlier steps), `samples.md` (this table only) and
        TensorBoard.
        """
        self.flush()  # Weights & Biases takes no step after a later one
        if not self._main or not rows:
            return
        table = [{k: v if isinstance(v, str | None) else _number(k, v) for k, v in row.items()} for row in rows]
        for row in table:
            self._samples.write(_line({"step": int(step), **row}))
        self._samples.flush()
        text = _markdown(table)
        (self.directory / "samples.md").write_text(f"Step {int(step)}\n\n{text}")
        self._tensorboard.add_text("samples", text, int(step))
        if self._wandb:
            columns = list(table[0])
            data = [[row.get(column) for column in columns] for row in table]
            self._wandb.log({"samples": self._wandb.Table(columns=columns, data=data)}, step=int(step))

    def close(self) -> None:
        """Writes what is pending, then closes the files, whatever happens. May raise `BrokenRunError`."""
        try:
            self.flush()
        finally:
            if self._main:
                self._bar.close()
                self._metrics.close()
                self._samples.close()
                self._tensorboard.close()
            if self._wandb:
                self._wandb.finish()

    def __enter__(self) -> "Run":
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
        self._show = self._show or tuple(values)[:3]
        self._shown |= {name: values[name] for name in self._show if name in values}


def read(directory: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a record of the run in `directory`; what was not finite is None."""
    path = directory / name
    if not path.is_file():
        raise InputError(f"{path} does not exist; is {directory} the directory of a run?")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} is not JSON: {error}") from error
    return rows


def _prepare(directory: Path, step: int) -> None:
    """Makes the directory, and removes from it the records of steps after `step`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = directory / name
        if path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _step(line) <= step]
            partial = path.with_suffix(".tmp")
            partial.write_text("".join(kept) if step else "")
            os.replace(partial, path)
    if step == 0:  # a run that continues tells TensorBoard to hide the later events instead
        shutil.rmtree(directory / "tensorboard", ignore_errors=True)
        (directory / "samples.md").unlink(missing_ok=True)


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
