"""The pages' server: who may do what, and a JSON interface to the store for the script in the browser.

A person's link carries its token behind a #, which browsers do not send: the entrance page posts it once and is given a
cookie. Every other request that changes something carries a token that only our own pages know. What models wrote is
sent as JSON and shown as text, and the policy of every page forbids scripts and styles that are not files of ours.
"""

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import json
import sqlite3
import time
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jinja2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_jax.errors import InputError
from rlhf_jax.people import arena, exchange, forms, markdown, oversight, progress, words
from rlhf_jax.people.store import Person, Refused, Rules, Store

PAGES = Path(__file__).parent / "pages"
LARGEST = 2**20  # bytes of a request
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'"
)
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the server must know of how it is reached."""

    cookie: str = "session"  # name of the cookie; servers on other ports of the same machine need others
    secure: bool = False  # by https, so that cookies are for https alone
    hosts: frozenset[str] | None = frozenset(_LOOPBACK)  # names that requests may be for; None: any
    rate: float = 20.0  # requests a second of one session, in the long run
    burst: float = 100.0  # requests of one session at once
    attempts: float = 20.0  # wrong tokens from one address in a minute


class Denied(Exception):
    """A request without a session, or without the rights or the token that it needs."""

    def __init__(self, status: int, code: str):
        super().__init__(code)
        self.status, self.code = status, code


@runtime_checkable
class Part(Protocol):
    """Further pages, beside those of every server."""

    def routes(self, pages: "Pages") -> list[BaseRoute]:
        """The routes, which go before all others; `pages.links` may be added to."""

    async def close(self) -> None:
        """Let go of what is held open, at the end."""


def app(store: Store, options: Options | None = None, *parts: Part) -> ASGIApp:
    """The application that serves `store`."""
    options = options or Options()
    pages = Pages(store, options)
    routes = [
        *(route for part in parts for route in part.routes(pages)),
        Route("/", pages.home),
        Route("/enter", pages.entrance, methods=["GET"]),
        Route("/enter", pages.enter, methods=["POST"]),
        Route("/leave", pages.leave, methods=["POST"]),
        Route("/language", pages.language),
        Route("/guidelines", pages.guidelines),
        Route("/guidelines", pages.acknowledge, methods=["POST"]),
        Route("/api/task", pages.task),
        Route("/api/draft", pages.draft, methods=["POST"]),
        Route("/api/submit", pages.submit, methods=["POST"]),
        Route("/api/undo", pages.undo, methods=["POST"]),
        Route("/admin", pages.admin),
        Route("/admin/export", pages.export),
        Route("/admin/arena", pages.arena),
        *oversight.routes(store, oversight.Frame(pages._administrator, pages._page, pages._boot, _json, _form)),
        Route("/admin/{action}", pages.act, methods=["POST"]),
        Mount("/static", StaticFiles(directory=PAGES / "static")),
    ]
    errors: dict[Any, Any] = {
        Denied: pages.on_denied,
        forms.Contradiction: pages.on_contradiction,
        Refused: pages.on_refused,
        InputError: pages.on_input,
        sqlite3.Error: pages.on_store,
        404: pages.on_missing,
    }

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tidying = asyncio.create_task(_tidy(store))
        try:
            yield
        finally:
            tidying.cancel()
            for part in parts:
                await part.close()

    return Guard(Starlette(routes=routes, exception_handlers=errors, lifespan=lifespan), options)


async def _tidy(store: Store) -> None:
    while True:
        await asyncio.sleep(5)
        with contextlib.suppress(sqlite3.Error):  # a full disk: who stores a label is told
            await run_in_threadpool(store.tidy)


# -- around every request ----------------------------------------------------------------------------------------------


class Buckets:
    """How many requests each sender may still make: `burst` at once, and `rate` more a second."""

    def __init__(self, rate: float, burst: float):
        self._rate, self._burst = rate, burst
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, sender: str) -> bool:
        """Whether the sender may make one more request now, which counts."""
        now = time.monotonic()
        if len(self._left) > 10_000:
            self._left = {name: kept for name, kept in self._left.items() if now - kept[1] < self._burst / self._rate}
        left, since = self._left.get(sender, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        self._left[sender] = max(0.0, left - 1), now
        return left >= 1


class Guard:
    """Refuses requests that are too large, too many or for another host, and puts the security headers on answers."""

    def __init__(self, app: ASGIApp, options: Options):
        self._app, self._options = app, options
        self._buckets = Buckets(options.rate, options.burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, size = Headers(scope=scope), 0

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                answered["Content-Security-Policy"] = _POLICY
                answered["X-Content-Type-Options"] = "nosniff"
                answered["Referrer-Policy"] = "no-referrer"
                answered["Cross-Origin-Opener-Policy"] = "same-origin"
                answered["Cache-Control"] = "no-cache" if scope["path"].startswith("/static/") else "no-store"
            await send(message)

        async def receive_bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST:
                raise Denied(413, "too_large")
            return message

        refused = self._refusal(scope, headers)
        if refused:
            await _failure(*refused)(scope, receive, send_safely)
        else:
            await self._app(scope, receive_bounded, send_safely)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        name = urllib.parse.urlsplit(f"//{host}").hostname if "[" not in host or "]" in host else None
        if self._options.hosts is not None and name not in self._options.hosts:
            return 400, "wrong_host"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST:
            return 413, "too_large"
        client = scope["client"][0] if scope.get("client") else ""
        if not scope["path"].startswith("/static/") and not self._buckets.take(
            _cookie(headers, self._options.cookie) or client
        ):
            return 429, "too_many"
        return None


def _cookie(headers: Headers, wanted: str) -> str:
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == wanted:
            return value
    return ""


def _failure(status: int, code: str, message: str = "", **more: Any) -> JSONResponse:
    text = message or words.of("en").get(f"error_{code}", code)
    return JSONResponse({"error": code, "message": text} | more, status)


# -- the pages ---------------------------------------------------------------------------------------------------------


class Pages:
    """The handlers of all routes."""

    def __init__(self, store: Store, options: Options):
        self._store, self._options = store, options
        self.links: dict[str, str] = {}  # further entries of the menu, and the names of their words
        self._attempts = Buckets(options.attempts / 60, options.attempts)
        self._templates = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGES), autoescape=True)

    # errors

    async def on_denied(self, request: Request, error: Exception) -> Response:
        """Answer a request without session or rights."""
        assert isinstance(error, Denied)
        if request.method == "GET" and not request.url.path.startswith("/api/"):
            return RedirectResponse("/enter" if error.status == 401 else "/", 303)
        return _failure(error.status, error.code)

    async def on_contradiction(self, request: Request, error: Exception) -> Response:
        """Answer a ranking that its ratings contradict."""
        assert isinstance(error, forms.Contradiction)
        return _failure(409, "contradiction", str(error), pairs=error.pairs)

    async def on_refused(self, request: Request, error: Exception) -> Response:
        """Answer a request that the store turned down."""
        assert isinstance(error, Refused)
        return _failure(409, error.code, str(error))

    async def on_input(self, request: Request, error: Exception) -> Response:
        """Answer a request that is wrong in itself."""
        if request.url.path.startswith("/admin"):
            return await run_in_threadpool(self._admin_page, request, self._administrator(request), str(error))
        return _failure(422, "wrong", str(error))

    async def on_store(self, request: Request, error: Exception) -> Response:
        """Answer a request that the store could not write: the disk is full, most likely."""
        print(f"error: {self._store.path}: {error}; make room, and answers will be stored again", flush=True)
        return _failure(507, "disk", str(error))

    async def on_missing(self, request: Request, error: Exception) -> Response:
        """Answer a request for what there is not."""
        return _failure(404, "missing")

    # entrance

    async def entrance(self, request: Request) -> Response:
        """Show the page that a link leads to."""
        return self._page(request, "enter.html", None)

    async def enter(self, request: Request) -> Response:
        """Exchange a link's token for a cookie."""
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise Denied(403, "foreign_page")
        token = (await _json(request)).get("token")
        client = request.client.host if request.client else ""
        session = await run_in_threadpool(self._store.enter, token) if isinstance(token, str) else None
        if session is None:
            if not self._attempts.take(client):
                raise Denied(429, "too_many")
            raise Denied(401, "unknown_link")
        response = JSONResponse({"to": "/"})
        response.set_cookie(
            self._options.cookie,
            session,
            max_age=30 * 86400,
            httponly=True,
            samesite="lax",
            secure=self._options.secure,
        )
        return response

    async def leave(self, request: Request) -> Response:
        """End the session."""
        await run_in_threadpool(self._person, request, await _form(request))
        await run_in_threadpool(self._store.leave, request.cookies[self._options.cookie])
        response = RedirectResponse("/enter", 303)
        response.delete_cookie(self._options.cookie)
        return response

    async def language(self, request: Request) -> Response:
        """Change the language of the pages."""
        to = request.query_params.get("to", "en")
        response = RedirectResponse("/", 303)
        if to in words.LANGUAGES:
            response.set_cookie("language", to, max_age=365 * 86400, samesite="lax", secure=self._options.secure)
        return response

    # work

    async def home(self, request: Request) -> Response:
        """Show the page on which people work, or the administrator's."""
        person = await run_in_threadpool(self._person, request)
        if person.role == "administrator" and "work" not in request.query_params:
            return RedirectResponse("/admin", 303)
        if not await run_in_threadpool(self._store.has_acknowledged, person.id):
            return RedirectResponse("/guidelines", 303)
        return await run_in_threadpool(self._work_page, request, person)

    def _work_page(self, request: Request, person: Person) -> Response:
        return self._page(request, "work.html", person, boot=self._boot(request, person))

    def _boot(self, request: Request, person: Person) -> dict[str, Any]:
        """What the script of the page on which people work must know."""
        return {
            "words": words.of(_language(request)),
            "person": person.id,
            "ratings": self._store.rules().ratings,
            "scales": forms.SCALES,
            "flags": forms.FLAGS,
            "prompt_flags": forms.PROMPT_FLAGS,
            "skips": forms.SKIPS,
            "strongest": forms.STRONGEST,
            "verdicts": forms.VERDICTS,
        }

    async def guidelines(self, request: Request) -> Response:
        """Show the guidelines."""
        person = await run_in_threadpool(self._person, request)
        version, text = await run_in_threadpool(self._store.guidelines)
        known = await run_in_threadpool(self._store.has_acknowledged, person.id)
        return self._page(
            request, "guidelines.html", person, version=version, html=markdown.html(text), acknowledged=known
        )

    async def acknowledge(self, request: Request) -> Response:
        """Record that the guidelines were read."""
        form = await _form(request)
        person = await run_in_threadpool(self._person, request, form)
        version = form.get("version", "")
        if not version.isdecimal():
            raise InputError("version: expected a number")
        await run_in_threadpool(self._store.acknowledge, person.id, int(version))
        return RedirectResponse("/", 303)

    async def task(self, request: Request) -> Response:
        """The person's task, as JSON."""
        content = json.dumps(await run_in_threadpool(self._task, request))  # in ASCII: a draft may be no Unicode yet
        return Response(content, media_type="application/json")

    def _task(self, request: Request) -> dict[str, Any]:
        person = self._person(request)
        if not self._store.has_acknowledged(person.id):
            raise Denied(403, "guidelines")
        found = self._store.task(person.id)
        return {
            "task": found and dataclasses.asdict(found),
            "aside": person.aside,
            "pace": dataclasses.asdict(self._store.pace(person.id)),
        }

    async def draft(self, request: Request) -> Response:
        """Keep a draft."""
        body = await _json(request)

        def save() -> None:
            self._store.save_draft(self._person(request, body).id, _number(body), body.get("draft") or {})

        await run_in_threadpool(save)
        return JSONResponse({"saved": True})

    async def submit(self, request: Request) -> Response:
        """Store an answer."""
        body = await _json(request)

        def save() -> int:
            person, seconds = self._person(request, body), body.get("seconds")
            if not isinstance(seconds, int | float) or not 0 <= seconds < 1e9:
                raise InputError("seconds: expected a number")
            name = body.get("submission")
            if not isinstance(name, str):
                raise InputError("submission: expected a name")
            return self._store.submit(person.id, _number(body), name, body.get("answer"), float(seconds))

        return JSONResponse({"label": await run_in_threadpool(save)})

    async def undo(self, request: Request) -> Response:
        """Withdraw the last answer."""
        body = await _json(request)
        await run_in_threadpool(lambda: self._store.undo(self._person(request, body).id))
        return JSONResponse({"undone": True})

    # administration

    async def admin(self, request: Request) -> Response:
        """Show progress and people."""
        return await run_in_threadpool(lambda: self._admin_page(request, self._administrator(request)))

    def _administrator(self, request: Request, form: dict[str, Any] | None = None) -> Person:
        person = self._person(request, form)
        if person.role != "administrator":
            raise Denied(403, "administrator")
        return person

    def _admin_page(self, request: Request, person: Person, message: str = "", invited: str = "") -> Response:
        with self._store.reader() as db:
            overview = progress.overview(db, time.time())
        return self._page(
            request,
            "admin.html",
            person,
            overview=overview,
            rules=self._store.rules(),
            guidelines=self._store.guidelines(),
            message=message,
            invited=invited,
        )

    async def act(self, request: Request) -> Response:
        """Do what a form of the administrator's page asks for."""
        form = await _form(request)
        return await run_in_threadpool(self._act, request, form)

    def _act(self, request: Request, form: dict[str, str]) -> Response:
        person, store = self._administrator(request, form), self._store
        number = int(form["person"]) if form.get("person", "").isdecimal() else -1
        match request.path_params["action"]:
            case "invite":
                token = store.invite(form.get("name", ""))
                base = str(request.base_url).rstrip("/")
                return self._admin_page(request, person, invited=f"{base}/enter#{token}")
            case "revoke" if number != person.id:
                store.revoke(number)
            case "aside" if number != person.id:
                store.set_aside(number, "by the administrator")
            case "restore":
                store.restore(number)
            case "guidelines":
                store.set_guidelines(form.get("text", ""))
            case "rules":
                store.set_rules(_rules(store.rules(), form))
            case _:
                raise Denied(404, "missing")
        return RedirectResponse("/admin", 303)

    async def export(self, request: Request) -> Response:
        """Send the labels as JSON Lines."""
        await run_in_threadpool(self._administrator, request)
        wanted = exchange.Filter.parse(urllib.parse.unquote_plus(request.url.query))

        def lines() -> Iterator[str]:
            with self._store.reader() as db:
                for _, row in exchange.labels(db, wanted):
                    yield json.dumps(row, ensure_ascii=False) + "\n"

        headers = {"Content-Disposition": 'attachment; filename="labels.jsonl"'}
        return StreamingResponse(lines(), headers=headers, media_type="application/x-ndjson")

    async def arena(self, request: Request) -> Response:
        """Show how the models of an arena fare, by the votes that a filter in the address selects."""
        return await run_in_threadpool(self._arena, request)

    def _arena(self, request: Request) -> Response:
        person = self._administrator(request)
        wanted = exchange.Filter.parse(urllib.parse.unquote_plus(request.url.query))
        with self._store.reader() as db:
            table = arena.table(arena.read(db, wanted))
        return self._page(request, "arena.html", person, table=table, live=f"/admin/arena?{request.url.query}")

    # shared

    def _person(self, request: Request, body: dict[str, Any] | None = None) -> Person:
        """The person who asks; with the `body` of a request that changes something, only if it has the page's token."""
        session = request.cookies.get(self._options.cookie, "")
        person = self._store.person(session) if session else None
        if person is None:
            raise Denied(401, "no_session")
        if body is not None:
            given = request.headers.get("x-csrf") or body.get("csrf") or ""
            if not isinstance(given, str) or not hmac.compare_digest(
                given.encode(errors="replace"), _csrf(session).encode()
            ):
                raise Denied(403, "foreign_page")
        return person

    def _page(self, request: Request, name: str, person: Person | None, **values: Any) -> Response:
        language = _language(request)
        page = self._templates.get_template(name).render(
            values,
            t=words.of(language),
            language=language,
            languages=words.LANGUAGES,
            person=person,
            links=self.links,
            csrf=_csrf(request.cookies.get(self._options.cookie, "")) if person else "",
        )
        return HTMLResponse(page)


def _csrf(session: str) -> str:
    return hmac.new(session.encode(errors="replace"), b"csrf", hashlib.sha256).hexdigest()


def _language(request: Request) -> str:
    """The language that was chosen, or else the first that the browser asks for and we have."""
    chosen = request.cookies.get("language")
    wanted = [part.split(";")[0].strip()[:2].lower() for part in request.headers.get("accept-language", "").split(",")]
    return next((name for name in (chosen, *wanted) if name in words.LANGUAGES), "en")


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise InputError("expected a JSON object") from None
    if not isinstance(body, dict):
        raise InputError("expected a JSON object")
    return body


async def _form(request: Request) -> dict[str, str]:
    text = (await request.body()).decode(errors="replace")
    return dict(urllib.parse.parse_qsl(text, keep_blank_values=True))


def _number(body: dict[str, Any]) -> int:
    number = body.get("assignment")
    if type(number) is not int or not 0 <= number < 2**62:
        raise InputError("assignment: expected a number")
    return number


@functools.cache
def _rule_types() -> dict[str, type]:
    return {field.name: type(field.default) for field in dataclasses.fields(Rules)}


def _rules(rules: Rules, form: dict[str, str]) -> Rules:
    """The rules with the numbers of a form."""
    for name, kind in _rule_types().items():
        if name in form:
            try:
                rules = dataclasses.replace(rules, **{name: kind(form[name])})
            except ValueError as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{name}={form[name]:.20}: expected a number") from None
    return rules
