"""The administrator's pages of agreement: how far people agree, and the queue of items that somebody has to decide."""

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from rlhf_jax.people import adjudication, forms, frame
from rlhf_jax.people.agreement import Agreement, Estimate, Share, Undefined
from rlhf_jax.people.consensus import Measures, Snapshot, Watch
from rlhf_jax.people.frame import Frame
from rlhf_jax.people.leases import Refused

_LISTED = 50  # items of the queue, and decisions
_SOON = 0.5  # seconds that a page waits for numbers that are fresh
_FIRST = 30.0  # seconds that the queue waits for its first numbers
_SNIPPET = 120  # characters


@dataclasses.dataclass(frozen=True)
class Cell:
    """A measure as a table shows it."""

    text: str = ""
    interval: str = ""
    title: str = ""
    why: str = ""  # the name of the reason for which there is no number


def routes(shared: Frame) -> list[Route]:
    """The routes of these pages."""
    pages = Oversight(shared)
    return [
        Route("/admin/agreement", pages.agreement),
        Route("/admin/adjudication", pages.queue),
        Route("/admin/adjudicate", pages.decide),
        Route("/admin/withdraw", frame.posted(pages.withdraw, frame.read_form), methods=["POST"]),
        Route("/api/adjudicate/task", pages.task),
        Route("/api/adjudicate/draft", frame.posted(pages.draft), methods=["POST"]),
        Route("/api/adjudicate/submit", frame.posted(pages.submit), methods=["POST"]),
        Route("/api/adjudicate/undo", frame.posted(pages.undo), methods=["POST"]),
    ]


class Oversight:
    """The handlers of the routes."""

    def __init__(self, shared: Frame):
        self._frame, self._store, self._watch = shared, shared.store, Watch(shared.store)

    def agreement(self, request: Request) -> Response:
        """Show how far people agree."""
        person = self._frame.administrator(request)
        found = self._watch.latest(_SOON)
        rows = [("", found.everybody), *found.people.items()] if found else []
        return self._frame.page(
            request,
            "agreement.html",
            person,
            rows=[(name, cells(measures)) for name, measures in rows],
            scales=forms.SCALES,
            computed=found and {"at": time.strftime("%H:%M:%S", time.localtime(found.at)), "took": f"{found.took:.2f}"},
        )

    def queue(self, request: Request) -> Response:
        """Show the queue and what was decided."""
        person, found = self._frame.administrator(request), self._watch.latest(_SOON)
        listed = []
        with self._store.reader() as db:
            items, shares = _left(found, adjudication.settled(db, person.id))
            for item, share in zip(items[:_LISTED].tolist(), shares[:_LISTED].tolist(), strict=True):
                names = [order.person for order in adjudication.orders(db, item)]
                prompt = db.execute("SELECT prompt FROM items WHERE id = ?", (item,)).fetchone()["prompt"]
                listed.append({"item": item, "share": share, "names": names, "prompt": _snippet(json.loads(prompt))})
            decided = [
                {
                    "label": decision.label,
                    "name": decision.person,
                    "at": time.strftime("%Y-%m-%d %H:%M", time.localtime(decision.at)),
                    "prompt": _snippet(decision.prompt),
                }
                for decision in adjudication.decisions(db, _LISTED)
            ]
        return self._frame.page(
            request,
            "adjudication.html",
            person,
            ready=found is not None,
            left=len(items),
            listed=listed,
            decided=decided,
        )

    def decide(self, request: Request) -> Response:
        """Show the page on which items are decided."""
        person = self._frame.administrator(request)
        boot = self._frame.boot(request, person) | {
            "person": f"{person.id}/adjudication",  # drafts in the browser are apart from those of other work
            "ratings": "none",
            "nothing": "nothing_to_decide",
            "api": {name: f"/api/adjudicate/{name}" for name in ("task", "draft", "submit", "undo")},
        }
        return self._frame.page(request, "adjudicate.html", person, boot=boot)

    def task(self, request: Request) -> Response:
        """The item that is asked for, or the first of the queue, as JSON."""
        person, wanted = self._frame.administrator(request), request.query_params.get("item", "")
        found = self._watch.latest() or self._watch.latest(_FIRST)
        gone: Refused | None = None
        with self._store.reader() as db:
            left, _ = _left(None if person.aside else found, adjudication.settled(db, person.id))
            pace = adjudication.pace(db, person.id, self._store.now(), len(left))
            items: Iterator[int] = map(int, left)
            if wanted.isdecimal() and len(wanted) < 18 and not person.aside:
                gone = adjudication.refusal(db, int(wanted))
                items = items if gone else itertools.chain([int(wanted)], items)
            # What was found may be older than an answer that somebody took back.
            item = next((item for item in items if adjudication.refusal(db, item) is None), None)
            task = None if item is None else adjudication.task(db, person.id, item)
        return frame.ascii_json(
            {
                "task": task,
                "about": self._frame.about(task["prompt"]) if task else None,
                "gone": gone and gone.code,
                "aside": person.aside,
                "pace": dataclasses.asdict(pace),
            }
        )

    def draft(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Keep a draft."""
        person = self._frame.administrator(request, body)
        adjudication.save_draft(self._store, person.id, frame.assignment(body), body.get("draft") or {})
        return {"saved": True}

    def submit(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Store a decision."""
        person, name = self._frame.administrator(request, body), frame.name(body, "submission")
        item, seconds = frame.assignment(body), frame.seconds(body)
        return {"label": adjudication.decide(self._store, person.id, item, name, body.get("answer"), seconds)}

    def undo(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Withdraw the administrator's last decision."""
        person = self._frame.administrator(request, body)
        return {"undone": True, "item": adjudication.withdraw(self._store, person.id)}

    def withdraw(self, request: Request, form: dict[str, str]) -> Response:
        """Withdraw a decision of the list."""
        person, label = self._frame.administrator(request, form), frame.number(form.get("label", ""), "label")
        with contextlib.suppress(Refused):  # it was withdrawn already
            adjudication.withdraw(self._store, person.id, label)
        return RedirectResponse("/admin/adjudication", 303)


def _left(found: Snapshot | None, settled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The items of the queue and their agreement, lowest first, without those that are settled."""
    if found is None:
        return np.empty(0, np.int32), np.empty(0, np.float32)
    left = ~np.isin(found.items, settled)
    return found.items[left], found.shares[left]


def cells(measures: Measures) -> list[Cell]:
    """The measures in the order of the columns: agreement in three ways, alphas, kappa, with oneself, gold."""
    others = (*measures.alpha.values(), measures.kappa, measures.own, measures.gold)
    return [*three_ways(measures.agreement), *map(_cell, others)]


def three_ways(agreed: Agreement | Undefined) -> list[Cell]:
    """Agreement with ties counted in three ways."""
    if isinstance(agreed, Undefined):
        return [_cell(agreed)] * 3
    only_ties = Undefined("agreement without ties is undefined: every case has a tie", "no_cases")
    return [_cell(one) for one in (agreed.without_ties or only_ties, agreed.ties_as_label, agreed.ties_as_half)]


def _cell(found: Share | Estimate | Undefined) -> Cell:
    match found:
        case Undefined():
            return Cell(why=found.why, title=str(found))
        case Share():
            interval = f"{100 * found.lower:.0f} … {100 * found.upper:.0f}"
            return Cell(f"{100 * found.value:.0f} %", interval, f"n = {found.n}")
    value, lower, upper = (
        f"{number:.2f}".replace("-", "\N{MINUS SIGN}") for number in (found.value, found.lower, found.upper)
    )
    return Cell(value, f"{lower} … {upper}")


def _snippet(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return text if len(text) <= _SNIPPET else text[: _SNIPPET - 1] + "…"
