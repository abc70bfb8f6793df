"""The check of types at run time, which setup.cfg hands to jaxtyping."""

from collections.abc import Callable
from typing import TypeVar

from beartype import beartype

Checked = TypeVar("Checked", bound=Callable | type)


def check(what: Checked) -> Checked:
    """The function or class, which then checks each call; one that is defined inside a function stays as it is.

    It would be decorated anew whenever the outer function runs, which is slow.
    """
    return what if "<locals>" in what.__qualname__ else beartype(what)
