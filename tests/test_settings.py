"""No dead setting: each one changes what an experiment asks of the library before its first step.

A stage runs up to where its records would begin, once as it is and once for each setting with another value. What it
asked of the library on the way, with which arguments, has to differ. Settings of the loop itself, which comes later,
are left to test_experiments.py.
"""

import dataclasses
import functools

import optax
import pytest
from flax import linen as nn

from experiments import dpo, grpo, ppo, pretrain, reward, sft
from rlhf_jax import heads, log, lora, models, optim, parallel, transformer, types
from rlhf_jax import reward as reward_lib
from rlhf_jax.data import builders, pipeline

LATER = {"out", "save_every", "samples_every", "samples"}
ASKED = {
    builders: ["source"],
    pipeline: ["text", "demonstrations", "rankings", "prompts"],
    models: ["load", "load_reward"],
    heads: ["critic", "shared_critic"],
    optim: ["adamw", "schedule", "cosine"],
    parallel: ["pmap"],
    transformer: ["bind", "preset"],
    reward_lib: ["normalize"],
}
STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "grpo": grpo, "dpo": dpo}


class Begun(Exception):
    """The stage has come to its records."""


def described(value):
    """What of an argument a setting may change, to compare."""
    if isinstance(value, functools.partial):
        return value.func.__name__, described(value.keywords)
    if isinstance(value, dict):
        return {name: described(x) for name, x in value.items()}
    if isinstance(value, tuple | list):
        return [described(x) for x in value]
    if isinstance(value, nn.Module):
        return repr(value)
    if isinstance(value, models.Model | optax.GradientTransformation):
        return type(value).__name__
    plain = isinstance(value, str | int | float | None) or dataclasses.is_dataclass(value) or hasattr(value, "parts")
    return repr(value) if plain else type(value).__name__


@pytest.fixture
def asked(monkeypatch):
    """What the stage has asked so far."""
    asked = []

    def record(name, function):
        @functools.wraps(function)
        def recorded(*args, **kwargs):
            asked.append((name, described(list(args)), described(kwargs)))
            return function(*args, **kwargs)

        return recorded

    def start(directory, config, **kwargs):
        asked.append(("start", described(kwargs)))
        raise Begun

    for module, names in ASKED.items():
        for name in names:
            monkeypatch.setattr(module, name, record(name, getattr(module, name)))
    for stage in (pretrain, sft, reward, ppo, grpo, dpo):
        monkeypatch.setattr(stage, "named_key", record("named_key", types.named_key))
    monkeypatch.setattr(log, "start", start)
    return asked


def another(value):
    """A value of the same kind that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value if value else 1
    if isinstance(value, float):
        return 0.5 * value if value else 0.25
    if isinstance(value, optim.Adam):
        return dataclasses.replace(value, b2=0.5)
    if isinstance(value, transformer.Compute):
        return transformer.Compute(dtype="bfloat16")
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{"ptx_coef": 7.0} if hasattr(value, "ptx_coef") else {})
    raise NotImplementedError(value)


def settings(name, quick):
    """A configuration of the stage, and another value of each setting for which there is no rule."""
    base, tuned, judge = (quick.out / part / "model" for part in ("pretrain", "sft", "reward"))
    ranked, other = (str(quick.out / "rank" / f"{part}.jsonl") for part in ("train", "held_out"))
    if name == "pretrain":
        return quick.pretrain, {"data": "world:rows=201", "init": tuned, "preset": "llama-tiny", "vocab_size": 300}
    if name == "sft":
        tuning = dataclasses.replace(quick.sft, init=base, data="world:rows=100")
        return tuning, {"data": "world:rows=101", "text": None, "init": tuned, "lora": lora.Config(rank=2)}
    if name == "reward":
        margin = reward_lib.Config(margin=0.5)
        learnt = dataclasses.replace(quick.reward, init=tuned, data=ranked, held_out=None)
        special = {"data": other, "held_out": other, "init": base, "reward": margin, "lora": lora.Config(rank=2)}
        return learnt, special
    if name == "dpo":
        preferred = dpo.Config(init=tuned, data=ranked, length=64, batch=8)
        beta = dataclasses.replace(preferred.dpo, beta=0.7)
        return preferred, {"data": other, "init": base, "dpo": beta}
    sizes = {"prompt_length": 40, "max_new_tokens": 8, "batch": 32, "text": "world:rows=200", "steps": 2, "warmup": 1}
    rolled = STAGES[name].Config(init=tuned, reward=(judge, judge), data="world:rows=100", **sizes)
    return rolled, {
        "data": "world:rows=101",
        "init": base,
        "reference": base,
        "reward": (judge,),
        "critic": "policy",
        "text": None,
        "schedule": "constant",
        "lora": lora.Config(rank=2),
    }


@pytest.mark.parametrize("name", STAGES)
def test_no_setting_is_dead(name, done, tmp_path, asked):
    quick, _ = done
    base, special = settings(name, quick)
    base = dataclasses.replace(base, out=tmp_path / "run", data_dir=quick.out / "data")
    special["data_dir"] = tmp_path / "data"

    def trace(cfg):
        asked.clear()
        with pytest.raises(Begun):
            STAGES[name].main(cfg)
        return list(asked)

    before = trace(base)
    assert before == trace(base)
    for field in dataclasses.fields(base):
        if field.name not in LATER:
            value = special[field.name] if field.name in special else another(getattr(base, field.name))
            assert value != getattr(base, field.name)
            assert trace(dataclasses.replace(base, **{field.name: value})) != before, field.name
