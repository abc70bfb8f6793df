"""A store that is empty, and the clock by which it goes; a browser, a site for it, and models to talk to."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rlhf_jax.people.items import Item
from rlhf_jax.people.store import Store
from tests.people.labelling import RULES, Clock

if TYPE_CHECKING:  # they need the extra people
    from tests.people.browsing import Site
    from tests.people.endpoints import Stub


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with Store(tmp_path / "people.db", clock) as store:
        store.set_rules(RULES)
        yield store


@pytest.fixture
def prompts(store: Store) -> None:
    """The store has three prompts, each with two answers to rank."""
    store.add([Item(f"prompt {n}", ("one", "two")) for n in range(3)])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium; of one module alone, since no event loop runs beside Playwright's."""
    from tests.people import browsing

    with browsing.browsing() as browser:
        yield browser


@pytest.fixture
def site(tmp_path: Path, browser: Any) -> "Iterator[Site]":
    """A site with one prompt to rank the answers to, without gold and repeats, in which overall ratings are wanted."""
    from rlhf_jax.people.rules import Rules
    from tests.people import browsing

    with browsing.site(tmp_path, browser, Rules(ratings="overall", gold_share=0.0, repeat_share=0.0)) as site:
        site.add({"prompt": browsing.PROMPT, "responses": browsing.ANSWERS})
        yield site


@pytest.fixture(scope="session")
def served() -> "Iterator[tuple[Stub, str]]":
    """An endpoint of models that say what a test wants, and its address."""
    from tests.people.endpoints import answering

    with answering() as found:
        yield found


@pytest.fixture
def stub(served: "tuple[Stub, str]") -> "Stub":
    """The endpoint, as it was at first."""
    served[0].reset()
    return served[0]
