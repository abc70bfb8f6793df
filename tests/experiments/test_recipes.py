"""The published recipes at their full sizes: every stage's train step is traced and lowered on shapes alone."""

import jax
import jax.numpy as jnp
import pytest

from experiments.papers import (
    deepseekmath,
    flan,
    instructgpt,
    tldr_huang2024,
    tldr_stiennon2020,
    tulu3,
    ziegler2019,
)
from rlhf_jax import models
from rlhf_jax.rollouts import sampling
from scripts import tpu_compile

RECIPES = {"instructgpt": instructgpt, "tldr_stiennon2020": tldr_stiennon2020}
CASES = [
    *((recipe, stage) for recipe, module in RECIPES.items() for stage in module.STAGES),
    ("flan", "tune-137b"),
    ("deepseekmath", "grpo-7b"),
    ("tulu3", "dpo-70b"),
    ("tldr_huang2024", "ppo-6.9b"),
]


@pytest.fixture(autouse=True)
def scanned(monkeypatch):
    """Of rollouts, which come before the train step, only shapes are needed: layer by layer they take long to trace."""
    stacked = lambda network, prompts, cfg, loops: sampling._sample_stacked(network, prompts, cfg)
    monkeypatch.setattr(sampling, "_sample_unrolled", stacked)


def trained(recipe, stage):
    """The train step of a stage, on one device."""
    responses = 9 if recipe == "instructgpt" else 2
    steps = tpu_compile.plan_experiment(f"{recipe}:{stage}", [], jax.devices()[:1], responses=responses)
    (step,) = (step for step in steps if step.name == "train")
    return step


def weights(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "stage"), CASES)
def test_a_step_of_full_size_is_lowered(recipe, stage):
    step = trained(recipe, stage)
    state, *_ = step.args
    after, metrics = step.step.lower(*step.args).out_info
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(after) == shapes(state)
    assert all(x.shape == (1,) and x.dtype == jnp.float32 for x in metrics.values())


@pytest.mark.slow
def test_models_are_of_the_size_that_their_stage_names():
    billions = lambda stage: weights(trained("instructgpt", stage).args[0].params) / 1e9
    policy, critic = models.preset("gpt3-175b"), models.preset("gpt3-6.7b")
    counts = [models.parameter_count(config) / 1e9 for config in (policy, critic)]
    assert billions("ppo-175b") == pytest.approx(sum(counts), rel=1e-3)
    assert billions("reward") == pytest.approx(counts[1], rel=1e-3)


def test_sizes_are_those_of_the_papers():
    for module in RECIPES.values():
        for size, name in module.MODELS.items():
            billions = {"1.3b": 1.32, "6b": 6.7, "6.7b": 6.7, "175b": 174.6}[size]
            assert models.parameter_count(models.preset(name)) / 1e9 == pytest.approx(billions, rel=0.02)


def test_the_presets_nearest_to_those_of_flan():
    billions = {"422m": 0.422, "2b": 2.0, "8b": 8.0, "68b": 68.0, "137b": 137.0}
    for size, name in flan.MODELS.items():
        assert models.parameter_count(models.preset(name)) / 1e9 == pytest.approx(billions[size], rel=0.36)


def test_the_presets_of_other_recipes():
    billions = {"1b": 1.012, "2.8b": 2.775, "6.9b": 6.857, "7b": 6.910, "8b": 8.030, "70b": 70.554}
    billions |= dict.fromkeys(ziegler2019.TASKS, 0.124)
    for module in (deepseekmath, tldr_huang2024, tulu3, ziegler2019):
        for size, name in module.MODELS.items():
            assert models.parameter_count(models.preset(name)) / 1e9 == pytest.approx(billions[size], rel=0.004)


def test_stages_follow_each_other():
    """What a stage reads of another one is where that writes it."""
    for module in (deepseekmath, tldr_huang2024, ziegler2019):
        made = {config.out / "model" for _, config in module.STAGES.values()}
        for _, config in module.STAGES.values():
            named = [path for path in (config.init, *getattr(config, "reward", ())) if path.parts[0] == "runs"]
            assert set(named) <= made


@pytest.mark.slow
def test_the_largest_compiles():
    step = trained("instructgpt", "sft-175b")
    memory = step.step.lower(*step.args).compile().memory_analysis()
    params = weights(step.args[0].params)
    assert memory.argument_size_in_bytes == pytest.approx(12 * params, rel=0.01)  # and Adam's two moments, in float32
