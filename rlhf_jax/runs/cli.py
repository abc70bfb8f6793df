"""The command line of an experiment: a frozen dataclass in, flags out, and every mistake of the user's on one line."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

# Read when transformers is first imported, which says that there is no PyTorch. There need not be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import absl.logging
import jax
import tyro

from rlhf_jax.devices import hosts, preemption
from rlhf_jax.runs import checkpoint, gcs, log
from rlhf_jax.runs.run import Stage
from rlhf_jax.types import InputError

Config = TypeVar("Config")
Result = TypeVar("Result")

# Exit codes: wrong input, a run that broke down or a full disk, control-C; and preemption.EXIT, to be run again.
USAGE, FAILURE, INTERRUPTED = 2, 1, 130


def run(main: Callable[[Config], Result], default: Config, args: Sequence[str] | None = None) -> Result:
    """Calls `main` with `default` as changed by the flags in `args`, by default those of the command line.

    Each field is a flag (`--ppo.clip` for a nested one), and the comment beside it is its help. Leaves with one line on
    stderr and status 2 on a flag or value that is wrong and on any `InputError` from `main`, 1 on a `BrokenRunError`
    and where the disk is full, 130 on control-C, 75 (`preemption.EXIT`) on SIGTERM, where the same command goes on from
    then. Other exceptions are bugs, and keep their traceback. Compiled programs are kept in the folder that
    JAX_COMPILATION_CACHE_DIR names, or else in ~/.cache/rlhf_jax. Paths may be gs:// ones (`gcs`).
    """
    prepare()
    try:
        with preemption.watched():
            config = parse(default, args)
            with hosts.together(), gcs.mirrored(config) as local:
                return main(local)
    except InputError as error:
        _leave(str(error), USAGE)
    except log.BrokenRunError as error:
        _leave(str(error), FAILURE)
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED)
    except preemption.Preempted:
        print("asked to end by SIGTERM: run the same command again to go on", file=sys.stderr)
        raise SystemExit(preemption.EXIT) from None
    except Exception as error:
        if not checkpoint.disk_is_full(error):
            raise
        what = error.strerror if isinstance(error, checkpoint.FullDiskError) else f"the disk is full: {error}"
        _leave(f"{what}; make room, and run the same command again to go on", FAILURE)


def prepare() -> None:
    """What `run` does before anything else, for a process that does part of its work."""
    absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax and Grain narrate, and print errors that they raise too
    if jax.config.values["jax_compilation_cache_dir"] is None:  # what was compiled once is found by later stages
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "rlhf_jax"))
    if jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 1.0:  # as it comes: most programs are smaller
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def run_stage(stages: Mapping[str, tuple[Callable[[Any], Any], Any]], args: Sequence[str] | None = None) -> Any:
    """`run` of the main and default that the first argument names: the command line of a recipe of several stages."""
    name, *flags = [*(sys.argv[1:] if args is None else args)] or [""]
    names = ", ".join(stages)
    if name in ("-h", "--help"):
        print(f"{sys.modules['__main__'].__doc__}\nStages: {names}; --help behind one lists its flags.")
        raise SystemExit(0)
    if name not in stages:
        _leave(f"{f'unknown stage {name}' if name else 'no stage'}: expected one of {names}, then its flags", USAGE)
    main, default = stages[name]
    return run(main, default, flags)


def parse(default: Config, args: Sequence[str] | None = None) -> Config:
    """`default` as changed by the flags in `args`; raises `InputError` on a flag or a value that is wrong."""
    module = sys.modules["__main__"]
    spec = getattr(module, "__spec__", None)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config, unknown = tyro.cli(
                type(default),
                default=default,
                args=args,
                prog=f"python -m {spec.name.removesuffix('.__main__')}" if spec else None,
                description=module.__doc__,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        if isinstance(stop.__context__, InputError):  # from the dataclass itself
            raise stop.__context__ from None
        raise InputError(f"{_first_paragraph(said.getvalue())}; see --help") from None
    if unknown:
        flag = unknown[0].split("=")[0].replace("_", "-")
        near = difflib.get_close_matches(flag, ["--help", *_flags(default)], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        kind = "flag" if flag.startswith("-") else "argument"
        raise InputError(f"unknown {kind} {unknown[0]}; {hint}see --help")
    return config


def hand_down(name: str, config: Config, shared: Stage, **decided: Any) -> Config:
    """`config`, of an experiment that is the stage `name` of another, with what the other one decides for it.

    That is what all stages share, seed, data_dir, compute and devices, and the fields `decided`. Raises InputError
    where the stage's own flag says something else, rather than overrule it unseen.
    """
    values = {field: getattr(shared, field) for field in ("seed", "data_dir", "compute", "devices")} | decided
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        if field.name in values and getattr(config, field.name) not in (field.default, values[field.name]):
            flag = f"--{name}.{field.name}".replace("_", "-")
            raise InputError(f"{flag} has no effect here, where other flags decide it: leave it out")
    return dataclasses.replace(config, **values)  # type: ignore[type-var]


def _flags(config: Any, prefix: str = "--") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _flags(value, flag + ".")
        else:
            yield flag


def _first_paragraph(box: str) -> str:
    """The message proper of the box that tyro draws around an error: what is between its title and the next rule."""
    lines = [line.strip("│| ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]]
    paragraphs = re.split(r"(?m)^[─+╰╯-]+$", "\n".join(lines))
    text = next((" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()), "wrong flags")
    return text.removeprefix("Error parsing ").rstrip(".")


def _leave(message: str, status: int) -> NoReturn:
    print("error: " + gcs.named(" ".join(message.split())), file=sys.stderr)
    raise SystemExit(status)
