"""The site builds without a warning, and every link in it leads somewhere."""

import importlib.util
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ("sphinx", "myst_parser", "furo", "sphinx_copybutton", "latex2mathml")


def load(name: str):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("line", "latex"),
    [
        ("A_t = delta_t + gamma lam A_{t+1}", r"A_{t}=\delta_{t}+\gamma\lambda A_{t+1}"),
        (
            "max(-A rho, -A clip(rho, 1 - clip, 1))",
            r"\operatorname{max}(-A\rho,-A\operatorname{clip}(\rho,1-\mathrm{clip},1))",
        ),
        ("sum_{j in U} exp(score_j)^2", r"\sum_{j\in U}\operatorname{exp}(\mathrm{score}_{j})^{2}"),
        ("x = 2.5e-3 + 1e-8", r"x=2.5\cdot 10^{-3}+10^{-8}"),
        ("h = ln(y_w) - 1 plus the mean", None),
        ("token      a b  c d  e", None),
        ('kl = "k3"', None),
    ],
)
def test_formulas_of_docstrings(line: str, latex: str | None):
    found = load("formulas").latex(line)
    assert (found and found.replace(" ", "")) == (latex and latex.replace(" ", ""))


def test_docstrings_become_restructured_text():
    lines = ["The mean of `x`s, a*b and c_.", "", "    A_t = r_t", "", "    any text", "", "End."]
    found = load("formulas").typeset(lines)
    assert found[0] == r"The mean of ``x``\ s, a\*b and c\_."
    assert found[2:5] == [".. math::", "", "   A _{t} = r _{t}"]
    assert found[6:9] == ["::", "", "    any text"]


@pytest.mark.parametrize("page", ["index", "start", "slurm", "zh"])
def test_commands_of_a_published_site_have_the_address(page: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sphinx", reason="needs the extra docs: pip install -e .[docs]")
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    extension, text = load("extension"), (ROOT / "docs" / f"{page}.md").read_text()
    assert extension.with_address(text) == text  # where the address is not known
    monkeypatch.setattr(extension, "REPOSITORY", "somebody/rlhf_jax")
    found = extension.with_address(text)
    assert "git clone https://github.com/somebody/rlhf_jax rlhf_jax && cd rlhf_jax\n" in found
    assert "THIS_REPOSITORY" not in found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the site needs {', '.join(missing)}: pip install -e .[docs]")
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "-d",
        f"{out}.cache",
        "docs",
        out,
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(site: Path):
    """Inside the site each page, file and anchor that a link names is there, and nothing is fetched from elsewhere."""
    texts = {path: path.read_text() for path in site.rglob("*.html")}
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in texts.items()}
    dead = []
    for path, text in texts.items():
        for link in re.findall(r'\bhref="([^"]+)"', text):
            target = urllib.parse.urlsplit(link)
            if target.scheme or link == "#":
                continue
            file = (path.parent / urllib.parse.unquote(target.path)).resolve() if target.path else path
            if not file.exists() or (
                target.fragment and urllib.parse.unquote(target.fragment) not in anchors.get(file, ())
            ):
                dead.append(f"{path.relative_to(site)}: {link}")
        fetched = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="(\w+:)?//', text)
        fetched += re.findall(r'<link[^>]*rel="(?:stylesheet|preload)"[^>]*href="(\w+:)?//', text)
        assert not fetched, path
    assert not dead, "\n".join(sorted(set(dead))[:40])


@pytest.mark.slow
def test_the_site_has_its_parts(site: Path):
    lesson = (site / "learn" / "ppo.html").read_text()
    assert "<math" in lesson and "course.source(" not in lesson
    formulas = (site / "learn" / "over-optimisation.html").read_text()
    assert "<mi>ln</mi>" in formulas  # and a space on the sides on which a letter or a number stands
    assert not re.search(r"</m[in]><mi>[a-z]{2,}</mi>|<mi>[a-z]{2,}</mi><m(?!o|space)", formulas)
    assert "surrogate" in lesson and (site / "learn" / "ppo.ipynb").exists()
    reference = (site / "reference" / "rooms" / "algorithms.html").read_text()
    assert "policy_loss" in reference and reference.count("<math") > 10
    assert (site / "source" / "rlhf_jax" / "types.py.html").exists()
    assert "How to fork an experiment" in (site / "manual.html").read_text()
