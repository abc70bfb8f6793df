"""README.md and docs/: what they link, name and run exists, and the example of docs/design.md trains."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.studies import study

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]  # CHANGELOG.md names what was before too


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ (.+)", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_pages_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text())
    found = {(file, anchor): page.parent / file if file else page for file, anchor in links}
    assert not [link for link, target in found.items() if target.suffix == ".md" and link[1] not in anchors(target)]


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_in_the_repository_exist(page: Path):
    named = re.findall(r"(?<![\w/~.-])((?:rlhf_jax|experiments|scripts|tests|docs)/[\w/.-]*\w)", page.read_text())
    missing = {name for name in named if not (ROOT / name).exists() and name != "experiments/mine.py"}
    assert not missing


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_to_run_exist(page: Path):
    modules = re.findall(r"python -m ((?:experiments|tests)\.[\w.]*\w)", page.read_text())
    missing = {name for name in modules if name != "experiments.NAME" and importlib.util.find_spec(name) is None}
    assert not missing


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_assume_an_activated_environment(page: Path):
    makes_its_own = page.name == "slurm.md"
    assert makes_its_own or ".venv/bin/" not in page.read_text().replace("source .venv/bin/activate", "")


def test_every_experiment_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    paths = [path.relative_to(ROOT / "experiments") for path in (ROOT / "experiments").rglob("*.py")]
    names = {
        ".".join(path.with_suffix("").parts): path
        for path in paths
        if "cli.run(" in (ROOT / "experiments" / path).read_text()
    }
    assert not {name for name in names if f"`{name}`" not in text}


def test_every_experiment_has_its_result():
    """Its first lines say what came out, and the page that they name is there."""
    for path in (ROOT / "experiments").rglob("*.py"):
        text = path.read_text()
        if "cli.run(" in text or "cli.run_stage(" in text:
            result = re.search(
                r"^Result:  (.+?)(?=\n\S|\n\n|\Z)", ast.get_docstring(ast.parse(text)) or "", re.DOTALL | re.MULTILINE
            )
            assert result, path
            assert all((ROOT / page).exists() for page in re.findall(r"(?:docs/)?[\w/]+\.md", result[1])), path


def test_pages_of_studies_say_which_commit_their_numbers_are_of():
    pages = [page for page in PAGES if study.BEGIN in page.read_text()]
    assert len(pages) == 6
    for page in pages:
        assert re.search(r"Commit: [0-9a-f]{7,}( with changes)?\.", page.read_text()), page


def test_the_front_page_in_chinese_says_the_same():
    """It has the commands, the pictures, the lessons and the numbers of the other libraries of the English one."""
    english, chinese = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("index", "zh"))
    shown = lambda text: [
        name.replace("-chinese.png", "-rank.gif") for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    ]
    assert shown(english) == shown(chinese)
    assert shlex.split(english.split("```sh")[1].split("```")[0], comments=True) == shlex.split(
        chinese.split("```sh")[1].split("```")[0], comments=True
    )
    said = english.split("```{toctree}")[0]
    targets = lambda text: set(re.findall(r"\]\(([^)]+)\)", text)) - {"zh.md"}
    assert {target.replace("-chinese.png", "-rank.gif") for target in targets(chinese)} >= targets(said)
    listed = re.findall(r"^\d+\. \[.+\]\((.+)\)", (ROOT / "docs/learn/index.md").read_text(), re.MULTILINE)
    assert re.findall(r"^\d+\. \[.+\]\(learn/(.+?)\)", chinese, re.MULTILINE) == listed


@pytest.mark.slow
def test_the_example_of_the_design_trains():
    """In a process of its own, with one device: hundreds of steps on eight would be slow on a busy core or two."""
    example = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)[0]
    command = [sys.executable, "-c", example]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 3
