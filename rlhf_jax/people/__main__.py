"""Serves the pages on which people rank, rate, compare and write, and moves labels in and out of their store.

scripts/people.sh                                            the quickstart's model and the world's prompts
scripts/people.sh --responses answers.jsonl                  no model: {"prompt", "responses"} a line
scripts/people.sh --model runs/a/model runs/b/model --data prompts.jsonl --k 4
scripts/people.sh --task arena --model runs/a/model runs/b/model --data prompts.jsonl
scripts/people.sh --chat http://127.0.0.1:8001               people talk to the models of an OpenAI-compatible server
scripts/people.sh --task demonstrate --data prompts.jsonl     no model: people write the answers
scripts/people.sh invite --db runs/people/people.db --name ann --role administrator
scripts/people.sh export --db runs/people/people.db --out labels.jsonl
scripts/people.sh import --db runs/people/people.db --responses more.jsonl
"""

import asyncio
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import re
import signal
import socket
import sqlite3
import sys
import threading
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro
import uvicorn

from rlhf_jax import hub
from rlhf_jax.errors import InputError
from rlhf_jax.people import (
    access,
    arena,
    beside,
    chat,
    endpoint,
    exchange,
    forms,
    frame,
    guidelines,
    network,
    record,
    server,
)
from rlhf_jax.people.beside import Program
from rlhf_jax.people.items import Item
from rlhf_jax.people.network import listening
from rlhf_jax.people.record import Sampling
from rlhf_jax.people.store import Store
from rlhf_jax.settings import Count, Seed, Settings, Share, Whole, with_lines

QUICKSTART = Path("runs/quickstart/sft/model")


@dataclasses.dataclass(frozen=True)
class Tasks(Settings):
    """The questions to people: where they come from, and how many there are."""

    responses: Path | None = None  # file of {"prompt", "responses": [K]} to ask about; needs no model
    task: forms.Task | None = None  # asked of rows that name none; without it, rank, or demonstrate if no responses
    overlap: Count = 1  # people who answer the same item
    overlap_share: Share = 1.0  # of the items, that so many answer; the others have one

    def items(self) -> list[Item]:
        """The items of the file, all of which have been checked."""
        if self.responses is None:
            return []
        if not self.responses.is_file():
            raise InputError(f"--responses {self.responses}: no such file")
        return list(exchange.read_items(self.responses, self.task, exchange.Overlap(self.overlap, self.overlap_share)))


@dataclasses.dataclass(frozen=True)
class Serve(Tasks):
    """The settings of the server."""

    db: Path = Path("runs/people/people.db")  # the store, which is created if it is not there
    model: tuple[Path, ...] = ()  # model directories that answer the prompts, in a process of their own
    # Prompts, as in every experiment; None: the world's. Models answer them, or people do (--task demonstrate).
    data: str | None = None
    prompts: Whole | None = None  # number of prompts; None: 200, of a file that people answer all; 0: none
    # Answers to a prompt, over all models; None: 2 to compare, otherwise 4. In an arena each model answers once.
    k: Count | None = None
    pairs: Count = 1  # of models that meet over a prompt of an arena; all pairs meet equally often
    seed: Seed = 0  # of sampling
    # Markdown file that people acknowledge before they begin; None: as before, or what a good answer to the world's is.
    guidelines: Path | None = None
    # Ratings that each answer needs before the ranking; None: as before; at first all, or overall where no model, data
    # or responses are named.
    ratings: forms.Ratings | None = None
    administrator: str = "administrator"  # name of the one whose link is printed
    host: str = "127.0.0.1"  # address to listen at
    port: network.Port = 8000  # port to listen at; 0: any that is free
    chat: str = ""  # address of a server of the OpenAI protocol, whose models people talk to (its key: PEOPLE_CHAT_KEY)
    talk: bool = True  # without --chat, people talk to the models that answer the prompts, or to the quickstart's
    behind_proxy: bool = False  # a reverse proxy on this machine serves https and hands requests on
    certificate: Path | None = None  # PEM file of a certificate, to serve https
    key: Path | None = None  # PEM file of its private key, unless it is in the same file

    def __post_init__(self) -> None:
        super().__post_init__()
        protected = self.behind_proxy or self.certificate is not None
        network.check_host(self.host, protected, "links and answers", "docs/people.md", 8000)
        for name in ("certificate", "key", "guidelines"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise InputError(f"--{name} {path}: no such file")
        address = urllib.parse.urlsplit(self.chat)
        if self.chat and (address.scheme not in ("http", "https") or not address.hostname):
            raise InputError(f"--chat {self.chat}: expected an address such as http://127.0.0.1:8001")
        if self.task == "chat" and self.responses is None:
            raise InputError(
                "--task chat: no model answers before people talk to it: give topics by --responses FILE.jsonl, or add"
                " conversations on the administrator's page"
            )
        if self.task == "thumb" and self.responses is None:
            raise InputError(
                "--task thumb: give the answers by --responses FILE.jsonl; those of models are judged on the chat page"
            )


@dataclasses.dataclass(frozen=True)
class Import(Tasks):
    """The settings of an import."""

    db: Path = Path("runs/people/people.db")  # the store, which is created if it is not there


@dataclasses.dataclass(frozen=True)
class Invite(Settings):
    """The settings of an invitation."""

    name: str  # of the person, who gets a new link if they are there already
    role: access.Role = "labeler"
    db: Path = Path("runs/people/people.db")  # the store
    url: str = "http://127.0.0.1:8000"  # address at which people reach the server


@dataclasses.dataclass(frozen=True)
class Export(Settings):
    """The settings of an export."""

    db: Path = Path("runs/people/people.db")  # the store
    out: Path = Path("labels.jsonl")  # file to write
    filter: str = ""  # labels to write, as in "person=ann&round=2"; all that count if it is empty


def serve(cfg: Serve) -> None:
    """Serve the pages until control-C."""
    items = [*cfg.items(), *_to_write(cfg)]
    try:
        cfg.db.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--db {cfg.db}: its folder cannot be made ({error.strerror})") from error
    with Store(cfg.db) as store, listening(cfg.host, cfg.port) as listener:
        is_new = not store.has_items()
        added, present = store.add(items)
        if items:
            print(f"{cfg.responses or cfg.data}: {_told(items, added, present)}")
        wanted = _sampling(cfg, store)
        if cfg.guidelines:
            guidelines.add(store, _text(cfg.guidelines))
        elif wanted:
            guidelines.begin(store, wanted.data)
        first_look = is_new and wanted is not None and not (cfg.model or cfg.data or cfg.responses)
        if ratings := cfg.ratings or ("overall" if first_look else None):
            store.set_rules(dataclasses.replace(store.rules(), ratings=ratings))
        url = network.url("https" if cfg.certificate else "http", cfg.host, listener)
        token = access.invite(store, cfg.administrator, "administrator", replaces=False)
        print(f"administrator: {url}/enter#{token}")
        print(_next_step(cfg, store, wanted), flush=True)
        address, talking = _talking(cfg)
        with beside.running(programs := [*_answering(cfg, store, wanted), *talking]):
            key = os.environ.get("PEOPLE_CHAT_KEY", "")
            gone = (lambda: talking[0].failed) if talking else (lambda: "")
            parts = [chat.part(endpoint.Endpoint(address, key, gone=gone))] if address else []
            try:
                _run(cfg, store, listener, [functools.partial(_noted, programs), *parts])
            finally:
                print(_stored(store), flush=True)


def _stored(store: Store) -> str:
    """The last line: how many labels the store has."""
    with store.reader() as db:
        (labels,) = db.execute("SELECT COALESCE(SUM(labels - skipped), 0) FROM tallies").fetchone()
    return f"{store.path}: {labels} {'label is' if labels == 1 else 'labels are'} stored"


def _next_step(cfg: Serve, store: Store, wanted: Sampling | None) -> str:
    """The line that stands below the link."""
    said = "open it and press Label"
    if wanted and wanted.model:
        said += "; the models answer the prompts meanwhile, and the first tasks come in about a minute"
    asked = {"all": "four ratings of each answer", "overall": "a rating of each answer"}.get(store.rules().ratings)
    if asked and cfg.task in (None, "rank"):
        said += f". A ranking needs {asked} first; with --ratings none it needs none"
    return said


def _noted(programs: Sequence[Program], shared: frame.Frame) -> Sequence[frame.BaseRoute]:
    """Let the pages tell how far the answers are, and the administrator's which programs failed, and why."""

    def failed() -> list[frame.Note]:
        return [(f"failed_{program.name}", program.failed) for program in programs if program.failed]

    def sampling() -> dict[str, int] | None:
        answering = any(program.name == "answers" and not program.failed for program in programs)
        return record.progress(shared.store) if answering else None

    shared.notes.append(failed)
    shared.sampling = sampling
    return ()


def _run(cfg: Serve, store: Store, listener: socket.socket, parts: Sequence[frame.Part]) -> None:
    options = frame.Options(
        cookie=f"session-{listener.getsockname()[1]}",
        secure=bool(cfg.certificate) or cfg.behind_proxy,
        hosts=frame.Options.hosts if network.is_loopback(cfg.host) and not cfg.behind_proxy else None,
    )
    config = network.config(server.app(store, options, *parts), cfg.behind_proxy, cfg.certificate, cfg.key)
    if threading.current_thread() is threading.main_thread():  # or uvicorn ends the process, and others outlive it
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(uvicorn.Server(config).serve([listener]))


def _to_write(cfg: Serve) -> list[Item]:
    """The prompts of a file that people answer without a model."""
    file = Path(cfg.data or "")
    if cfg.task != "demonstrate" or cfg.model or not cfg.data or not file.is_file():
        return []
    overlap = exchange.Overlap(cfg.overlap, cfg.overlap_share)
    return list(itertools.islice(exchange.read_items(file, cfg.task, overlap), cfg.prompts))


def _sampling(cfg: Serve, store: Store) -> Sampling | None:
    """The answers to sample: with the models named, or as begun before, or with the quickstart's at first."""
    if cfg.prompts == 0:
        if cfg.model:
            raise InputError(f"--prompts 0: --model {cfg.model[0]} has nothing to answer; leave one of the two out")
        return None
    if cfg.task == "arena" and (cfg.model or (cfg.responses is None and not store.has_items())):
        arena.check(cfg.model, cfg.pairs)
    if cfg.model:
        missing = [path for path in cfg.model if not (path.is_file() or (path / "config.json").is_file())]
        if missing := [path for path in missing if not hub.is_name(path)]:
            raise InputError(f"--model {missing[0]}: expected a model directory, with a config.json")
        return _asked(cfg, cfg.model)
    if cfg.task == "demonstrate" and cfg.data:
        return None if Path(cfg.data).is_file() else _asked(cfg, ())
    begun = record.unfinished(store) if cfg.responses is None else None
    if begun or cfg.responses or store.has_items():
        if ignored := _ignored(cfg, begun):
            why = "what was begun before is finished first" if begun else "there is something to ask already"
            print(f"{', '.join(ignored)}: ignored, since {why}; name --model to have its answers to prompts added")
        return begun
    if (QUICKSTART / "config.json").is_file():
        return _asked(cfg, (QUICKSTART,))
    if cfg.task == "demonstrate":
        return _asked(cfg, ())
    raise InputError(
        f"nothing to ask: no model at {QUICKSTART}, which scripts/quickstart.sh makes in a few minutes;"
        " or name one by --model, or answers by --responses FILE.jsonl"
    )


def _ignored(cfg: Serve, begun: Sampling | None) -> list[str]:
    """The flags that say what models answer, where they go on with what was `begun` otherwise, or answer nothing."""
    names = {"data", "prompts", "k", "pairs", "seed"}
    if cfg.responses is None:
        names |= {"task", "overlap", "overlap_share"}
    given = {
        field.name: getattr(cfg, field.name)
        for field in dataclasses.fields(cfg)
        if field.name in names and getattr(cfg, field.name) != field.default
    }
    differ = (name for name, value in given.items() if begun is None or getattr(begun, name) != value)
    return ["--" + name.replace("_", "-") for name in differ]


def _asked(cfg: Serve, models: Sequence[Path]) -> Sampling:
    return Sampling(
        model=tuple(map(str, models)),
        data=cfg.data or "world",
        prompts=cfg.prompts or 200,
        k=cfg.k or (2 if cfg.task == "compare" else 4),
        task=cfg.task,
        overlap=cfg.overlap,
        overlap_share=cfg.overlap_share,
        pairs=cfg.pairs,
        seed=cfg.seed,
    )


def _answering(cfg: Serve, store: Store, wanted: Sampling | None) -> list[Program]:
    """The program that samples the models' answers into the store, if that is wanted, and which is on record there."""
    if wanted is None:
        return []
    return [Program(wanted.command(cfg.db, record.begin(store, wanted)), "answers")]


def _talking(cfg: Serve) -> tuple[str, list[Program]]:
    """The address at which people talk to models, "" if nowhere, and the program that serves them, if one must."""
    if cfg.chat or not cfg.talk:
        return cfg.chat, []
    models = cfg.model or ((QUICKSTART,) if cfg.responses is None and (QUICKSTART / "config.json").is_file() else ())
    if not models:
        return "", []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    each_once = dict.fromkeys(map(str, models))
    command = beside.command("experiments.serve", "--port", str(port), "--model", *each_once)
    return f"http://127.0.0.1:{port}", [Program(command, "serve")]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 ({error})") from error


def import_items(cfg: Import) -> None:
    """Add the items of a file to a store."""
    if cfg.responses is None:
        raise InputError("import needs --responses FILE.jsonl")
    items = cfg.items()
    with Store(cfg.db) as store:
        added, present = store.add(items)
    print(f"{cfg.db}: {_told(items, added, present)}")


def invite(cfg: Invite) -> None:
    """Print the link of a person, who may be new."""
    with Store(cfg.db, create=False) as store:
        token = access.invite(store, cfg.name, cfg.role)
    print(f"{cfg.name} ({cfg.role}): {cfg.url.rstrip('/')}/enter#{token}")


def _told(items: Sequence[Item], added: int, present: int) -> str:
    """The sentence that says how many items were added."""
    same = sum(item.task == "arena" and arena.is_same(item.responses) for item in items)
    more = f"; {same} battles have the same answer from both models: people are told so" if same else ""
    return f"{added} items added, {present} were there already{more}"


def export(cfg: Export) -> None:
    """Write the labels of a store to a file."""
    counts = exchange.export(cfg.db, cfg.out, exchange.Filter.parse(cfg.filter))
    print(f"{cfg.out}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))


Command = TypeVar("Command", Serve, Import, Export, Invite)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a mistake of the user's ends with one line and status 2."""
    name, *rest = [*(sys.argv[1:] if args is None else args)] or [""]
    try:
        match name:
            case "export":
                export(_parsed(Export, rest))
            case "import":
                import_items(_parsed(Import, rest))
            case "invite":
                invite(_parsed(Invite, rest))
            case _:
                serve(_parsed(Serve, rest if name == "serve" else [name, *rest] if name else []))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except sqlite3.Error as error:
        print(f"error: the store cannot be written ({error}); make room on its disk", file=sys.stderr)
        raise SystemExit(1) from None


def _parsed(kind: type[Command], args: Sequence[str]) -> Command:
    """The settings that flags spell; InputError for one that is wrong."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=list(args), prog="scripts/people.sh", description=with_lines(__doc__ or ""))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        if isinstance(stop.__context__, InputError):
            raise stop.__context__ from None
        words = " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]|-{5,}", " ", printed.getvalue()).split())
        words = re.sub(
            r"^.*?(Error parsing |Unrecognized options: )|( Argument helptext| For full helptext).*", "", words
        )
        raise InputError(f"{words:.300}; see --help") from None


if __name__ == "__main__":
    main()
