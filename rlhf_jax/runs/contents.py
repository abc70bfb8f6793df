"""The files that a configuration names, and checksums that tell whether they are still what they were.

A string may name a file in many ways: `rows.jsonl`, `rows.jsonl[:90%]`, `template:TEMPLATES:PATH`, `a.jsonl=1,b.txt=2`.
The formats are not parsed here: whatever part of a string, between the characters that may stand around a path, is the
path of something that exists, or a pattern that files fit, counts. Of a model directory those files count that change
its tokens or its logits.
"""

import contextlib
import glob
import itertools
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlhf_jax.people import exchange
from rlhf_jax.types import InputError

Checksums = dict[str, str]  # of a path, by the name of each file below it; a path that is a file has the one name ""

_AROUND = re.compile(r"[:=,;|+*@?&\[\](){}\s]")  # what may stand before and behind a path in a string
_PATTERN = re.compile(r"[*?\[].*\.\w+\Z")  # in the pattern of several files, which has an ending
_HUB = r"(?<![\w./])hub:[\w.\-]+(?:/[\w.\-]+)?(?:@[\w.\-/]+)?(?:\?\w+=[\w.\-]+(?:&\w+=[\w.\-]+)*)?"
_TFDS = r"(?<![\w./])[A-Za-z]\w*(?:/[\w.\-]+)?(?::[\d.]+)?(?![\w./])"
_PEOPLE = re.compile(r"(?:^|,)people:([^?,=\[\]]*(?:\?(?:\w+=[^=&,\[\]]*&?)*)?)")  # and no weight
_MODEL = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_templates/*",
    "additional_chat_templates/*",
)  # in a model directory
_RECORDS = "*.array_record*"  # in the folder of a prepared TFDS data set
_SQLITE = b"SQLite format 3\0"  # at the head of a database
_BULKY = (".safetensors", ".gguf", ".array_record")  # in the names of files of which a sample is read beyond _WHOLE
_WHOLE = 2**24  # bytes up to which a bulky file is read whole
_MOST = 2**30  # bytes up to which any other one is: a quarter of a second
_WINDOWS, _WIDTH = 128, 2**16  # the sample: so many stretches of so many bytes each, the two ends among them
_MANY = 64  # files of one path, beyond which only the ends of the bulky ones are read


def paths(text: str) -> list[str]:
    """The parts of a string that are paths of what exists: the longest ones, in order.

    A folder counts if it is a model directory or its name has a separator: a bare word, such as the name of a preset,
    may happen to be a folder here.
    """
    bounds = [(0, 0), *((match.start(), match.end()) for match in _AROUND.finditer(text)), (len(text), len(text))]
    if len(bounds) > 200:  # prose
        return [text] if _exists(text) else []
    spans = [(start, end) for (_, start), (end, _) in itertools.combinations(bounds, 2) if start < end]
    taken: list[tuple[int, int]] = []
    for start, end in sorted(spans, key=lambda span: span[0] - span[1]):
        if all(end <= first or last <= start for first, last in taken) and _exists(text[start:end]):
            taken.append((start, end))
    return [text[start:end] for start, end in sorted(taken)]


def prepared(text: str, data_dir: Path | None) -> dict[str, Path]:
    """The data sets of TFDS and the Hub that a string names and that are prepared in `data_dir`, with their folders."""
    if data_dir is None:
        return {}
    names = re.findall(f"{_HUB}|{_TFDS}", text)
    folders = {name: data_dir / name.replace(":", "/") for name in names}
    return {name: folder for name, folder in folders.items() if os.path.isdir(folder)}


def checksums(path: str | Path) -> Checksums:
    """Checksums of a file, or of the files of a model directory or a folder of data, by their names below it.

    Most are of the whole content. Of weights and records beyond 16 MiB they are of the size and of 8 MiB spread over
    the file, so that a model of any size takes a fraction of a second. Files that cannot be read are left out: who
    needs them will say so. So is a database, which changes in use: what is read from it is compared.
    """
    path = Path(os.path.expanduser(path))
    if os.path.isfile(path):
        files = {"": path}
    elif _is_pattern(str(path)):
        files = {found: Path(found) for found in _fitting(str(path))}
    else:
        patterns = _MODEL if _is_model(path) else ("**/*",)
        below = {found for pattern in patterns for found in path.glob(pattern)}
        files = {str(found.relative_to(path)): found for found in below if _is_visible_file(found, path)}
    return _read(files)


def label_checksums(text: str) -> dict[str, Checksums]:
    """The checksums of what data sets "people:PATH?filter" read, by path; a new label changes the store's file."""
    found: dict[str, Checksums] = {}
    for spec in _PEOPLE.findall(text):
        path, _, wanted = spec.partition("?")
        with contextlib.suppress(InputError):  # who reads it will say so
            digest = exchange.digest(spec)
            found.setdefault(path, {})[wanted if path in found else ""] = digest
    return found


def record_checksums(folder: Path) -> Checksums:
    """Checksums of the records of a prepared TFDS data set."""
    return _read({str(found.relative_to(folder)): found for found in folder.rglob(_RECORDS) if found.is_file()})


def changes(old: Checksums, new: Checksums) -> list[str]:
    """The names of the files that are not the same in the two: changed, gone, or new."""
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def by_content(value: object, files: Mapping[str, Checksums]) -> str:
    """A setting with checksums in place of the paths in it: the same for the same files, wherever they lie."""
    if not files:
        return str(value)
    known = "|".join(map(re.escape, sorted(files, key=len, reverse=True)))
    return re.sub(known, lambda match: str(sorted(files[match[0]].items())), str(value))


def _counts(name: str) -> bool:
    path = os.path.expanduser(name)
    if len(name) > 4096 or not os.path.exists(path):
        return False
    is_named_as_path = os.sep in name and name.strip("./~")
    return os.path.isfile(path) or bool(is_named_as_path) or _is_model(Path(path))


def _exists(name: str) -> bool:
    return _counts(name) or _is_pattern(name)


def _is_pattern(name: str) -> bool:
    return len(name) <= 4096 and bool(_PATTERN.search(name)) and next(_fitting(name), None) is not None


def _fitting(pattern: str) -> Iterator[str]:
    """The files that fit a pattern."""
    return filter(os.path.isfile, glob.iglob(os.path.expanduser(pattern), recursive=True))


def _is_model(path: Path) -> bool:
    return os.path.isdir(path) and any(path.glob("*.safetensors"))


def _is_database(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(_SQLITE)) == _SQLITE
    except OSError:
        return False


def _is_visible_file(file: Path, top: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(top).parts)


def _read(files: Mapping[str, Path]) -> Checksums:
    windows = _WINDOWS if len(files) <= _MANY else 2
    found = {}
    for name, path in files.items():
        if _is_database(path):
            continue
        try:
            found[name] = _checksum(path, windows)
        except OSError:
            continue
    return dict(sorted(found.items()))


def _checksum(path: Path, windows: int) -> str:
    """The CRC-32 of a file's content, or of its size and of so many stretches of it if it is large."""
    most = _WHOLE if any(part in path.name for part in _BULKY) else _MOST
    with path.open("rb") as file:
        size, checksum = os.fstat(file.fileno()).st_size, 0
        if size <= most:
            while block := file.read(2**20):
                checksum = zlib.crc32(block, checksum)
        else:
            for offset in _offsets(size, windows):
                file.seek(offset)
                checksum = zlib.crc32(file.read(_WIDTH), checksum)
    return f"{checksum:08x}-{size}"


def _offsets(size: int, windows: int) -> Iterator[int]:
    """Where the stretches that are read begin: evenly spread, the first and the last at the ends."""
    return (n * (size - _WIDTH) // (windows - 1) for n in range(windows))
