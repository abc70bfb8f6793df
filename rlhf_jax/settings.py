"""What each number of a configuration may be, declared in its type, beside the field:

    @dataclasses.dataclass(frozen=True)
    class Config(Settings):
        lr: Positive = 3e-4
        batch: Count = 64
        unfinished_score: Annotated[float, Unbounded("scores have either sign")] | None = None

A config is checked whenever one is made, from flags or in code. NaN and infinities are refused everywhere, and so is
what is out of range once it is float32 or int32, which all numbers become in a step.
"""

import dataclasses
import functools
import math
import numbers
import struct
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from rlhf_jax.types import SEEDS, InputError


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers within these bounds."""

    above: int | float | None = None
    least: int | float | None = None
    below: int | float | None = None
    most: int | float | None = None
    unit: str = ""  # what is counted, for the message

    def __contains__(self, value: Any) -> bool:
        return (
            (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        bounds = ("more than", self.above), ("at least", self.least), ("less than", self.below), ("at most", self.most)
        said = " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)
        return f"{said} {self.unit}".strip()


@dataclasses.dataclass(frozen=True)
class Unbounded:
    """Any finite number, for this reason."""

    reason: str

    def __contains__(self, value: Any) -> bool:
        return True

    def __str__(self) -> str:
        return "a finite number"


Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(least=0, most=1)]
Share = Annotated[float, Range(above=0, most=1)]  # of a whole, of which something must be left
Rate = Annotated[float, Range(least=0, below=1)]  # of what is dropped, or of decay: 1 would leave nothing, or all
LabelNoise = Annotated[float, Range(least=0, below=0.5)]  # from one half on, labels would say the opposite
Count = Annotated[int, Range(above=0)]
Whole = Annotated[int, Range(least=0)]
Seed = Annotated[int, Range(least=0, below=SEEDS)]  # a larger one would repeat the noise of a smaller


class Settings:
    """The base of a dataclass whose numbers have ranges. A `__post_init__` of its own begins with that of `super()`."""

    def __post_init__(self) -> None:
        """Raises InputError for the first number that is out of its range, in one line that names field and range."""
        for name, hint in ranges(type(self)).items():  # type: ignore[arg-type]  # mypy doubts that a class has a hash
            value = getattr(self, name)
            if expected := _expected(hint, value):
                raise InputError(f"{name}={value}: expected {expected}")


@functools.cache
def ranges(config: type) -> dict[str, Any]:
    """The types of the fields of a dataclass that hold numbers, by name; TypeError for a number without a range."""
    hints = typing.get_type_hints(config, include_extras=True)
    found = {}
    for field in dataclasses.fields(config):
        declared = list(declarations(hints[field.name]))
        if None in declared:
            raise TypeError(
                f"{config.__module__}.{config.__qualname__}.{field.name} has no range: give it a type such as Positive"
                " or Count of rlhf_jax.settings, or the reason why it is Unbounded"
            )
        if declared:
            found[field.name] = hints[field.name]
    return found


def declarations(hint: Any) -> Iterator[Range | Unbounded | None]:
    """What a type says of each number in it, in tuples and unions too; None where it says nothing."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated and (declared := _declared(inner)):
        yield declared
    elif origin is Annotated:
        yield from declarations(inner[0])
    elif hint is int or hint is float:
        yield None
    elif origin is not Literal:
        for each in inner:
            yield from declarations(each)


def _declared(annotated: tuple) -> Range | Unbounded | None:
    return next((note for note in annotated[1:] if isinstance(note, Range | Unbounded)), None)


def _expected(hint: Any, value: Any) -> str:
    """What a type wants instead of `value`, and nothing where it is content."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        declared = _declared(inner)
        return _expected_number(inner[0], declared, value) if declared else _expected(inner[0], value)
    if origin in (types.UnionType, typing.Union):
        wanted = [_expected(each, value) for each in inner]
        return ", or ".join(wanted) if all(wanted) else ""
    if origin is tuple:
        if not isinstance(value, tuple):
            return "a tuple"
        each = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(each) != len(value):
            return f"{len(each)} values"
        wanted = [_expected(*pair) for pair in zip(each, value, strict=True)]
        return next((f"{what}, each" for what in wanted if what), "")
    if origin is Literal:
        return "" if value in inner else f"one of {', '.join(map(str, inner))}"
    if isinstance(hint, type) and not isinstance(value, hint):
        return "None" if hint is types.NoneType else hint.__name__
    return ""


def _expected_number(kind: type, declared: Range | Unbounded, value: Any) -> str:
    wanted = numbers.Integral if kind is int else numbers.Real
    if not isinstance(value, wanted) or isinstance(value, bool):
        return "a whole number" if kind is int else "a number"
    if kind is int:
        if value not in declared:
            return str(declared)
        bounded = isinstance(declared, Range) and (declared.below is not None or declared.most is not None)
        return "" if bounded or value < 2**31 else "less than 2^31"
    if not math.isfinite(single := _float32(value)):
        return "a finite number" if isinstance(declared, Unbounded) else f"a finite number, {declared}"
    if value not in declared:
        return str(declared)
    return "" if single in declared else f"{declared}, in float32 too"


def _float32(value: Any) -> float:
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.inf
