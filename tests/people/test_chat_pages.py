"""Talking to models in a real Chromium: the chat page, and conversations in which the better of two answers goes on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2", reason="needs the extra people: pip install -e .[people]")
pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")

from rlhf_jax.people.rules import Rules
from tests.people import browsing
from tests.people.browsing import HOSTILE, Site, check_access, picture, stored, until
from tests.people.endpoints import Stub

FIRST = "What makes the sky blue? Please explain it to a child."
SECOND = "And why is it red in the evening?"
THIRD = "Thank you! Is that so on Mars as well?"
SAID = {
    FIRST: "Sunlight holds all colours. The air scatters blue light far more than red, so blue comes to us from"
    " everywhere in the sky.\n\nThat is why the sky looks blue wherever you look.",
    SECOND: "In the evening, light comes to us through much more air. The blue is scattered away on its long way, and"
    " what is left is orange and red.",
    THIRD: "Nearly the other way round: fine dust makes the day butterscotch, and the sunset blue.",
}
WORSE = {
    FIRST: "Rayleigh scattering: the cross-section goes with the inverse fourth power of the wavelength.",
    SECOND: "The sky is red in the evening because the sun gets colder. It warms up again at night.",
    THIRD: "Yes.",
}


@pytest.fixture
def site(tmp_path: Path, browser: Any, stub: Stub, served: tuple[Stub, str]) -> Iterator[Site]:
    """A site with models to talk to."""
    rules = Rules(ratings="none", gold_share=0.0, repeat_share=0.0)
    with browsing.site(tmp_path, browser, rules, served[1]) as site:
        yield site


def talking(site: Site, name: str = "ann", **options: Any) -> Any:
    page = site.person(name, **options)
    page.goto(f"{site.server.url}/chat")
    until(page, "document.getElementById('model')?.options.length === 2")
    return page


def answered(page: Any, count: int) -> None:
    """Wait until so many answers of the model are whole."""
    until(page, f"document.querySelectorAll('.message.assistant .acts').length === {count}")


def test_a_chat_by_mouse(site: Site, stub: Stub):
    page = talking(site, viewport={"width": 1280, "height": 900})
    assert page.locator("#model option").all_inner_texts() == ["Model 1", "Model 2"]  # no names
    check_access(page)
    page.select_option("#model", "1")
    page.click("summary")
    page.fill("#system", "You explain things to children.")
    page.fill("#temperature", "0.5")
    page.fill("#tokens", "200")
    check_access(page)
    page.click("summary")
    stub.text = SAID[FIRST]
    page.fill("#message", FIRST)
    page.click("#send")
    answered(page, 1)
    (asked,) = stub.asked
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("bob", 0.5, 200)
    assert asked["messages"][0] == {"role": "system", "content": "You explain things to children."}
    page.click(".thumb.down")
    page.click(".thumb.up")
    until(page, "document.querySelector('.thumb.up').getAttribute('aria-pressed') === 'true'")
    stub.text = SAID[SECOND]
    page.fill("#message", SECOND)
    page.click("#send")
    answered(page, 2)
    picture(page, "people-chat")
    check_access(page)
    page.click("#theme")
    picture(page, "people-chat-dark")
    check_access(page)
    page.click("#theme")

    page.locator("button.better").last.click()
    check_access(page)
    page.fill("#edited", "It has to go through more air.")
    page.click(".rewrite .done")
    until(page, "document.querySelector('.badge')?.textContent === 'your better answer'")
    page.locator("button.edit").last.click()  # another question instead
    page.fill("#edited", "Why is it black at night?")
    stub.text = "There is no sunlight to scatter."
    page.click(".rewrite .done")
    answered(page, 2)
    stub.text = "We are in the shadow of the Earth."
    page.locator("button.again").last.click()
    answered(page, 2)
    until(page, "document.querySelectorAll('.message').length === 4")
    assert [message["role"] for message in stub.asked[-1]["messages"]] == ["system", "user", "assistant", "user"]
    page.reload()
    until(page, "document.getElementById('model')?.options.length === 2")
    assert "shadow of the Earth" in page.inner_text(".talk") and page.input_value("#model") == "1"
    other = page.context.new_page()
    other.goto(page.url)
    answered(other, 2)
    page.bring_to_front()
    page.locator(".thumb.down").last.click()
    until(other, "document.querySelectorAll('.thumb.down[aria-pressed=true]').length === 1")
    other.close()
    until(page, "document.querySelectorAll('.thumb.down[aria-pressed=true]').length === 1")
    page.wait_for_timeout(100)
    page.click("#new")
    assert page.locator(".message").count() == 0
    page.click("#former")
    assert page.locator(".message").count() == 4
    rows = site.exported()
    first = [{"role": "system", "content": "You explain things to children."}, {"role": "user", "content": FIRST}]
    assert [row.get("label") for row in rows if "response" in row] == [True, False]
    assert rows[0]["prompt"] == first and rows[0]["response"] == SAID[FIRST] and rows[0]["models"] == ["bob"]
    assert [row["completion"] for row in rows if "completion" in row] == ["It has to go through more air."]
    (ranking,) = (row for row in rows if "responses" in row)
    assert ranking["responses"] == ["It has to go through more air.", SAID[SECOND]]


def test_a_chat_by_keyboard_alone(site: Site, stub: Stub):
    page = talking(site, locale="zh-CN", viewport={"width": 360, "height": 740})
    press, write = page.keyboard.press, page.keyboard.type
    write("one")
    press("Shift+Enter")
    write("two")
    press("Enter")
    answered(page, 1)
    assert stub.asked[-1]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    check_access(page)
    picture(page, "people-chat-narrow")
    press("Shift+Tab")  # again
    press("Shift+Tab")  # better answer
    press("Enter")
    press("Control+a")
    write("Mine.")
    press("Control+Enter")
    until(page, "document.querySelector('.badge')?.textContent === '您的更好回答'")
    press("ArrowUp")  # what was asked, once more
    press("Control+a")
    write("three")
    press("Enter")
    answered(page, 1)
    until(page, "document.querySelector('.message.assistant').innerText.includes('three')")
    for _ in range(4):
        press("Shift+Tab")
    press("Enter")  # thumb up
    until(page, "document.querySelector('.thumb.up').getAttribute('aria-pressed') === 'true'")
    page.wait_for_timeout(100)
    rows = site.exported()
    assert [row["completion"] for row in rows if "completion" in row] == ["Mine."]
    assert [(row["response"], row["label"]) for row in rows if "response" in row] == [("ada heard: three", True)]


def test_an_answer_is_stopped_or_breaks(site: Site, stub: Stub):
    page = talking(site)
    stub.pause, stub.text = 0.05, "word " * 500
    page.fill("#message", "Go on for ever")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.growing')?.innerText.includes('word word')")
    page.keyboard.press("Escape")
    answered(page, 1)
    assert "cut off" in page.inner_text(".talk") and page.locator(".thumb").count() == 2
    stub.pause, stub.text, stub.fault = 0.0, "{model} heard: {message}", "cut"
    page.fill("#message", "Break")
    page.click("#send")
    page.wait_for_selector(".failed")
    check_access(page)
    assert "connection broke" in page.inner_text(".failed") and "ada" in page.locator(".said").last.inner_text()
    assert "ada" not in page.inner_text(".failed")
    stub.fault = ""
    page.click(".retry")
    until(page, "document.querySelectorAll('.message')[3].innerText.includes('heard: Break')")
    assert page.locator(".failed").count() == 0
    stub.fault = "long"
    page.fill("#message", "More")
    page.click("#send")
    page.wait_for_selector(".failed")
    assert "longer than the model can hold" in page.inner_text(".failed")
    stub.fault = ""
    page.click(".retry")
    answered(page, 3)
    page.context.set_offline(True)
    page.fill("#message", "Offline")
    page.click("#send")
    page.wait_for_selector(".failed")
    page.context.set_offline(False)
    page.click(".retry")
    answered(page, 4)
    stub.pause, stub.text = 0.05, "word " * 500
    page.fill("#message", "Reload")
    page.click("#send")
    until(page, "document.querySelector('.growing')?.innerText.includes('word word')")
    page.wait_for_timeout(600)
    page.reload()
    page.wait_for_selector(".failed")
    assert "word" in page.locator(".said").last.inner_text()
    for _ in range(100):  # the endpoint is told that nobody waits any more: of the first, of that offline, of this
        if stub.cancelled >= 2:
            break
        page.wait_for_timeout(20)
    assert stub.cancelled >= 2


def test_hostile_answers_run_nothing(site: Site, stub: Stub):
    page = talking(site, "<b onload=alert(1)>")
    stub.text = HOSTILE[0].replace("{", "{{").replace("}", "}}") + HOSTILE[1] + "<a href=javascript:alert(1)>x</a>"
    page.fill("#message", HOSTILE[3])
    page.click("#send")
    answered(page, 1)
    assert page.evaluate("window.pwned") is None
    assert page.locator("#talk script, #talk img, #talk a, #talk style").count() == 0
    assert "<script>" in page.inner_text(".talk") and "U+202E" in page.inner_text(".talk")
    page.locator("button.better").click()
    page.click(".rewrite .done")
    page.reload()
    answered(page, 1)
    assert page.evaluate("window.pwned") is None
    stub.text = "x" * 99_000
    page.fill("#message", "y" * 5000)
    page.click("#send")
    answered(page, 2)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("text=Show all 99000 characters").count() == 1


def add_conversations(site: Site, count: int, topic: str) -> None:
    admin = site.page(viewport={"width": 1280, "height": 900})
    admin.goto(f"{site.server.url}/enter#{site.server.token}")
    admin.wait_for_url("**/admin")
    admin.fill("#chats-count", str(count))
    admin.fill("#chats-topic", topic)
    admin.click("text=Add")
    until(admin, f"document.querySelector('main').innerText.includes('0 of {count} answers, {count} items')")
    check_access(admin)


def choices(page: Any) -> Any:
    page.wait_for_selector(".strength")
    return page.locator(".strength label")


def test_three_turns_by_mouse(site: Site, stub: Stub):
    add_conversations(site, 1, "Ask about something that you see every day.")
    page = site.person(viewport={"width": 1280, "height": 900})
    page.wait_for_selector("#message")
    page.click("#submit")
    assert "needs more turns" in page.inner_text("#banner")
    wanted = []
    for n, message in enumerate(SAID):
        stub.said = {("ada", message): SAID[message], ("bob", message): WORSE[message]}
        page.fill("#message", message)
        page.click("#send")
        labels = choices(page)
        assert labels.count() == 8 and page.locator("#choose").is_disabled()
        first, second = page.locator(".card .text").all_inner_texts()
        better = [first, second].index(SAID[message])
        labels.nth([1, 6][better]).click()
        if n == 1:
            labels.nth([0, 7][better]).click()
            assert page.inner_text("#choose") == f"Go on with {'AB'[better]}"
            picture(page, "people-choose")
            check_access(page)
            page.click("#theme")
            check_access(page)
            page.click("#theme")
            page.reload()  # the choice was not stored, the pair was
            choices(page)
            assert page.locator(".card .text").all_inner_texts() == [first, second]
            choices(page).nth([0, 7][better]).click()
        wanted.append(SAID[message])
        page.click("#choose")
        stored(page, n + 1)
        page.wait_for_selector("#message")
    assert "Enough turns" in page.inner_text(".progress")
    page.click("#submit")
    stored(page, 4)
    until(page, "document.getElementById('ask').textContent.startsWith('Nothing to do')")
    rows = site.exported()
    assert [row["chosen"].split() for row in rows if "chosen" in row] == [text.split() for text in wanted]
    assert [row["strength"] for row in rows[:3]] == [-3, -4, -3]
    assert all(row["models"] == ["ada", "bob"] and row["person"] == "ann" for row in rows[:3])
    assert [message["content"] for message in rows[2]["prompt"]][::2] == list(SAID)
    assert rows[3]["turns"] == 3 and len(rows[3]["messages"]) == 6


def test_three_turns_by_keyboard_alone_with_an_undo_and_a_broken_one(site: Site, stub: Stub):
    site.add({"task": "chat", "prompt": [{"role": "system", "content": "Be brief."}]})
    page = site.person(locale="zh-CN", viewport={"width": 360, "height": 740})
    press, write = page.keyboard.press, page.keyboard.type
    page.wait_for_selector("#message")
    check_access(page)

    def turn(message: str, digit: str) -> None:
        page.wait_for_selector("#message")
        write(message)
        press("Enter")
        choices(page)
        press(digit)
        press("Enter")

    turn("one", "1")
    stored(page, 1)
    page.wait_for_selector("#message")
    write("two")
    until(page, "document.getElementById('draft').textContent === '草稿已保存'")
    page.reload()
    until(page, "document.activeElement.value === 'two'")
    stub.fault = "cut"
    press("Enter")
    page.wait_for_selector("#retry")
    check_access(page)
    stub.fault = ""
    press("Enter")  # the focus is on the button that asks again
    choices(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    picture(page, "people-choose-narrow")
    press("8")
    press("Enter")
    stored(page, 2)
    page.wait_for_selector("#message")
    for _ in range(3):
        press("Tab")
    press("u")  # the last turn is to be chosen again
    stored(page, 1)
    choices(page)
    press("3")
    press("Enter")
    stored(page, 2)
    turn("three", "4")
    stored(page, 3)
    page.wait_for_selector("#message")
    press("Control+Enter")
    stored(page, 4)
    rows = site.exported()
    shown = [row["strength"] * (1 if row["shown"] == [0, 1] else -1) for row in rows[:3]]
    assert sorted(shown) == [-4, -2, -1] and len(rows) == 4
    assert json.dumps(rows[3]["messages"]).count("heard:") == 3
