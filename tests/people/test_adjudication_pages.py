"""Adjudication in a real Chromium: an administrator decides where people disagree."""

import pytest

pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")

from rlhf_jax.people.store import Store
from tests.people import labelling
from tests.people.browsing import ANSWERS, PROMPT, RATED, Site, check_access, order, picture, shown, until


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
    page.goto(f"{site.server.url}/admin/adjudication")
    until(page, "document.querySelectorAll('.listed tbody tr').length === 2")
    check_access(page)

    page.focus(".start")
    page.keyboard.press("Enter")
    page.wait_for_selector(".chip")
    assert "2 people agree to 0 %" in page.inner_text("#ask")  # the most disputed first
    shown(page)
    page.keyboard.press("?")
    assert "go to the orders to take" in page.inner_text("dialog[open]")
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
