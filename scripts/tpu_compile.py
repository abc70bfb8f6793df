"""Compiles the steps of an experiment for a Cloud TPU on a machine without one: do they fit, and what do they take?

    python scripts/tpu_compile.py --experiment ppo --topology v5e:2x4
    python scripts/tpu_compile.py --experiment sft --topology v5p:2x2x4 --init llama3-8b --devices.fsdp 16
    python scripts/tpu_compile.py --experiment instructgpt:ppo-175b --topology v5p:8x8x8 --devices.fsdp 512

Needs `pip install -e .[tpu]` and no accelerator. All further flags are the experiment's own. Nothing is loaded:
a model is named by a directory with a config.json, or by a preset of rlhf_jax.transformer; the default is what the
experiments before this one make by their defaults. Prints a table of the steps in Markdown and one line of JSON, and
leaves with status 1 where a step does not fit beside what else lies on the devices, 2 on wrong input.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

from experiments import assistant, dpo, evaluate, grpo, ppo, ppo_gold, pretrain, rank, rejection, reward, rloo, sft
from experiments.published import gsm8k_evaluate
from rlhf_jax import models
from rlhf_jax.algorithms import grpo as grpo_lib
from rlhf_jax.algorithms import optim, updates
from rlhf_jax.algorithms import rloo as rloo_lib
from rlhf_jax.analysis import tpu
from rlhf_jax.devices import parallel
from rlhf_jax.models import families, heads, lora
from rlhf_jax.rollouts import rollout, scores
from rlhf_jax.runs import cli
from rlhf_jax.types import InputError, Params, Prompts, Rankings, Rollout, Tokens

EOS = 0  # any token will do
SAID = 8  # rows that `rollout.say` answers at the end of a stage

Models = Callable[[Path], models.Config]  # the architecture that a model directory has, or would have


# Models ---------------------------------------------------------------------------------------------------------------


def architecture(path: Path, compute: models.Compute, made_by: Callable[[str], Any]) -> models.Config:
    """Of a model directory, of a preset, or of what the experiment would make in whose run directory it lies.

    `made_by(name)` is that one's configuration, None if there is none. Raises InputError where nothing is known.
    """
    if str(path) in models.PRESETS:
        config = models.preset(str(path))
    elif path.exists():
        config = families.load_config(path)
    else:
        maker = made_by(path.parent.name)
        if isinstance(maker, models.Config):
            config = maker
        elif maker is None:
            raise InputError(f"{path} is neither a model directory nor a preset: {', '.join(models.PRESETS)}")
        elif isinstance(maker, pretrain.Config) and maker.init is None:
            config = dataclasses.replace(models.preset(maker.preset), vocab_size=maker.vocab_size)
        else:
            config = architecture(maker.init, compute, made_by)
    return dataclasses.replace(config, compute=compute)


def default_of(name: str) -> Any:
    """The configuration with which an experiment starts; None where there is none of that name."""
    try:
        module = importlib.import_module(f"experiments.{name}")
    except ImportError:
        return None
    return module.CONFIG if hasattr(module, "CONFIG") else module.Config() if hasattr(module, "Config") else None


def maker_of(recipe: Any, stage: str, name: str) -> Any:
    """Of a recipe with stages: the stage in whose folder a model lies, and for its base model the size of `stage`."""
    size = lambda stage: stage.partition("-")[2]
    if name in recipe.STAGES and not size(name):
        return recipe.STAGES[name][1]
    return models.preset(recipe.MODELS[size(name if name in recipe.STAGES else stage)])


# Shapes ---------------------------------------------------------------------------------------------------------------


def of(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def tokens(*shape: int) -> Tokens:
    return Tokens(tokens=of(*shape), segment=of(*shape), target=of(*shape, dtype=bool))


def prompts(rows: int, columns: int) -> Prompts:
    return Prompts(tokens=of(rows, columns), mask=of(rows, columns, dtype=bool), index=of(rows))


def rankings(rows: int, responses: int, columns: int) -> Rankings:
    shape = rows, responses, columns
    return Rankings(tokens=of(*shape), mask=of(*shape, dtype=bool), start=of(rows), rank=of(rows, responses))


def scalar_shapes(config: models.Config) -> Params:
    """Parameters of a reward model or critic."""
    make = lambda policy: heads.from_policy(policy, config, jax.random.key(0))
    return jax.eval_shape(make, models.parameter_shapes(config))


def key_shape() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


# Steps ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """Shapes of arrays on the devices of a layout."""

    layout: parallel.Layout
    chips: int
    responses: int = 9  # to a prompt in a batch of rankings, which its data says

    def state(self, make: Callable, *shapes: Any) -> Any:
        """What `make` returns of such arguments, placed as `layout.state` does."""
        return tpu.state_shapes(self.layout, jax.eval_shape(make, *shapes))

    def frozen(self, make: Callable, *shapes: Any) -> Any:
        """The same, as `layout.frozen` does."""
        return tpu.state_shapes(self.layout, jax.eval_shape(make, *shapes), frozen=True)

    def again(self, placed: Any) -> Any:
        """`layout.state` of what lies on a mesh already is the same arrays; by pmap it is another copy."""
        if isinstance(self.layout, parallel.Mesh):
            return placed
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), placed)

    def rows(self, tree: Any, rows_axis: int = 0) -> Any:
        return tpu.row_shapes(self.layout, tree, rows_axis)

    def returned(self, step: Callable, *args: Any) -> Any:
        """The rows that a step returns, for a step that takes them."""
        shapes = jax.eval_shape(step, *args)
        return shapes if isinstance(self.layout, parallel.Pmap) else self.rows(shapes)

    @property
    def keys(self) -> Any:
        return tpu.state_shapes(self.layout, key_shape())

    @property
    def first(self) -> Any:
        return tpu.state_shapes(self.layout, of(dtype=jnp.uint32))


def program(name: str, step: Callable, args: tuple, tokens: int, *held: Any) -> tpu.Program:
    """`held` is what lies on the devices meanwhile, its arguments among it or not."""
    mine = {id(x) for x in jax.tree.leaves(args)}
    return tpu.Program(name, step, args, tokens, [x for x in jax.tree.leaves(held) if id(x) not in mine])


def begin(tx: optax.GradientTransformation) -> Callable:
    """The state before the first step, of parameters."""
    return lambda params: optim.init(params, tx, jax.random.key(0))


def counted(place: Place, config: models.Config, cfg: Any, rows: int) -> float | None:
    """`tpu.train_bytes` of a stage that learns from rows of text, where it applies."""
    adapted = getattr(cfg, "lora", lora.Config()).rank
    if not isinstance(place.layout, parallel.Mesh) or config.compute.remat != "full" or adapted:
        return None
    return tpu.train_bytes(config, place.layout.mesh.shape, rows, cfg.length, cfg.devices.microbatches)


def said(place: Place, config: models.Config, length: int, params: Params, *held: Any) -> tpu.Program:
    """The samples at the end of a stage, by `rollout.say`."""
    half, rows = min(length, config.max_length) // 2, place.chips * -(-SAID // place.chips)
    step = rollout.answering(config, place.layout, max_new_tokens=half, temperature=1.0, eos_id=EOS)
    args = params, place.rows(prompts(rows, half)), place.keys, place.first
    return program("sample", step, args, rows * half, held)


def pretraining(cfg: pretrain.Config, models: Models, place: Place) -> Iterator[tpu.Program]:
    made = dataclasses.replace(models.preset(cfg.preset), vocab_size=cfg.vocab_size, compute=cfg.compute)
    config = models(cfg.init) if cfg.init else made
    tx, step = pretrain.build(cfg, config, place.layout)
    state = place.state(begin(tx), models.parameter_shapes(config))
    batch = place.rows(tokens(cfg.batch, cfg.length))
    train = program("train", step, (state, batch), cfg.batch * cfg.length)
    yield dataclasses.replace(train, counted=counted(place, config, cfg, cfg.batch))
    yield said(place, config, cfg.length, place.again(state.params), *on_mesh(place, state))


def on_mesh(place: Place, *trees: Any) -> tuple:
    """What a mesh keeps where pmap brings a state to the host."""
    return trees if isinstance(place.layout, parallel.Mesh) else ()


def tuning(cfg: sft.Config, models: Models, place: Place) -> Iterator[tpu.Program]:
    config = models(cfg.init)
    shapes = models.parameter_shapes(config)
    tx, step = sft.build(cfg, config, place.layout, steps=100)
    state, base = place.state(functools.partial(sft.start, cfg, tx), shapes)
    rows = cfg.batch + (cfg.text_batch if cfg.text else 0)
    batch = place.rows(tokens(rows, cfg.length))
    train = program("train", step, (state, base, batch), rows * cfg.length)
    yield dataclasses.replace(train, counted=counted(place, config, cfg, rows))
    merged = place.state(lambda x: x, shapes) if cfg.lora.rank else place.again(state.params)
    yield said(place, config, cfg.length, merged, base, *on_mesh(place, state))


def judging(cfg: reward.Config, models: Models, place: Place) -> Iterator[tpu.Program]:
    config = models(cfg.init)
    tx, step, scored = reward.build(cfg, config, place.layout, steps=100)
    trained, frozen = jax.eval_shape(functools.partial(reward.split, cfg, config), models.parameter_shapes(config))
    state, base = place.state(begin(tx), trained), place.state(lambda x: x, frozen)
    shape = cfg.batch, place.responses, cfg.length
    batch, count = place.rows(rankings(*shape)), math.prod(shape)
    yield program("train", step, (state, base, batch), count)
    params = lora.attach(base, place.again(state.params), lora.Config())  # adapters of the same shapes
    yield program("score", scored, (params, batch), count, state, base)


def preferring(cfg: dpo.Config, models: Models, place: Place) -> Iterator[tpu.Program]:
    config = models(cfg.init)
    shapes = models.parameter_shapes(config)
    tx, step = dpo.build(cfg, config, place.layout, steps=100)
    state = place.state(begin(tx), shapes)
    reference = place.frozen(cfg.compute.freeze, shapes)
    shape = cfg.batch, place.responses, cfg.length
    yield program("train", step, (state, place.rows(rankings(*shape)), reference), math.prod(shape))
    yield said(place, config, cfg.length, place.again(state.params), reference, *on_mesh(place, state))


def improving(cfg: ppo.Config, models: Models, place: Place) -> Iterator[tpu.Program]:
    config, judges = models(cfg.init), [models(path) for path in cfg.reward]
    judge = judges[0] if cfg.critic == "reward" else None
    tx, collect, step = ppo.build(cfg, config, judge, EOS, place.layout)
    shapes = models.parameter_shapes(config)
    critic = scalar_shapes(judge) if judge else jax.eval_shape(lambda: heads.fresh(config))
    state, base = place.state(functools.partial(ppo.start, cfg, tx), shapes, critic)
    shared = cfg.lora.rank and cfg.reference is None
    reference = base["policy"] if shared else place.frozen(cfg.compute.freeze, shapes)
    params = lora.attach(base, state.params, lora.Config())
    scored = [] if isinstance(cfg, ppo_gold.Config) else judges
    train = lambda episodes, text: (state, base, episodes, text)
    yield from rolling(cfg, cfg.ppo, cfg.pessimism, scored, place, collect, step, params, reference, train, state, base)


def grouping(cfg: grpo.Config, models: Models, place: Place) -> Iterator[tpu.Program]:
    config = models(cfg.init)
    shapes = models.parameter_shapes(config)
    algorithm = rloo_lib if isinstance(cfg, rloo.Config) else grpo_lib
    tx, collect, step = grpo.build(cfg, config, EOS, place.layout, algorithm.train_step)
    begin = lambda policy: updates.init({"policy": policy}, tx, cfg.algorithm, jax.random.key(0))
    state = place.state(begin, shapes)
    reference = place.frozen(cfg.compute.freeze, shapes)
    judges = [models(path) for path in cfg.reward]
    train = lambda episodes, text: (state, episodes, text)
    yield from rolling(cfg, cfg.algorithm, 0.0, judges, place, collect, step, state.params, reference, train, state)


def rolling(
    cfg: Any,
    settings: updates.Config,
    pessimism: float,
    judges: list[models.Config],
    place: Place,
    collect: Callable,
    step: Callable,
    params: Params,
    reference: Params,
    train: Callable[[Rollout, Tokens | None], tuple],
    *held: Any,
) -> Iterator[tpu.Program]:
    """The steps of every experiment that learns from rollouts; `held` is what the trainer has on the devices."""
    columns = cfg.prompt_length + cfg.max_new_tokens
    args = params, reference, place.rows(prompts(cfg.batch, cfg.prompt_length)), place.keys, place.first
    judge, score = scorer(judges, pessimism, place)
    held = *held, reference, judge
    yield program("collect", collect, args, cfg.batch * columns, held)
    episodes = place.returned(collect, *args)
    if score:
        yield program("score", score, (judge, episodes), cfg.batch * columns, held)
        episodes = place.returned(score, judge, episodes)
    else:
        episodes = episodes.replace(score=place.rows(of(cfg.batch, dtype=jnp.float32)))
    rounds = settings.epochs * settings.minibatches
    text = place.rows(tokens(rounds, cfg.text_batch, cfg.text_length), rows_axis=1) if cfg.text else None
    learnt = settings.epochs * cfg.batch * columns + (rounds * cfg.text_batch * cfg.text_length if cfg.text else 0)
    yield program("train", step, train(episodes, text), learnt, held)


def scorer(judges: list[models.Config], pessimism: float, place: Place) -> tuple[Params, Callable | None]:
    """The parameters of the reward models, and the step that scores by them."""
    if not judges:
        return {}, None
    stack = functools.partial(scores.stacked, config=judges[0])
    params = place.frozen(stack, [scalar_shapes(judge) for judge in judges])
    return params, scores.scoring(judges[0], EOS, pessimism, place.layout)


def measured(
    cfg: Any,
    config: models.Config,
    reference: Params,
    params: Params,
    judge: Path | None,
    models: Models,
    place: Place,
) -> Iterator[tpu.Program]:
    """`rollout.episodes`."""
    columns = cfg.prompt_length + cfg.max_new_tokens
    sizes = {"max_new_tokens": cfg.max_new_tokens, "temperature": cfg.temperature}
    collect = rollout.collecting(config, place.layout, **sizes, eos_id=EOS)
    args = {"policy": params}, reference, place.rows(prompts(cfg.batch, cfg.prompt_length)), place.keys, place.first
    scoring, score = scorer([models(judge)] if judge else [], 0.0, place)
    yield program("collect", collect, args, cfg.batch * columns, scoring)
    if score:
        episodes = place.returned(collect, *args)
        yield program("score", score, (scoring, episodes), cfg.batch * columns, params, reference)


def evaluating(cfg: evaluate.Config, models: Models, place: Place) -> Iterator[tpu.Program]:
    config = models(cfg.model)
    shapes = models.parameter_shapes(config)
    params = place.state(lambda x: x, shapes)
    reference = place.again(params) if cfg.best_of > 1 else place.state(lambda x: x, shapes)
    yield from measured(cfg, config, reference, params, cfg.reward, models, place)
    if cfg.best_of == 1:
        batch = place.rows(tokens(cfg.batch, cfg.text_length))
        yield program("loss", evaluate.nll_step(config, place.layout), (params, batch), cfg.batch * cfg.text_length)


def rejecting(cfg: rejection.Config, models: Models, place: Place) -> Iterator[tpu.Program]:
    config = models(cfg.init)
    params = place.state(lambda x: x, models.parameter_shapes(config))
    yield from measured(cfg, config, place.again(params), params, cfg.reward, models, place)
    yield from tuning(rejection.sft_config(cfg), models, place)


def answering(cfg: rank.Config | gsm8k_evaluate.Config, models: Models, place: Place) -> Iterator[tpu.Program]:
    config = models(cfg.init if isinstance(cfg, rank.Config) else cfg.model)
    sizes = {"max_new_tokens": cfg.max_new_tokens, "temperature": cfg.temperature}
    step = rollout.answering(config, place.layout, **sizes, eos_id=EOS)
    params = place.state(lambda x: x, models.parameter_shapes(config))
    args = params, place.rows(prompts(cfg.batch, cfg.prompt_length)), place.keys, place.first
    yield program("sample", step, args, cfg.batch * (cfg.prompt_length + cfg.max_new_tokens))


STEPS: dict[type, Callable[[Any, Models, Place], Iterator[tpu.Program]]] = {
    pretrain.Config: pretraining,
    sft.Config: tuning,
    reward.Config: judging,
    dpo.Config: preferring,
    ppo.Config: improving,
    grpo.Config: grouping,
    evaluate.Config: evaluating,
    rejection.Config: rejecting,
    rank.Config: answering,
    gsm8k_evaluate.Config: answering,
}


def plan(cfg: Any, models: Models, place: Place) -> list[tpu.Program]:
    """The steps of an experiment with this configuration; raises InputError where it has none of its own."""
    if isinstance(cfg, assistant.Config):
        stages = assistant.stages(cfg).items()
        return [
            dataclasses.replace(step, name=f"{name} {step.name}")
            for name, stage in stages
            for step in plan(stage, models, place)
        ]
    steps = next((STEPS[kind] for kind in type(cfg).__mro__ if kind in STEPS), None)
    if steps is None:
        raise InputError("this experiment has no steps of its own: compile those that it runs")
    return list(steps(cfg, lambda path: models(path, cfg.compute), place))


def chosen(name: str) -> tuple[Any, Callable[[str], Any]]:
    """The default configuration of an experiment, or of a recipe's stage, and `made_by` for its models."""
    experiment, _, stage = name.partition(":")
    if (default := default_of(experiment)) is not None and not stage:
        return default, default_of
    try:
        recipe = importlib.import_module(f"experiments.{experiment}")
        default = recipe.STAGES[stage][1]
    except (ImportError, AttributeError, KeyError):
        names = sorted(path.stem for path in Path(assistant.__file__).parent.glob("[!_]*.py"))
        raise InputError(
            f"experiment {name!r}: expected one of {', '.join(names)}, a stage of a recipe behind a colon"
        ) from None
    return default, functools.partial(maker_of, recipe, stage)


def planned(experiment: str, flags: Sequence[str], devices: list, **sizes: int) -> list[tpu.Program]:
    """The steps of an experiment with these flags over these devices."""
    default, made_by = chosen(experiment)
    cfg = cli.parse(default, flags)
    if isinstance(cfg, assistant.Config):
        made_by = assistant.stages(cfg).get
    place = Place(parallel.layout(cfg.devices, devices), len(devices), **sizes)
    return plan(cfg, lambda path, compute: architecture(path, compute, made_by), place)


def main(args: Sequence[str] | None = None) -> int:
    """Compile, print, and say whether all fits: 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", required=True, help="such as ppo, or a recipe's stage: instructgpt:ppo-175b")
    parser.add_argument("--topology", required=True, help="such as v5e:2x4")
    parser.add_argument("--only", action="append", default=[], help="a step to compile; all unless given, repeatable")
    parser.add_argument("--responses", type=int, default=9, help="answers to a prompt in a batch of rankings: 9")
    own, flags = parser.parse_known_args(args)
    devices = tpu.devices(own.topology)
    programs = planned(own.experiment, flags, devices, responses=own.responses)
    if unknown := [name for name in own.only if name not in [step.name for step in programs]]:
        raise InputError(f"step {unknown[0]!r}: expected one of {', '.join(step.name for step in programs)}")
    reports: list[tpu.Report] = []
    for step in programs:
        if not own.only or step.name in own.only:
            reports.append(tpu.compiled(step, own.topology, len(devices)))
            rows = tpu.table(reports).splitlines()
            print("\n".join(rows if len(reports) == 1 else rows[-1:]), flush=True)
    print(json.dumps([report.record() for report in reports]))
    return int(any(report.share > 1 for report in reports))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
