"""An endpoint of the OpenAI protocol whose models say what a test wants, and break as it wants."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rlhf_jax.people import __main__ as command


class Stub:
    """Two models that repeat what they are told; `fault` is what goes wrong with the next answers."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was asked, and how to answer."""
        self.names = ["ada", "bob"]
        self.fault = ""
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.pause = 0.0  # seconds between the words
        self.passing: list[str] = []  # faults of the next answers, one each
        self.rule: Callable[[str], str] | None = None  # from the message to the answer, in the place of `text`
        self.text = "{model} heard: {message}"
        self.said: dict[tuple[str, str], str] = {}  # by model and message, in the place of `text`
        self.cancelled = 0  # answers that nobody waited for any more

    async def models(self, request: Request) -> Response:
        if self.fault == "no models":
            return JSONResponse({"data": []})
        return JSONResponse({"data": [{"id": name, "object": "model"} for name in self.names]})

    async def answer(self, request: Request) -> Response:
        body = json.loads(await request.body())
        self.asked.append(body)
        self.keys.add(request.headers.get("authorization", ""))
        match self.passing.pop(0) if self.passing else self.fault:
            case "busy":
                return JSONResponse({"error": {"message": "slow down"}}, 429)
            case "long":
                error = {"message": "400 tokens of 256 in ada", "code": "context_length_exceeded"}
                return JSONResponse({"error": error}, 400)
            case "broken":
                return Response("<html>" + "x" * 100_000, 500)
            case "no stream":
                return JSONResponse({"choices": [{"message": {"content": "hi"}}]})
        return StreamingResponse(self._events(body), media_type="text/event-stream; charset=utf-8")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        model, message = body["model"], body["messages"][-1]["content"]
        told = self.said.get((model, message)) or (self.rule(message) if self.rule else "")
        text = told or self.text.format(model=model, message=message)
        yield ": a comment\n\n" + _event({"role": "assistant", "content": ""})
        words = text.split(" ")
        try:
            for n, word in enumerate(words):
                await asyncio.sleep(self.pause)
                if n == 1 and self.fault in ("cut", "silent", "malformed", "error", "number", "endless line"):
                    match self.fault:
                        case "cut":
                            return
                        case "silent":
                            await asyncio.sleep(60)
                        case "malformed":
                            yield "data: {oh no\n\n"
                        case "error":
                            yield 'data: {"error": {"message": "out of memory in ada"}}\n\n'
                        case "number":
                            yield _event({"content": 7})
                        case "endless line":
                            yield "data: " + "x" * 2**21
                yield _event({"content": word + (" " if n + 1 < len(words) else "")})
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        yield _event({}, "length" if self.fault == "length" else "stop")
        yield 'data: {"choices": [], "usage": {"total_tokens": 9}}\n\n'
        if self.fault != "no mark":
            yield "data: [DONE]\n\n"

    def app(self) -> Starlette:
        """The application."""
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.answer, methods=["POST"]),
            ]
        )


def _event(delta: dict[str, Any], end: str | None = None) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": end}]}) + "\r\n\r\n"


@contextlib.contextmanager
def answering() -> Iterator[tuple[Stub, str]]:
    """A stub that listens, and its address."""
    stub = Stub()
    with command.listening("127.0.0.1", 0) as listener:
        config = uvicorn.Config(stub.app(), log_level="critical", access_log=False, timeout_graceful_shutdown=0)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield stub, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
