"""A browser, the site that it looks at, and what tests do on a page.

Set SCREENSHOTS to a folder, such as docs, to have the pictures of docs/people.md made anew, and AXE to the path of
axe-core's axe.min.js to check the pages for accessibility.
"""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rlhf_jax.people import __main__ as command
from rlhf_jax.people import access
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store
from tests.people.serving import Thread

ANSWERS = [
    "Plants catch light with chlorophyll and split water with it. The oxygen leaves the plant, and the hydrogen"
    " helps to build sugar from carbon dioxide.\n\nIn short: light + water + carbon dioxide → sugar + oxygen.",
    "It's when plants eat sunlight.",
    "Plants are their own cooks. Their leaves catch sunlight with something green, called chlorophyll, their"
    " roots drink water, and tiny holes under the leaves let in carbon dioxide from the air. With the energy of"
    " the light they join water and carbon dioxide into sugar, which is their food. Some of it they keep for the"
    " night, and out of the rest they build stems, roots and fruit. What is left over is oxygen. It goes out"
    " through the same tiny holes, and you are breathing it now. All this is called photosynthesis: putting"
    " together with light. So every apple that you eat was once air, water and sunshine.",
    "I cannot help with that.",
]
PROMPT = [
    {"role": "system", "content": "You explain things to children of ten."},
    {"role": "user", "content": "How do plants make their own food? Please answer in a few sentences."},
]
RANKS = [1, 2, 0, 2]  # of ANSWERS
RATED = [5, 3, 7, 2]
HOSTILE = [
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><style>body{display:none}</style>",
    "\u202eevil\u202c \u2066x \u0000\u0007 \u200b zero \U000e0041",
    "x" * 1_000_000,
    "</script><script>window.pwned = 3</script><!-- \"' ]]> {{ 7 * 7 }} javascript:alert(1)",
]


@contextlib.contextmanager
def browsing() -> Iterator[Any]:
    """A Chromium, driven by Playwright; skips the test where either is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(driver), args=["--no-sandbox"])
        yield browser
        browser.close()


def chromium(driver: Any) -> str:
    """The path of the browser of all tests: the one in CHROMIUM, Playwright's own, or else the system's."""
    names = (os.environ.get("CHROMIUM", ""), driver.chromium.executable_path, "chromium", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("needs Chromium: playwright install chromium, apt-get install chromium, or its path in CHROMIUM")
    return path


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
        # Without transitions, in the middle of which colours would be checked.
        page = self.browser.new_context(reduced_motion="reduce", **options).new_page()
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


@contextlib.contextmanager
def site(folder: Path, browser: Any, rules: Rules, endpoint: str = "") -> Iterator[Site]:
    """A site for as long as the context lasts, in which no script may fail."""
    site = Site(folder, browser)
    with Store(site.db) as store:
        store.set_rules(rules)
    site.server = Thread(site.db, endpoint)
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


@contextlib.contextmanager
def film(page: Any, name: str) -> Iterator[Callable[[int], None]]:
    """A function that shows the page as it is now for so many milliseconds of one animated picture."""
    frames, durations = [], []

    def hold(milliseconds: int) -> None:
        if os.environ.get("SCREENSHOTS"):
            page.wait_for_timeout(200)
            frames.append(Image.open(io.BytesIO(page.screenshot())).convert("P", palette=Image.Palette.ADAPTIVE))
            durations.append(milliseconds)

    yield hold
    if frames:
        path = Path(os.environ["SCREENSHOTS"]) / f"{name}.gif"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def check_access(page: Any) -> None:
    """No violation by axe-core, where it is there."""
    if path := os.environ.get("AXE"):
        page.evaluate(Path(path).read_text())
        found = page.evaluate("axe.run()")
        assert not [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]]
