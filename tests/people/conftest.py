"""A store that is empty, and the clock by which it goes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_jax.people.store import Store
from tests.people.labelling import RULES, Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with Store(tmp_path / "people.db", clock) as store:
        store.set_rules(RULES)
        yield store
