"""A lesson is a Markdown page whose Python fences are its cells: this reads, runs and converts it."""

import ast
import functools
import json
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Namespace = dict[str, Any]  # of the cells of a lesson

ROOT = Path(__file__).parents[2]
LESSONS = ROOT / "docs" / "learn"
FENCE = re.compile(r"^```python\n(.*?)^```\n?", re.DOTALL | re.MULTILINE)
SOURCE = re.compile(r"^course\.source\(([\w.]+)\)$", re.MULTILINE)
FIGURE = re.compile(r"^!\[[^\]]*\]\(figures/[^)]*\)\n", re.MULTILINE)


def names() -> list[str]:
    """The names of the lessons: pages of docs/learn/ that have cells."""
    return sorted(path.stem for path in LESSONS.glob("*.md") if FENCE.search(path.read_text()))


def read(name: str) -> str:
    """The text of a lesson."""
    return (LESSONS / f"{name}.md").read_text()


def cells(text: str) -> Iterator[tuple[bool, str]]:
    """The parts of a page in order: (True, code) or (False, Markdown)."""
    at = 0
    for match in FENCE.finditer(text):
        if before := text[at : match.start()].strip():
            yield False, before
        yield True, match[1].rstrip()
        at = match.end()
    if rest := text[at:].strip():
        yield False, rest


def run(name: str, replaced: Mapping[str, Callable] | None = None) -> Namespace:
    """Run the cells of a lesson in one namespace, and return it.

    `replaced` maps a name to a function of what the page assigns to it, which is applied right behind that statement.
    """
    text = read(name)
    namespace: Namespace = {"__name__": f"lesson_{name.replace('-', '_')}"}
    for number, (is_code, code) in enumerate(cells(text)):
        if not is_code:
            continue
        for statement in ast.parse(code).body:
            before = dict(namespace)
            exec(compile(ast.Module([statement], []), f"docs/learn/{name}.md, cell {number}", "exec"), namespace)
            for key, change in (replaced or {}).items():
                if key in namespace and namespace[key] is not before.get(key):
                    namespace[key] = change(namespace[key])
    return namespace


# Sources --------------------------------------------------------------------------------------------------------------


def imported(code: str) -> dict[str, str]:
    """The dotted path of each name that a program imports."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


@functools.cache
def _parsed(file: Path) -> tuple[str, ast.Module]:
    text = file.read_text()
    return text, ast.parse(text)


def locate(dotted: str) -> tuple[Path, str]:
    """The file of a function or class with this dotted path, and its source there; LookupError if there is none."""
    parts = dotted.split(".")
    for end in range(len(parts) - 1, 0, -1):
        file = ROOT.joinpath(*parts[:end]).with_suffix(".py")
        if file.exists():
            text, module = _parsed(file)
            body: list[ast.stmt] = module.body
            node = None
            for part in parts[end:]:
                node = next((one for one in body if getattr(one, "name", None) == part), None)
                body = getattr(node, "body", [])
            if node is not None:
                return file.relative_to(ROOT), ast.get_source_segment(text, node) or ""
    raise LookupError(f"{dotted} is no function of this repository")


def with_sources(text: str) -> str:
    """The page with the source of a function in the place of each `course.source(function)` that ends a cell."""
    paths = imported("\n".join(code for is_code, code in cells(text) if is_code))

    def followed(match: re.Match) -> str:
        shown = SOURCE.search(match[1])
        if shown is None:
            return match[0]
        first, _, rest = shown[1].partition(".")
        file, code = locate(f"{paths[first]}.{rest}" if rest else paths[first])
        before = match[1][: shown.start()].rstrip()
        cell = f"```python\n{before}\n```\n\n" if before else ""
        return f"{cell}`{shown[1]}` in [{file}](../../{file}):\n\n```python\n{code}\n```\n"

    return FENCE.sub(followed, text)


# Notebooks ------------------------------------------------------------------------------------------------------------


def notebook(name: str, repository: str | None = None) -> str:
    """The lesson as a Jupyter notebook; with `repository`, OWNER/NAME on GitHub, it installs the library first."""
    text = FIGURE.sub("", read(name))
    if repository:
        folder = f"https://github.com/{repository}/blob/main/docs/learn/"
        text = re.sub(r"\]\((?!\w+:|#)([^)]+)\)", lambda link: f"]({urllib.parse.urljoin(folder, link[1])})", text)
    parts = list(cells(text))
    if repository:
        folder = repository.partition("/")[2]
        install = (
            "import os\nimport shutil\n\n"
            'on_tpu = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")\n'
            'extra = "[gpu]" if shutil.which("nvidia-smi") else "[tpu]" if on_tpu else ""  # of the runtime\n'
            f'if not os.path.exists("{folder}"):\n'
            f"    !git clone -q --depth 1 https://github.com/{repository}\n"
            f'    %pip install -q -e "{folder}{{extra}}"\n'
            f"%cd {folder}"
        )
        parts.insert(1, (True, install))
    return json.dumps(
        {
            "cells": [_cell(number, is_code, part) for number, (is_code, part) in enumerate(parts)],
            "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
            "nbformat": 4,
            "nbformat_minor": 5,
        },
        indent=1,
        ensure_ascii=False,
    )


def _cell(number: int, is_code: bool, text: str) -> dict:
    cell = {"id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
    if is_code:
        return cell | {"cell_type": "code", "execution_count": None, "outputs": []}
    return cell | {"cell_type": "markdown"}
