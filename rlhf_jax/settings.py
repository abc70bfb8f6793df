"""The range of each number of a configuration, declared in the type of its field:

    @dataclasses.dataclass(frozen=True)
    class Config(Settings):
        lr: Positive = 3e-4
        batch: Count = 64
        unfinished_score: Annotated[float, Unbounded("scores have either sign")] | None = None

A config is checked whenever it is constructed, from flags or in code. NaN and infinities are always refused, and so is
a number that leaves its range when it is converted to float32 or int32, as all numbers are inside a step.
"""

import dataclasses
import functools
import math
import numbers
import re
import struct
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from rlhf_jax.errors import InputError

SEEDS = 2**32  # number of seeds: jax.random.key reduces a larger seed modulo this, so two seeds would share their noise


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers within these bounds."""

    above: int | float | None = None
    least: int | float | None = None
    below: int | float | None = None
    most: int | float | None = None
    unit: str = ""  # noun for the error message, such as "responses to compare"

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
    """Any finite number is allowed, for the given reason."""

    reason: str

    def __contains__(self, value: Any) -> bool:
        return True

    def __str__(self) -> str:
        return "a finite number"


Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(least=0, most=1)]
Share = Annotated[float, Range(above=0, most=1)]  # of a whole, of which something must be left
Rate = Annotated[float, Range(least=0, below=1)]  # dropout or decay: 1 would drop everything, or never decay
LabelNoise = Annotated[float, Range(least=0, below=0.5)]  # from 0.5 on, labels would mean the opposite
Count = Annotated[int, Range(above=0)]
Whole = Annotated[int, Range(least=0)]
Seed = Annotated[int, Range(least=0, below=SEEDS)]  # a larger seed would repeat the noise of a smaller one


class Settings:
    """The base class of config dataclasses whose numbers have ranges.

    A subclass that defines `__post_init__` must call `super().__post_init__()` first.
    """

    def __post_init__(self) -> None:
        """Raise InputError for the first number out of range; the message names the field and the range."""
        for name, hint in ranges(type(self)).items():  # type: ignore[arg-type]  # mypy doubts that a class has a hash
            value = getattr(self, name)
            if expected := _expected(hint, value):
                raise InputError(f"{name}={value}: expected {expected}")


@functools.cache
def ranges(config: type) -> dict[str, Any]:
    """The type of each field of a dataclass that holds numbers, by field name.

    Raises TypeError for a number that declares no range.
    """
    hints = typing.get_type_hints(config, include_extras=True)
    result = {}
    for field in dataclasses.fields(config):
        declared = list(declarations(hints[field.name]))
        if None in declared:
            raise TypeError(
                f"{config.__module__}.{config.__qualname__}.{field.name} has no range: give it a type such as Positive"
                " or Count of rlhf_jax.settings, or the reason why it is Unbounded"
            )
        if declared:
            result[field.name] = hints[field.name]
    return result


_FIELD = re.compile(r"    (\w+): ([^#]*?)\s*(?:#\s*(.*))?$")
_DIRECTIVES = re.compile(r"^(?:(?:type: ignore|noqa|pragma:|fmt:)[^#]*(?:#\s*|$))+")  # what a comment tells tools


def described(code: str) -> Iterator[tuple[str, str, str]]:
    """The name, the declaration and the comment of each field in the source of a dataclass.

    The comment is that beside the field, or else that above it and its neighbours, without what it tells tools, such as
    `type: ignore`.
    """
    above, ends = "", True  # the comment above, and whether the next one begins another
    for line in textwrap.dedent(code).splitlines():
        if found := _FIELD.match(line):
            yield found[1], found[2], _DIRECTIVES.sub("", found[3] or "") or above
            above, ends = "" if found[3] else above, True
        elif line.startswith("    #"):
            above, ends = line.strip(" #") if ends else f"{above} {line.strip(' #')}", False
        else:
            above, ends = "", True


def with_lines(text: str) -> str:
    """The text for --help, which joins the lines of a paragraph unless they are indented: those with columns here.

    A paragraph has columns if it has several lines, and two spaces in a row, as after `Run:` in an experiment.
    """
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(textwrap.indent(each, "  ") if "\n" in each and "  " in each else each for each in paragraphs)


def declarations(hint: Any) -> Iterator[Range | Unbounded | None]:
    """The declared range of each number in a type, also inside tuples and unions; None for a number without one."""
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
    """A description of the values that a type allows, if `value` is not one of them; else an empty string."""
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
