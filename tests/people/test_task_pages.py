"""Every task in a real Chromium: by mouse, by touch and by keyboard alone; in Chinese; with hostile text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("httpx2", reason="needs the extra people: pip install -e .[people]")
pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")

from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store
from tests.people import browsing, labelling
from tests.people.browsing import HOSTILE, Site, check_access, drag, order, picture, shown, stored, until
from tests.people.endpoints import Stub


class Mouse:
    """Somebody at a page who has nothing but a mouse, and types what is to be written."""

    options: ClassVar[dict[str, Any]] = {"viewport": {"width": 1280, "height": 860}}

    def __init__(self, page: Any):
        self.page = page

    def press(self, selector: str) -> None:
        self.page.locator(selector).click()

    def write(self, selector: str, text: str) -> None:
        """Write a text in the place of what is there."""
        self.press(selector)
        self.page.keyboard.press("Control+a")
        self.page.keyboard.type(text)

    def choose(self, selector: str, n: int) -> None:
        """Choose option n of those that the digits choose."""
        self.press(f":nth-match({selector}, {n + 1})")

    def rate(self, n: int, rating: int) -> None:
        self.press(f"#card-{n} .scale label:nth-child({rating})")

    def place(self, n: int, place: int) -> None:
        drag(self.page, n, f'.level[data-place="{place}"]')


class Touch(Mouse):
    """Somebody at a phone."""

    options: ClassVar[dict[str, Any]] = {
        "viewport": {"width": 390, "height": 844},
        "has_touch": True,
        "is_mobile": True,
    }

    def press(self, selector: str) -> None:
        self.page.locator(selector).tap()

    def place(self, n: int, place: int) -> None:
        self.press(f"#chip-{n}")
        self.press(f'.level[data-place="{place}"]')


class Keys(Mouse):
    """Somebody who has no more than a keyboard, which goes from one thing to the next."""

    def focus(self, selector: str) -> None:
        element = self.page.locator(selector).element_handle()
        for _ in range(100):
            way = element.evaluate(
                "(to) => { const at = document.activeElement; return at === to ? '' :"
                " at.compareDocumentPosition(to) & Node.DOCUMENT_POSITION_PRECEDING ? 'Shift+Tab' : 'Tab' }"
            )
            if not way:
                return
            self.page.keyboard.press(way)
        raise AssertionError(f"no key leads to {selector}")

    def press(self, selector: str) -> None:
        self.focus(selector)
        self.page.keyboard.press("Enter")

    def write(self, selector: str, text: str) -> None:
        self.focus(selector)
        self.page.keyboard.press("Control+a")
        self.page.keyboard.type(text)

    def choose(self, selector: str, n: int) -> None:
        self.page.keyboard.press(str(n + 1))

    def rate(self, n: int, rating: int) -> None:
        self.page.keyboard.press("abcd"[n])
        self.page.keyboard.press(str(rating))

    def place(self, n: int, place: int) -> None:
        self.page.keyboard.press("abcd"[n])
        self.page.keyboard.press(str(place + 1))


RANK = {"prompt": "Name a dog.", "responses": ["Rex", "Dog", "Cat"]}
PAIR = {"prompt": "Greet me.", "responses": ["Hello!", "what"], "task": "compare"}
BEST = {"prompt": "Name a cat.", "responses": ["Mia", "Cat", "Dog"], "task": "best"}
EDIT = {"prompt": "Why is the sky blue?", "responses": ["The ocean.", "Air scatters blue."], "task": "demonstrate"}
FRESH = {"prompt": "Say hi.", "task": "demonstrate"}
THUMB = {"prompt": "Say yes.", "responses": ["Yes!"], "task": "thumb"}
ARENA = {"prompt": "Count to two.", "responses": ["one, two", "1"], "models": ["a/model", "b/model"], "task": "arena"}
TALK = {"prompt": "Ask about the weather.", "task": "chat"}
TASKS = (RANK, PAIR, TALK, BEST, EDIT, FRESH, THUMB, ARENA)


@pytest.fixture
def every(tmp_path: Path, browser: Any, stub: Stub, served: tuple[Stub, str]) -> Iterator[Site]:
    """A site that asks every task of three people, with models to talk to."""
    rules = Rules(ratings="overall", gold_share=0.0, repeat_share=0.0, turns=1)
    with browsing.site(tmp_path, browser, rules, served[1]) as site:
        site.add(*(row | {"overlap": 3} for row in TASKS))
        yield site


def answer(hand: Mouse, kind: str) -> None:
    """Answer the task that is on the page, as everybody here does."""
    page = hand.page
    if kind == "rank":
        places = order(page, RANK["responses"])
        for n, k in enumerate(places):
            hand.rate(n, 7 - 2 * k)
        for n, k in enumerate(places):
            hand.place(n, k)
    elif kind == "compare":
        hand.choose(".strength label", [1, 7][order(page, PAIR["responses"]).index(0)])
    elif kind == "best":
        hand.choose(".pick", order(page, BEST["responses"]).index(0))
    elif kind == "thumb":
        hand.choose(".strength label", 0)
    elif kind == "arena":
        hand.choose(".strength label", order(page, ARENA["responses"]).index(0))
    elif kind == "demonstrate" and page.locator(".card").count():
        hand.press(f"#card-{order(page, EDIT['responses']).index(1)} .edit-this")
        page.keyboard.press("Control+End")
        page.keyboard.type(" More than red.")
    elif kind == "demonstrate":
        hand.write("#text", "Hi!")
    elif kind == "chat":
        hand.write("#message", "Will it rain?")
        hand.press("#send")
        page.wait_for_selector(".strength")
        hand.choose(".strength label", [0, 7]["ada" in shown(page)[1]])
        hand.press("#choose")
        stored(page, 3)  # the turn; what ends the conversation comes after it
        page.wait_for_selector("#message")


def converse(hand: Mouse, site: Site) -> None:
    """Talk to a model, judge what it says, write something better, and have it answer anew."""
    page = hand.page

    def until_answered(text: str, count: int = 1) -> None:
        said = "[...document.querySelectorAll('.message.assistant')].filter((one) => one.querySelector('.acts'))"
        until(page, f"{said}.length === {count} && {said}.at(-1).innerText.includes({text!r})")

    hand.press("nav a[href='/chat']")
    until(page, "document.getElementById('model')?.options.length === 2")
    hand.write("#message", "one")
    hand.press("#send")
    until_answered("ada heard: one")
    hand.press(".thumb.down")
    hand.press(".thumb.up")
    until(page, "document.querySelector('.thumb.up').ariaPressed === 'true'")
    hand.press("button.edit")
    hand.write("#edited", "two")
    hand.press(".rewrite .done")
    until_answered("ada heard: two")
    hand.press("button.better")
    hand.write("#edited", "Mine.")
    hand.press(".rewrite .done")
    until_answered("Mine.")
    hand.press("button.again")
    until_answered("ada heard: two")
    hand.write("#message", "three")
    hand.press("#send")
    until_answered("ada heard: three", 2)
    until(page, "document.getElementById('stop').hidden")


def disagree(site: Site, count: int) -> None:
    """Have two people order the answers to some items in opposite ways."""
    site.add(*({"prompt": f"Disputed {n}.", "responses": ["a", "b"], "overlap": 2} for n in range(count)))
    with Store(site.db) as store:
        for name in ("carl", "dora"):
            who = labelling.person(store, name)
            while task := store.task(who):
                ranks = [int((text == "a") == (name == "carl")) for text in task.responses]
                said: dict[str, Any] = {"ranks": ranks, "ratings": [{"overall": 4}] * 2}
                store.submit(who, task.id, f"submission-{task.id}", said, 30.0)


def decide(hand: Mouse, site: Site, done: int) -> None:
    """Take the order of one of two people who disagree."""
    page = hand.page
    page.goto(f"{site.server.url}/enter#{site.server.token}")
    page.wait_for_url("**/admin")
    hand.press("a[href='/admin/adjudication']")
    hand.press(".start")
    until(page, "document.querySelector('.turns')?.textContent.includes('Disputed')")
    hand.press("tr:has(th:text('dora')) .take")
    until(page, "document.getElementById('badge-0').textContent !== ''")
    hand.press("#submit")
    stored(page, done + 1)


def told(rows: list[dict]) -> list[dict]:
    """What rows say, without who said it, when and in which order."""
    known = ("prompt", "responses", "ranks", "ratings", "chosen", "rejected", "verdict", "label", "response",
             "completion", "messages")  # fmt: skip
    found = [{key: row[key] for key in known if type(row.get(key)) not in (type(None), int)} for row in rows]
    return sorted(found, key=str)


def test_every_task_by_mouse_by_touch_and_by_keyboard_alone(every: Site):
    found: dict[str, list[dict]] = {}
    hands = []
    for kind in (Mouse, Touch, Keys):
        page = every.person(kind.__name__, **kind.options)
        hand = kind(page)
        for done in range(len(TASKS)):
            page.wait_for_selector("#task[data-task]")
            task = page.get_attribute("#task", "data-task")
            if kind is Mouse:
                check_access(page)
                if task == "compare":
                    picture(page, "people-compare")
            answer(hand, task)
            assert page.get_attribute("#submit", "class") == ("" if task == "chat" else "primary")
            hand.press("#submit")
            stored(page, done + 1 + (done >= TASKS.index(TALK)))
        converse(hand, every)
        found[kind.__name__] = told(every.exported("--filter", f"person={kind.__name__}"))
        hands.append(hand)
    disagree(every, len(hands))
    for n, hand in enumerate(hands):
        decide(hand, every, n)
    assert found["Mouse"] == found["Touch"] == found["Keys"]
    said = found["Keys"]
    text = "Air scatters blue. More than red."
    rows: list[dict[str, Any]] = [
        {"prompt": "Greet me.", "chosen": "Hello!", "rejected": "what"},
        {"prompt": "Name a cat.", "responses": BEST["responses"], "ranks": [0, 1, 1]},
        {"prompt": EDIT["prompt"], "completion": text},
        {
            "prompt": EDIT["prompt"],
            "responses": [text, *reversed(EDIT["responses"])],
            "ranks": [0, 1, 2],
        },
        {"prompt": "Say hi.", "completion": "Hi!"},
        {"prompt": "Say yes.", "response": "Yes!", "label": True},
    ]
    assert all(row in said for row in rows)
    ranks = {str(row["prompt"]): row["ranks"] for row in said if "ranks" in row}
    assert ranks["Name a dog."] == [0, 1, 2]
    assert {"Mine."} == {row["completion"] for row in said if "two" in str(row.get("prompt")) and "completion" in row}
    decided = every.exported("--filter", "adjudicated=only")
    assert sorted((row["prompt"], row["ranks"]) for row in decided) == [(f"Disputed {n}.", [0, 1]) for n in range(3)]


def test_hostile_text_runs_nothing_and_leaves_the_page_standing(site: Site):
    with Store(site.db) as store:
        store.set_rules(Rules(ratings="none", gold_share=0.0, repeat_share=0.0))
    site.add({"prompt": HOSTILE[0] + HOSTILE[1] + HOSTILE[3], "responses": HOSTILE})
    page = site.person("<b onload=alert(1)>")
    page.wait_for_selector(".chip")
    page.keyboard.press("s")
    page.keyboard.press("1")
    until(page, "document.querySelector('.turns').textContent.includes('pwned')")
    assert page.evaluate("window.pwned") is None and page.locator(".cards script, .cards img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    texts = shown(page)
    assert HOSTILE[0] in texts and HOSTILE[3] in texts
    assert any(all(name in text for name in ("U+202E", "U+0000", "U+200B", "U+E0041")) for text in texts)
    assert page.locator("text=Show all 1000000 characters").count() == 1
    for place in "1234":
        page.keyboard.press(place)
    page.keyboard.press("Enter")
    stored(page, 2)
    (row,) = site.exported()
    assert row["responses"] == HOSTILE
    admin = site.page()
    admin.goto(f"{site.server.url}/enter#{site.server.token}")
    admin.wait_for_url("**/admin")
    assert "<b onload=alert(1)>" in admin.inner_text("main") and admin.evaluate("window.pwned") is None


def test_chinese(site: Site):
    page = site.person(locale="zh-CN", viewport={"width": 1440, "height": 900})
    shown(page)
    assert page.inner_text("#submit") == "提交" and page.get_attribute("html", "lang") == "zh-Hans"
    picture(page, "people-chinese")
    check_access(page)
    page.click("text=English")
    until(page, "document.getElementById('submit')?.textContent === 'Submit'")
