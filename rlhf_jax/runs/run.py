"""The part of a training loop that is the same in every experiment: go on where the run was, record, save.

    with runs.Run(cfg, layout, state, {"data": batches}, steps) as run:
        state = run.state
        for step in run:
            state, metrics = step_fn(state, layout.rows(next(run.streams["data"])))
            run.record(step, state, metrics)

A `Run` never sees a loss, a model or a batch: the state goes in and out of the loop, which stays in the experiment.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import jax

from rlhf_jax.devices import parallel
from rlhf_jax.devices.compute import Compute
from rlhf_jax.runs import checkpoint, timing
from rlhf_jax.runs.directory import CHECKPOINTS, changed_settings
from rlhf_jax.runs.log import NO_LIMITS, Limits, Records
from rlhf_jax.settings import Seed, Settings, Whole
from rlhf_jax.types import Metrics, TrainState


@dataclasses.dataclass(frozen=True)
class Stage(Settings):
    """The settings that every experiment has."""

    seed: Seed = 0  # of everything that is random
    out: Path = Path("runs/stage")  # run directory
    data_dir: Path = Path("runs/data")  # where prepared data sets are kept
    compute: Compute = Compute()
    devices: parallel.Config = parallel.Config()


@dataclasses.dataclass(frozen=True)
class Config(Stage):
    """The settings that every experiment has which trains a model; the model goes to the folder "model" of `out`."""

    # How control tokens that rows spell are read: as such, with a count of these rows (warn), or as plain text; None is
    # as the model directory says. What is trained keeps it.
    control_tokens: Literal["warn", "text"] | None = None
    saves: checkpoint.Config = checkpoint.Config()
    skip_bad: Whole = 0  # steps in a row with a gradient that is not finite to skip; one more ends the run
    profile: Whole = 0  # steps to trace after the first three, into the folder profile
    wandb: bool = False  # log to Weights & Biases too


@runtime_checkable
class Stream(checkpoint.Stream, Iterator[Any], Protocol):
    """An iterator over batches that knows its place."""


SEED = {"seed": "rng"}


class Run:
    """A run of `steps` steps in `cfg.out`, from its newest checkpoint if there is one. Use it as a context manager."""

    state: TrainState  # placed by the layout; of the newest checkpoint, or as it was given
    streams: dict[str, Stream]  # iterators over what was given, from where the run was
    clock: timing.Clock  # of the parts of a step, where the loop tells it of them

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
        """Finds where to go on.

        `state` is that before the first step, not placed. `streams` are saved with it, and set to their places again.
        Of `limits`, what `cfg` says too is taken from there. `in_state` maps settings that the state holds to its
        leaves: where `--saves.resume changed` changes such a setting, the run goes on with the new value.
        """
        self._cfg, self._layout, self._steps = cfg, layout, steps
        self._limits = dataclasses.replace(limits, skip_bad=cfg.skip_bad, profile=cfg.profile, wandb=cfg.wandb)
        self._opened, self._saving = contextlib.ExitStack(), contextlib.ExitStack()
        self.streams = {name: cast(Stream, iter(stream)) for name, stream in streams.items()}
        resumed = checkpoint.resume(cfg.out / CHECKPOINTS, state, self.streams, cfg.saves, total=steps)
        if cfg.saves.resume == "changed":
            changed = {in_state[name] for name in changed_settings(cfg.out, cfg) if name in in_state}
            resumed = _replace_leaves(resumed, state, changed)
        self._done = int(resumed.step)
        self.state = layout.state(resumed)

    def __enter__(self) -> "Run":
        cfg, done, total = self._cfg, self._done, self._steps
        with contextlib.ExitStack() as opened:  # so that what is open is closed where the next cannot be opened
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
        """The numbers of the steps that are still to be done; the first step of a run has number 1.

        After the last one all checkpoints are on disk, and SIGTERM is no longer put off.
        """
        yield from range(self._done + 1, self._steps + 1)
        self._saving.close()

    def record(self, step: int, state: TrainState, metrics: Metrics) -> None:
        """Records the metrics of a step, and saves the state after it when its turn has come or SIGTERM has."""
        self._records.write(step, self._layout.get(metrics) | self.clock.seconds())
        if self._saves.due(step):
            self._saves.save(self._layout.get(state), self.streams, self._records.flush())

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records a table of samples, see `log.Records.samples`."""
        self._records.samples(step, rows)


def _replace_leaves(state: TrainState, other: TrainState, names: set[str]) -> TrainState:
    """`state` with the leaves of these names, such as "opt_state/kl_coef", of another one."""

    def choose(path: tuple, leaf: Any, changed: Any) -> Any:
        return changed if jax.tree_util.keystr(path, simple=True, separator="/") in names else leaf

    return jax.tree_util.tree_map_with_path(choose, state, other)
