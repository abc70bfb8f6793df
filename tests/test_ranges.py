"""Every number of every config has its range, or a reason why it has none, and a value beyond it is refused by name."""

import dataclasses
import functools
import importlib
import math
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import tensorflow_datasets as tfds

import experiments
import rlhf_jax
from experiments import ppo as ppo_experiment
from rlhf_jax import models, settings
from rlhf_jax.algorithms import ppo
from rlhf_jax.models.scaling import LinearScaling, Llama3Scaling, LongScaling, YarnScaling
from rlhf_jax.rollouts import sampling
from rlhf_jax.runs import cli, directory
from rlhf_jax.settings import Count, Fraction, NonNegative, Positive, Range, Rate, Seed, Settings, Unbounded, Whole
from rlhf_jax.types import InputError, named_key
from scripts import chat, survive, targets  # noqa: F401  # whose configs are found as subclasses


def subclasses(base: type) -> Iterator[type]:
    for each in base.__subclasses__():
        yield each
        yield from subclasses(each)


def nested(hint: Any) -> Iterator[type]:
    """The dataclasses that a type names."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
    elif typing.get_origin(hint) is not Literal:
        for each in typing.get_args(hint):
            yield from nested(each)


def reachable(config: type) -> Iterator[type]:
    """A dataclass, and those that lie in its fields, however deep."""
    yield config
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        for each in nested(hints[field.name]):
            yield from reachable(each)


@functools.cache
def configs() -> list[type]:
    """Each config of the package and of the experiments: what is named so, what lies in one, and every `Settings`.

    The configs of TFDS builders are made from data specs, which `sources` checks as it reads them.
    """
    found = {}
    for package in (rlhf_jax, experiments):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            config = getattr(importlib.import_module(module.name), "Config", None)
            if dataclasses.is_dataclass(config) and not issubclass(config, tfds.core.BuilderConfig):
                found |= dict.fromkeys(reachable(config))
    for config in subclasses(Settings):
        if config.__module__.split(".")[0] in ("rlhf_jax", "experiments", "scripts"):
            found |= dict.fromkeys(reachable(config))
    return sorted(found, key=name)


def name(config: type) -> str:
    return f"{config.__module__}.{config.__qualname__}"


SCALINGS = {
    LinearScaling: LinearScaling(8.0),
    Llama3Scaling: Llama3Scaling(8.0, 1.0, 4.0, 8192),
    YarnScaling: YarnScaling(8.0, 8192),
    LongScaling: LongScaling((1.0,), (2.0,), 8192, 1.5),
}


def example(config: type) -> Any:
    if config in SCALINGS:
        return SCALINGS[config]
    if config is models.Experts:
        return models.Experts(count=4, active=2)
    return config(max_new_tokens=4) if config is sampling.Config else config()


def beyond(hint: Any) -> Iterator[Any]:
    """Values that a field of this type must refuse: next to its bounds, and no numbers at all."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        for value in beyond(inner[0]):
            yield (value,)
    elif origin is Annotated:
        kind, declared = inner
        # Of the field's own type: others are refused as well, but here by the types that tests check at run time.
        yield from (True, 2**32, 10**400) if kind is int else (math.nan, math.inf, -math.inf, 1e39)
        if isinstance(declared, Range):
            below = (lambda x: x - 1) if kind is int else (lambda x: math.nextafter(x, -math.inf))
            above = (lambda x: x + 1) if kind is int else (lambda x: math.nextafter(x, math.inf))
            edges = [
                (declared.above, lambda x: x),
                (declared.below, lambda x: x),
                (declared.least, below),
                (declared.most, above),
            ]
            yield from (kind(step(bound)) for bound, step in edges if bound is not None)
    else:
        for each in inner:
            yield from beyond(each)


def test_configs_are_found():
    found = {name(config) for config in configs()}
    package = {f"rlhf_jax.algorithms.{module}.Config" for module in ("updates", "ppo", "grpo", "rloo", "dpo", "reward")}
    package |= {"rlhf_jax.models.config.Config", *map(name, SCALINGS)}
    package |= {"rlhf_jax.algorithms.optim.Adam", "rlhf_jax.models.lora.Config", "rlhf_jax.devices.compute.Compute"}
    package |= {"rlhf_jax.devices.parallel.Config", "rlhf_jax.runs.checkpoint.Config"}
    modules = ("pretrain", "sft", "reward", "ppo", "grpo", "dpo", "rounds", "papers.sentiment")
    modules += ("studies.frontier", "studies.virtues")
    assert package | {f"experiments.{module}.Config" for module in modules} | {"scripts.chat.Config"} <= found


@pytest.mark.parametrize("config", configs(), ids=name)
def test_every_number_has_a_range_or_a_reason(config):
    assert issubclass(config, Settings), f"{name(config)} checks nothing: make it a Settings"
    for field, hint in settings.ranges(config).items():
        for declared in settings.declarations(hint):
            unbounded = isinstance(declared, Unbounded)
            assert declared.reason if unbounded else str(declared), f"{name(config)}.{field} has an empty range"


NUMBERS = [
    (config, field, hint)
    for config in configs()
    if issubclass(config, Settings)
    for field, hint in settings.ranges(config).items()
]


@pytest.mark.parametrize(
    ("config", "field", "hint"), NUMBERS, ids=[f"{name(config)}.{field}" for config, field, _ in NUMBERS]
)
def test_what_is_out_of_range_is_refused_by_name(config, field, hint):
    usual, refused = example(config), list(beyond(hint))
    assert len(refused) >= 4
    for value in refused:
        with pytest.raises(InputError, match=rf"^{field}=.*: expected .*") as said:
            dataclasses.replace(usual, **{field: value})
        assert "\n" not in str(said.value)


@dataclasses.dataclass(frozen=True)
class Numbers(Settings):
    positive: Positive = 1.0
    fraction: Fraction = 0.0
    rate: Rate = 0.0
    count: Count = 1
    whole: Whole = 0
    seed: Seed = 0
    coefficient: NonNegative | None = None
    score: Annotated[float, Unbounded("scores have either sign")] = 0.0
    group: Annotated[int, Range(least=2, unit="responses to compare")] = 2
    budgets: tuple[Positive, ...] = ()
    pair: tuple[Count, Fraction] = (1, 0.0)
    width: Count | Literal["all"] = "all"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"positive": -0.01}, "positive=-0.01: expected more than 0"),
        ({"positive": math.nan}, "positive=nan: expected a finite number, more than 0"),
        ({"positive": 1e-50}, "positive=1e-50: expected more than 0, in float32 too"),
        ({"positive": "1"}, "positive=1: expected a number"),
        ({"fraction": 1.5}, "fraction=1.5: expected at least 0 and at most 1"),
        ({"rate": 1.0}, "rate=1.0: expected at least 0 and less than 1"),
        ({"rate": 1 - 1e-9}, "rate=0.999999999: expected at least 0 and less than 1, in float32 too"),
        ({"count": 0}, "count=0: expected more than 0"),
        ({"count": 2**31}, "count=2147483648: expected less than 2^31"),
        ({"count": True}, "count=True: expected a whole number"),
        ({"count": 2.0}, "count=2.0: expected a whole number"),
        ({"whole": -1}, "whole=-1: expected at least 0"),
        ({"seed": -1}, "seed=-1: expected at least 0 and less than 4294967296"),
        ({"seed": 2**32}, "seed=4294967296: expected at least 0 and less than 4294967296"),
        ({"coefficient": -1.0}, "coefficient=-1.0: expected at least 0, or None"),
        ({"score": -math.inf}, "score=-inf: expected a finite number"),
        ({"group": 1}, "group=1: expected at least 2 responses to compare"),
        ({"budgets": (0.5, 0.0)}, "budgets=(0.5, 0.0): expected more than 0, each"),
        ({"budgets": 0.5}, "budgets=0.5: expected a tuple"),
        ({"pair": (1, 2.0)}, "pair=(1, 2.0): expected at least 0 and at most 1, each"),
        ({"pair": (1,)}, "pair=(1,): expected 2 values"),
        ({"width": 0}, "width=0: expected more than 0, or one of all"),
    ],
    ids=str,
)
def test_what_is_said(change, said):
    with pytest.raises(InputError) as error:
        Numbers(**change)
    assert str(error.value) == said


@pytest.mark.parametrize(
    "change",
    [
        {"positive": 1e-30, "fraction": 1.0, "rate": 0.999},
        {"positive": 1, "score": -3, "coefficient": 0},  # ints are numbers
        {"positive": np.float32(0.5), "count": np.int64(3)},
        {"count": 2**31 - 1, "seed": 2**32 - 1},
        {"budgets": (0.1, 2.0), "pair": (4, 0.5), "width": 3, "coefficient": None},
    ],
    ids=str,
)
def test_what_is_within(change):
    for field, value in change.items():
        assert getattr(Numbers(**change), field) == value


def test_a_number_without_a_range_cannot_be_declared():
    @dataclasses.dataclass(frozen=True)
    class Bare(Settings):
        rates: tuple[float, ...] | None = None

    with pytest.raises(TypeError, match=r"Bare\.rates has no range: give it a type such as Positive"):
        Bare()


@pytest.mark.parametrize("seed", [-1, 2**32, 99999999999999999999999])
def test_a_seed_that_would_repeat_another(seed):
    with pytest.raises(InputError, match=rf"^seed={seed}: expected at least 0 and less than 4294967296$"):
        named_key(seed, "test")


def test_the_last_seed_is_one_of_its_own():
    assert named_key(2**32 - 1, "test") != named_key(0, "test")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--algorithm.clip", "-0.2"], "algorithm: clip=-0.2: expected more than 0"),
        (["--algorithm.gamma", "nan"], "algorithm: gamma=nan: expected a finite number, at least 0 and at most 1"),
        (["--adam.b2", "1"], "adam: b2=1.0: expected at least 0 and less than 1"),
        (["--devices.microbatches", "3000000000"], "devices: microbatches=3000000000: expected less than 2^31"),
    ],
    ids=str,
)
def test_flags_out_of_range(flags, said):
    with pytest.raises(InputError) as error:
        cli.parse(ppo_experiment.Config(), flags)
    assert str(error.value).startswith(said)


def test_flags_keep_their_spelling_and_types():
    flags = [
        "--algorithm.clip",
        "0.3",
        "--algorithm.stop-kl",
        "None",
        "--algorithm.unfinished-score",
        "-2",
        "--compute.chunk",
        "8",
    ]
    cfg = cli.parse(ppo_experiment.Config(), flags)
    assert cfg.algorithm == dataclasses.replace(ppo_experiment.Config().algorithm, clip=0.3, unfinished_score=-2.0)
    assert cfg.compute == models.Compute(chunk=8)
    assert isinstance(cfg.algorithm, ppo.Config)


FILES = {
    "scaling",
    "run",
    "other",
    "quickstart",
    "workload",
    "db",
    "responses",
    "rubric",
    "guidelines",
    "certificate",
    "key",
    "data_dir",
    "out",
    "docs",
    "work",
    "data",
    "include",
}  # paths of no model


def test_every_path_is_that_of_a_model_or_of_a_file():
    """A model may be a name of the Hub, whose commit a resumed run compares; it must be known which settings are."""
    for config in configs():
        hints = typing.get_type_hints(config)
        paths = {field for field, hint in hints.items() if Path in (hint, *typing.get_args(hint))}
        unknown = paths - directory.MODELS - FILES
        assert not unknown, f"{name(config)}: are {sorted(unknown)} models? see MODELS of rlhf_jax.runs.directory"
