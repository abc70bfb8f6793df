"""Talking to the models: a page on which anybody talks to any of them, and the conversations of the task "chat".

Answers come from an `Endpoint` and go on to the browser as lines of JSON, as they are sampled:

    {"n": 0, "text": "..."}    a part of the answer in that place
    {"n": 0, "end": "stop"}    that answer is whole, or "length" if it was cut
    {"turn": 17}               all are, and recorded: by this assignment they are judged, like any other task
    {"error": "chat_away"}     nothing more comes, and nothing was recorded

A browser never says what a model answered, or which model it was: both are recorded here, as a turn of the store,
before a person can judge them. Labelers are not told the models' names.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import random
import secrets
import sqlite3
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from rlhf_jax.errors import InputError
from rlhf_jax.people import acts, forms, frame, turns, words
from rlhf_jax.people.access import Person
from rlhf_jax.people.endpoint import LONGEST, Asked, Endpoint, Failure, Piece, whole
from rlhf_jax.people.frame import Denied, Frame
from rlhf_jax.people.items import Item
from rlhf_jax.people.leases import Refused

AT_ONCE = 2  # requests for answers that a person may have open
_TEMPERATURE = 1.0  # of the two answers that are compared
_MOST_ADDED = 1000  # conversations that an administrator adds at once


@dataclasses.dataclass(frozen=True)
class _Question:
    """The requests to the models, and how their answers are recorded."""

    name: str  # the page's, of the turn
    messages: list[dict[str, str]]
    models: tuple[str, ...]  # one for each answer, in the order of the item
    shown: list[int]
    temperature: float = _TEMPERATURE
    max_tokens: int | None = None
    chat: int | None = None  # the assignment of the conversation

    def item(self, texts: Sequence[str], ended: Sequence[bool]) -> Item:
        """The item of the answers, given in the order shown."""
        order = sorted(range(len(texts)), key=self.shown.__getitem__)
        return Item(
            prompt=self.messages,
            responses=tuple(texts[n] for n in order),
            task="thumb" if self.chat is None else "compare",
            models=self.models,
            ended=tuple(ended[n] for n in order),
        )


def part(endpoint: Endpoint) -> frame.Part:
    """The pages on which people talk to the models of an endpoint."""
    return functools.partial(_routes, endpoint)


def _routes(endpoint: Endpoint, shared: Frame) -> list[Route]:
    pages = Chat(endpoint, shared)
    shared.links["/chat"] = "chat"
    shared.talks = lambda: not endpoint.gone()
    shared.at_end.append(endpoint.close)
    return [
        Route("/chat", pages.page),
        Route("/api/chat/models", pages.models),
        Route("/api/chat/conversation", pages.conversation),
        Route("/api/chat/answer", pages.answer, methods=["POST"]),
        Route("/api/chat/stop", pages.stop, methods=["POST"]),
        Route("/api/chat/withdraw", frame.posted(pages.withdraw), methods=["POST"]),
        Route("/api/chat/better", frame.posted(pages.better), methods=["POST"]),
        Route("/admin/chats", frame.posted(pages.add, frame.read_form), methods=["POST"]),
    ]


class Chat:
    """The handlers of the routes."""

    def __init__(self, endpoint: Endpoint, shared: Frame):
        self._endpoint, self._frame, self._store = endpoint, shared, shared.store
        self._open: dict[tuple[int, str], asyncio.Queue[tuple[int, Piece | Failure | None]]] = {}

    def page(self, request: Request) -> Response:
        """Show the page on which a person talks to a model."""
        person = self._frame.person(request)
        self._frame.check_read(person)
        boot = {"words": words.of(frame.language(request)), "person": person.id}
        return self._frame.page(request, "chat.html", person, boot=boot)

    async def models(self, request: Request) -> Response:
        """The models, by their names for the administrator, and by their number alone for labelers."""
        person = await run_in_threadpool(self._worker, request)
        try:
            names = await self._endpoint.models()
        except Failure as failure:
            return JSONResponse(_told(failure, person), 502)
        blind = person.role != "administrator"
        return JSONResponse({"models": [None if blind else name for name in names]})

    def conversation(self, request: Request) -> Response:
        """How a conversation stands, as JSON."""
        number = frame.number(request.query_params.get("assignment", ""), "assignment")
        found = turns.conversation(self._store, self._worker(request).id, number)
        return JSONResponse(dataclasses.asdict(found))

    async def answer(self, request: Request) -> Response:
        """Stream the answer to a dialogue, or the two answers to the next message of a conversation."""
        body = await frame.read_json(request)
        person = await run_in_threadpool(self._worker, request, body)
        name = frame.name(body, "name")
        if sum(key[0] == person.id for key in self._open) >= AT_ONCE or (person.id, name) in self._open:
            raise Denied(429, "chat_busy")
        try:
            question = await self._question(person, name, body)
        except Failure as failure:
            return JSONResponse(_told(failure, person), 502)
        return StreamingResponse(
            self._streamed(person, question),
            headers={"X-Accel-Buffering": "no"},
            media_type="application/x-ndjson",
        )

    async def _question(self, person: Person, name: str, body: dict[str, Any]) -> _Question:
        names = await self._endpoint.models()
        if "assignment" in body:
            message = _dialogue([{"role": "user", "content": body.get("message")}])
            number = frame.assignment(body)
            found = await run_in_threadpool(turns.conversation, self._store, person.id, number)
            pair = random.sample(range(len(names)), 2) if len(names) > 1 else [0, 0]
            return _Question(
                name=name,
                messages=[*found.messages(), *message],
                models=tuple(names[k] for k in sorted(pair)),
                shown=random.sample(range(2), 2),
                chat=number,
            )
        model, most, temperature = body.get("model"), body.get("max_tokens"), body.get("temperature", 1.0)
        if type(model) is not int or not 0 <= model < len(names):
            raise InputError(f"model: expected a number from 0 to {len(names) - 1}")
        if most is not None and (type(most) is not int or not 1 <= most <= LONGEST):
            raise InputError(f"max_tokens: expected a whole number from 1 to {LONGEST}")
        if type(temperature) not in (int, float) or not 0 <= temperature <= 2:
            raise InputError("temperature: expected a number from 0 to 2")
        return _Question(
            name=name,
            messages=_dialogue(body.get("messages")),
            models=(names[model],),
            shown=[0],
            temperature=float(temperature),
            max_tokens=most,
        )

    async def _streamed(self, person: Person, question: _Question) -> AsyncIterator[str]:
        key, queue = (person.id, question.name), asyncio.Queue[tuple[int, Piece | Failure | None]]()
        texts, ends, stopped = [""] * len(question.shown), [""] * len(question.shown), False
        self._open[key] = queue
        pumps = [
            asyncio.create_task(self._pump(queue, n, question, question.models[k]))
            for n, k in enumerate(question.shown)
        ]
        try:
            while not all(ends):
                n, piece = await queue.get()
                if piece is None:  # the person stops it
                    for n, end in enumerate(ends):
                        if not end:
                            ends[n] = "length"
                            yield _line({"n": n, "end": "length"})
                    stopped = True
                elif isinstance(piece, Failure):
                    yield _line(_told(piece, person))
                    return
                elif piece.end:
                    ends[n] = piece.end
                    yield _line({"n": n, "end": piece.end})
                else:
                    texts[n] += piece.text
                    yield _line({"n": n, "text": piece.text})
            if stopped and not any(texts):
                yield _line({"error": "chat_stopped", "message": ""})
            else:
                yield _line(await self._recorded(person, question, texts, ends))
        finally:
            for pump in pumps:
                pump.cancel()
            self._open.pop(key, None)

    async def _pump(self, queue: asyncio.Queue[Any], n: int, question: _Question, model: str) -> None:
        asked = Asked(
            model=model,
            messages=question.messages,
            temperature=question.temperature,
            max_tokens=question.max_tokens,
            seed=secrets.randbits(31),
        )
        try:
            async with contextlib.aclosing(self._endpoint.answer(asked)) as pieces:
                async for piece in pieces:
                    queue.put_nowait((n, piece))
        except Failure as failure:
            queue.put_nowait((n, failure))
        except Exception as error:  # a fault of ours: the page would wait for ever
            queue.put_nowait((n, Failure("malformed", type(error).__name__)))
            raise

    async def _recorded(self, person: Person, question: _Question, texts: list[str], ends: list[str]) -> dict[str, Any]:
        item = question.item([whole(text) for text in texts], [end == "stop" for end in ends])
        try:
            turn = await run_in_threadpool(
                turns.record, self._store, person.id, question.name, item, question.shown, question.chat
            )
        except Refused as error:
            return {"error": error.code, "message": str(error)}
        except sqlite3.Error as error:
            self._frame.report(error)
            return {"error": "disk", "message": str(error)}
        return {"turn": turn}

    async def stop(self, request: Request) -> Response:
        """End an answer where it is; what has come so far is recorded as one that was cut."""
        body = await frame.read_json(request)
        person = await run_in_threadpool(self._frame.person, request, body)
        if queue := self._open.get((person.id, frame.name(body, "name"))):
            queue.put_nowait((-1, None))
        return JSONResponse({"stopped": True})

    def withdraw(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Take back what was said of an answer."""
        turns.withdraw(self._store, self._worker(request, body).id, frame.assignment(body))
        return {"withdrawn": True}

    def better(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Store an answer that a person holds for better than the model's."""
        person, name, seconds = self._worker(request, body), frame.name(body, "submission"), frame.seconds(body)
        item = turns.recorded(self._store, person.id, frame.assignment(body))
        if item.task != "thumb":
            raise InputError("assignment: expected that of one answer")
        answer = forms.checked("demonstrate", 1, {"text": body.get("text"), "edited": 0}, "none")
        better = dataclasses.replace(item, task="demonstrate")
        turn = turns.record(self._store, person.id, f"better/{name}", better, [0])
        return {"label": self._store.submit(person.id, turn, name, answer, seconds)}

    def add(self, request: Request, form: dict[str, str]) -> Response:
        """Add conversations that people are asked to have."""
        person = self._frame.administrator(request, form)
        count, topic = form.get("count", ""), form.get("topic", "").strip()
        if not count.isdecimal() or not 1 <= int(count[:9]) <= _MOST_ADDED:
            raise InputError(f"count={count:.20}: expected a whole number from 1 to {_MOST_ADDED}")
        self._store.add(Item(topic, task="chat", number=secrets.randbits(52)) for _ in range(int(count)))
        with self._store.writer() as db:
            acts.add(db, "chats", person.id, self._store.now(), why=f"{count}: {topic:.80}" if topic else count)
        return RedirectResponse("/admin", 303)

    def _worker(self, request: Request, body: dict[str, Any] | None = None) -> Person:
        """The person who asks, if they may work."""
        person = self._frame.person(request, body)
        self._frame.check_read(person)
        if person.aside:
            raise Denied(403, "aside")
        return person


def _told(failure: Failure, person: Person) -> dict[str, str]:
    """A failure as the page is told of it; its message may name a model, which a labeler does not learn."""
    return {"error": f"chat_{failure.code}", "message": str(failure) if person.role == "administrator" else ""}


def _line(event: dict[str, Any]) -> str:
    return json.dumps(event) + "\n"  # in ASCII: half of a surrogate pair may come before the other


def _dialogue(messages: Any) -> list[dict[str, str]]:
    """The messages of a dialogue, which begins with a system message or the user's, and ends with the user's."""
    if not isinstance(messages, list) or not messages:
        raise InputError("messages: expected a list of messages")
    found = []
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise InputError(f'messages[{n}]: expected {{"role", "content"}}')
        content = forms.text(message.get("content"), f"messages[{n}].content", LONGEST)
        found.append({"role": message["role"], "content": content})
    turns = [message["role"] for message in found[found[0]["role"] == "system" :]]
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise InputError("messages: expected the user's and the assistant's in turn, and one of the user's at the end")
    if not found[-1]["content"].strip():
        raise InputError(f"messages[{len(found) - 1}].content: expected a message, got nothing")
    return found
