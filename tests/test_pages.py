"""README.md and docs/: what they link, name and run exists, and the example of docs/design.md trains."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]  # CHANGELOG.md names what was before too


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


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


@pytest.mark.slow
def test_the_example_of_the_design_trains():
    """In a process of its own, with one device: hundreds of steps on eight would be slow on a busy core or two."""
    example = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)[0]
    command = [sys.executable, "-c", example]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 3
