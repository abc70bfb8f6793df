"""The arena in a real Chromium: by mouse, by touch and by keyboard alone, from the invitation to the table."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")

from rlhf_jax.people import arena
from rlhf_jax.people.items import Item
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store
from tests.people import browsing
from tests.people.browsing import Site, check_access, order, picture, shown, stored, until
from tests.people.labelling import person

PPO = "Plants catch sunlight with their leaves, and make sugar out of water and air with it. The oxygen is left over."
SFT = "Plants eat sunlight."
BASE = "Plants plants are food of plants."
TEXTS = {"runs/ppo/model": PPO, "runs/sft/model": SFT, "runs/base/model": BASE}
PROMPT = "How do plants make their own food?"


@pytest.fixture
def site(tmp_path: Path, browser: Any) -> Iterator[Site]:
    """A site with three battles of three models, each for two people, and one of two equal answers."""
    pairs = (("ppo", "sft"), ("sft", "base"), ("ppo", "base"))
    rows = []
    for n, pair in enumerate(pairs):
        models = [f"runs/{name}/model" for name in pair]
        rows.append({"prompt": f"{PROMPT} ({n})", "responses": [TEXTS[model] for model in models], "models": models})
    rows.append({"prompt": "Again?", "responses": [SFT, SFT + "\n"], "models": ["runs/ppo/model", "runs/sft/model"]})
    with browsing.site(tmp_path, browser, Rules(gold_share=0.0, repeat_share=0.0)) as site:
        site.add(*(row | {"task": "arena", "overlap": 2} for row in rows))
        yield site


def place(page: Any, text: str) -> int:
    return order(page, [text, next(other for other in shown(page) if other != text)]).index(0)


def until_lit(page: Any, *texts: str) -> None:
    """Wait until the cards of these answers alone have the colour of a choice."""
    lit = (
        "[...document.querySelectorAll('.card')].filter((card) => getComputedStyle(card).borderTopColor"
        " === getComputedStyle(document.querySelector('.brand svg')).fill)"
    )
    until(
        page, f"{lit}.map((card) => card.querySelector('.text').textContent).join() === {json.dumps(','.join(texts))}"
    )


def names_nobody(page: Any) -> None:
    """Neither the page nor what the server sends it has a model's name."""
    task = page.evaluate("fetch('/api/task').then((response) => response.text())")
    for said in (page.content(), task):
        assert not re.search(r"runs/|ppo|sft/", said)


def test_from_the_invitation_to_the_table(site: Site):
    admin = site.page(viewport={"width": 1280, "height": 860})
    admin.goto(f"{site.server.url}/enter#{site.server.token}")
    admin.wait_for_url("**/admin")
    admin.fill("#name", "Ann")
    admin.click("text=Invite")
    link = admin.input_value("#link")
    admin.click("text=How the models fare in the arena")
    admin.wait_for_url("**/admin/arena")
    assert admin.inner_text("tbody").count("no battle yet") == 3

    ann = site.page(viewport={"width": 1280, "height": 860})  # by mouse
    ann.goto(link)
    ann.wait_for_selector(".card")
    names_nobody(ann)
    label = ann.locator(".strength label").nth(place(ann, PPO))
    label.click()
    until_lit(ann, PPO)
    picture(ann, "people-arena")
    check_access(ann)
    ann.click("#theme")
    check_access(ann)
    ann.click("#theme")
    ann.click("text=About this prompt")
    ann.locator("text=Ambiguous").click()
    ann.fill("#note", "a note")
    ann.click("#submit")
    stored(ann, 1)
    ann.click("#submit")
    assert "Choose an answer first" in ann.inner_text("#banner")
    ann.locator(".strength label").nth(place(ann, BASE)).click()
    ann.click("#submit")
    stored(ann, 2)
    ann.click("#undo")
    until_lit(ann, BASE)
    ann.locator(".strength label").nth(place(ann, SFT)).click()
    ann.click("#submit")
    stored(ann, 2)
    ann.locator(".strength label").nth(3).click()  # both are bad
    until_lit(ann)
    ann.click("#submit")
    stored(ann, 3)
    assert "word for word" in ann.inner_text("[role=note]") and ann.locator(".strength input:disabled").count() == 2
    check_access(ann)
    ann.locator(".strength label").nth(2).click()
    ann.click("#submit")
    stored(ann, 4)

    bob = site.person("bob")  # by keyboard alone
    better = {"(0)": SFT, "(1)": BASE, "(2)": PPO}
    for done in range(3):  # the third comes first: ann gave it back by her undo
        until(bob, "document.querySelector('.turns')?.textContent.endsWith(')')")
        bob.keyboard.press(str(1 + place(bob, better[bob.inner_text(".turns")[-3:]])))
        bob.keyboard.press("Enter")
        stored(bob, done + 1)
    until(bob, "document.querySelector('.turns').textContent.includes('Again')")
    bob.keyboard.press("1")  # cannot be chosen
    bob.keyboard.press("Control+Enter")
    assert "Choose an answer first" in bob.inner_text("#banner")
    bob.keyboard.press("u")
    until(bob, "document.querySelector('.turns').textContent.includes('(1)')")
    bob.keyboard.press("4")
    bob.keyboard.press("Enter")
    stored(bob, 3)
    bob.keyboard.press("3")
    bob.keyboard.press("Enter")
    stored(bob, 4)

    rows = site.exported()
    assert [(row["verdict"], row["person"]) for row in rows[:2]] == [("first", "Ann"), ("first", "Ann")]
    assert (rows[0]["note"], rows[0]["prompt_flags"]) == ("a note", ["ambiguous"])
    assert [row["verdict"] for row in rows[4:]] == ["first", "second", "bad", "tie"]
    said = "Votes: 8 · people: 2 · battles: 4 · both bad: 2 · two answers of the same text: 2"
    until(admin, f"document.querySelector('.muted').textContent === '{said}'")  # by itself
    with Store(site.db) as store, store.reader() as db:
        found = arena.table(arena.read(db))
    cells = [row.split("\t") for row in admin.locator("tbody").first.inner_text().splitlines()]
    cells = [row for row in (list(filter(None, row)) for row in cells) if row]
    assert [row[0].strip() for row in cells] == [one.name for one in found.standings]
    assert admin.locator("th[title]").first.get_attribute("title") == found.standings[0].model


def test_the_table_of_many_votes(site: Site):
    """Models without a finite strength say so; wide, dark, narrow and in Chinese."""
    with Store(site.db) as store:
        carl = person(store, "carl")
        wins = {("runs/ppo/model", "runs/sft/model"): 9, ("runs/sft/model", "runs/ppo/model"): 4}
        wins |= {("runs/sft/model", "runs/base/model"): 8, ("runs/base/model", "runs/sft/model"): 3}
        wins |= {("runs/ppo/model", "runs/base/model"): 10, ("runs/base/model", "runs/ppo/model"): 2}
        wins |= {(f"runs/{name}/model", "runs/random/model"): 3 for name in ("ppo", "sft", "base")}
        battles = [pair for pair, count in wins.items() for _ in range(count)]
        store.add(Item(f"p {n}", ("better", "worse"), "arena", pair) for n, pair in enumerate(battles))
        n = 0
        while held := store.task(carl):
            answer: dict = {"skip": "other"}
            if str(held.prompt).startswith("p "):
                n += 1
                said = ("first", "second")[held.responses.index("better")]
                answer = {"verdict": ("tie", "bad")[n % 2] if n % 7 == 0 and n <= len(battles) - 9 else said}
            store.submit(carl, held.id, f"submission-{held.id}", answer, 1.0)
    admin = site.page(viewport={"width": 1280, "height": 860})
    admin.goto(f"{site.server.url}/enter#{site.server.token}")
    admin.wait_for_url("**/admin")
    admin.goto(f"{site.server.url}/admin/arena")
    text = admin.inner_text("main")
    assert (
        "not finite: it lost every battle" in text
        and "∞" not in text
        and "nan" not in text.lower()
        and "inf" not in text
    )
    picture(admin, "people-arena-table")
    check_access(admin)
    admin.click("#theme")
    check_access(admin)
    admin.set_viewport_size({"width": 360, "height": 780})
    assert admin.evaluate("document.documentElement.scrollWidth <= innerWidth")
    check_access(admin)
    admin.goto(f"{site.server.url}/admin/arena?round=7")
    assert "No battles yet" in admin.inner_text("main")
    admin.goto(f"{site.server.url}/admin/arena?task=rank")
    assert "an arena counts the votes of its own task alone" in admin.inner_text("[role=alert]")
    admin.goto(f"{site.server.url}/language?to=zh")
    admin.goto(f"{site.server.url}/admin/arena")
    assert "胜率" in admin.inner_text("main")


def test_a_battle_on_a_phone(site: Site):
    page = site.person(viewport={"width": 360, "height": 780}, has_touch=True, is_mobile=True, color_scheme="dark")
    page.wait_for_selector(".card")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    check_access(page)
    page.locator(".strength label").nth(place(page, SFT)).tap()
    picture(page, "people-arena-narrow")
    page.locator("#submit").tap()
    stored(page, 1)
    assert json.dumps(site.exported()[0]["verdict"]) == '"second"'
