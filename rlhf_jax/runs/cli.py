"""The command line of an experiment: a frozen dataclass in, flags out, and every mistake of the user's on one line."""

import codecs
import contextlib
import dataclasses
import difflib
import errno
import inspect
import io
import itertools
import os
import re
import select
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

# Read when transformers is first imported, which says that there is no PyTorch. There need not be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import absl.logging
import jax
import tyro

from rlhf_jax.devices import hosts, preemption
from rlhf_jax.runs import checkpoint, compiled, gcs, log
from rlhf_jax.runs.run import Stage
from rlhf_jax.settings import described, with_lines
from rlhf_jax.types import InputError

Config = TypeVar("Config")
Result = TypeVar("Result")

# Exit codes: wrong input, a run that broke down or a full disk, control-C, an output that nobody reads any more; and
# preemption.EXIT, to be run again.
USAGE, FAILURE, INTERRUPTED, UNREAD = 2, 1, 130, 128 + signal.SIGPIPE
_OF_A_PATH = errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP  # mistakes, where a file is named


def run(main: Callable[[Config], Result], default: Config, args: Sequence[str] | None = None) -> Result:
    """Call `main` with `default` as changed by the flags in `args`, by default those of the command line.

    Each field is a flag (`--ppo.clip` for a nested one), and the comment beside it is its help. Leaves with one line on
    stderr and status 2 on a flag or value that is wrong, on any `InputError` from `main` and on a path that may not be
    used, 1 on a `BrokenRunError` and where the disk or a memory is full, 130 on control-C, 75 (`preemption.EXIT`) on
    SIGTERM, where the same command goes on from then; and with 141 and no line where the output was closed, as by
    `| head`. Other exceptions are bugs, and keep their traceback. Compiled programs are kept in the folder that
    JAX_COMPILATION_CACHE_DIR names, or else in ~/.cache/rlhf_jax (`compiled`). Paths may be gs:// ones (`gcs`).
    """
    prepare()
    with _output(), _threads():
        try:
            with preemption.handle_sigterm():
                config = parse(default, args)
                with hosts.distributed(), gcs.mirrored(config) as local:
                    return main(local)
        except log.BrokenRunError as error:
            _leave(str(error), FAILURE)
        except KeyboardInterrupt:
            _leave("interrupted", INTERRUPTED)
        except preemption.Preempted:
            _tell("asked to end by SIGTERM: run the same command again to go on")
            raise SystemExit(preemption.EXIT) from None
        except Exception as error:
            if checkpoint.disk_is_full(error):
                what = error.strerror if isinstance(error, checkpoint.FullDiskError) else f"the disk is full: {error}"
                _leave(f"{what}; make room, and run the same command again to go on", FAILURE)
            if _memory_is_full(error):
                what = str(error).strip().partition("\n")[0].rstrip(".") or "no memory is left"
                _leave(f"{what}; what needs less is in docs/troubleshooting.md, under Out of memory", FAILURE)
            if isinstance(error, InputError):
                _leave(str(error), USAGE)
            if isinstance(error, OSError) and error.errno in _OF_A_PATH and error.filename:
                _leave(f"{os.fspath(error.filename)!s:.300}: {error.strerror}", USAGE)
            raise


def prepare() -> None:
    """Set up the process as `run` does before anything else, for one that does part of its work."""
    absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax and Grain narrate, and print errors that they raise too
    _prepare_streams()
    compiled.prepare()


def _prepare_streams() -> None:
    """Make the standard streams take any text: what cannot be decoded is U+FFFD, what cannot be encoded is escaped.

    Where the locale has ASCII alone they are UTF-8, which Python itself makes of it unless it is told not to. Streams
    that were closed before the start read nothing and write to nowhere.
    """
    for name, mode, errors in (("stdin", "r", "replace"), ("stdout", "w", "backslashreplace"),
                               ("stderr", "w", "backslashreplace")):  # fmt: skip
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            is_ascii = codecs.lookup(stream.encoding).name == "ascii" and "PYTHONIOENCODING" not in os.environ
            stream.reconfigure(encoding="utf-8" if is_ascii else stream.encoding, errors=errors)


@contextlib.contextmanager
def _output() -> Iterator[None]:
    """On the way out everything is flushed here: where nobody reads it any more, the process ends without a word."""
    try:
        yield
    except BrokenPipeError:
        if not any(map(_is_unread, (sys.stdout, sys.stderr))):
            raise  # it was another pipe
        _flush()
        raise SystemExit(UNREAD) from None
    except BaseException:
        _flush()
        raise
    if (error := _flush()) is not None:
        if not isinstance(error, BrokenPipeError):
            _tell(f"error: the output cannot be written: {error.strerror}")
        raise SystemExit(UNREAD if isinstance(error, BrokenPipeError) else FAILURE)


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe, or a socket, that the other side has closed."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # an error is reported in any case
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _flush() -> OSError | None:
    """Flush the standard streams; one that fails writes to nowhere from then on. Returns the last error."""
    failed = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            failed = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    return failed


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """Within, a thread that fails because the disk is full prints no traceback: the main thread will tell.

    TensorBoard's dies of it. TensorStore's report that Orbax no longer waits for what they wrote.
    """
    former, former_unraisable = threading.excepthook, sys.unraisablehook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not checkpoint.disk_is_full(args.exc_value):
            former(args)

    def unraisable_hook(args: Any) -> None:
        if threading.current_thread() is threading.main_thread() or str(args.exc_value) != "Event loop is closed":
            former_unraisable(args)

    threading.excepthook, sys.unraisablehook = hook, unraisable_hook
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = former, former_unraisable


def run_stage(stages: Mapping[str, tuple[Callable[[Any], Any], Any]], args: Sequence[str] | None = None) -> Any:
    """`run` of the main and default that the first argument names: the command line of a recipe of several stages."""
    name, *flags = [*(sys.argv[1:] if args is None else args)] or [""]
    names = ", ".join(stages)
    if name not in stages:
        prepare()
        with _output():
            if name in ("-h", "--help"):
                print(f"{sys.modules['__main__'].__doc__}\nStages: {names}; --help behind one lists its flags.")
                raise SystemExit(0)
            wrong = f"unknown stage {name}" if name else "no stage"
            _leave(f"{wrong}: expected one of {names}, then its flags", USAGE)
    main, default = stages[name]
    return run(main, default, flags)


def parse(default: Config, args: Sequence[str] | None = None) -> Config:
    """`default` as changed by the flags in `args`; raises `InputError` on a flag or a value that is wrong."""
    arguments = [_decoded(argument) for argument in (sys.argv[1:] if args is None else args)]
    module = sys.modules["__main__"]
    spec = getattr(module, "__spec__", None)
    printed = io.StringIO()
    if not {"-h", "--help"}.isdisjoint(arguments):
        _explain(default)
    try:
        with contextlib.redirect_stderr(printed):
            config, unknown = tyro.cli(
                type(default),
                default=default,
                args=arguments,
                prog=f"python -m {spec.name.removesuffix('.__main__')}" if spec else None,
                description=with_lines(module.__doc__ or ""),
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        if isinstance(stop.__context__, InputError):  # from the dataclass itself
            raise stop.__context__ from None
        raise InputError(f"{_first_paragraph(printed.getvalue())}; see --help") from None
    if unknown:
        flag = unknown[0].split("=")[0].replace("_", "-")
        near = difflib.get_close_matches(flag, ["--help", *_flags(default)], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        kind = "flag" if flag.startswith("-") else "argument"
        raise InputError(f"unknown {kind} {unknown[0]}; {hint}see --help")
    _check_paths(config, arguments)
    return config


def _explain(config: Any) -> None:
    """Give --help the comment of each field as its text: tyro would also show what a comment tells tools."""
    kinds = [kind for kind in type(config).__mro__ if dataclasses.is_dataclass(kind)]
    for kind in kinds:
        with contextlib.suppress(OSError):  # it was not read from a file
            for name, _, comment in described(inspect.getsource(kind)):
                field = kind.__dataclass_fields__.get(name)
                if field and (comment or not dataclasses.is_dataclass(field.default)):  # a group has its docstring
                    field.metadata = types.MappingProxyType({"help": comment, **field.metadata})
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            _explain(value)


def _decoded(argument: str) -> str:
    """An argument as the UTF-8 that it is, also where the locale has ASCII alone; InputError if it is none."""
    try:
        return os.fsencode(argument).decode() if "\udc80" <= max(argument, default="") <= "\udcff" else argument
    except UnicodeDecodeError:
        shown = argument.encode(errors="backslashreplace").decode()
        raise InputError(f"argument {shown:.100}: expected UTF-8; rename the file, if it names one") from None


def _check_paths(config: Any, arguments: Sequence[str]) -> None:
    """Raises InputError for a path among the flags that is empty, or that this locale has no name for."""
    emptied = {flag for flag, value in itertools.pairwise(arguments) if value == ""}
    emptied |= {argument[:-1] for argument in arguments if re.fullmatch(r"--[\w.\-]+=", argument)}
    emptied = {flag.replace("_", "-") for flag in emptied}
    for flag, value in _flags(config).items():
        for path in value if isinstance(value, tuple | list) else (value,):
            if not isinstance(path, Path):
                continue
            if flag in emptied and str(path) == ".":
                raise InputError(f"{flag} is empty: expected a path, such as . for the working directory")
            try:
                os.fsencode(path)
            except UnicodeEncodeError:
                shown = str(path).encode("ascii", "backslashreplace").decode()
                raise InputError(f"{flag} {shown}: this locale has no such names; set PYTHONUTF8=1") from None


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


def _flags(config: Any, prefix: str = "--") -> dict[str, Any]:
    """The values of all fields of a dataclass and of those nested in it, by flag."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = prefix + field.name.replace("_", "-")
        found |= _flags(value, flag + ".") if dataclasses.is_dataclass(value) else {flag: value}
    return found


def _first_paragraph(box: str) -> str:
    """The message in the box that tyro draws around an error: the text between its title and the next rule."""
    lines = [line.strip("│| ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]]
    paragraphs = re.split(r"(?m)^[─+╰╯-]+$", "\n".join(lines))
    text = next((" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()), "wrong flags")
    return text.removeprefix("Error parsing ").rstrip(".")


def _memory_is_full(error: Exception) -> bool:
    """Whether the devices, or this machine, have less memory than was asked for."""
    said = str(error)
    exhausted = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in said
    return isinstance(error, MemoryError) or (exhausted and "memory" in said)


def _leave(message: str, status: int) -> NoReturn:
    _tell("error: " + gcs.named(" ".join(message.split())))
    raise SystemExit(status)


def _tell(line: str) -> None:
    """Print a line on stderr. Where nobody reads that, the status still tells."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
