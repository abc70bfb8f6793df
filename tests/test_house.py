"""The walls of the house: which rooms of the package may import which."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_jax"

# What each room may import, beside itself. Nothing imports upwards, so there is no circle.
GROUND = {"types", "settings", "logprobs"}
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "settings": {"types"},
    "logprobs": {"types", "settings"},
    "devices": {"types", "settings"},
    "algorithms": GROUND | {"devices"},
    "data": {"types", "settings", "devices"},
    "models": GROUND | {"devices", "data"},
    "rollouts": GROUND | {"devices", "algorithms", "data", "models"},
    "runs": {"types", "settings", "devices"},
    "analysis": GROUND | {"devices", "models"},
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[str, int]]:
    """The room that each import of the package leads to, and its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "rlhf_jax":
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_jax."):
            yield node.module.split(".")[1], node.lineno
        elif isinstance(node, ast.Import):
            yield from (
                (alias.name.split(".")[1], node.lineno) for alias in node.names if alias.name.startswith("rlhf_jax.")
            )


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_room_is_known():
    assert {room(path) for path in SOURCES} == MAY_IMPORT.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_downwards(path: Path):
    allowed = MAY_IMPORT[room(path)] | {room(path)}
    wrong = [f"line {line}: {other}" for other, line in imported_rooms(path) if other not in allowed]
    assert not wrong, f"{path.relative_to(PACKAGE.parent)} may import {sorted(allowed)}, but imports {wrong}"


def test_no_circle():
    """Rooms can be put in an order in which each imports earlier ones alone."""
    built: set[str] = set()
    while left := MAY_IMPORT.keys() - built:
        ready = {name for name in left if MAY_IMPORT[name] <= built}
        assert ready, f"{sorted(left)} import each other"
        built |= ready
