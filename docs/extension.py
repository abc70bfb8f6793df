"""What the site adds to the Markdown of these pages.

links      to a file of the repository leads to a page of the site that shows it, in colours
pages      that are one link to README.md or its like become that file
lessons    `source(ppo.policy_loss)` is followed by the source of that function, as in a notebook; they are wide
reference  a page for each room of the library, from docstrings, whose indented formulas are typeset
formulas   are MathML, which browsers draw themselves
"""

import functools
import inspect
import os
import posixpath
import re
from pathlib import Path
from typing import Any

import formulas
import latex2mathml.converter
from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx

from experiments.lessons import pages
from rlhf_jax import settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REPOSITORY = os.environ.get("GITHUB_REPOSITORY")  # OWNER/NAME, where GitHub builds the site
WHOLE = {"README.md": "manual", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changes"}  # files, and their pages


# Links and whole files ------------------------------------------------------------------------------------------------


def read_source(app: Sphinx, page: str, source: list[str]) -> None:
    """The text that Sphinx reads, in place of what the file says."""
    text = source[0]
    file = next((file for file, name in WHOLE.items() if name == page), None)
    if file is not None:
        text = re.sub(r"\]\((?!\w+:|#)", "](../", (ROOT / file).read_text())
    if page.startswith("learn/") and page != "learn/index":
        text = with_links(pages.with_sources(text), posixpath.basename(page))
    if page == "index":
        text = complete(text)
    text = with_address(text)
    up = posixpath.relpath(".", posixpath.dirname(page) or ".")
    for name, target in WHOLE.items():
        text = re.sub(rf"\]\((?:\.\./)+{re.escape(name)}", f"]({up}/{target}.md", text)
    source[0] = re.sub(r"\]\((?:\.\./)+docs/", f"]({up}/", text)


def complete(text: str) -> str:
    """The front page with all pages in its contents: those that it does not name are ways to do something."""
    there = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    named = set(re.findall(r"^(?:.* <)?([\w/]+)>?$", text, re.MULTILINE))
    text = re.sub(r"^contributing$", "\n".join([*sorted(there - named), "contributing"]), text, flags=re.MULTILINE)
    return text if "troubleshooting" in there else text.replace("\ntroubleshooting\n", "\n")


def with_address(text: str) -> str:
    """The text with the address of the repository in its commands, where that is known."""
    if not REPOSITORY:
        return text
    return re.sub(r"THIS_REPOSITORY( .*?) +# THIS_REPOSITORY.*", rf"https://github.com/{REPOSITORY}\1", text)


def with_links(text: str, name: str) -> str:
    """The text of a lesson with links to its notebook below its title."""
    links = [f'<a href="{name}.ipynb" download>Download the notebook</a>']
    if REPOSITORY:
        colab = f"https://colab.research.google.com/github/{REPOSITORY}/blob/gh-pages/learn/{name}.ipynb"
        links.append(f'<a href="{colab}">Open in Colab</a>')
    title, rest = text.split("\n", 1)
    return f'{title}\n\n<p class="notebook">{" ".join(links)}</p>\n{rest}'


def widen(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Leave out the contents beside a lesson: the functions that it shows have lines of up to 120 columns."""
    if page.startswith("learn/") and page != "learn/index":
        context["furo_hide_toc"] = True


def write_notebooks(app: Sphinx, error: Exception | None) -> None:
    """Put the notebooks of the lessons beside their pages."""
    if error is None:
        for name in pages.names():
            (Path(app.outdir) / "learn" / f"{name}.ipynb").write_text(pages.notebook(name, REPOSITORY))


def link_sources(app: Sphinx, doctree: nodes.document) -> None:
    """Lead links to files of the repository to the pages that show them."""
    page = app.env.docname
    for node in list(doctree.findall(addnodes.download_reference)):
        path = (DOCS / posixpath.dirname(page) / node["reftarget"]).resolve()
        if not path.is_relative_to(ROOT) or path.is_relative_to(DOCS / "_static"):
            continue
        name = str(path.relative_to(ROOT))
        app.env.shown_files.setdefault(page, set()).add(name)  # type: ignore[attr-defined]
        uri = posixpath.relpath(f"source/{name}.html", posixpath.dirname(page) or ".")
        node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))


def prepare(app: Sphinx, env: Any, names: list[str]) -> None:
    """The environment remembers which files each page links to."""
    if not hasattr(env, "shown_files"):
        env.shown_files = {}


def forget(app: Sphinx, env: Any, page: str) -> None:
    """A page that is read again names its files again."""
    getattr(env, "shown_files", {}).pop(page, None)


SOURCE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} - rlhf_jax</title>
<link rel="stylesheet" href="{root}/_static/pygments.css">
<link rel="stylesheet" href="{root}/_static/site.css">
<body class="source">
<p><a href="{root}/index.html">rlhf_jax</a> / {name}</p>
{code}
"""


def write_sources(app: Sphinx, error: Exception | None) -> None:
    """Write a page for each file of the repository that another page links to."""
    if error is not None:
        return
    formatter = HtmlFormatter(linenos="inline", lineanchors="line", anchorlinenos=True)
    for name in sorted(set().union(*app.env.shown_files.values())):  # type: ignore[attr-defined]
        try:
            lexer = get_lexer_for_filename(name)
        except ClassNotFound:
            lexer = TextLexer()
        page = Path(app.outdir) / "source" / f"{name}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        code = highlight((ROOT / name).read_text(), lexer, formatter)
        page.write_text(SOURCE.format(name=name, root="../" * name.count("/") + "..", code=code))


# Formulas -------------------------------------------------------------------------------------------------------------


THIN = '<mspace width="0.167em"></mspace>'  # about the name of a function, which the converter sets close


def mathml(formula: str, display: str = "inline") -> str:
    """A formula of LaTeX as MathML."""
    converted = latex2mathml.converter.convert(formula, display=display)
    before = re.sub(r"(</m[in]>)(?=<mi>[a-z]{2,}</mi>)", rf"\1{THIN}", converted)
    return re.sub(r"(<mi>[a-z]{2,}</mi>)(?=<m(?!o|space))", rf"\1{THIN}", before)


def inline_math(self: Any, node: nodes.math) -> None:
    self.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def block_math(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


# The reference --------------------------------------------------------------------------------------------------------

ROOMS = {
    "algorithms": "the papers, as pure functions",
    "models": "networks and model directories",
    "rollouts": "from prompts to scored responses",
    "data": "sources, formats, tokenizers, batches",
    "devices": "pmap, meshes, hosts, preemption",
    "runs": "run directories, records, checkpoints",
    "analysis": "cost of programs, calibration",
    "evaluation": "tasks put to a model",
    "serving": "models behind the OpenAI protocol",
    "people": "the pages on which people label, and the store of what they said",
}
GROUND = ("types", "logprobs", "settings")


def write_reference(app: Sphinx) -> None:
    """Write the pages of the reference, which git ignores."""
    folder = DOCS / "reference" / "rooms"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {}
    for name in GROUND:
        wanted[name] = page_of(f"rlhf_jax.{name}", [f"rlhf_jax.{name}"])
    for room in ROOMS:
        files = sorted(path.relative_to(ROOT) for path in (ROOT / "rlhf_jax" / room).rglob("*.py"))
        modules = [".".join(path.with_suffix("").parts) for path in files if path.name != "__init__.py"]
        wanted[room] = page_of(f"rlhf_jax.{room}", modules)
    for path in folder.glob("*.rst"):
        if path.stem not in wanted:
            path.unlink()
    for name, text in wanted.items():
        file = folder / f"{name}.rst"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


def page_of(title: str, modules: list[str]) -> str:
    """A page of the reference."""
    lines = [title, "=" * len(title), ""]
    for module in modules:
        if len(modules) > 1:
            short = module.removeprefix(f"{title}.")
            lines += [short, "-" * len(short), ""]
        lines += [f".. automodule:: {module}", "   :members:", "   :undoc-members:", ""]
    return "\n".join(lines)


def docstring(app: Sphinx, kind: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring of this project, which is plain text with `code`, into what Sphinx reads."""
    lines[:] = formulas.typeset(lines)
    if kind == "class":
        lines += fields(name)


def fields(name: str) -> list[str]:
    """The fields of a class with the comments beside or above them, which are what the command line shows as help."""
    try:
        _, code = pages.locate(name)
    except LookupError:
        return []
    lines = []
    for field, declaration, comment in settings.described(code):
        if not field.startswith("_"):
            lines += [f"``{field}: {declaration}``", f"   {formulas.escaped(comment)}" if comment else "   \\ ", ""]
    return lines


def signature(app: Sphinx, kind: str, name: str, thing: Any, options: Any, given: str, result: str) -> tuple[str, str]:
    """A signature in which an array is called one."""
    return tuple(
        part and re.sub(r"\b(?:jaxlib\._jax|jax|numpy)\.(?=Array|ndarray)", "", part) for part in (given, result)
    )


def skip(app: Sphinx, kind: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out the fields of classes, which `fields` lists, and what flax and dataclasses add."""
    if name in ("replace", "setup", "parent", "scope", "name") or name.startswith("__"):
        return True
    if kind == "class" and not (inspect.isroutine(thing) or isinstance(thing, (property, functools.cached_property))):
        return True
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write_reference)
    app.connect("env-before-read-docs", prepare)
    app.connect("env-purge-doc", forget)
    app.connect("source-read", read_source)
    app.connect("doctree-read", link_sources, priority=1)
    app.connect("html-page-context", widen, priority=900)  # after the theme's own
    app.connect("build-finished", write_notebooks)
    app.connect("build-finished", write_sources)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", skip)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    return {"parallel_read_safe": False}
