"""Data sets of the Hugging Face Hub by name, "hub:OWNER/NAME@REVISION?config=CONFIG&split=SPLIT", read by `datasets`.

All but the name may be left out. That library finds and caches the files, under HF_HOME; HF_HUB_OFFLINE=1 keeps it off
the network, HF_ENDPOINT names a mirror, HF_TOKEN opens gated sets. What is read is stored under the data directory and
not looked up again, so that a run goes on with the rows that it began with, whatever has become of the data set since.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.data import builders, files
from rlhf_jax.types import InputError

PREFIX = "hub:"
_SPEC = re.compile(r"hub:(?P<name>[\w.\-]+(?:/[\w.\-]+)?)(?:@(?P<revision>[\w.\-/]+))?(?:\?(?P<options>[^?]*))?")


class _Name(NamedTuple):
    """The parts of a spec."""

    name: str
    revision: str | None
    config: str | None
    split: str


def find(spec: str) -> files.Origin:
    """The data set that "hub:NAME" names. It is looked for when its rows are read."""
    name = _parsed(spec)
    return files.Origin(f"data {spec!r}", "", lambda: _values(name, spec), store=Path(spec.replace(":", "/", 1)))


def _parsed(spec: str) -> _Name:
    match = _SPEC.fullmatch(spec)
    if not match or ".." in spec:
        raise InputError(f"data {spec!r}: expected hub:OWNER/NAME@REVISION?config=CONFIG&split=SPLIT, or less of it")
    options = {"config": None, "split": "train"}
    for option in filter(None, (match["options"] or "").split("&")):
        key, _, value = option.partition("=")
        if key not in options or not re.fullmatch(r"[\w.\-]+", value):
            raise InputError(f"data {spec!r}: expected, for instance, ?config=main&split=train, got {option!r}")
        options[key] = value
    return _Name(match["name"], match["revision"], options["config"], options["split"] or "train")


def _values(name: _Name, spec: str) -> files.Values:
    if importlib.util.find_spec("datasets") is None:
        raise InputError(f"data {spec!r}: data sets of the Hub need datasets; install the extra datasets, or: pip"
                         " install datasets")  # fmt: skip
    table = _load(name, spec).with_format("arrow")
    return files.batches_values(lambda: (batch for part in table.iter(1024) for batch in part.to_batches()),
                                f"data {spec!r}")  # fmt: skip


def _load(name: _Name, spec: str) -> Any:
    import datasets  # takes a second

    datasets.disable_progress_bars()
    try:
        with builders.quiet():
            return datasets.load_dataset(name.name, name.config, split=name.split, revision=name.revision)
    except Exception as error:  # of the network, the Hub, its cache, or the files: each has its own
        raise InputError(f"data {spec!r}: {_reason(error, name)}") from error


def _reason(error: Exception, name: _Name) -> str:
    """Why a data set cannot be read, in one line, with what to do."""
    said = " ".join(str(error).split())[:300]
    chain = [type(one).__name__ for one in _causes(error)]
    if "gated" in said:
        return f"it is gated: accept its terms at the Hub, and set HF_TOKEN ({said})"
    if "Config name is missing" in said or "BuilderConfig" in said:
        return f"name its configuration, as in hub:{name.name}?config=NAME ({said})"
    if "split" in said and isinstance(error, ValueError):
        return f"name its split, as in hub:{name.name}?split=NAME ({said})"
    if {"OfflineModeIsEnabled", "ConnectionError", "LocalEntryNotFoundError", "ConnectError"} & {*chain}:
        return f"it is not in the cache, and the Hub cannot be reached or is not to be (HF_HUB_OFFLINE) ({said})"
    return f"cannot be read from the Hub ({type(error).__name__}: {said})"


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
