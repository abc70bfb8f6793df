"""The words, the theme and the markup of the pages."""

import json
import re
from typing import get_args

import pytest

pytest.importorskip("starlette", reason="needs the extra people: pip install -e .[people]")
pytest.importorskip("httpx2", reason="needs the extra people: pip install -e .[people]")

from rlhf_jax.people import acts, arena, forms, frame, markdown, words
from rlhf_jax.people.store import Store
from tests.people.visiting import client


def test_both_languages_have_all_words(store: Store):
    table = json.loads((frame.PAGES / "words.json").read_text())
    assert all(len(said) == len(words.LANGUAGES) and all(said) for said in table.values())
    for name, (english, chinese) in table.items():
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", chinese)), name
    texts = "".join(path.read_text() for path in frame.PAGES.rglob("*.*") if path.suffix in (".html", ".js"))
    used = set(re.findall(r'\bt\("(\w+)"', texts)) | set(re.findall(r"\bt\.(\w+)", texts))
    assert used <= table.keys()
    for prefix, names in (("flag", forms.FLAGS), ("pflag", forms.PROMPT_FLAGS)):
        assert {f"{prefix}_{name}" for name in names} <= table.keys()
    assert {f"skip_{name}" for name in forms.SKIPS} <= table.keys()
    assert {f"verdict_{name}" for name in forms.VERDICTS} | {f"arena_{why}" for why in get_args(arena.Why)} <= (
        table.keys()
    )
    assert {f"act_{what}" for what in get_args(acts.What)} | {"chats_wait", "error_chat_broken"} <= table.keys()
    assert {"failed_answers", "failed_serve"} <= table.keys()
    nobody = client(store)
    assert "欢迎" in nobody.get("/enter", headers={"Accept-Language": "zh-CN,en;q=0.5"}).text
    assert "Welcome" in nobody.get("/enter", headers={"Accept-Language": "fr"}).text
    nobody.get("/language?to=zh")
    assert "欢迎" in nobody.get("/enter").text


def test_a_page_comes_in_the_theme_that_was_chosen(store: Store):
    ann = client(store)
    assert 'data-theme=""' in ann.get("/enter").text
    ann.cookies.set("theme", "dark")
    assert 'data-theme="dark"' in ann.get("/enter").text
    ann.cookies.set("theme", "'><script>")
    assert "'><script>" not in ann.get("/enter").text


def test_guidelines_are_markup_of_ours_alone():
    text = "# <b>Hi\n\n**bold** `a*b*<` ![i](https://a.b/i) [x](https://a.b/c) [y](javascript:z)\n\n- one"
    assert markdown.html(text) == (
        "<h2>&lt;b&gt;Hi</h2>\n"
        '<p><strong>bold</strong> <code>a*b*&lt;</code> !<a href="https://a.b/i">i</a>'
        ' <a href="https://a.b/c">x</a> [y](javascript:z)</p>\n'
        "<ul>\n<li>one</li>\n</ul>\n"
    )
    assert markdown.html("```\n<i>*x*\n```\n") == "<pre><code>&lt;i&gt;*x*\n</code></pre>\n"
