"""Accessibility by axe-core, in both themes, wide and narrow; with it, other tests check their pages as well."""

import os
from typing import Any

import pytest

pytest.importorskip("httpx2", reason="needs the extra people: pip install -e .[people]")
pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")

from tests.people.browsing import Site, check_access, until

PAGES = ("/?work", "/guidelines", "/admin")  # without the others, which the tests of their own look at


def look(site: Site, **options: Any) -> None:
    page = site.page(**options)
    page.goto(f"{site.server.url}/enter")
    check_access(page)
    page.goto(f"{site.server.url}/enter#{site.server.token}")
    page.wait_for_url("**/admin")
    for path in PAGES:
        page.goto(site.server.url + path)
        until(page, "!document.getElementById('ask')?.textContent.endsWith('…')")  # loading
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        check_access(page)


@pytest.mark.skipif(not os.environ.get("AXE"), reason="needs axe-core: npm install axe-core, and AXE=.../axe.min.js")
def test_no_page_shuts_anybody_out(site: Site):
    look(site, viewport={"width": 1280, "height": 860}, color_scheme="light")
    look(site, viewport={"width": 360, "height": 740}, color_scheme="dark", locale="zh-CN")
