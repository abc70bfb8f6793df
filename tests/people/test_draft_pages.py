"""What a person enters outlives a reload, a lost connection, another tab, a lease that ran out and a killed server."""

import pytest

pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")

from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store
from tests.people.browsing import ANSWERS, RANKS, RATED, Site, order, shown, stored, until
from tests.people.serving import Server, serving


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
    if not page.locator("dialog[open]").count():
        page.wait_for_selector("dialog[open], #pace-done:text('1')")
    if page.locator("dialog[open]").count():
        page.click("dialog[open] >> text=keep both")
    stored(page, 1)
    ranks = dict(zip(places, [1, 2, 3, 0], strict=True))
    assert [row["ranks"] for row in site.exported()] == [[ranks[k] for k in range(4)]]


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
    page.wait_for_selector("dialog[open]")
    assert "ran out" in page.inner_text("#banner") and page.input_value("dialog[open] textarea") == "A long story."


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
    assert said.count("enter#") == 2 and said.count("\n") == 5  # the two links, each with a line below it
    assert said.endswith("1 label is stored\n")  # by the one that was told to end
