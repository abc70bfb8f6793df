"""Compiles the steps of an experiment for a Cloud TPU on a machine without one: do they fit, and what do they take?

    python scripts/tpu_compile.py --experiment ppo --topology v5e:2x4
    python scripts/tpu_compile.py --experiment sft --topology v5p:2x2x4 --init llama3-8b --devices.fsdp 16
    python scripts/tpu_compile.py --experiment instructgpt:ppo-175b --topology v5p:8x8x8 --devices.fsdp 512

Needs `pip install -e .[tpu]` and no accelerator. All further flags are the experiment's own. Nothing is loaded:
a model is named by a directory with a config.json, or by a preset of `models.PRESETS`; the default is what the
experiments before this one make by their defaults. One step of the experiment's own `main` runs over shapes
(`analysis.shapes`), and so tells which steps it compiles and what lies on the devices beside each.

Prints a table of the steps in Markdown and one line of JSON, and leaves with status 1 where a step does not fit beside
what else lies on the devices, 2 on wrong input.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import assistant, dpo, evaluate, grpo, instruct, ppo, pretrain, rank, rejection, reward, sft
from experiments.published import gsm8k_evaluate, paths
from rlhf_jax import hub, models, runs
from rlhf_jax.algorithms import optim
from rlhf_jax.analysis import flops, shapes, tpu
from rlhf_jax.data import pipeline, sources, tokenizer
from rlhf_jax.data.rows import Row, Rows
from rlhf_jax.data.tasks import mixture
from rlhf_jax.data.world import World, labelers
from rlhf_jax.devices import parallel
from rlhf_jax.models import heads, lora
from rlhf_jax.rollouts import scores
from rlhf_jax.rollouts import tokens as tokens_lib
from rlhf_jax.runs import cli, plots
from rlhf_jax.types import InputError, Params, Prompts, Rankings, Rollout, Tokens, TrainState, Virtue

ROOMS = "experiments", "experiments.published", "experiments.papers", "experiments.studies"
EXAMPLES = 8  # rows of any data: as many as a stage answers at its end

# The architecture that a model directory has, or would have.
ConfigOf = Callable[[Path, models.Compute], models.Config]


# Models ---------------------------------------------------------------------------------------------------------------


def architecture(path: Path, compute: models.Compute, find_maker: Callable[[str], Any]) -> models.Config:
    """The architecture of a preset, of a model directory, or of the model that an experiment would write to that path.

    `find_maker(name)` is the configuration of the experiment whose run directory has that name, None if there is none.
    Raises InputError where nothing is known.
    """
    if str(path) in models.PRESETS:
        config = models.preset(str(path))
    elif path.exists():
        config = models.load_config(path)
    else:
        maker = find_maker(path.parent.name)
        if isinstance(maker, models.Config):
            config = maker
        elif maker is None and hub.is_name(path):
            config = models.load_config(path)
        elif maker is None:
            raise InputError(f"{path} is neither a model directory nor a preset: {', '.join(models.PRESETS)}")
        elif isinstance(maker, pretrain.Config) and maker.init is None:
            config = new_config(maker)
        else:
            config = architecture(maker.init, compute, find_maker)
    return dataclasses.replace(config, compute=compute)


def find_module(name: str) -> Any:
    """The module of an experiment or a recipe, in whichever folder of `experiments` it is; None if in none of them."""
    for room in ROOMS:
        if name.isidentifier() and importlib.util.find_spec(f"{room}.{name}") is not None:
            return importlib.import_module(f"{room}.{name}")
    return None


def new_config(cfg: pretrain.Config) -> models.Config:
    """The architecture of a model that is trained from random weights."""
    return dataclasses.replace(models.preset(cfg.preset), vocab_size=cfg.vocab_size, compute=cfg.compute)


def default_config(name: str) -> Any:
    """The default configuration of an experiment; None where there is none of that name."""
    module = find_module(name)
    return module.CONFIG if hasattr(module, "CONFIG") else module.Config() if hasattr(module, "Config") else None


def main_function(name: str) -> Callable:
    """The `main` of an experiment, or of the PPO that it configures."""
    module = find_module(name)
    return module.main if hasattr(module, "main") else module.ppo.main


def find_stage_maker(recipe: Any, stage: str, name: str) -> Any:
    """The maker of a model of a recipe: the stage `name`, or for a base model the preset of the size of `stage`."""
    size = lambda stage: stage.partition("-")[2]
    if name in recipe.STAGES and not size(name):
        return recipe.STAGES[name][1]
    return models.preset(recipe.MODELS[size(name if name in recipe.STAGES else stage)])


# What `main` finds where it would load, read and write ----------------------------------------------------------------


@functools.cache
def any_tokenizer() -> tokenizer.Tokenizer:
    """A tokenizer of bytes, for experiments that want some."""
    with tempfile.TemporaryDirectory() as folder:
        return tokenizer.train(["What is it?"], 257, folder)


class ExampleRows(Rows):
    """A few rows that have the fields of every kind of data."""

    def __init__(self, spec: str, *_: Any, **__: Any):
        seed = re.search(r"seed=(\d+)", spec)
        world = World.generate(int(seed[1]) if seed else 0)
        other = {"text": "What is it?", "responses": ["this", "that"], "ranks": [0, 1], "answer": "1"}
        self._rows = [row | other for row in world.prompt_rows(EXAMPLES, 0)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)


@dataclasses.dataclass(frozen=True)
class Batches:
    """A stream of one batch, again and again unless `once`."""

    batch: Any
    once: bool
    counts: str = "not read"
    steps: int = 100

    def part(self, *_: int) -> "Batches":
        return self

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.batch, *([1] if self.once else []))


def zeros(dtype: Any, *shape: int) -> np.ndarray:
    """Zeros that take no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


# These take the arguments of the functions of `pipeline` that they stand for.


def token_batches(
    rows: Any, tokenizer: Any, *, length: int, batch: int, seed: int | None, epochs: int | None = None, **_: Any
) -> Batches:
    tokens = zeros(np.int32, batch, length)
    return Batches(Tokens(tokens=tokens, segment=tokens, target=zeros(bool, batch, length)), epochs is not None)


def ranking_batches(
    responses: int,
    rows: Any,
    tokenizer: Any,
    *,
    length: int,
    batch: int,
    seed: int,
    epochs: int | None = None,
    virtue: Virtue | None = None,
    shares: Any = None,
) -> Batches:
    shape = batch, responses, length  # read one by one: how long the prompts are is not known
    rankings = Rankings(
        tokens=zeros(np.int32, *shape),
        mask=zeros(bool, *shape),
        start=zeros(np.int32, batch),
        rank=zeros(np.int32, batch, responses),
        harmful=zeros(bool, batch, responses) if virtue else None,
    )
    return Batches(rankings, epochs is not None)


def prompts(rows: int, length: int) -> Prompts:
    tokens = zeros(np.int32, rows, length)
    return Prompts(tokens=tokens, mask=~zeros(bool, rows, length), index=np.arange(rows, dtype=np.int32) % EXAMPLES)


def prompt_batches(rows: Any, tokenizer: Any, *, length: int, batch: int, seed: int, widths: int = 1) -> Batches:
    return Batches(prompts(batch, length), once=False)


def mixed_batches(mixed: Any, tokenizer: Any, sizes: mixture.Sizes) -> Batches:
    return token_batches(None, tokenizer, length=sizes.length, batch=sizes.batch, seed=0)


class NoTests:
    """Tests of no questions, which are no part of a step."""

    def __init__(self, *_: Any): ...

    def __call__(self, *_: Any) -> list:
        return []

    def metrics(self, *_: Any) -> dict:
        return {}

    def report(self, *_: Any) -> list:
        return []


class NoRecords:
    """Records of no tokens, which are no part of a step."""

    def __init__(self, *_: Any): ...

    def before(self, *_: Any) -> list:
        return []

    watch = after = before


class OneStep(contextlib.nullcontext):
    """A `runs.Run` of one step, which records nothing."""

    def __init__(self, cfg: Any, layout: shapes.Shapes, state: Any, streams: dict[str, Batches], *_: Any):
        super().__init__(self)
        self.state, self.streams = layout.state(state), {name: iter(stream) for name, stream in streams.items()}
        self.clock = mock.Mock()

    def __iter__(self) -> Iterator[int]:
        return iter([1])

    def record(self, *_: Any) -> None: ...

    def samples(self, *_: Any) -> None: ...

    def tokens(self, *_: Any) -> None: ...


@contextlib.contextmanager
def nothing_but_steps(layout: shapes.Shapes, config_of: ConfigOf, chips: int, responses: int) -> Iterator[None]:
    """Whatever loads, reads, writes or prints does nothing, and models and batches are shapes and zeros."""

    def load(path: Path, compute: models.Compute, place: Any) -> models.Model:
        config = config_of(path, compute)
        params = layout.loaded(models.parameter_shapes(config))
        return models.Model(config, params, any_tokenizer(), models.bind(models.Transformer(config)))

    def load_reward(path: Path, compute: models.Compute, place: Any) -> models.Model:
        config = config_of(path, compute)
        make = lambda policy: heads.from_policy(policy, config, jax.random.key(0))
        params = layout.loaded(jax.eval_shape(make, models.parameter_shapes(config)))
        return models.Model(config, params, any_tokenizer(), models.bind(heads.ScalarModel(config)))

    def new_model(cfg: pretrain.Config, rows: Any) -> models.Model:
        config = new_config(cfg)
        params = jax.tree.map(lambda x: shapes.unknown(x.shape, x.dtype), models.parameter_shapes(config))
        return models.Model(config, params, any_tokenizer(), models.bind(models.Transformer(config)))

    def score_by_text(*_: Any) -> Callable[[Rollout], Rollout]:
        return lambda episodes: episodes.replace(score=layout.rows(np.zeros(episodes.index.size, np.float32)))

    merge = lora.merge

    def merge_shapes(base: Params, trained: Params, cfg: lora.Config) -> Params:
        if cfg.rank is None:
            return trained
        return layout.loaded(
            jax.eval_shape(lambda *both: merge(*both, cfg), shapes.shapes(base), shapes.shapes(trained))
        )

    init = optim.init

    def init_shapes(params: Params, tx: optax.GradientTransformation, rng: jax.Array) -> TrainState:
        of_tracers = lambda params: tx.init(jax.tree.map(jnp.asarray, params))  # Adafactor's takes nothing else
        return init(params, optax.GradientTransformation(of_tracers, tx.update), rng)

    every_prompt = lambda rows, tokenizer, *, length: (prompts(len(list(rows)), length), "not read")
    nothing = lambda *_, **__: None
    changed: list[tuple[Any, str, Any]] = [
        (jax, "device_count", lambda: chips),
        (parallel, "layout", lambda cfg: layout),
        (models, "load", load),
        (models, "load_reward", load_reward),
        (models, "save", nothing),
        (lora, "merge", merge_shapes),
        (optim, "init", init_shapes),
        (pretrain, "new_model", new_model),
        (paths, "check_given", nothing),
        (sources, "rows", ExampleRows),
        (pipeline, "text", token_batches),
        (pipeline, "demonstrations", token_batches),
        (mixture, "open_mixture", nothing),
        (mixture, "Stream", mixed_batches),
        (mixture, "counts", nothing),
        (instruct, "Tests", NoTests),
        (pipeline, "rankings", functools.partial(ranking_batches, responses)),
        (pipeline, "prompts", prompt_batches),
        (pipeline, "every_prompt", every_prompt),
        (scores, "text_function", score_by_text),
        (flops, "peak", lambda dtype: 1.0),
        (reward, "table", lambda *_: []),
        (tokens_lib, "Recorder", NoRecords),
        (reward, "record", lambda *_: 0.0),
        (labelers, "agreement", lambda _: 0.0),
        (plots, "curves", nothing),
        (runs, "Run", OneStep),
        *((runs, name, nothing) for name in ("claim", "share", "write", "write_config")),
    ]
    with contextlib.ExitStack() as stack:
        for module, name, value in changed:
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


# Steps ----------------------------------------------------------------------------------------------------------------

NAMES = {
    "collect": "collect",
    "score_responses": "score",
    "scores": "score",
    "evaluate": "loss",
    "held_out_loss": "loss",
}  # others train


def programs(cfg: Any, calls: Sequence[shapes.Call]) -> Iterator[tpu.Program]:
    """The steps that an experiment called, by their names in the table."""
    alike = lambda one, other: (one.function, one.args, one.result) == (other.function, other.args, other.result)
    calls = [call for n, call in enumerate(calls) if not any(alike(call, other) for other in calls[:n])]
    names = [NAMES.get(call.function, "train") for call in calls]
    for n, call in enumerate(calls):
        name, tokens = names[n], learnt_tokens(cfg, call)
        if name == "collect":
            tokens = call.result.tokens.size
            if "reference" not in call.args[0] and "score" not in names[n + 1 :]:
                name = "sample"
                if "train" in names:  # at the end of a stage, where the responses alone count
                    tokens = call.result.response_mask.size
        yield tpu.Program(name, call.step, call.args, tokens, call.beside)


def learnt_tokens(cfg: Any, call: shapes.Call) -> int:
    """The tokens that a step reads; an update reads a rollout as often as it has epochs."""
    total = 0
    for x in jax.tree.leaves(call.args, is_leaf=lambda x: isinstance(x, Tokens | Rankings | Rollout)):
        if isinstance(x, Tokens | Rankings):
            total += x.tokens.size
        elif isinstance(x, Rollout):
            total += x.tokens.size * (1 if call.function in NAMES else cfg.algorithm.epochs)
    return total


def with_count(step: tpu.Program, cfg: pretrain.Config | sft.Config, config: models.Config, layout: Any) -> tpu.Program:
    """A train step on rows of text with `tpu.train_bytes`, where that applies."""
    adapted = isinstance(cfg, sft.Config) and cfg.lora.rank
    if step.name != "train" or not isinstance(layout, parallel.Mesh) or config.compute.remat != "full" or adapted:
        return step
    rows = step.tokens // cfg.length
    counted = tpu.train_bytes(config, layout.mesh.shape, rows, cfg.length, cfg.devices.microbatches)
    return dataclasses.replace(step, counted=counted)


WITH_STEPS = (
    *(pretrain.Config, sft.Config, reward.Config, dpo.Config, ppo.Config, grpo.Config),
    *(rank.Config, evaluate.Config, rejection.Config, gsm8k_evaluate.Config, instruct.Config),
)


def plan_steps(main: Callable, cfg: Any, config_of: ConfigOf, devices: list, responses: int) -> list[tpu.Program]:
    """The steps of an experiment with this configuration; raises InputError where it has none of its own."""
    if isinstance(cfg, assistant.Config):
        stages = assistant.stages(cfg)
        return [
            dataclasses.replace(step, name=f"{field.name} {step.name}")
            for field in dataclasses.fields(stages)
            for step in plan_steps(
                find_module(field.name).main, getattr(stages, field.name), config_of, devices, responses
            )
        ]
    if not isinstance(cfg, WITH_STEPS):
        raise InputError("this experiment has no steps of its own: compile those that it runs")
    layout = shapes.Shapes(parallel.layout(cfg.devices, devices))
    with nothing_but_steps(layout, config_of, len(devices), responses):
        jax.eval_shape(lambda: [None for _ in [main(cfg)]])
    steps = list(programs(cfg, layout.calls))
    if isinstance(cfg, rejection.Config):
        cfg = rejection.sft_config(cfg)
    if isinstance(cfg, pretrain.Config) and cfg.init is None:
        config = new_config(cfg)
    elif isinstance(cfg, pretrain.Config | sft.Config):
        config = config_of(cfg.init, cfg.compute)
    else:
        return steps
    return [with_count(step, cfg, config, layout.layout) for step in steps]


def choose(name: str) -> tuple[Callable, Any, Callable[[str], Any]]:
    """The main and default configuration of an experiment or of a recipe's stage, and the makers of its models."""
    experiment, _, stage = name.partition(":")
    if (default := default_config(experiment)) is not None and not stage:
        return main_function(experiment), default, default_config
    try:
        recipe = find_module(experiment)
        main, default = recipe.STAGES[stage]
    except (AttributeError, KeyError):
        names = sorted(path.stem for path in Path(assistant.__file__).parent.rglob("[!_]*.py"))
        raise InputError(
            f"experiment {name!r}: expected one of {', '.join(names)}, a stage of a recipe behind a colon"
        ) from None
    return main, default, functools.partial(find_stage_maker, recipe, stage)


def plan_experiment(experiment: str, flags: Sequence[str], devices: list, responses: int = 9) -> list[tpu.Program]:
    """The steps of an experiment with these flags over these devices."""
    main, default, find_maker = choose(experiment)
    cfg = cli.parse(default, flags)
    if isinstance(cfg, assistant.Config):
        stages = assistant.stages(cfg)
        find_maker = lambda name: getattr(stages, name, None)
    return plan_steps(main, cfg, lambda path, compute: architecture(path, compute, find_maker), devices, responses)


def main(args: Sequence[str] | None = None) -> int:
    """Compile, print, and say whether all fits: 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", required=True, help="such as ppo, or a recipe's stage: instructgpt:ppo-175b")
    parser.add_argument("--topology", required=True, help="such as v5e:2x4")
    parser.add_argument("--only", action="append", default=[], help="a step to compile; all unless given, repeatable")
    parser.add_argument("--responses", type=int, default=9, help="answers to a prompt in a batch of rankings: 9")
    own, flags = parser.parse_known_args(args)
    devices = tpu.devices(own.topology)
    programs = plan_experiment(own.experiment, flags, devices, responses=own.responses)
    if unknown := [name for name in own.only if name not in [step.name for step in programs]]:
        raise InputError(f"step {unknown[0]!r}: expected one of {', '.join(step.name for step in programs)}")
    reports: list[tpu.Report] = []
    for step in programs:
        if not own.only or step.name in own.only:
            reports.append(tpu.compile_report(step, own.topology, len(devices)))
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
