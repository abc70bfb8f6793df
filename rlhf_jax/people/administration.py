"""The administrator's pages of progress, people and rules, of the arena's table, and the export."""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Iterator

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from rlhf_jax.errors import InputError
from rlhf_jax.people import access, acts, arena, exchange, frame, guidelines, oversight, progress
from rlhf_jax.people.access import Person
from rlhf_jax.people.frame import Denied, Frame
from rlhf_jax.people.rules import Rules

_LISTED = 20  # acts
_AT_ONCE = 100  # labels of an export that are sent


def routes(shared: Frame) -> list[Route]:
    """The routes of these pages; the last one takes whatever other pages of the administrator do not."""
    pages = Administration(shared)
    return [
        Route("/admin", pages.admin),
        Route("/admin/export", pages.export),
        Route("/admin/arena", pages.arena),
        Route("/admin/{action}", frame.posted(pages.act, frame.read_form), methods=["POST"]),
    ]


class Administration:
    """The handlers of the routes."""

    def __init__(self, shared: Frame):
        self._frame, self._store = shared, shared.store

    def admin(self, request: Request) -> Response:
        """Show progress and people."""
        return self.page(request, self._frame.administrator(request))

    def page(
        self, request: Request, person: Person, message: str = "", invited: str = "", status: int = 200
    ) -> Response:
        """The page of progress and people, with a message of what went wrong, or the link of who was invited."""
        notes = [note for each in self._frame.notes for note in each()]
        with self._store.reader() as db:
            overview, history = progress.overview(db, time.time()), acts.newest(db, _LISTED)
            if not self._frame.talks() and (waiting := progress.wanted(db, "chat")):
                notes.append(("chats_wait", waiting))
        response = self._frame.page(
            request,
            "admin.html",
            person,
            overview=overview,
            notes=notes,
            history=history,
            at=lambda moment: time.strftime("%Y-%m-%d %H:%M", time.localtime(moment)),
            rules=self._store.rules(),
            guidelines=guidelines.newest(self._store),
            message=message,
            invited=invited,
        )
        response.status_code = status
        return response

    def act(self, request: Request, form: dict[str, str]) -> Response:
        """Do what a form of the administrator's page asks for."""
        person, store = self._frame.administrator(request, form), self._store
        number = int(form["person"]) if form.get("person", "").isdecimal() else -1
        match request.path_params["action"]:
            case "invite":
                role: access.Role = "administrator" if form.get("role") == "administrator" else "labeler"
                token = access.invite(store, form.get("name", ""), role, person.id)
                base = str(request.base_url).rstrip("/")
                return self.page(request, person, invited=f"{base}/enter#{token}")
            case "revoke" if number != person.id:
                access.revoke(store, number, person.id)
            case "aside" if number != person.id:
                store.set_aside(number, "by the administrator", person.id)
            case "restore":
                store.restore(number, person.id)
            case "guidelines":
                guidelines.add(store, form.get("text", ""), person.id)
            case "rules":
                store.set_rules(_rules(store.rules(), form), person.id)
            case _:
                raise Denied(404, "missing")
        return RedirectResponse("/admin", 303)

    def export(self, request: Request) -> Response:
        """Send the labels as JSON Lines."""
        self._frame.administrator(request)
        wanted = _wanted(request)
        with self._store.reader() as db:  # nothing can be said once the file has begun
            exchange.check(db, wanted)

        def lines() -> Iterator[str]:
            with self._store.reader() as db:
                rows = exchange.labels(db, wanted)
                while some := list(itertools.islice(rows, _AT_ONCE)):
                    yield "".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in some)

        headers = {"Content-Disposition": 'attachment; filename="labels.jsonl"'}
        return StreamingResponse(lines(), headers=headers, media_type="application/x-ndjson")

    def arena(self, request: Request) -> Response:
        """Show how the models of an arena fare, by the votes that a filter in the address selects."""
        person = self._frame.administrator(request)
        with self._store.reader() as db:
            table = arena.table(arena.read(db, _wanted(request)))
        live = f"/admin/arena?{request.url.query}"
        agreed = oversight.three_ways(table.agreement)
        return self._frame.page(request, "arena.html", person, table=table, agreed=agreed, live=live)


def _wanted(request: Request) -> exchange.Filter:
    """The filter of labels that stands in the address."""
    return exchange.Filter.parse(request.url.query.replace("+", "%20"))


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
