"""Rankings in a real Chromium: from the invitation to the export, by mouse, by touch and by keyboard alone."""

import collections
import json

import pytest

pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")

from rlhf_jax.people import guidelines
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store
from tests.people.browsing import (
    ANSWERS,
    RANKS,
    RATED,
    Site,
    check_access,
    drag,
    film,
    order,
    picture,
    shown,
    stored,
    until,
)


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
    admin.fill("#text", "# Be kind\n\n- to *everybody*\n- **plants**: living things" + "\n\nand more" * 60)
    admin.click("text=Save as a new version")
    page.fill("#token", link)  # or open it
    page.click("text=Enter")
    page.wait_for_url("**/guidelines")
    check_access(page)
    until(page, "document.activeElement.matches('button')")
    assert page.evaluate("scrollY") == 0  # they are read from their beginning
    page.keyboard.press("Enter")
    page.wait_for_url(site.server.url + "/")
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    check_access(page)
    digits = page.locator(":is(dt:has-text('7'), dt:has-text('9')) + dd").all_inner_texts()
    assert [text.split(":")[0] for text in digits] == [
        "on a rating",
        "on an answer of the order",
        "on an answer of the order",
        "where there is one choice to make",
    ]
    page.keyboard.press("Escape")
    places = order(page, ANSWERS)
    assert page.locator(".panel.locked").count() == 1 and page.locator("#chip-0").is_disabled()
    assert page.inner_text(".step") == "1 · Rate\n\nEach answer by itself: 1 = very bad, 7 = very good."
    assert page.inner_text(".panel h2") == "2 · Rank"
    assert page.inner_text("#about summary") == "What the guidelines say" and not page.is_visible("#about li")
    page.click("#about summary")
    assert page.inner_text("#about li") == "plants: living things"
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
    assert page.inner_text(f"#badge-{at[2]}") == "#1" and page.locator("#banner").is_hidden()
    page.select_option("#confidence", "7")
    page.fill("#note", "a note")
    page.click("text=About this prompt")
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
    assert admin.locator(".start").count() == 0  # somebody else labels
    assert "1 of 1 answers" in admin.inner_text("main")
    picture(admin, "people-admin")


def test_guidelines_without_a_word_of_the_question_say_so(site: Site):
    page = site.person()
    until(page, "!document.getElementById('task').hidden")
    assert page.is_hidden("#about")  # there are none
    with Store(site.db) as store:
        guidelines.add(store, "- **Anna**: a diver")
    page.reload()
    page.wait_for_url("**/guidelines")
    page.locator("button.primary").press("Enter")
    page.wait_for_url(site.server.url + "/")
    page.click("#about summary")
    assert page.inner_text("#about li") == "Nothing about a person, place or word of this question."
    check_access(page)


def test_a_page_without_tasks_tells_how_far_the_model_is(site: Site):
    page, said = site.page(), []
    pace = {"today": 0, "done": 0, "left": 0, "seconds": 0}
    waiting = lambda done: {"task": None, "aside": None, "pace": pace, "sampling": {"done": done, "prompts": 200}}
    page.route("**/api/task", lambda route: route.fulfill(json=waiting(said[0])))
    page.goto(f"{site.server.url}/enter#{site.server.token}")
    page.wait_for_url("**/admin")
    check_access(page)
    for done, text in ((0, "the first tasks come in about a minute"), (16, "16 of 200 are ready")):
        said[:] = [done]
        page.click(".start") if done == 0 else page.reload()
        until(page, f"document.getElementById('ask').textContent.includes('{text}')")
        assert "New tasks appear here by themselves" in page.inner_text("#resting")
    page.unroute("**/api/task")
    until(page, "document.querySelector('.card')")  # by itself


def test_a_ranking_by_keyboard_alone(site: Site):
    page = site.person(viewport={"width": 1440, "height": 900})
    places = order(page, ANSWERS)
    press = page.keyboard.press
    with film(page, "people-rank") as hold:
        hold(1500)
        for key in [str(RATED[k]) for k in places] + [str([2, 4, 1, 4][k]) for k in places]:
            press(key)
            hold(700)
        hold(1500)
        press("Enter")  # the focus is on the button
        stored(page, 1)
        hold(1500)
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
    if page.locator("dialog[open]").count() or page.wait_for_timeout(200) or page.locator("dialog[open]").count():
        page.locator("dialog[open] >> text=keep both").press("Enter")
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
        page.wait_for_selector("dialog[open]")
        assert len(site.exported()) == done
        if done:
            page.click("dialog[open] >> text=keep both")
        else:
            check_access(page)
            page.keyboard.press("Enter")  # the focus is on the button that goes back
            until(page, "!document.querySelector('dialog[open]')")
            page.click("#submit")  # who was asked is not asked again
        stored(page, done + 1)
    for row in site.exported():
        assert [rating["overall"] for rating in row["ratings"]] == RATED and row["ranks"] == [1, 0, 2, 0]


def test_three_people_at_once_by_mouse(site: Site):
    """They take turns, so that all hold a task at the same time; no item has more answers than are wanted of it."""
    with Store(site.db) as store:
        store.set_rules(Rules(ratings="none", gold_share=0.0, repeat_share=0.0))
    site.add({"prompt": "of all", "responses": ["a", "b"], "overlap": 3})
    site.add(*({"prompt": f"of one: {n}", "responses": [f"{n} a", f"{n} b"]} for n in range(2)))
    pages = {name: site.person(name, viewport={"width": 1280, "height": 860}) for name in ("ann", "ben", "cleo")}
    for done in range(1, 3):
        for page in pages.values():
            for n in range(len(shown(page))):
                drag(page, n, '.level[data-place="1"]')
        for page in pages.values():
            page.click("#submit")
        for page in pages.values():
            stored(page, done)
    answered = collections.Counter((json.dumps(row["prompt"]), row["person"]) for row in site.exported())
    assert set(answered.values()) == {1} and len(answered) == 6
    assert sorted(collections.Counter(prompt for prompt, _ in answered).values()) == [1] * 3 + [3]
