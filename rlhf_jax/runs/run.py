"""The part of a training loop that is the same in every experiment: resume, record, save.

    with runs.Run(cfg, layout, state, {"data": batches}, steps) as run:
        state = run.state
        for step in run:
            state, metrics = step_fn(state, layout.rows(next(run.streams["data"])))
            run.record(step, state, metrics)

A `Run` knows no loss, model or batch. The loop stays in the experiment and passes its state in and out.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import jax

from rlhf_jax.devices import parallel
from rlhf_jax.devices.compute import Compute
from rlhf_jax.runs import checkpoint, timing
from rlhf_jax.runs.directory import CHECKPOINTS
from rlhf_jax.runs.log import NO_LIMITS, Limits, Records
from rlhf_jax.settings import NonNegative, Seed, Settings, Whole
from rlhf_jax.types import Metrics, TrainState


@dataclasses.dataclass(frozen=True)
class Stage(Settings):
    """The settings that every experiment has."""

    seed: Seed = 0  # seed of all random numbers of the run
    out: Path = Path("runs/stage")  # run directory, for all results
    data_dir: Path = Path("runs/data")  # directory of prepared data sets, which runs share
    compute: Compute = Compute()
    devices: parallel.Config = parallel.Config()


@dataclasses.dataclass(frozen=True)
class Config(Stage):
    """The settings of every experiment that trains a model, which it writes to the folder "model" of `out`."""

    # How control tokens that rows spell are read: as such, with a count of these rows (warn), or as plain text; None is
    # as the model directory says. What is trained keeps it.
    control_tokens: Literal["warn", "text"] | None = None
    balance: NonNegative = 0.001  # weight of the load-balancing loss of a mixture of experts; others have none
    saves: checkpoint.Config = checkpoint.Config()
    skip_bad: Whole = 0  # skip up to so many steps in a row whose gradient is not finite; one more ends the run
    profile: Whole = 0  # number of steps to trace with the profiler, after the first three, into the folder profile
    wandb: bool = False  # also log to Weights & Biases


@runtime_checkable
class Stream(checkpoint.Stream, Iterator[Any], Protocol):
    """An iterator over batches whose position can be saved and restored."""


class _SettingsInState:
    """The values of settings that a state depends on, saved beside the positions of the streams.

    So a checkpoint tells which of them have changed since, on every process, whatever config.json says by now.
    """

    def __init__(self, values: dict[str, float | int | None]):
        self._values, self.changed = values, set[str]()

    def get_state(self) -> dict[str, float | int | None]:
        return self._values

    def set_state(self, saved: dict[str, float | int | None]) -> None:
        self.changed = {name for name, value in self._values.items() if name in saved and saved[name] != value}


SEED = {"seed": "rng"}  # the leaf of the state that depends on the setting `seed`


class Run:
    """A run of `steps` steps in `cfg.out`, resumed from its newest checkpoint if any. Use it as a context manager."""

    state: TrainState  # placed by the layout; from the newest checkpoint, or the initial state
    streams: dict[str, Stream]  # iterators over the given streams, at the position of the checkpoint
    clock: timing.Clock  # measures the parts of a step that the loop reports to it

    def __init__(
        self,
        cfg: Config,
        layout: parallel.Layout,
        state: TrainState,
        streams: Mapping[str, Iterable[Any]],
        steps: int,
        limits: Limits = NO_LIMITS,
        in_state: Mapping[str, str] = SEED,
    ):
        """Restore the newest checkpoint of `cfg.out`, if there is one.

        `state` is the initial state, not yet placed. The positions of `streams` are saved and restored with it. `cfg`
        overrides the fields of `limits` that it has too. `in_state` maps settings whose value is part of the state to
        the path of that leaf: if `--saves.resume changed` changes one, the run continues with its new value.
        """
        self._cfg, self._layout, self._steps = cfg, layout, steps
        self._limits = dataclasses.replace(limits, skip_bad=cfg.skip_bad, profile=cfg.profile, wandb=cfg.wandb)
        self._opened, self._saving = contextlib.ExitStack(), contextlib.ExitStack()
        self.streams = {name: cast(Stream, iter(stream)) for name, stream in streams.items()}
        values = _SettingsInState({name: _value(cfg, name) for name in in_state})
        self._positions: dict[str, checkpoint.Stream] = {**self.streams, "settings": values}
        resumed = checkpoint.resume(cfg.out / CHECKPOINTS, state, self._positions, cfg.saves, total=steps)
        resumed = _replace_leaves(resumed, state, {in_state[name] for name in values.changed})
        self._done = int(resumed.step)
        self.state = layout.state(resumed)

    def __enter__(self) -> "Run":
        cfg, done, total = self._cfg, self._done, self._steps
        with contextlib.ExitStack() as opened:  # closes what is open if the next part fails to open
            self.clock = opened.enter_context(timing.Clock())
            records = Records(cfg.out, cfg, total=total, step=done, limits=self._limits)
            self._records = opened.enter_context(records)
            opened.push(self._saving)
            self._saves = self._saving.enter_context(checkpoint.Writer(cfg.out / CHECKPOINTS, cfg.saves, done, total))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._opened.__exit__(*error)

    def __iter__(self) -> Iterator[int]:
        """The numbers of the remaining steps; the first step of a run has number 1.

        After the last step all checkpoints are on disk, and SIGTERM is no longer deferred.
        """
        yield from range(self._done + 1, self._steps + 1)
        self._saving.close()

    def record(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Record the metrics of a step, and save the state after it if a checkpoint is due or SIGTERM has come."""
        self._records.write(step, self._layout.get(metrics) | self.clock.seconds())
        if self._saves.due(step):
            self._saves.save(self._layout.get(state), self._positions, self._records.flush())

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a table of samples, see `log.Records.samples`."""
        self._records.samples(step, rows)

    def tokens(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record what every token of some episodes was worth, see `log.Records.tokens`."""
        self._records.tokens(step, rows)


def _value(cfg: Any, name: str) -> Any:
    """The setting of this dotted name."""
    return functools.reduce(getattr, name.split("."), cfg)


def _replace_leaves(state: TrainState, other: TrainState, names: set[str]) -> TrainState:
    """`state` with the leaves of these paths, such as "opt_state/kl_coef", taken from `other`."""

    def choose(path: tuple, leaf: Any, changed: Any) -> Any:
        return changed if jax.tree_util.keystr(path, simple=True, separator="/") in names else leaf

    return jax.tree_util.tree_map_with_path(choose, state, other)
