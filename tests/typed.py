"""The check of types at run time, which setup.cfg hands to jaxtyping."""

from collections.abc import Callable
from typing import TypeVar

from beartype import beartype

Checked = TypeVar("Checked", bound=Callable | type)


def check(what: Checked) -> Checked:
    """What checks its arguments and results at each call, but for what is defined inside a function.

    That would be decorated anew whenever the outer function runs, which takes a fifth of the suite's time.
    """
    return what if "<locals>" in what.__qualname__ else beartype(what)
