"""How rows are stored: TFDS builders for local files and for the embedded world, and any TFDS data set by its name.

Builders store a checked row as one string, because a prompt is a string or a list and TFDS features hold no unions. It
is msgpack, which is written and read several times as fast as JSON. They write ArrayRecord, keep the order of the rows,
hold none of them in memory, and need no TensorFlow. What is stored is found again by what it was made of: the content
of the file, or the parameters and the code of the world.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import itertools
import logging
import os
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgpack
import requests
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from tensorflow_datasets.proto import tf_example_pb2

from rlhf_jax.data import records as records_lib
from rlhf_jax.data.rows import Kind, Row, Rows
from rlhf_jax.devices import hosts, progress
from rlhf_jax.types import InputError

SHARD = 2**28  # bytes of a file of rows, about
GROUP = 16  # rows that are read together


def _unnamed(folder: str, shard: int) -> Path:
    """The file of a shard before it is known how many there are, which is a part of their names."""
    return Path(folder) / f"{shard:05}.rows"


class _OwnInfo(tfds.core.DatasetInfo):
    """The facts of rows that are made here alone."""

    def initialize_from_bucket(self) -> None:
        """Do nothing: TFDS would leave an empty temporary folder behind, and find nothing in its bucket."""


class Builder(tfds.core.dataset_builder.FileReaderBuilder):
    """Store the rows that `rows` yields, in their order. A further reader is a subclass with `rows` and a config.

    Each row comes with its place in the source, such as "line 3", by which errors name it.

    What `rows` puts into `self.info.metadata`, as {what: how many}, is stored too, and printed whenever they are read.
    """

    VERSION = tfds.core.Version("1.3.0")  # raise it when the rows change though the config does not

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Places and canonical rows, as `check` returns them; InputError on a bad one."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"row": tfds.features.Text(), "place": tfds.features.Text()})
        counts = tfds.core.MetadataDict()
        return _OwnInfo(builder=self, features=features, disable_shuffling=True, metadata=counts)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        """Write the rows as they come: TFDS's own way holds all of them in memory, to put them in order."""
        split = self.builder_config.split
        template = self._get_filename_template(split_name=split)
        shards: list[tuple[int, int]] = []  # rows and bytes of each
        records = self._records()
        for first in records:
            partial = _unnamed(self.data_dir, len(shards))
            shards.append(records_lib.write(partial, itertools.chain([first], records), GROUP, SHARD))
        if not shards:
            raise ValueError("no rows")
        for n in range(len(shards)):
            path = template.sharded_filepath(shard_index=n, num_shards=len(shards))
            os.rename(_unnamed(self.data_dir, n), path)
        lengths, sizes = zip(*shards, strict=True)
        info = tfds.core.SplitInfo(
            name=split, shard_lengths=list(lengths), num_bytes=sum(sizes), filename_template=template
        )
        self.info.set_splits(tfds.core.splits.SplitDict([info]))

    def _records(self) -> Iterator[bytes]:
        """Yield the rows as TFDS stores them."""
        with progress.bar(None, what="reading", unit="row", delay=10.0) as shown:
            for place, row in self.rows():
                # Another one for each row: a message keeps the memory of all values that it ever had.
                example = tf_example_pb2.Example()
                for name, value in (("place", place.encode()), ("row", msgpack.packb(row))):
                    example.features.feature[name].bytes_list.value.append(value)
                yield example.SerializeToString(deterministic=True)
                shown.update()


@dataclasses.dataclass(eq=False)
class Config(tfds.core.BuilderConfig):
    """Everything that the rows depend on, spelled in `name` too. A data set has one split, so no other is prepared."""

    kind: Kind = "text"
    split: str = "train"


def place(title: object, where: str) -> str:
    """The place in a source, without the name of the source."""
    return where.removeprefix(f"{title}, ")


def file_path(name: str) -> Path:
    """The path that a data spec names, in UTF-8, whatever the locale."""
    return Path(os.fsdecode(name.encode("utf-8", "surrogateescape")))


def file_digest(path: Path) -> str:
    """The hash that names the content of a file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; name one that there is, or first run the experiment that writes it")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:24]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def stored(make: Callable[[], Builder], where: str, split: str) -> Rows:
    """The rows of a builder, prepared first if need be."""
    builder, records = open_records(make, where, split)
    counts = dict(builder.info.metadata or {})
    if counts:
        print(f"{where}: {'; '.join(f'{n} {what}' for what, n in counts.items())}")
    return Rows(
        records,
        lambda record, _: msgpack.unpackb(_value(record, "row")),
        counts,
        derived_folder(builder, split),
        lambda record, _: f"{where}, {_value(record, 'place').decode()}",
    )


def _value(record: bytes, name: str) -> bytes:
    """The value of a field of a record of ours; TFDS's own decoder takes ten times as long."""
    return tf_example_pb2.Example.FromString(record).features.feature[name].bytes_list.value[0]


def _bytes_of(builder: Builder, split: str) -> records_lib.Records:
    """The records of a split, as they are stored."""
    files = tfds.core.splits.SplitDict(builder.info.splits.values())[split].file_instructions
    return records_lib.Records([records_lib.Span(Path(file.filename), file.skip, file.take) for file in files])


def derived_folder(builder: tfds.core.DatasetBuilder, split: str) -> Path:
    return Path(builder.data_dir) / "derived" / split


# -- TFDS --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what TFDS prints while it prepares a data set."""
    tfds.disable_progress_bar()
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logging.set_verbosity(verbosity)


CONNECT = 5  # seconds, for each address of a host


@contextlib.contextmanager
def _fetching(builder: tfds.core.DatasetBuilder, where: str) -> Iterator[None]:
    """Announce the download of a published data set, and give up soon on hosts that cannot be reached.

    TFDS alone retries each connection ten times, over minutes, without a timeout. Reads keep its retries, and have no
    timeout.
    """
    if isinstance(builder, Builder):
        yield
        return
    if hosts.first():
        names = sorted({urllib.parse.urlsplit(url).hostname or url for url in builder.url_infos or ()})
        origin = f" from {', '.join(names)}" if names else ""
        print(f"{where}: fetching it{origin} into {builder.data_dir}", file=sys.stderr, flush=True)
    send = requests.adapters.HTTPAdapter.send

    def send_soon(self: Any, request: Any, *args: Any, **options: Any) -> Any:
        self.max_retries = self.max_retries.new(connect=1)
        if options.get("timeout") is None and not args:
            options["timeout"] = (CONNECT, None)
        return send(self, request, *args, **options)

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # each retry is a warning
    with mock.patch.object(requests.adapters.HTTPAdapter, "send", send_soon):
        yield


def disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or its cause, is a full disk or quota; ArrayRecord tells only in its message."""
    full = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT)}
    while error is not None:
        if getattr(error, "errno", None) in full or any(words in str(error) for words in full.values()):
            return True
        error = error.__cause__ or error.__context__
    return False


def full_disk(where: str | Path) -> OSError:
    """An error which says that there is no space left at a place."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(where))


def open_records(
    make: Callable[[], tfds.core.DatasetBuilder], where: str, split: str
) -> tuple[tfds.core.DatasetBuilder, Any]:
    """A builder and the records of a split, prepared first if need be. Records of our own builders are bytes.

    TFDS puts them in their place only when complete.
    """
    with hosts.first_before_others(), quiet():
        builder = make()
        if not builder.is_prepared():
            try:
                with _fetching(builder, where):
                    builder.download_and_prepare(file_format="array_record")
            except InputError:
                raise
            except Exception as error:
                if disk_is_full(error):
                    raise full_disk(builder.data_dir) from error
                # Another process may have been quicker with the same data.
                if not (builder := make()).is_prepared():
                    cause = str(error).strip().partition("\n")[0]
                    hint = f": prepare it elsewhere, as array_record, and copy it to {builder.data_dir}"
                    raise InputError(
                        f"{where}: cannot be prepared ({type(error).__name__}: {cause})"
                        + hint * (not isinstance(builder, Builder))
                    ) from error
        try:
            records = _bytes_of(builder, split) if isinstance(builder, Builder) else builder.as_data_source(split)
            if not len(records):
                raise ValueError("an empty slice")
        except NotImplementedError as error:
            raise InputError(
                f"{where}: {builder.data_dir} holds it in a format without random access;"
                " delete it or choose another data directory"
            ) from error
        except (ValueError, KeyError) as error:
            known = ", ".join(f"{name} ({one.num_examples} rows)" for name, one in builder.info.splits.items())
            raise InputError(
                f"{where}: no rows in split {split!r}; there are {known}: name another split, or add rows"
            ) from error
    return builder, records
