"""The pages' server: who may do what, and a JSON interface to the store for the script in the browser.

A person's link carries its token behind a #, which browsers do not send: the entrance page posts it once and is given a
cookie. Every other request that changes something carries a token that only our own pages know. What models wrote is
sent as JSON and shown as text, and the policy of every page forbids scripts and styles that are not files of ours.
"""

import asyncio
import contextlib
import dataclasses
import ipaddress
import sqlite3
import time
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_jax.errors import InputError
from rlhf_jax.people import access, administration, forms, frame, guidelines, markdown, oversight, words
from rlhf_jax.people.frame import Denied, Frame, Options, Part
from rlhf_jax.people.leases import Refused
from rlhf_jax.people.store import Store

LARGEST = 2**20  # bytes of a request
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self';"
    " base-uri 'none'; frame-ancestors 'none'"
)


def app(store: Store, options: Options | None = None, *parts: Part) -> ASGIApp:
    """The application that serves `store`, with the routes of further `parts` before all others."""
    shared = Frame(store, options or Options())
    pages = Pages(shared)
    routes = [
        *(route for part in parts for route in part(shared)),
        Route("/", pages.home),
        Route("/enter", pages.entrance, methods=["GET"]),
        Route("/enter", pages.enter, methods=["POST"]),
        Route("/leave", frame.posted(pages.leave, frame.read_form), methods=["POST"]),
        Route("/language", pages.language),
        Route("/guidelines", pages.guidelines),
        Route("/guidelines", frame.posted(pages.acknowledge, frame.read_form), methods=["POST"]),
        Route("/api/task", pages.task),
        Route("/api/draft", frame.posted(pages.draft), methods=["POST"]),
        Route("/api/submit", frame.posted(pages.submit), methods=["POST"]),
        Route("/api/undo", frame.posted(pages.undo), methods=["POST"]),
        *oversight.routes(shared),
        *administration.routes(shared),
        Mount("/static", StaticFiles(directory=frame.PAGES / "static")),
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
            for close in shared.at_end:
                await close()

    return Guard(Starlette(routes=routes, exception_handlers=errors, lifespan=lifespan), shared)


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

    def __init__(self, app: ASGIApp, shared: Frame):
        self._app, self._options, self._senders = app, shared.options, shared.senders
        self._buckets = Buckets(self._options.rate, self._options.burst)

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
        if not scope["path"].startswith("/static/"):
            # A session that was not seen to be valid is no name: whoever makes one up is who is at that address.
            person = self._senders.get(_cookie(headers, self._options.cookie))
            if not self._buckets.take(_network(scope) if person is None else f"person {person}"):
                return 429, "too_many"
        return None


def _network(scope: Scope) -> str:
    """The address that a request comes from; of one of IPv6 the part that its owner cannot choose."""
    address = scope["client"][0] if scope.get("client") else ""
    with contextlib.suppress(ValueError):
        if (parsed := ipaddress.ip_address(address)).version == 6:
            return str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
    return address


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
    """The handlers of the labelers' routes, and of errors on all pages."""

    def __init__(self, shared: Frame):
        self._frame, self._store, self._options = shared, shared.store, shared.options
        self._attempts = Buckets(self._options.attempts / 60, self._options.attempts)

    # errors

    async def on_denied(self, request: Request, error: Exception) -> Response:
        """Answer a request without session or rights."""
        assert isinstance(error, Denied)
        if request.method == "GET" and not request.url.path.startswith("/api/"):
            return RedirectResponse({"no_session": "/enter", "guidelines": "/guidelines"}.get(error.code, "/"), 303)
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
            page = administration.Administration(self._frame).page
            return await run_in_threadpool(
                lambda: page(request, self._frame.administrator(request), str(error), status=422)
            )
        return _failure(422, "wrong", str(error))

    async def on_store(self, request: Request, error: Exception) -> Response:
        """Answer a request that the store could not write: the disk is full, most likely."""
        self._frame.report(error)
        return _failure(507, "disk", str(error))

    async def on_missing(self, request: Request, error: Exception) -> Response:
        """Answer a request for what there is not."""
        return _failure(404, "missing")

    # entrance

    async def entrance(self, request: Request) -> Response:
        """Show the page that a link leads to."""
        return self._frame.page(request, "enter.html", None)

    async def enter(self, request: Request) -> Response:
        """Exchange a link's token for a cookie."""
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise Denied(403, "foreign_page")
        token = (await frame.read_json(request)).get("token")
        session = await run_in_threadpool(access.enter, self._store, token) if isinstance(token, str) else None
        if session is None:
            if not self._attempts.take(_network(request.scope)):
                raise Denied(429, "too_many")
            raise Denied(401, "unknown_link")
        if person := await run_in_threadpool(access.person, self._store, session):
            self._frame.senders[session] = person.id
        response = JSONResponse({"to": "/"})
        response.set_cookie(
            self._options.cookie,
            session,
            max_age=access.SESSION,
            httponly=True,
            samesite="lax",
            secure=self._options.secure,
        )
        return response

    def leave(self, request: Request, form: dict[str, str]) -> Response:
        """End the session."""
        self._frame.person(request, form)
        access.leave(self._store, self._frame.session(request))
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

    def home(self, request: Request) -> Response:
        """Show the page on which people work, or the administrator's."""
        person = self._frame.person(request)
        if person.role == "administrator" and "work" not in request.query_params:
            return RedirectResponse("/admin", 303)
        self._frame.check_read(person)
        return self._frame.page(request, "work.html", person, boot=self._frame.boot(request, person))

    def guidelines(self, request: Request) -> Response:
        """Show the guidelines."""
        person = self._frame.person(request)
        version, text = guidelines.newest(self._store)
        known = guidelines.has_acknowledged(self._store, person.id)
        html = markdown.html(guidelines.translated(text, frame.language(request)))
        return self._frame.page(request, "guidelines.html", person, version=version, html=html, acknowledged=known)

    def acknowledge(self, request: Request, form: dict[str, str]) -> Response:
        """Record that the guidelines were read."""
        person = self._frame.person(request, form)
        guidelines.acknowledge(self._store, person.id, frame.number(form.get("version", ""), "version"))
        return RedirectResponse("/?work" if person.role == "administrator" else "/", 303)

    def task(self, request: Request) -> Response:
        """The person's task, as JSON."""
        person, talks = self._frame.person(request), self._frame.talks()
        self._frame.check_read(person)
        found, pace = self._store.task(person.id, talks), self._store.pace(person.id, talks)
        return frame.ascii_json(
            {
                "task": found and dataclasses.asdict(found),
                "about": self._frame.about(found.prompt) if found else None,
                "sampling": None if found else self._frame.sampling(),
                "aside": person.aside,
                "pace": dataclasses.asdict(pace),
            }
        )

    def draft(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Keep a draft."""
        person = self._frame.person(request, body)
        self._store.save_draft(person.id, frame.assignment(body), body.get("draft") or {})
        return {"saved": True}

    def submit(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Store an answer."""
        person, name = self._frame.person(request, body), frame.name(body, "submission")
        number, seconds = frame.assignment(body), frame.seconds(body)
        return {"label": self._store.submit(person.id, number, name, body.get("answer"), seconds)}

    def undo(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Withdraw the last answer."""
        self._store.undo(self._frame.person(request, body).id)
        return {"undone": True}
