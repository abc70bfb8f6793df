"""The pages in a real Chromium: every task by mouse, by touch and by keyboard alone, from the invitation to the export.

Set SCREENSHOTS to a folder, such as docs, to have the pictures of docs/people.md made anew, and AXE to the path of
axe-core's axe.min.js to check the pages for accessibility.
"""

import collections
import dataclasses
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")

from experiments import reward, rounds
from rlhf_jax.data import sources
from rlhf_jax.data.world import World, labelers
from rlhf_jax.people import __main__ as command
from rlhf_jax.people import access, forms
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store
from tests.people import labelling
from tests.people.large import FULL_SIZE
from tests.people.serving import Server, Thread, browsing, serving

ANSWERS = [
    "Plants catch light with chlorophyll and split water with it. The oxygen leaves the plant, and the hydrogen"
    " helps to build sugar from carbon dioxide.\n\nIn short: light + water + carbon dioxide → sugar + oxygen.",
    "It's when plants eat sunlight.",
    "Photosynthesis turns light into food, and it is why there is oxygen to breathe. " * 8,
    "I cannot help with that.",
]
PROMPT = [
    {"role": "system", "content": "You explain things to children of ten."},
    {"role": "user", "content": "How do plants make their own food? Please answer in a few sentences."},
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing() as browser:
        yield browser


class Site:
    """A store with rows to ask about, and the server in front of it."""

    def __init__(self, folder: Path, browser: Any):
        self.db, self.folder, self.browser = folder / "people.db", folder, browser
        self.errors: list[str] = []
        self.server: Any

    def person(self, name: str = "ann", **options: Any) -> Any:
        """A page on which somebody has followed a link of their own."""
        with Store(self.db) as store:
            token = access.invite(store, name)
        page = self.page(**options)
        page.goto(f"{self.server.url}/enter#{token}")
        page.wait_for_url(self.server.url + "/")
        return page

    def page(self, **options: Any) -> Any:
        page = self.browser.new_context(**options).new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda line: self.errors.append(line.text) if "Content Security" in line.text else None)
        return page

    def exported(self, *flags: str) -> list[dict]:
        out = self.folder / "labels.jsonl"
        command.main(["export", "--db", str(self.db), "--out", str(out), *flags])
        return [json.loads(line) for line in out.read_text().splitlines()]

    def add(self, *rows: dict) -> None:
        path = self.folder / "more.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command.main(["import", "--db", str(self.db), "--responses", str(path)])


@pytest.fixture
def site(tmp_path: Path, browser: Any) -> Iterator[Site]:
    """A site without gold and repeats, in which overall ratings are wanted."""
    site = Site(tmp_path, browser)
    with Store(site.db) as store:
        store.set_rules(Rules(ratings="overall", gold_share=0.0, repeat_share=0.0))
    site.add({"prompt": PROMPT, "responses": ANSWERS})
    site.server = Thread(site.db)
    try:
        yield site
        assert not site.errors
    finally:
        for context in browser.contexts:
            context.close()
        site.server.close()


def shown(page: Any) -> list[str]:
    """The answers, in the order of the page."""
    page.wait_for_selector(".card")
    return [text.strip() for text in page.locator(".card .text").all_inner_texts()]


def order(page: Any, answers: list[str]) -> list[int]:
    """The answer that stands in each place."""
    spaceless = ["".join(answer.split()) for answer in answers]
    return [spaceless.index("".join(text.split())) for text in shown(page)]


def drag(page: Any, n: int, target: str) -> None:
    """Drag an answer with the mouse."""
    page.locator(f"#chip-{n}").scroll_into_view_if_needed()
    box, to = page.locator(f"#chip-{n}").bounding_box(), page.locator(target).bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(to["x"] + 60, to["y"] + to["height"] / 2, steps=4)
    page.mouse.up()


def until(page: Any, expression: str) -> None:
    """Wait until an expression holds; Playwright's own way would need a looser policy of the page."""
    holds = f"(() => {{ try {{ return Boolean({expression}) }} catch {{ return false }} }})()"
    for _ in range(500):
        try:
            if page.evaluate(holds):
                return
        except Exception as error:  # one page goes, and the next one comes
            if "context was destroyed" not in str(error):
                raise
        page.wait_for_timeout(20)
    raise AssertionError(f"never: {expression}; the page says {page.inner_text('body')[:2000]}")


def stored(page: Any, done: int) -> None:
    """Wait until the page counts so many answers."""
    until(page, f"document.getElementById('pace-done').textContent === '{done}'")


def picture(page: Any, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(300)
        page.screenshot(path=Path(folder) / f"{name}.png")


def check_access(page: Any) -> None:
    """No violation by axe-core, where it is there."""
    if path := os.environ.get("AXE"):
        page.evaluate(Path(path).read_text())
        found = page.evaluate("axe.run()")
        assert not [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]]


RANKS = [1, 2, 0, 2]  # of ANSWERS
RATED = [5, 3, 7, 2]


def test_a_ranking_by_mouse(site: Site):
    admin = site.page(viewport={"width": 1280, "height": 860})
    admin.goto(f"{site.server.url}/enter#{site.server.token}")
    admin.wait_for_url("**/admin")
    admin.fill("#name", "Ann")
    admin.click("text=Invite")
    link = admin.input_value("#link")
    assert site.server.token not in admin.url and "#" not in admin.url

    page = site.page(viewport={"width": 1440, "height": 900})
    page.goto(f"{site.server.url}/enter#wrong")
    until(page, "document.getElementById('enter-error').textContent.startsWith('This link is not valid')")
    check_access(page)
    admin.fill("#text", "# Be kind\n\n- to *everybody*")
    admin.click("text=Save as a new version")
    page.fill("#token", link)  # or open it
    page.click("text=Enter")
    page.wait_for_url("**/guidelines")
    check_access(page)
    until(page, "document.activeElement.matches('button')")
    page.keyboard.press("Enter")
    page.wait_for_url(site.server.url + "/")
    page.keyboard.press("?")
    page.wait_for_selector("dialog")
    check_access(page)
    page.keyboard.press("Escape")
    places = order(page, ANSWERS)
    assert page.locator(".panel.locked").count() == 1 and page.locator("#chip-0").is_disabled()
    page.click("#submit")
    assert "Rate every answer first" in page.inner_text("#banner")
    for n, k in enumerate(places):
        page.locator(f'#card-{n} .scale label:has(input[value="{RATED[k]}"])').click()
    page.locator("#card-0 summary").click()
    page.locator("#card-0 >> text=Hallucination").click()
    page.click("#submit")
    assert "Give every answer a place" in page.inner_text("#banner")
    at = {k: n for n, k in enumerate(places)}
    drag(page, at[0], '.level[data-place="1"]')
    drag(page, at[1], '.level[data-place="1"]')  # a tie for now
    drag(page, at[3], '.level[data-place="3"]')
    drag(page, at[1], '.level[data-place="3"]')
    drag(page, at[2], '.gap[data-gap="1"]')  # before place 2: all others move down
    assert page.inner_text(f"#badge-{at[2]}") == "#1"
    page.select_option("#confidence", "7")
    page.fill("#note", "a note")
    page.locator(".about summary").click()
    page.locator("text=Ambiguous").click()
    until(page, "document.getElementById('draft').textContent === 'Draft saved'")
    picture(page, "people-rank")
    check_access(page)
    page.click("#theme")
    picture(page, "people-rank-dark")
    check_access(page)
    page.click("#theme")
    page.click("#submit")
    stored(page, 1)
    (row,) = site.exported()
    assert (row["responses"], row["ranks"], row["person"]) == (ANSWERS, RANKS, "Ann")
    assert [rating["overall"] for rating in row["ratings"]] == RATED and row["shown"] == places
    assert row["ratings"][places[0]]["flags"] == ["hallucination"]
    assert (row["confidence"], row["note"], row["prompt_flags"]) == (7, "a note", ["ambiguous"])
    admin.goto(f"{site.server.url}/admin")
    assert "1 of 1 answers" in admin.inner_text("main")
    picture(admin, "people-admin")
    check_access(admin)


def test_a_ranking_by_keyboard_alone(site: Site):
    page = site.person(viewport={"width": 1440, "height": 900})
    places = order(page, ANSWERS)
    press = page.keyboard.press
    for k in places:
        press(str(RATED[k]))
    for k in places:
        press(str([2, 4, 1, 4][k]))
    press("Enter")  # the focus is on the button
    stored(page, 1)
    (row,) = site.exported()
    assert (row["ranks"], [rating["overall"] for rating in row["ratings"]]) == (RANKS, RATED)

    press("u")  # and once more, with other keys
    stored(page, 0)
    press("b")
    n = places[1]
    before = [2, 4, 1, 4][n] if n != 3 and n != 1 else 3  # ties lose their gaps when they are stored
    press("ArrowDown" if before == 1 else "ArrowUp")
    press("n")
    page.keyboard.type("on second thought")
    press("Control+Enter")
    if page.locator("dialog").count() or page.wait_for_timeout(200) or page.locator("dialog").count():
        page.locator("dialog >> text=keep both").press("Enter")
    stored(page, 1)
    (row,) = site.exported()
    assert row["ranks"] != RANKS and row["note"] == "on second thought"


def test_a_ranking_by_touch_on_a_phone(site: Site):
    page = site.person(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    places = order(page, ANSWERS)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for n, k in enumerate(places):
        page.locator(f'#card-{n} .scale label:has(input[value="{RATED[k]}"])').tap()
    picture(page, "people-narrow")
    check_access(page)
    touch = page.context.new_cdp_session(page)

    def at(selector: str) -> dict[str, float]:
        box = page.locator(selector).bounding_box()
        return {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}

    page.locator("#chip-3").tap()  # tap the answer, then the place
    page.locator(f'.level[data-place="{RANKS[places[3]]}"]').tap()
    page.locator("#tray").scroll_into_view_if_needed()
    page.evaluate("scrollBy(0, 200)")
    for n, k in enumerate(places[:3]):
        start, end = at(f"#chip-{n}"), at(f'.level[data-place="{RANKS[k]}"]')
        touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [start]})
        for step in (0.3, 0.7, 1.0):
            point = {axis: start[axis] + step * (end[axis] - start[axis]) for axis in ("x", "y")}
            touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.evaluate("document.getElementById('submit').click()")  # Playwright's tap is lost after such touches
    stored(page, 1)
    assert site.exported()[0]["ranks"] == RANKS


def test_the_other_tasks_by_keyboard_and_by_mouse(site: Site):
    pair = {"prompt": "Greet me.", "responses": ["Hello!", "what"], "task": "compare"}
    best = {"prompt": "Name a cat.", "responses": ["Mia", "Cat", "Dog"], "task": "best"}
    edit = {"prompt": "Why is the sky blue?", "responses": ["The ocean.", "Air scatters blue."], "task": "demonstrate"}
    site.add(*(row | {"overlap": 2} for row in (pair, best, edit, {"prompt": "Say hi."})))
    found: dict[str, list[dict]] = {}
    for name in ("ann", "bob"):
        page = site.person(name)
        keys = name == "ann"
        if name == "ann":  # skip the ranking
            shown(page)
            page.keyboard.press("s")
            page.keyboard.press("2")
        else:
            page.wait_for_selector(".card")
            if page.locator("#task[data-task=rank]").count():
                page.click("#skip")
                page.click("text=I cannot tell")
        page.wait_for_selector("#task[data-task=compare]")
        picture(page, "people-compare")
        check_access(page)
        first = order(page, pair["responses"])[0] == 0
        if keys:
            page.keyboard.press("2" if first else "8")
            page.keyboard.press("Enter")
        else:
            page.locator(".strength label").nth(1 if first else 7).click()
            page.click("#submit")
        page.wait_for_selector("#task[data-task=best]")
        check_access(page)
        n = order(page, best["responses"]).index(0)
        if keys:
            page.keyboard.press(str(n + 1))
            page.keyboard.press("Enter")
        else:
            page.locator(".pick").nth(n).click()
            page.click("#submit")
        page.wait_for_selector("#task[data-task=demonstrate]")
        n = order(page, edit["responses"]).index(1)
        if keys:
            page.keyboard.press("Shift+Tab")
            if n == 0:
                page.keyboard.press("Shift+Tab")
                page.keyboard.press("Shift+Tab")
            page.keyboard.press("Enter")
            page.keyboard.press("Control+End")
            page.keyboard.type(" More than red.")
            page.keyboard.press("Control+Enter")
        else:
            page.locator("text=Edit this one").nth(n).click()
            page.locator("#text").fill("Air scatters blue. More than red.")
            check_access(page)
            page.click("#submit")
        until(page, "!document.querySelector('.card') && document.getElementById('text')")
        page.locator("#text").fill("Hi!")
        page.keyboard.press("Control+Enter")
        stored(page, 5)
        until(page, "document.getElementById('ask').textContent.startsWith('Nothing to do')")
        found[name] = [
            {
                key: row[key]
                for key in ("prompt", "responses", "ranks", "chosen", "rejected", "completion")
                if key in row
            }
            for row in site.exported("--filter", f"person={name}")
        ]
    assert found["ann"] == found["bob"]
    text = "Air scatters blue. More than red."
    assert found["ann"] == [
        {"prompt": "Greet me.", "chosen": "Hello!", "rejected": "what"},
        {"prompt": "Name a cat.", "responses": best["responses"], "ranks": [0, 1, 1]},
        {"prompt": edit["prompt"], "completion": text},
        {"prompt": edit["prompt"], "responses": [text, *reversed(edit["responses"])], "ranks": [0, 1, 2]},
        {"prompt": "Say hi.", "completion": "Hi!"},
    ]


def test_a_draft_survives_a_reload_and_a_lost_connection(site: Site):
    page = site.person()
    places = order(page, ANSWERS)
    for k in places:
        page.keyboard.press(str(RATED[k]))
    page.keyboard.press("2")
    until(page, "document.getElementById('draft').textContent === 'Draft saved'")
    page.evaluate("localStorage.clear()")  # another browser would find the server's
    page.reload()
    page.wait_for_selector("#badge-0:text('#2')")
    assert page.locator(".card input:checked").count() == 4

    page.context.set_offline(True)
    for place in "341":
        page.keyboard.press(place)
    until(page, "document.getElementById('draft').textContent.startsWith('Draft kept')")
    page.context.set_offline(False)
    page.reload()  # what the server has is older
    page.wait_for_selector("#badge-3:text('#1')")
    page.context.set_offline(True)
    page.keyboard.press("Control+Enter")
    until(page, "document.getElementById('banner').textContent.startsWith('No connection')")
    page.context.set_offline(False)
    if not page.locator("dialog").count():
        page.wait_for_selector("dialog, #pace-done:text('1')")
    if page.locator("dialog").count():
        page.click("dialog >> text=keep both")
    stored(page, 1)
    ranks = dict(zip(places, [1, 2, 3, 0], strict=True))
    assert [row["ranks"] for row in site.exported()] == [[ranks[k] for k in range(4)]]


def test_a_contradiction_is_asked_once_and_both_are_stored(site: Site):
    site.add({"prompt": "Once more?", "responses": ANSWERS})
    page = site.person()
    for done in range(2):
        places = order(page, ANSWERS)
        for k in places:
            page.keyboard.press(str(RATED[k]))
        for k in places:
            page.keyboard.press(str(4 - RANKS[k]))
        page.keyboard.press("Enter")
        page.wait_for_selector("dialog")
        assert len(site.exported()) == done
        if done:
            page.click("dialog >> text=keep both")
        else:
            check_access(page)
            page.keyboard.press("Enter")  # the focus is on the button that goes back
            until(page, "!document.querySelector('dialog')")
            page.click("#submit")  # who was asked is not asked again
        stored(page, done + 1)
    for row in site.exported():
        assert [rating["overall"] for rating in row["ratings"]] == RATED and row["ranks"] == [1, 0, 2, 0]


def test_two_tabs(site: Site):
    site.add({"prompt": "Second", "responses": ["a", "b"]})
    page = site.person()
    other = page.context.new_page()
    other.goto(site.server.url)
    assert shown(other) == shown(page)
    other.evaluate("BroadcastChannel.prototype.postMessage = () => {}")  # a tab that hears nothing
    page.evaluate("BroadcastChannel.prototype.postMessage = () => {}")
    for tab in (page, other):
        tab.bring_to_front()
        for k in order(tab, ANSWERS):
            tab.keyboard.press(str(RATED[k]))
        for k in order(tab, ANSWERS):
            tab.keyboard.press(str([2, 4, 1, 4][k]))
        tab.keyboard.press("Enter")
        until(tab, "document.querySelector('.turns')?.textContent.includes('Second')")
    assert "answered this task already" in other.inner_text("#banner")
    assert len(site.exported()) == 1


@pytest.mark.parametrize("reload", [False, True])
def test_a_text_that_comes_too_late_can_be_copied(reload: bool, site: Site):
    """Also one that was sent while the connection was lost, before the page was loaded again."""
    with Store(site.db) as store:
        store.set_rules(Rules(ratings="none", gold_share=0.0, repeat_share=0.0, lease=1.0))
    site.add({"prompt": "Write."})
    page = site.person("ann")
    page.wait_for_selector(".chip")
    page.keyboard.press("s")
    page.keyboard.press("3")
    page.wait_for_selector("#text")
    page.evaluate(
        "{ const real = window.fetch; window.fetch = (path, ...rest) =>"
        " path === '/api/draft' ? new Promise(() => {}) : real(path, ...rest); }"  # no sign of life
    )
    page.locator("#text").fill("A long story.")
    page.wait_for_timeout(1100)
    other = site.person("bob")  # has what ann skipped, and then what she holds no longer
    other.wait_for_selector(".chip")
    other.keyboard.press("s")
    other.keyboard.press("3")
    other.wait_for_selector("#text")
    if reload:
        page.route("**/api/submit", lambda route: route.abort())
    page.keyboard.press("Control+Enter")
    if reload:
        until(page, "document.getElementById('banner').textContent !== ''")
        page.unroute("**/api/submit")
        page.reload()
    page.wait_for_selector("dialog")
    assert "ran out" in page.inner_text("#banner") and page.input_value("dialog textarea") == "A long story."


def disputed(site: Site) -> dict[str, list[int]]:
    """A second item, more disputed than the first, which ann and bob have ordered in their own ways."""
    pair = {"prompt": "Greet me.", "responses": ["Hello!", "what", "<b>Hi</b>"], "overlap": 2}
    site.add(pair, {"prompt": PROMPT, "responses": ANSWERS, "overlap": 2, "round": 1})
    said = {"ann": [0, 2, 1, 3], "bob": [1, 1, 0, 2]}
    with Store(site.db) as store:
        for name in ("somebody else", *said):
            who = labelling.person(store, name)
            if name not in said:
                store.task(who)  # the one that is there already
                continue
            for n in (1, 2):
                task = store.task(who)
                assert task
                texts = pair["responses"] if len(task.responses) == 3 else ANSWERS
                shown = [texts.index(text) for text in task.responses]  # type: ignore[attr-defined]
                ranks = said[name] if len(shown) == 4 else [[0, 1, 2], [2, 1, 0]][name == "bob"]
                ratings = [{"overall": RATED[k]} for k in shown]
                answer = {"ranks": [ranks[k] for k in shown], "ratings": ratings, "confirmed": True}
                if name == "bob":
                    answer |= {"confidence": 6, "note": "The first is a list of steps."}
                store.submit(who, task.id, f"submission-{n}", answer, 30.0)
    return said


def test_an_administrator_decides_by_keyboard_alone_and_by_mouse(site: Site):
    said = disputed(site)
    page = site.page(viewport={"width": 1440, "height": 900})
    page.goto(f"{site.server.url}/enter#{site.server.token}")
    page.wait_for_url("**/admin")
    page.goto(f"{site.server.url}/admin/agreement")
    until(page, "document.querySelector('.measures .everybody')")
    picture(page, "people-agreement")
    check_access(page)
    page.goto(f"{site.server.url}/admin/adjudication")
    until(page, "document.querySelectorAll('.listed tbody tr').length === 2")
    check_access(page)

    page.focus(".start")
    page.keyboard.press("Enter")
    page.wait_for_selector(".chip")
    assert "2 people agree to 0 %" in page.inner_text("#ask")  # the most disputed first
    shown(page)
    page.keyboard.press("?")
    assert "go to the orders to take" in page.inner_text("dialog")
    page.keyboard.press("Escape")
    for place in "213":
        page.keyboard.press(place)
    page.keyboard.press("Enter")  # the focus is on the button
    until(page, "document.querySelector('.turns').textContent.includes('plants')")
    places = order(page, ANSWERS)
    assert page.locator(".orders tbody th").all_inner_texts() == ["ann", "bob"]
    letters = [["ABCD"[places.index(k)] for k in range(4) if said["bob"][k] == place] for place in range(3)]
    cells = [page.locator(".orders tbody tr").nth(1).locator("td").nth(1 + place) for place in range(3)]
    assert [sorted(cell.locator(".letter").all_inner_texts()) for cell in cells] == [sorted(one) for one in letters]
    picture(page, "people-adjudicate")
    check_access(page)
    page.click("#theme")
    page.wait_for_timeout(200)  # colours change slowly
    check_access(page)
    page.click("#theme")

    page.locator(".take").nth(1).click()  # bob's order, as it is
    until(page, "document.querySelector('#badge-0').textContent !== ''")
    page.click("#submit")
    until(page, "document.getElementById('ask').textContent.startsWith('There is nothing to decide')")
    rows = site.exported("--filter", "adjudicated=only")
    assert [row["decided_by"] for row in rows] == ["administrator"] * 2
    assert rows[1]["ranks"] == said["bob"] and [one["overall"] for one in rows[1]["ratings"]] == RATED
    assert "taken" in rows[1] and "taken" not in rows[0] and sorted(rows[0]["ranks"]) == [0, 1, 2]

    page.keyboard.press("u")  # and now ann's, by keyboard, with one change
    page.wait_for_selector(".orders")
    assert page.inner_text("#badge-0") == f"#{said['bob'][places[0]] + 1}"
    page.keyboard.press("t")
    page.keyboard.press("Enter")
    until(page, f"document.querySelector('#badge-0').textContent === '#{said['ann'][places[0]] + 1}'")
    page.keyboard.press("abcd"[places.index(1)])
    page.keyboard.press("4")
    page.keyboard.press("Control+Enter")
    until(page, "document.getElementById('ask').textContent.startsWith('There is nothing to decide')")
    rows = site.exported("--filter", "adjudicated=only")
    assert rows[1]["ranks"] == [0, 2, 1, 2] and "taken" not in rows[1]
    page.goto(f"{site.server.url}/admin/adjudication")
    assert page.locator("text=administrator").count() >= 2
    check_access(page)
    page.locator("button.danger").first.click()
    until(page, "document.querySelectorAll('table').length === 2")

    narrow = page.context.new_page()
    narrow.set_viewport_size({"width": 360, "height": 740})
    for path in ("/admin/agreement", "/admin/adjudication", "/admin/adjudicate"):
        narrow.goto(site.server.url + path)
        narrow.wait_for_timeout(300)
        assert narrow.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        check_access(narrow)
    narrow.close()


HOSTILE = [
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><style>body{display:none}</style>",
    "\u202eevil\u202c \u2066x \u0000\u0007 \u200b zero",
    "x" * 1_000_000,
    "</script><script>window.pwned = 3</script><!-- \"' ]]> {{ 7 * 7 }} javascript:alert(1)",
]


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
    assert any("U+202E" in text and "U+0000" in text for text in texts)
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


def test_the_page_goes_on_when_the_server_was_killed(site: Site):
    site.add({"prompt": "Second", "responses": ["a", "b"]})
    process = Server(site.db)  # beside the one in a thread
    site.server.url = process.url
    page = site.person()
    for k in order(page, ANSWERS):
        page.keyboard.press(str(RATED[k]))
    for k in order(page, ANSWERS):
        page.keyboard.press(str([2, 4, 1, 4][k]))
    process.kill()
    page.keyboard.press("Enter")
    until(page, "document.getElementById('banner').textContent.startsWith('No connection')")
    with serving(site.db, port=process.port) as again:
        until(page, "document.querySelector('.turns')?.textContent.includes('Second')")
        assert [row["ranks"] for row in site.exported()] == [RANKS]
    said = "".join(process.said + again.said)
    assert said.count("enter#") == 2 and said.count("\n") == 2  # nothing but the administrator's two links


def label(page: Any, ranks: Callable[[list[str]], list[int]]) -> None:
    """Rank the answers on a page by keys; the ratings say the same."""
    before = page.inner_text(".turns")
    done = int(page.inner_text("#pace-done"))
    texts = shown(page)
    places = ranks(texts)
    for rank in places:
        page.keyboard.press(str(max(1, 7 - rank)))
    for rank in places:
        page.keyboard.press(str(rank + 1))
    page.keyboard.press("Enter")
    stored(page, done + 1)
    assert before


def test_simulated_labelers_drive_the_page(done: tuple[Any, dict], site: Site):
    """The export is what they would have written, and the reward model the same as from their file, to the bit."""
    count = 60 if FULL_SIZE else 10
    world = World.generate(0)
    people = labelers.labelers(seed=1)
    rows = list(labelers.rankings(world, count, seed=1, people=people))
    rng = random.Random(0)
    with Store(site.db) as store:
        store.set_rules(Rules(ratings="overall", gold_share=0.0, repeat_share=0.0))
    site.person("somebody else")  # has the task that is there already
    wanted = []
    for row in rows:  # each is ranked by whoever asks first
        rng.shuffle(row["responses"])
        wanted.append({"prompt": row["prompt"], "responses": row["responses"]})
    site.add(*wanted)
    pages = [site.person(f"labeler {person.id}") for person in people]
    sent = 0
    while sent < count:
        for person, page in zip(people, pages, strict=True):
            until(page, "!document.querySelector('#ask').textContent.startsWith('Loading')")
            if sent == count:
                break
            text = page.inner_text(".turns .turn:last-child .text")
            number = int(page.inner_text("#pace-done"))
            label(page, lambda texts, text=text, person=person: person.rank(world, text, texts, 1))  # type: ignore[misc]
            assert int(page.inner_text("#pace-done")) == number + 1
            sent += 1
    exported = site.exported()
    assert len(exported) == count
    for row in exported:
        person = people[int(row["person"].split()[-1])]
        assert row["ranks"] == person.rank(world, row["prompt"][-1]["content"], row["responses"], 1)
    assert {len(row["responses"]) for row in exported} <= set(range(4, 10))
    assert len({row["person"] for row in exported}) == 5
    by_item = sorted(exported, key=lambda row: row["item"])
    assert [{key: row[key] for key in ("prompt", "responses")} for row in by_item] == wanted
    path = site.folder / "labels.jsonl"
    read = [
        list(sources.rows(spec, "rankings", data_dir=site.folder / "data")) for spec in (str(path), f"people:{site.db}")
    ]
    assert read[0] == read[1] and len(read[0]) == count
    assert set(forms.SCALES[:1]) == set(exported[0]["ratings"][0])
    written = site.folder / "written.jsonl"
    with written.open("w") as file:
        for row in exported:
            person = people[int(row["person"].split()[-1])]
            ranks = person.rank(world, row["prompt"][-1]["content"], row["responses"], 1)
            file.write(json.dumps({"prompt": row["prompt"], "responses": row["responses"], "ranks": ranks}) + "\n")
    cfg, _ = done
    learnt = dataclasses.replace(
        cfg.reward, init=cfg.out / "sft" / "model", data_dir=site.folder / "data", held_out=None
    )
    weights = []
    for name, data in {"page": f"people:{site.db}", "file": str(written)}.items():
        reward.main(dataclasses.replace(learnt, data=data, out=site.folder / name))
        weights.append((site.folder / name / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_rounds_through_the_page(done: tuple[Any, dict], site: Site):
    """Labels through the page, reward model, PPO, and the next round's answers on the page, which shows them itself."""
    cfg, _ = done
    site.person("somebody else")  # has the task that is there already
    config = rounds.Config(
        out=site.folder / "rounds",
        data_dir=cfg.out / "data",
        init=cfg.out / "sft" / "model",
        rounds=2,
        rank=dataclasses.replace(cfg.rank, prompts=8, held_out=2, most=5, overlap=4, db=site.db),
        reward=cfg.reward,
        ppo=cfg.ppo,
        evaluate=cfg.evaluate,
    )
    results: list[dict] = []
    run = threading.Thread(target=lambda: results.append(rounds.main(config)))
    run.start()
    pages = [site.person(f"labeler {n}") for n in range(5)]
    while run.is_alive():
        for page in pages:
            page.wait_for_timeout(50)
            if page.locator(".card").count():
                label(page, lambda texts: list(range(len(texts))))
    run.join()
    assert len(results) == 1 and len(results[0]["online"]) == 2
    exported = [row for row in site.exported() if row["round"]]
    assert [row["round"] for row in exported] == [1] * 16 + [2] * 16  # 8, and 2 by four people each
    for row in exported:
        assert row["ranks"] == [row["shown"].index(k) for k in range(len(row["shown"]))]
        answered = config.init if row["round"] == 1 else config.out / "online" / "round1" / "ppo" / "model"
        assert set(row["models"]) == {str(answered)}
    lines = (config.out / "online" / "labels.jsonl").read_text().splitlines()
    known = [(row["prompt"], row["responses"], row["ranks"], row["person"]) for row in exported]
    for line in lines:
        row = json.loads(line)
        assert (row["prompt"], row["responses"], row["ranks"], row["labeler"]) in known
    assert len(lines) == 2 * 8
    until(pages[0], "document.getElementById('ask').textContent.startsWith('Nothing to do')")


def test_three_people_at_once_by_mouse(site: Site):
    """They take turns, so that all hold a task at the same time; no item has more answers than are wanted of it."""
    with Store(site.db) as store:
        store.set_rules(Rules(ratings="none", gold_share=0.0, repeat_share=0.0))
    site.add({"prompt": "of all", "responses": ["a", "b"], "overlap": 3})
    site.add(*({"prompt": f"of one: {n}", "responses": [f"{n} a", f"{n} b"]} for n in range(5)))
    pages = {name: site.person(name, viewport={"width": 1280, "height": 860}) for name in ("ann", "ben", "cleo")}
    for done in range(1, 4):
        for page in pages.values():
            for n in range(len(shown(page))):
                drag(page, n, '.level[data-place="1"]')
        for page in pages.values():
            page.click("#submit")
        for page in pages.values():
            stored(page, done)
    answered = collections.Counter((json.dumps(row["prompt"]), row["person"]) for row in site.exported())
    assert set(answered.values()) == {1} and len(answered) == 9
    assert sorted(collections.Counter(prompt for prompt, _ in answered).values()) == [1] * 6 + [3]
