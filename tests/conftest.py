"""What every test runs under: eight CPU devices, and numerical sloppiness as an error."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before jax is imported. A flag of the user's comes later, and so prevails.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """What was compiled once is found again, by later tests and later runs."""
    if getattr(config, "cache", None) is None:  # under -p no:cacheprovider
        return
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_compilation_cache_max_size", 2**30)  # bytes; with a limit, workers take turns in it


@pytest.fixture(scope="module")
def quick_compiling() -> Iterator[None]:
    """For modules whose tests mostly compile: XLA leaves out most optimisations, which halves that."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict]:
    """The configuration of a quickstart of two steps a stage, after it ran, and its summary."""
    from experiments import assistant
    from tests.quickstart import TINY

    cfg = dataclasses.replace(TINY, out=tmp_path_factory.mktemp("runs") / "quickstart")
    jax.config.update("jax_disable_most_optimizations", True)
    summary = assistant.main(cfg)
    jax.config.update("jax_disable_most_optimizations", False)
    return cfg, summary


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
