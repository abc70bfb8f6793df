"""What every test runs under: eight CPU devices, and numerical sloppiness as an error."""

import dataclasses
import fcntl
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when jax is imported. Tests mostly compile: XLA leaves out most optimisations, which halves that.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

import jax
import pytest

import tests.typed  # noqa: F401 (jaxtyping looks it up by name)

# Before the first computation. A flag of the user's comes later, and so prevails.
xla_flags = [
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",  # of eight devices on a busy core or two; then it aborts
    os.environ.get("XLA_FLAGS", ""),
]
if jax.__version_info__ < (0, 11):  # newer ones abort on a flag that they have no more
    xla_flags.insert(0, "--xla_cpu_use_fusion_emitters=false")  # compiles nearly twice as fast
    xla_flags.insert(0, "--xla_cpu_parallel_codegen_split_count=1")  # every core has a worker of its own already
os.environ["XLA_FLAGS"] = " ".join(xla_flags)
jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(50_000, 10, 10)  # tracing makes millions of objects: by default each 700 new ones are looked through


def pytest_configure(config: pytest.Config) -> None:
    """What was compiled once is found again, by later tests and later runs, and by the processes that tests start."""
    if getattr(config, "cache", None) is None:  # under -p no:cacheprovider
        return
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # else each process would compile all of JAX's modules anew
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(config.cache.mkdir("bytecode"))
        sys.dont_write_bytecode = False
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Compiled programs that were used least recently are deleted; a limit of JAX would cost each new one time."""
    from rlhf_jax.runs import compiled  # here, since its annotations are checked: pytest hooks into its import first

    if getattr(session.config, "cache", None) is not None and not hasattr(session.config, "workerinput"):
        compiled.trim(session.config.cache.mkdir("jax"), 2**30)


@pytest.hookimpl(tryfirst=True)  # before pytest picks by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow are tests so marked, and all that need the models of a quickstart or a browser; `full` ones are skipped.

    Files with slow tests come first, so that no worker is left alone with one at the end.
    """
    for item in items:
        if item.get_closest_marker("full") and "FULL_SIZE" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="FULL_SIZE=1 runs this further variant"))
        if {"done", "browser"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def _forgotten() -> Iterator[None]:
    """Compiled programs do not outlive their module: Linux bounds the pieces of memory that a process may map."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _curves_unrendered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The curves of runs are set up, but not rendered, which takes half a second: test_plots.py and `done` do that."""
    plots = sys.modules.get("rlhf_jax.runs.plots")
    if plots is None or request.module.__name__.endswith("test_plots"):
        return
    render = plots._save

    def save(figure: Any, path: Path) -> Path:
        if path.name != "curves.png":
            return render(figure, path)
        path.touch()
        return path

    monkeypatch.setattr(plots, "_save", save)


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict]:
    """The configuration of a quickstart of two steps a stage, after it ran, and its summary.

    It runs once, in one of the workers.
    """
    from experiments import assistant
    from tests.quickstart import TINY

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    cfg = dataclasses.replace(TINY, out=folder / "runs" / "quickstart")
    with (folder / "quickstart.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        summary = cfg.out / "summary.json"
        return cfg, json.loads(summary.read_text()) if summary.exists() else assistant.main(cfg)


@pytest.fixture
def flags(done: tuple[Any, dict], tmp_path: Path) -> list:
    """Flags with which an experiment finds what the quickstart left, and leaves it alone."""
    cfg, _ = done
    return ["--data-dir", cfg.out / "data", "--out", tmp_path / "run"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of oracles and data beside the repository; a test that needs it is skipped where there is none."""
    path = Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("needs ../shared")
    return path
