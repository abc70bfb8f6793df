"""What every test runs under: eight CPU devices, and numerical sloppiness as an error."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when jax is imported. Tests mostly compile: XLA leaves out most optimisations, which halves that.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

import jax
import pytest

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


def pytest_configure(config: pytest.Config) -> None:
    """What was compiled once is found again, by later tests and later runs."""
    if getattr(config, "cache", None) is None:  # under -p no:cacheprovider
        return
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_compilation_cache_max_size", 2**30)  # bytes; with a limit, workers take turns in it


@pytest.hookimpl(tryfirst=True)  # before pytest picks by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow are tests so marked, and all that need the models of a quickstart or a browser."""
    for item in items:
        if {"done", "browser"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def _forgotten() -> Iterator[None]:
    """Compiled programs do not outlive their module: Linux bounds the pieces of memory that a process may map."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict]:
    """The configuration of a quickstart of two steps a stage, after it ran, and its summary."""
    from experiments import assistant
    from tests.quickstart import TINY

    cfg = dataclasses.replace(TINY, out=tmp_path_factory.mktemp("runs") / "quickstart")
    return cfg, assistant.main(cfg)


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
