"""The frame of every page: who asks, by which token of our own pages, how a page is made, and what a request holds."""

import dataclasses
import hashlib
import hmac
import json
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute

from rlhf_jax.errors import InputError
from rlhf_jax.people import access, forms, guidelines, network, words
from rlhf_jax.people.access import Person
from rlhf_jax.people.labels import check_name
from rlhf_jax.people.store import Store

PAGES = Path(__file__).parent / "pages"


@dataclasses.dataclass(frozen=True)
class Options:
    """How a server is reached, and by how many requests at most."""

    cookie: str = "session"  # name of the cookie; servers on other ports of the same machine need others
    secure: bool = False  # by https, so that cookies are for https alone
    hosts: frozenset[str] | None = network.LOOPBACK  # names that requests may be for; None: any
    rate: float = 20.0  # requests a second of one person, or one address without a session, in the long run
    burst: float = 100.0  # requests of one of them at once
    attempts: float = 20.0  # wrong tokens from one address in a minute


Note = tuple[str, object]  # the name of the words, and what {why} in them stands for


class Denied(Exception):
    """A request without a session, or without the rights or the token that it needs."""

    def __init__(self, status: int, code: str):
        super().__init__(code)
        self.status, self.code = status, code


class Frame:
    """The store, the options and the templates that the pages of a server share."""

    def __init__(self, store: Store, options: Options):
        self.store, self.options = store, options
        self.links: dict[str, str] = {}  # further entries of the menu, and the names of their words
        self.notes: list[Callable[[], list[Note]]] = []  # what the administrator has to know, as long as it is so
        # How many prompts models have answered, and of how many, while they do.
        self.sampling: Callable[[], dict[str, int] | None] = lambda: None
        self.talks: Callable[[], bool] = lambda: False  # whether there is a model that people can talk to
        self.senders: dict[str, int] = {}  # by the token of a session that was valid: the person
        self.at_end: list[Callable[[], Awaitable[None]]] = []  # called when the server stops
        self._templates = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGES), autoescape=True)

    def person(self, request: Request, body: dict[str, Any] | None = None) -> Person:
        """The person who asks; with the `body` of a request that changes something, only if it has the page's token."""
        session = self.session(request)
        person = access.person(self.store, session) if session else None
        if person is None:
            self.senders.pop(session, None)
            raise Denied(401, "no_session")
        self.senders[session] = person.id
        if body is not None:
            given = request.headers.get("x-csrf") or body.get("csrf") or ""
            if not isinstance(given, str) or not hmac.compare_digest(
                given.encode(errors="replace"), _csrf(session).encode()
            ):
                raise Denied(403, "foreign_page")
        return person

    def session(self, request: Request) -> str:
        """The session's token that the browser sends; empty if it sends none."""
        return request.cookies.get(self.options.cookie, "")

    def administrator(self, request: Request, body: dict[str, Any] | None = None) -> Person:
        """The person who asks, as `person` has it, who must be the administrator."""
        person = self.person(request, body)
        if person.role != "administrator":
            raise Denied(403, "administrator")
        return person

    def check_read(self, person: Person) -> None:
        """Raise Denied for a person who has not acknowledged the newest guidelines."""
        if not guidelines.has_acknowledged(self.store, person.id):
            raise Denied(403, "guidelines")

    def about(self, prompt: Any) -> list[str] | None:
        """The lines of the guidelines about words of a prompt; None where they have none about any word."""
        return guidelines.about(guidelines.newest(self.store)[1], prompt)

    def page(self, request: Request, name: str, person: Person | None, **values: Any) -> Response:
        """A page, by the name of its template, for a person or, as None, for anybody."""
        chosen = language(request)
        page = self._templates.get_template(name).render(
            values,
            t=words.of(chosen),
            language=chosen,
            languages=words.LANGUAGES,
            theme=request.cookies.get("theme", ""),
            person=person,
            links=self.links,
            csrf=_csrf(self.session(request)) if person else "",
        )
        return HTMLResponse(page)

    def boot(self, request: Request, person: Person) -> dict[str, Any]:
        """The words, scales and names that the script of a page needs on which people answer tasks."""
        return {
            "words": words.of(language(request)),
            "person": person.id,
            "ratings": self.store.rules().ratings,
            "scales": forms.SCALES,
            "flags": forms.FLAGS,
            "prompt_flags": forms.PROMPT_FLAGS,
            "skips": forms.SKIPS,
            "strongest": forms.STRONGEST,
            "verdicts": forms.VERDICTS,
        }

    def report(self, error: Exception) -> None:
        """Print that the store could not be written: its disk is full, most likely."""
        print(f"error: {self.store.path}: {error}; make room, and answers will be stored again", flush=True)


# The routes of further pages, which may set `talks` and `sampling`, and add to `links`, `notes` and `at_end`.
Part = Callable[[Frame], Sequence[BaseRoute]]


def _csrf(session: str) -> str:
    return hmac.new(session.encode(errors="replace"), b"csrf", hashlib.sha256).hexdigest()


def language(request: Request) -> str:
    """The language that was chosen, or else the first that the browser asks for and we have."""
    chosen = request.cookies.get("language")
    wanted = [part.split(";")[0].strip()[:2].lower() for part in request.headers.get("accept-language", "").split(",")]
    return next((name for name in (chosen, *wanted) if name in words.LANGUAGES), "en")


def ascii_json(value: Any) -> Response:
    """The value as JSON in ASCII, since a draft may hold half of a surrogate pair, which is no Unicode yet."""
    return Response(json.dumps(value), media_type="application/json")


# -- what a request holds: InputError for what it should not -----------------------------------------------------------


def posted(
    handle: Callable[[Request, dict[str, Any]], Any], read: Callable[[Request], Awaitable[dict[str, Any]]] | None = None
) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint that reads a JSON object, or as `read` does, and lets a thread handle it; a dict becomes JSON."""

    async def endpoint(request: Request) -> Response:
        found = await run_in_threadpool(handle, request, await (read or read_json)(request))
        return found if isinstance(found, Response) else JSONResponse(found)

    return endpoint


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object that the script of a page sends."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise InputError("expected a JSON object") from None
    if not isinstance(body, dict):
        raise InputError("expected a JSON object")
    return body


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a form."""
    text = (await request.body()).decode(errors="replace")
    return dict(urllib.parse.parse_qsl(text, keep_blank_values=True))


def assignment(body: dict[str, Any]) -> int:
    """The number of the task that a request is about."""
    number = body.get("assignment")
    if type(number) is not int or not 0 <= number < 2**62:
        raise InputError("assignment: expected a number")
    return number


def seconds(body: dict[str, Any]) -> float:
    """The time that a person looked at a task."""
    given = body.get("seconds")
    if not isinstance(given, int | float) or not 0 <= given < 1e9:
        raise InputError("seconds: expected a number")
    return float(given)


def name(body: dict[str, Any], field: str) -> str:
    """The name that a page gives to what it sends, so that it counts once if it is sent twice."""
    given = body.get(field)
    if not isinstance(given, str):
        raise InputError(f"{field}: expected a name")
    check_name(given, field)
    return given


def number(text: str, field: str) -> int:
    """The number that a field of a form or of an address spells."""
    if not text.isdecimal() or len(text) > 18:
        raise InputError(f"{field}: expected a number")
    return int(text)
