"""Names of models on the Hugging Face Hub in place of paths: `EleutherAI/pythia-1b`, or with `@revision`.

A path is a name of the Hub if it looks like one and its first part is no folder here. `owner/name/FILE.gguf`, or
`owner/name@revision/FILE.gguf`, is one GGUF file of a repository. The Hub's own client fetches what is named into its
own cache, so that HF_HOME, HF_ENDPOINT (a mirror), HF_TOKEN and HF_HUB_OFFLINE mean what they mean elsewhere. A name is
looked up once in a process: what it stands for stays the same, also where the branch moves on meanwhile.
"""

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from rlhf_jax.errors import InputError

_PART = r"[A-Za-z0-9][\w.\-]*"
_NAME = re.compile(
    rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>refs/pr/\d+|[\w.\-]+))?(?:/(?P<file>.+\.gguf))?", re.ASCII
)
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "vocab*", "merges.txt")
_UNWANTED = ("*.fp16.safetensors", "consolidated*", "original/*", "onnx/*", "*checkpoint-*/*", "openvino/*")


def is_name(path: str | Path) -> bool:
    """Whether a path is a name of the Hub, and no path of this machine: nothing is looked up there."""
    match = _NAME.fullmatch(str(path))
    return match is not None and not os.path.lexists(path) and not os.path.lexists(str(path).partition("/")[0])


def local(path: str | Path) -> Path:
    """Where a model is on this machine: the path itself, or what a name of the Hub stands for, fetched if need be.

    Raises InputError where there is no such repository, revision or file, or none that may be read or reached.
    """
    return _fetch(str(path)) if is_name(path) else Path(path)


def commit(path: str | Path) -> str:
    """The commit that a name of the Hub stands for; the model is fetched if need be."""
    parts = local(path).parts
    return parts[parts.index("snapshots") + 1]


@functools.cache
def _fetch(name: str) -> Path:
    import huggingface_hub  # here, because most models are directories

    match = _NAME.fullmatch(name)
    assert match is not None
    repository, revision, file = match["repository"], match["revision"], match["file"]
    with _reaching(name, repository, revision, file):
        if file:
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
        folder = Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[*_WANTED],
                ignore_patterns=[*_UNWANTED],
            )
        )
    _check(name, folder)
    return folder


@contextlib.contextmanager
def _reaching(name: str, repository: str, revision: str | None, file: str | None) -> Iterator[None]:
    """Makes an InputError, with what to do, of the client's errors; those of this machine's disk stay."""
    from huggingface_hub import constants, errors

    where, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    when = "without HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "with a network"
    try:
        yield
    except errors.GatedRepoError as error:
        advice = f"accept its terms at {where}/{repository}, then log in with `hf auth login` or set HF_TOKEN"
        raise InputError(f"{name} is gated: {advice}") from error
    except errors.RepositoryNotFoundError as error:
        what = f"{name} is no path here, and {where} has no such repository, or none that you may read"
        raise InputError(f"{what}: correct it; a private one needs `hf auth login` or HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{name}: {repository} has no revision {revision} at {where}: name another") from error
    except errors.RemoteEntryNotFoundError as error:
        raise InputError(f"{name}: {repository} has no file {file} at {where}: name another") from error
    except errors.LocalEntryNotFoundError as error:
        if hasattr(error, "snapshot_path"):  # it is there in part
            what, advice = f"{name} is half downloaded to {error.snapshot_path}", f"run again {when} to complete it"
        else:
            what, advice = f"{name} is no path here, nor in {cache}", f"correct it, or run again {when}"
        raise InputError(f"{what}, and {_why(error)}: {advice}") from error
    except errors.HFValidationError as error:
        raise InputError(f"{name} is neither a path here nor a name of the Hub: {_line(error)}") from error
    except (errors.HTTPError, errors.OfflineModeIsEnabled) as error:  # of any status, or a connection that broke
        raise InputError(f"{name} cannot be fetched: {_why(error)}; run again, and it goes on from there") from error


def _why(error: BaseException) -> str:
    """Why something could not be fetched: the first cause."""
    from huggingface_hub import constants

    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} gives {_line(error)}"
    return reason


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")


def _check(name: str, folder: Path) -> None:
    """Raises InputError for a snapshot that is no model, or that an earlier client fetched in part only."""
    index = folder / "model.safetensors.index.json"
    needed = ["config.json", "model.safetensors"]
    if index.exists():
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):  # the reader tells of those
            needed = ["config.json", *sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})]
    if any((folder.parents[1] / "blobs").glob("*.incomplete")):
        needed.append("tokenizer.json")
    absent = [each for each in needed if not (folder / each).exists()]
    if absent:
        more = f" and {len(absent) - 1} more" if absent[1:] else ""
        what = f"{name} is half downloaded, or no model in safetensors: {folder} lacks {absent[0]}{more}"
        advice = f"delete that folder and run again with a network, or name a GGUF file of it as {name}/FILE.gguf"
        raise InputError(f"{what}; {advice}")
