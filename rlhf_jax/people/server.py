"""The pages' server: who may do what, and a JSON interface to the store for the script in the browser.

A person's link carries its token behind a #, which browsers do not send: the entrance page posts it once and is given a
cookie. Every other request that changes something carries a token that only our own pages know. What models wrote is
sent as JSON and shown as text, and the policy of every page forbids scripts and styles that are not files of ours.
"""

import asyncio
import contextlib
import dataclasses
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
from rlhf_jax.people.access import Person
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
        Route("/leave", pages.leave, methods=["POST"]),
        Route("/language", pages.language),
        Route("/guidelines", pages.guidelines),
        Route("/guidelines", pages.acknowledge, methods=["POST"]),
        Route("/api/task", pages.task),
        Route("/api/draft", pages.draft, methods=["POST"]),
        Route("/api/submit", pages.submit, methods=["POST"]),
        Route("/api/undo", pages.undo, methods=["POST"]),
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

    return Guard(Starlette(routes=routes, exception_handlers=errors, lifespan=lifespan), shared.options)


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
            return await run_in_threadpool(page, request, self._frame.administrator(request), str(error))
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
        client = request.client.host if request.client else ""
        session = await run_in_threadpool(access.enter, self._store, token) if isinstance(token, str) else None
        if session is None:
            if not self._attempts.take(client):
                raise Denied(429, "too_many")
            raise Denied(401, "unknown_link")
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

    async def leave(self, request: Request) -> Response:
        """End the session."""
        await run_in_threadpool(self._frame.person, request, await frame.read_form(request))
        await run_in_threadpool(access.leave, self._store, self._frame.session(request))
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
        person = await run_in_threadpool(self._frame.person, request)
        if person.role == "administrator" and "work" not in request.query_params:
            return RedirectResponse("/admin", 303)
        return await run_in_threadpool(self._work_page, request, person)

    def _work_page(self, request: Request, person: Person) -> Response:
        self._frame.check_read(person)
        return self._frame.page(request, "work.html", person, boot=self._frame.boot(request, person))

    async def guidelines(self, request: Request) -> Response:
        """Show the guidelines."""
        person = await run_in_threadpool(self._frame.person, request)
        version, text = await run_in_threadpool(guidelines.newest, self._store)
        known = await run_in_threadpool(guidelines.has_acknowledged, self._store, person.id)
        return self._frame.page(
            request, "guidelines.html", person, version=version, html=markdown.html(text), acknowledged=known
        )

    async def acknowledge(self, request: Request) -> Response:
        """Record that the guidelines were read."""
        form = await frame.read_form(request)
        person = await run_in_threadpool(self._frame.person, request, form)
        version = frame.number(form.get("version", ""), "version")
        await run_in_threadpool(guidelines.acknowledge, self._store, person.id, version)
        return RedirectResponse("/", 303)

    async def task(self, request: Request) -> Response:
        """The person's task, as JSON."""
        return frame.ascii_json(await run_in_threadpool(self._task, request))

    def _task(self, request: Request) -> dict[str, Any]:
        person = self._frame.person(request)
        self._frame.check_read(person)
        found = self._store.task(person.id)
        return {
            "task": found and dataclasses.asdict(found),
            "aside": person.aside,
            "pace": dataclasses.asdict(self._store.pace(person.id)),
        }

    async def draft(self, request: Request) -> Response:
        """Keep a draft."""
        body = await frame.read_json(request)

        def save() -> None:
            self._store.save_draft(
                self._frame.person(request, body).id, frame.assignment(body), body.get("draft") or {}
            )

        await run_in_threadpool(save)
        return JSONResponse({"saved": True})

    async def submit(self, request: Request) -> Response:
        """Store an answer."""
        body = await frame.read_json(request)

        def save() -> int:
            person, name = self._frame.person(request, body), frame.name(body, "submission")
            number, seconds = frame.assignment(body), frame.seconds(body)
            return self._store.submit(person.id, number, name, body.get("answer"), seconds)

        return JSONResponse({"label": await run_in_threadpool(save)})

    async def undo(self, request: Request) -> Response:
        """Withdraw the last answer."""
        body = await frame.read_json(request)
        await run_in_threadpool(lambda: self._store.undo(self._frame.person(request, body).id))
        return JSONResponse({"undone": True})
