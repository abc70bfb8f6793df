"""The routes of the OpenAI protocol: `protocol` says what is asked and how it is told, an `engine` answers.

GET  /v1/models, /v1/models/{model}
POST /v1/chat/completions, /v1/completions
GET  /health
"""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import secrets
import sys
import time
import traceback
import urllib.parse
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_jax.people.network import LOOPBACK
from rlhf_jax.rollouts.conversations import Token
from rlhf_jax.serving import protocol
from rlhf_jax.serving.engine import Begun, Engine, Event, Failed, Request
from rlhf_jax.serving.protocol import Asked, Choice, Refusal, Usage, Writer
from rlhf_jax.serving.text import Text
from rlhf_jax.types import InputError

LARGEST = 2**24  # bytes of a request


@dataclasses.dataclass(frozen=True)
class Options:
    """How requests are answered that leave something open, and which are refused."""

    max_tokens: int = 1024  # of an answer in a chat whose request names no limit, where the context has room for them
    api_key: str | None = None  # that requests must carry
    hosts: frozenset[str] | None = LOOPBACK  # names that requests may be for; None: any


def app(engines: Mapping[str, Engine], options: Options = Options()) -> ASGIApp:
    """The application that answers with these models; their engines run already."""
    service = Service(engines, options)
    routes = [
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/models/{model:path}", service.model),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.completions, methods=["POST"]),
    ]
    errors: dict[Any, Any] = {Refusal: _on_refusal, HTTPException: _on_http, Exception: _on_error}
    return Guard(Starlette(routes=routes, exception_handlers=errors), options)


class Guard:
    """Refuses requests that are too large, for another host, or without the key."""

    def __init__(self, app: ASGIApp, options: Options):
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = 0

        async def receive_bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST:
                raise Refusal(f"the request has more than {LARGEST} bytes: send less", status=413)
            return message

        refusal = self._refusal(scope["path"], Headers(scope=scope))
        if refusal is None:
            await self._app(scope, receive_bounded, send)
        else:
            await JSONResponse(refusal.json(), refusal.status)(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> Refusal | None:
        host = headers.get("host", "")
        name = urllib.parse.urlsplit(f"//{host}").hostname if "[" not in host or "]" in host else None
        if self._options.hosts is not None and name not in self._options.hosts:
            return Refusal(f"this server is not {name}: expected one of {', '.join(sorted(self._options.hosts))}")
        given = headers.get("authorization", "").removeprefix("Bearer ").encode()
        wanted = self._options.api_key
        if wanted is not None and path != "/health" and not hmac.compare_digest(given, wanted.encode()):
            return Refusal("the API key is wrong or missing: send it as a bearer token", None, 401, "invalid_api_key")
        return None


def _on_refusal(_: HttpRequest, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return JSONResponse(refusal.json(), refusal.status)


def _on_http(request: HttpRequest, error: Exception) -> Response:
    """A path or a method that there is none of."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(Refusal(what, status=error.status_code).json(), error.status_code, error.headers)


def _on_error(_: HttpRequest, error: Exception) -> Response:
    """A bug, whose traceback uvicorn prints."""
    return JSONResponse(Refusal(f"the server failed: {type(error).__name__}", status=500).json(), 500)


def _refusal_of(error: Exception) -> Refusal:
    """The message to a client about an error of ours."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, InputError):
        return Refusal(str(error))
    traceback.print_exception(error, file=sys.stderr)
    return Refusal(f"the server failed ({type(error).__name__}): its log has more", status=500)


class Service:
    """The handlers of all routes."""

    def __init__(self, engines: Mapping[str, Engine], options: Options):
        self._engines, self._options, self._since = engines, options, int(time.time())

    async def health(self, _: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._engines]})

    async def model(self, request: HttpRequest) -> Response:
        name = request.path_params["model"]
        self._engine(name)
        return JSONResponse(self._model(name))

    async def chat(self, request: HttpRequest) -> Response:
        return await self._answer(request, protocol.chat(await _body(request)))

    async def completions(self, request: HttpRequest) -> Response:
        return await self._answer(request, protocol.completion(await _body(request)))

    def _model(self, name: str) -> protocol.Json:
        context = self._engines[name].context
        return {"id": name, "object": "model", "created": self._since, "owned_by": "rlhf_jax", "max_model_len": context}

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            message = f"there is no model {name:.200}: expected one of {', '.join(self._engines)}"
            raise Refusal(message, "model", 404, "model_not_found")
        return self._engines[name]

    async def _answer(self, request: HttpRequest, asked: Asked) -> Response:
        engine = self._engine(asked.model)
        prompts = [await run_in_threadpool(_ids, engine, asked, prompt) for prompt in asked.prompts]
        limit = _limit(engine, asked, max(map(len, prompts)), self._options.max_tokens)
        wanted = Request(
            prompts=tuple(prompts),
            max_tokens=limit,
            n=asked.n,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=max(asked.top_p, 1e-6),
            seed=secrets.randbits(64) if asked.seed is None else asked.seed,
            stop=asked.stop,
            scored="nothing" if asked.likeliest is None else "prompt" if asked.echo else "answer",
            strip=asked.chat,
            stream=asked.stream,
        )
        name = "chatcmpl" if asked.chat else "cmpl"
        writer = Writer(f"{name}-{secrets.token_hex(12)}", int(time.time()), asked, engine.vocabulary)
        telling = _Telling(engine, wanted, writer)
        if asked.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(telling.stream(), media_type="text/event-stream", headers=headers)
        return await _unless_gone(request, telling.whole())


async def _body(request: HttpRequest) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is no JSON ({error})") from error


def _ids(engine: Engine, asked: Asked, prompt: Any) -> tuple[int, ...]:
    """The tokens of a prompt."""
    if isinstance(prompt, list) and not asked.chat:
        last = len(engine.vocabulary) - 1
        if not all(0 <= i <= last for i in prompt):
            raise Refusal(f"prompt: expected token ids from 0 to {last}", "prompt")
        return tuple(prompt)
    try:
        return engine.render(prompt)
    except InputError as error:
        raise Refusal(f"{asked.param}: {error}", asked.param) from error


def _limit(engine: Engine, asked: Asked, longest: int, default: int) -> int:
    """The most tokens of an answer, for which the context has room; raises Refusal where it has not."""
    room = engine.context - longest
    limit = min(default, room) if asked.max_tokens is None else asked.max_tokens
    if max(limit, 1) > room or limit < 0:
        what = f"the prompt has {longest} tokens, and an answer {max(limit, 1)}"
        raise Refusal(
            f"{what}, but the context of {asked.model} has {engine.context}: send less, or lower max_tokens",
            asked.param,
            code="context_length_exceeded",
        )
    return limit


class _Telling:
    """One request: its answers as they come."""

    def __init__(self, engine: Engine, wanted: Request, writer: Writer):
        self._engine, self._wanted, self._writer = engine, wanted, writer
        self._sampled = [0] * wanted.count
        self._echoes: dict[int, tuple[str, list[int]]] = {}  # of each prompt
        self._cached = 0

    async def whole(self) -> Response:
        """All answers at once."""
        choices = [Choice(index) for index in range(self._wanted.count)]
        try:
            async with contextlib.aclosing(self._parts()) as parts:
                async for part, _ in parts:
                    choice = choices[part.index]
                    choice.text += part.text
                    choice.tokens += part.tokens
                    choice.places += part.places
                    choice.finish = part.finish
        except Exception as error:
            raise _refusal_of(error) from error
        return JSONResponse(self._writer.whole(choices, self._usage()))

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The answers as server-sent events."""
        try:
            async with contextlib.aclosing(self._parts()) as parts:
                async for part, begins in parts:
                    if begins and (first := self._writer.begun(part.index)):
                        yield _event(first)
                    if part.text or part.tokens or part.finish:
                        for chunk in self._writer.chunks(part):
                            yield _event(chunk)
            if self._writer.asked.usage:
                yield _event(self._writer.used(self._usage()))
        except Exception as error:
            yield _event(_refusal_of(error).json())
        yield b"data: [DONE]\n\n"

    def _usage(self) -> Usage:
        return Usage(sum(map(len, self._wanted.prompts)), sum(self._sampled), self._cached)

    async def _parts(self) -> AsyncGenerator[tuple[Choice, bool], None]:
        """The parts of all answers, and whether each is the first of its answer."""
        async with contextlib.aclosing(self._events()) as events:
            async for event in events:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Begun):
                    if event.index % self._wanted.n == 0:  # a prompt counts once
                        self._cached += event.cached
                    yield self._echo(event), True
                    continue
                self._sampled[event.index] = event.count
                piece = event.piece
                shift = len(self._echoed(event.index)[0])
                places = [place + shift for place in piece.places]
                yield Choice(event.index, piece.text, [*piece.tokens], places, event.finish), False

    def _echo(self, begun: Begun) -> Choice:
        """The prompt, where it is to be told too."""
        if not self._writer.asked.echo:
            return Choice(begun.index)
        text, places = self._echoed(begun.index)
        first = self._wanted.prompts[begun.index // self._wanted.n][0]
        return Choice(begun.index, text, [Token(first), *begun.prompt], places)

    def _echoed(self, index: int) -> tuple[str, list[int]]:
        """The text of a prompt that is told, and where its tokens begin in it."""
        number = index // self._wanted.n
        if number not in self._echoes:
            self._echoes[number] = self._echo_of(number) if self._writer.asked.echo else ("", [])
        return self._echoes[number]

    def _echo_of(self, number: int) -> tuple[str, list[int]]:
        asked = self._writer.asked
        given, read = asked.prompts[number], Text()
        special = self._engine.special if isinstance(given, str) else set[int]()  # the tokenizer's own additions
        pieces = [
            read.add(Token(i), b"" if i in special else self._engine.vocabulary[i])
            for i in self._wanted.prompts[number]
        ]
        whole = [*pieces, read.end()]
        text = given if isinstance(given, str) else "".join(piece.text for piece in whole)
        return text, [place for piece in whole for place in piece.places]

    async def _events(self) -> AsyncGenerator[Event, None]:
        """Yield the engine's events of the request, up to the end of all answers."""
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, event)

        ticket = self._engine.submit(self._wanted, deliver)
        try:
            left = self._wanted.count
            while left:
                event = await inbox.get()
                left -= isinstance(event, Failed) or (not isinstance(event, Begun) and event.finish is not None)
                yield event
        finally:
            ticket.cancel()


def _event(value: protocol.Json) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _unless_gone(request: HttpRequest, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of the work, unless the client goes away, which ends it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=499)
    finally:
        for task in (answer, leaving):
            task.cancel()
        await asyncio.wait({answer, leaving})
