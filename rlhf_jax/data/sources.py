"""Where rows come from: the embedded world, files, published formats, data sets of the Hub or of TFDS, mixtures."""

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds

from rlhf_jax.data import builders, files, formats, json_lines, mixtures
from rlhf_jax.data import world as world_lib
from rlhf_jax.data.rows import Kind, Row, Rows, check
from rlhf_jax.data.world import labelers
from rlhf_jax.data.world import steps as world_steps
from rlhf_jax.data.world import tasks as world_tasks
from rlhf_jax.people import exchange
from rlhf_jax.types import InputError

HELD_OUT = 256  # rows of the world's held-out split, unless the user says otherwise


def rows(spec: str, kind: Kind, *, data_dir: str | Path, split: str = "train") -> Rows:
    """The rows that `spec` names, prepared under `data_dir` on first use.

    `spec` is one of

    - "world" or, for instance, "world:seed=3,rows=1000": the embedded world, with splits "train" and "held_out"; rows
      of kind "examples" or "records" are those of one of its tasks, "world:task=plus", of which there may be fewer;
    - the path of a file of rows, such as "rows.jsonl" or "rows.parquet", or a pattern of several, "data/*.jsonl.gz":
      `files` lists the endings. It has the one split "train";
    - "hub:OWNER/NAME" or, for instance, "hub:OWNER/NAME@v2?config=main&split=test": a data set of the Hub (`hub`);
    - "people:PATH" or, for instance, "people:PATH?person=ann&round=2": the labels that people gave on the pages of
      `rlhf_jax.people`, with that filter (`people.exchange.Filter`);
    - a published format and any file, pattern or data set of the Hub in it, such as "hh:train.jsonl.gz" or
      "nectar:hub:berkeley-nest/Nectar": `formats` lists them;
    - the name of a TFDS data set, such as "imdb_reviews" or "glue/sst2", with the field to read where it has several
      of text and none named "text": "glue/mrpc:sentence1".

    each with a slice of TFDS behind it where only some of the rows are meant: "hh:train.jsonl.gz[:90%]"; or several of
    these with commas between them, with weights for a mixture: "hh:a.jsonl=0.7,b.parquet=0.3" (`mixtures`).

    `split` may have such a slice itself: "train[:90%]". Raises InputError, and leaves nothing prepared, on a bad row.
    """
    if mixtures.is_several(spec):
        base, _, part = split.partition("[")
        return mixtures.rows(
            spec,
            part and f"[{part}",
            lambda one: rows(one, kind, data_dir=data_dir, split=_split(one, base)),
            Path(data_dir),
        )
    if sliced := re.fullmatch(r"(.+)(\[[^\[\]]*\])", spec):
        spec, part = sliced.groups()
        if "[" in split:
            raise InputError(f"data {spec + part!r}: rows of {split!r} are a slice already, and have no further one")
        split += part
    name, _, rest = spec.partition(":")
    if is_world(spec):
        return _world(spec, kind, Path(data_dir), split)
    if name == "people":
        return _people(rest, kind, Path(data_dir), split)
    if formats.reads(spec):
        return formats.source(spec, kind, Path(data_dir), split)
    if name == "hub" or files.is_named(spec):
        return _plain_rows(formats.find(spec), kind, Path(data_dir), split)
    return _published(spec, kind, Path(data_dir), split)


def held_out(spec: str | None, data: str, kind: Kind, *, data_dir: str | Path) -> Rows | None:
    """The rows that `spec` names, to evaluate what is trained on `data`; of the world they are of its held-out split.

    Where `spec` is None they are HELD_OUT rows of the world if `data` is the world, too. Else there are none: None.
    """
    if spec is None:
        if mixtures.is_several(data) or not is_world(data):
            return None
        of = _world_options(data.partition("[")[0])
        spec = f"world:seed={of.seed},rows={HELD_OUT}" + (f",task={of.task}" if of.task else "")
    several = mixtures.is_several(spec)
    return rows(spec, kind, data_dir=data_dir, split="held_out" if several else _split(spec, "held_out"))


def _split(spec: str, split: str) -> str:
    """The split of one source that is meant by `split`: only worlds have a held-out one."""
    return split if is_world(spec) else "train"


@dataclasses.dataclass(eq=False)
class PlainConfig(builders.Config):
    """`name` holds the hash of the content of files; what is prepared of the Hub is in a folder of its own."""

    origin: files.Origin | None = None


class PlainRows(builders.Builder):
    """Rows of files, or of a data set of the Hub, that are of a kind as they are."""

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield the row of each line, of each row of a table, or of each document."""
        origin, kind = self.builder_config.origin, self.builder_config.kind
        empty = True
        for where, value in origin.values():
            empty = False
            yield builders.place(origin.title, where), check(kind, value, where)
        if empty:
            raise InputError(f"{origin.title}: expected rows of {kind}, got an empty file")


def _plain_rows(origin: files.Origin, kind: Kind, data_dir: Path, split: str) -> Rows:
    for path in origin.paths:
        if json_lines.uncompressed(path).endswith(".txt") and kind != "text":
            raise InputError(f"{path}: {kind} are read from a .jsonl file, a .txt file holds documents alone")
    endings = {Path(json_lines.uncompressed(path)).suffix for path in origin.paths}
    config = PlainConfig(name="-".join(filter(None, [kind + "".join(sorted(endings)), origin.digest])), kind=kind,
                         origin=origin)  # fmt: skip
    return builders.stored(lambda: PlainRows(config=config, data_dir=data_dir / origin.store), origin.title, split)


@dataclasses.dataclass(eq=False)
class PeopleConfig(builders.Config):
    """`name` holds the hash of what is read."""

    spec: str = ""  # path and filter


class People(builders.Builder):
    """Labels of people, out of their store."""

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield the rows of the labels that the filter selects, and count those of other kinds."""
        config, others, empty = self.builder_config, 0, True
        for kind, place, row in exchange.learnt(*exchange.split(config.spec)):
            if config.kind in (kind, "prompts"):
                empty = False
                yield place, check(config.kind, row, f"people:{config.spec}, {place}")
            else:
                others += 1
        if empty:
            raise InputError(f"people:{config.spec}: expected {config.kind}, got {others} labels of other kinds")
        self.info.metadata.update({f"rows left out, which are no {config.kind}": others} if others else {})


def _people(spec: str, kind: Kind, data_dir: Path, split: str) -> Rows:
    given = ("rankings", "demonstrations", "prompts", "thumbs")
    if kind not in given:
        raise InputError(f"data 'people:{spec}': people give {', '.join(given)}, no {kind}")
    name = f"{kind}-{exchange.digest(spec)}"
    config = PeopleConfig(name=name, kind=kind, spec=spec)
    return builders.stored(lambda: People(config=config, data_dir=data_dir), f"people:{spec}", split)


@dataclasses.dataclass(eq=False)
class WorldConfig(builders.Config):
    """The sample of a world that a data set holds."""

    seed: int = 0  # of the world
    n_rows: int = 10_000
    task: str = ""  # of which rows of kind "examples" or "records" are


class AssistantWorld(builders.Builder):
    """Rows that the embedded world generates; no two kinds or splits are the same sample of it."""

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield a sample of the world."""
        config = self.builder_config
        world, n, held_out = world_lib.World.generate(config.seed), config.n_rows, config.split == "held_out"
        samples: dict[Kind, Callable[[], Iterator[Row]]] = {
            "text": lambda: ({"text": text} for text in world.corpus(n, seed=int(held_out))),
            "demonstrations": lambda: world.demonstrations(n, seed=2 + held_out),
            # By the same people, whichever the split.
            "rankings": lambda: labelers.rankings(world, n, seed=4, held_out=held_out),
            "thumbs": lambda: map(_thumb, itertools.count(), _judged(world, n, held_out)),
            "prompts": lambda: world.prompt_rows(n, seed=5, held_out=held_out),
            "steps": lambda: map(world_steps.to_first_fault, world_steps.rows(world, n, seed=7, held_out=held_out)),
            "examples": lambda: world_tasks.rows(world, config.task, n, held_out),
            "records": lambda: world_tasks.rows(world, config.task, n, held_out),
        }
        rows = samples[config.kind]()
        for number, row in enumerate(rows):
            yield f"row {number}", check(config.kind, row, f"world, row {number}")


def _judged(world: world_lib.World, n: int, held_out: bool) -> Iterator[Row]:
    """Other rankings than those of kind "rankings", by the same people."""
    return labelers.rankings(world, n, seed=6, people=labelers.labelers(4), held_out=held_out)


def _thumb(number: int, ranking: Row) -> Row:
    """One of the best responses of a ranking, which is good, or one of the worst, in turn."""
    label = number % 2 == 0
    pick = (min if label else max)(range(len(ranking["ranks"])), key=ranking["ranks"].__getitem__)
    return {"prompt": ranking["prompt"], "completion": ranking["responses"][pick], "label": label}


def is_world(spec: str) -> bool:
    """Whether a spec of one source names the embedded world."""
    return re.split(r"[:\[]", spec)[0] == "world"


class _WorldOptions(NamedTuple):
    """The options in the spec of a world."""

    seed: int = 0
    rows: int = 10_000
    task: str = ""


def _world_options(spec: str) -> _WorldOptions:
    """The options in the spec of a world, with defaults for those that it leaves out."""
    options = _WorldOptions()
    for option in filter(None, spec.partition(":")[2].split(",")):
        name, _, value = option.partition("=")
        if name == "task":
            try:
                world_tasks.find(value)
            except InputError as error:
                raise InputError(f"data {spec!r}: {error}") from error
            options = options._replace(task=value)
        elif name == "seed" and value.isdecimal():
            options = options._replace(seed=int(value))
        elif name == "rows" and value.isdecimal():
            options = options._replace(rows=int(value))
        else:
            raise InputError(f"data {spec!r}: expected, for instance, world:seed=3,rows=1000, got {option!r}")
    if options.rows < 1:
        raise InputError(f"data {spec!r}: expected at least 1 row")
    return options


def _world(spec: str, kind: Kind, data_dir: Path, split: str) -> Rows:
    options = _world_options(spec)
    base = split.partition("[")[0]
    if base not in ("train", "held_out"):
        raise InputError(f"data {spec!r}: no rows in split {split!r}; there are train, held_out")
    asks = kind in ("examples", "records")
    if asks and not options.task:
        raise InputError(
            f"data {spec!r}: {kind} are of a task: name one, as in world:task={next(iter(world_tasks.MAKERS))}"
        )
    if options.task and not asks:
        raise InputError(f"data {spec!r}: a task has examples, and no {kind}: leave task={options.task} out")
    code = b"".join(path.read_bytes() for path in sorted(Path(world_lib.__file__).parent.glob("*.py")))
    digest = hashlib.sha256(code).hexdigest()[:12]
    of_task = f"-{options.task}" if options.task else ""
    config = WorldConfig(
        name=f"{kind}{of_task}-seed{options.seed}-{options.rows}-{base}-{digest}",
        kind=kind,
        seed=options.seed,
        n_rows=options.rows,
        task=options.task,
        split=base,
    )
    return builders.stored(lambda: AssistantWorld(config=config, data_dir=data_dir), f"data {spec!r}", split)


def _published(spec: str, kind: Kind, data_dir: Path, split: str) -> Rows:
    name, field = spec, None
    if match := re.fullmatch(r"(.+):([A-Za-z_]\w*)", spec):  # a version, name:1.0.0, starts with a digit
        name, field = match.groups()
    make = _find(name, spec, data_dir)
    features = make().info.features
    if not isinstance(features, tfds.features.FeaturesDict):
        raise InputError(f"data {spec!r}: its rows have no named fields")
    strings = sorted(key for key, x in features.items() if x.shape == () and x.np_dtype == np.object_)
    if kind in ("text", "prompts"):
        field = field or ("text" if "text" in strings else strings[0] if len(strings) == 1 else None)
        if field not in strings:
            raise InputError(f"data {spec!r}: name the text field, as in {name}:{(strings or ['field'])[0]};"
                             f" there are {', '.join(strings) or 'none'}")  # fmt: skip
        target = {"text": "text", "prompts": "prompt"}[kind]

    def where_of(_: dict[str, Any], index: int) -> str:
        return f"data {spec!r}, split {split}, row {index}"

    def to_row(record: dict[str, Any], index: int) -> Row:
        where = where_of(record, index)
        try:
            row = {target: record[field].decode()} if field else {key: _plain(x) for key, x in record.items()}
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: expected UTF-8, got bytes that are not") from error
        # An empty text is no mistake of the user's here: the pipelines refuse and count it.
        return row if row == {"text": ""} else check(kind, row, where)

    builder, records = builders.open_records(make, f"data {spec!r}", split)
    return Rows(records, to_row, {}, builders.derived_folder(builder, split) / (field or ""), where_of)


def _find(name: str, spec: str, data_dir: Path) -> Callable[[], tfds.core.DatasetBuilder]:
    @builders.quiet()  # TFDS prints a banner where there is no TensorFlow
    def make() -> tfds.core.DatasetBuilder:
        try:
            return tfds.builder(name, data_dir=data_dir)
        except ModuleNotFoundError:
            # Of TensorFlow, some builders want nothing but the names of types, which NumPy has too.
            module = tfds.builder_cls(re.split("[/:]", name)[0]).__module__
            with mock.patch.object(sys.modules[module], "tf", np, create=True):
                return tfds.builder(name, data_dir=data_dir)

    if not re.fullmatch(r"\w+(/[\w.\-]+)?(:[\d.]+)?", name):
        raise InputError(
            f"data {spec!r}: expected world, hub:NAME, a TFDS name, or a path that ends in {files.ENDINGS_TEXT};"
            f" or a published format and a path, as in hh:PATH; the formats are {', '.join(formats.NAMES)}"
        )
    try:
        with builders.quiet():
            try:
                make()
            except tfds.core.registered.DatasetNotFoundError:
                # Without TensorFlow TFDS gives up before it has imported these, where glue and others are.
                for module in ("text", "question_answering", "summarization", "translate", "structured"):
                    with contextlib.suppress(ImportError):
                        importlib.import_module(f"tensorflow_datasets.{module}")
                make()
    except tfds.core.registered.DatasetNotFoundError as error:
        raise InputError(
            f"data {spec!r}: neither world nor a known TFDS name, nor does it end in {files.ENDINGS_TEXT}"
        ) from error
    except (ModuleNotFoundError, AttributeError) as error:
        raise InputError(f"data {spec!r}: TFDS needs TensorFlow for it; pip install tensorflow") from error
    except ValueError as error:
        raise InputError(f"data {spec!r}: {str(error).strip().partition(chr(10))[0]}") from error
    return make


def _plain(value: Any) -> Any:
    """A decoded TFDS feature as JSON would have it: text, numbers, lists, and a list of objects for columns."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        columns = {key: _plain(column) for key, column in value.items()}
        if columns and all(isinstance(column, list) for column in columns.values()):
            return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
        return columns
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(x) for x in value]
    return value
