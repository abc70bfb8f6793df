"""No dead setting: each one changes what an experiment asks of the library before its first step.

A stage runs up to where its records would begin, once as it is and once for each setting with another value. What it
asked of the library on the way, with which arguments, has to differ. Settings of the loop itself, which comes later,
are left to tests/experiments. An experiment that has no such loop runs to its end on made-up answers, and what it
writes may differ instead; stages of another experiment do not run, but are asked of it as well.
"""

import contextlib
import dataclasses
import functools

import numpy as np
import optax
import pytest
from flax import linen as nn

from experiments import dpo, evaluate, grpo, instruct, ppo, pretrain, rank, rejection, reward, rounds, sft
from experiments.papers import sentiment
from rlhf_jax import models, runs, types
from rlhf_jax.algorithms import optim, rewards
from rlhf_jax.algorithms import reward as reward_lib
from rlhf_jax.algorithms import sft as sft_lib
from rlhf_jax.data import pipeline, sources
from rlhf_jax.data.tasks import mixture
from rlhf_jax.devices import parallel
from rlhf_jax.evaluation import tasks
from rlhf_jax.models import heads, lora
from rlhf_jax.rollouts import rollout, scores
from rlhf_jax.runs import plots, run
from tests.experiments import test_sentiment
from tests.quickstart import LENGTHS

JUDGE = {"judge", "process"}  # which tests/experiments/test_judge.py and test_steps.py have
# Settings of which the loop asks.
LATER = {"out", "saves", "samples_every", "samples", "token_samples", "held_out_every", "resample"} | JUDGE
# Settings without effect by default, which tests/experiments has: of `rank` with people, and of `rounds` with DPO.
SPECIAL = {"rank": {"db", "data", "overlap", "enough", "round"}, "rounds": {"dpo"}}
ASKED = {
    sources: ["rows"],
    pipeline: ["text", "demonstrations", "rankings", "prompts", "every_prompt"],
    models: ["load", "load_reward", "logprobs_fn", "preset", "tokenizer_of", "balance_weight"],
    heads: ["critic", "shared_critic", "score_fn"],
    mixture: ["open_mixture", "Sizes"],
    tasks.Evaluation: ["__init__"],
    optim: ["adamw", "adafactor", "schedule", "cosine"],
    parallel: ["layout", "pmap"],
    reward_lib: ["normalize"],
}
STAGES = {
    "pretrain": pretrain,
    "sft": sft,
    "instruct": instruct,
    "reward": reward,
    "ppo": ppo,
    "grpo": grpo,
    "dpo": dpo,
}
OTHERS = {"rank": rank, "evaluate": evaluate, "rejection": rejection, "rounds": rounds, "sentiment": sentiment}


class Begun(Exception):
    """The stage has come to its records."""


def described(value):
    """What of an argument a setting may change, to compare."""
    if isinstance(value, functools.partial):
        keywords = dict(value.keywords)
        if "make_step" in keywords:  # a step of `lora.on_base`
            keywords["make_step"] = keywords["make_step"](lambda network: network)
        return value.func.__name__, described(keywords)
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


def once(load, asked):
    """Loading that reads each model once, since no stage comes as far as to change one, and asks nothing meanwhile."""
    found = {}

    @functools.wraps(load)
    def loaded(path, **how):
        key = str(path), repr(how.get("compute")), "place" in how
        if key not in found:
            before = len(asked)
            found[key] = load(path, **how)
            del asked[before:]
        return found[key]

    return loaded


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

    def begin(directory, config, *, total, step, limits):
        asked.append(("records", total, described(limits)))
        raise Begun

    for name in ("load", "load_reward"):
        monkeypatch.setattr(models, name, once(getattr(models, name), asked))
    for module, names in ASKED.items():
        for name in names:
            monkeypatch.setattr(module, name, record(name, getattr(module, name)))
    for stage in (STAGES | OTHERS).values():
        if hasattr(stage, "named_key"):
            monkeypatch.setattr(stage, "named_key", record("named_key", types.named_key))
    monkeypatch.setattr(run, "Records", begin)
    monkeypatch.setattr(tasks.Evaluation, "__call__", lambda *_: [])
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
    if isinstance(value, parallel.Config):
        return parallel.Config(microbatches=2)
    if isinstance(value, models.Compute):
        return models.Compute(dtype="bfloat16")
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{"ptx_coef": 7.0} if hasattr(value, "ptx_coef") else {})
    raise NotImplementedError(value)


def settings(name, quick):
    """A configuration of the stage, and another value of each setting for which there is no rule."""
    base, tuned, judge = (quick.out / part / "model" for part in ("pretrain", "sft", "reward"))
    ranked, other = (str(quick.out / "rank" / f"{part}.jsonl") for part in ("train", "held_out"))
    held_out = {"held_out": "world:rows=20"}
    if name == "pretrain":
        return quick.pretrain, {
            "data": "world:rows=201",
            "init": tuned,
            "preset": "llama-tiny",
            "vocab_size": 300,
        } | held_out
    if name == "sft":
        tuning = dataclasses.replace(quick.sft, init=base, data="world:rows=100")
        return tuning, {"data": "world:rows=101", "text": None, "init": tuned, "lora": lora.Config(rank=2)} | held_out
    if name == "instruct":
        tuning = instruct.Config(
            init=tuned, tasks=("plus", "more", "older"), held_out=("comparison",), questions=2, length=60
        )
        return tuning, {
            "init": base,
            "tasks": ("minus", "more"),
            "held_out": ("arithmetic",),
            "mixture": mixture.Config(ceiling=9),
            "prompt_length": 40,
            "target_length": 9,
            "optimizer": "adafactor",
            "schedule": "constant",
            "lora": lora.Config(rank=2),
        }
    if name == "reward":
        margin = reward_lib.Config(margin=0.5)
        learnt = dataclasses.replace(quick.reward, init=tuned, data=ranked, held_out=None)
        special = {"data": other, "held_out": other, "init": base, "algorithm": margin, "lora": lora.Config(rank=2)}
        return learnt, special | {"virtue": "helpful", "head_seed": 7}
    if name == "dpo":
        preferred = dpo.Config(init=tuned, data=ranked, length=64, batch=8)
        beta = dataclasses.replace(preferred.algorithm, beta=0.7)
        special = {"data": other, "init": base, "algorithm": beta, "virtue": "helpful", "schedule": "linear"}
        return preferred, special | {"lora": lora.Config(rank=2)}
    sizes = {"prompt_length": 40, "max_new_tokens": 8, "batch": 32, "text": "world:rows=200", "steps": 2, "warmup": 1}
    default = STAGES[name].Config()
    algorithm = dataclasses.replace(default.algorithm, rewards=rewards.Config(threshold=0.0))
    given = {"init": tuned, "reward": (judge, judge), "cost": judge, "data": "world:rows=100", "algorithm": algorithm}
    return dataclasses.replace(default, **given, **sizes), {
        "cost": judge.parent / ".." / "reward" / "model",  # read from a path that is spelt differently
        "data": "world:rows=101",
        "init": base,
        "reference": base,
        "reward": (judge,),
        "critic": "policy",
        "text": None,
        "schedule": "constant",
        "lora": lora.Config(rank=2),
    }


def check_each_setting(base, special, trace, later=LATER):
    """That each setting of `base` but `later` ones changes its trace: by its value in `special`, or by any other."""
    special = {"control_tokens": "text"} | special
    before = trace(base)
    assert before == trace(base)
    for field in dataclasses.fields(base):
        if field.name not in later:
            value = special[field.name] if field.name in special else another(getattr(base, field.name))
            assert value != getattr(base, field.name)
            assert trace(dataclasses.replace(base, **{field.name: value})) != before, field.name


@pytest.mark.parametrize("name", STAGES)
def test_no_setting_is_dead(name, done, tmp_path, asked):
    quick, _ = done
    base, special = settings(name, quick)
    base = dataclasses.replace(base, out=tmp_path / "run", data_dir=quick.out / "data")
    special["data_dir"] = tmp_path / "data"

    def trace(cfg):
        asked.clear()
        scores.scoring.cache_clear()  # whose programs serve several models
        with pytest.raises(Begun):
            STAGES[name].main(cfg)
        return list(asked)

    check_each_setting(base, special, trace)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_answers_are_sampled_as_the_algorithm_scores_them(name, done, tmp_path, asked):
    quick, _ = done
    base, _ = settings(name, quick)
    algorithm = dataclasses.replace(base.algorithm, temperature=0.5, stop_at_eos=False)
    paths = {"out": tmp_path, "data_dir": quick.out / "data"}
    with pytest.raises(Begun):
        STAGES[name].main(dataclasses.replace(base, **paths, algorithm=algorithm))
    (collect,) = (args[0][1] for kind, args, *_ in asked if kind == "pmap" and args[0][0] == "collect")
    assert "temperature=0.5" in collect["cfg"] and "stop_at_eos=False" in collect["cfg"]


# Experiments without a loop of their own ------------------------------------------------------------------------------


def other_settings(name, quick, tmp_path):
    """As `settings`, of an experiment that asks other things of the library."""
    base, tuned, judge = (quick.out / part / "model" for part in ("pretrain", "sft", "reward"))
    compute = models.Compute(dtype="bfloat16")
    link = tmp_path / "judge"
    link.symlink_to(judge)
    if name == "rank":
        return dataclasses.replace(quick.rank, init=tuned, prompts=8), {"init": base}
    if name == "evaluate":
        judged = dataclasses.replace(quick.evaluate, model=tuned, reference=tuned, reward=judge)
        return judged, {"model": base, "reference": base, "reward": None}
    if name == "rejection":
        sizes = {"data": "world:rows=100", "prompts": 8, "best_of": 2, **LENGTHS}
        special = {"data": "world:rows=101", "init": base, "reward": link, "sft": sft.Config(lr=0.5)}
        return rejection.Config(init=tuned, reward=judge, **sizes), special
    if name == "rounds":
        return rounds.Config(init=tuned, rounds=2, rank=rank.Config(prompts=8)), {
            "init": base,
            "compute": compute,
            "improve": "dpo",
            "rank": rank.Config(prompts=9),
            "reward": reward.Config(lr=0.5),
            "ppo": ppo.Config(lr=0.5),
            "evaluate": evaluate.Config(texts=9),
        }
    felt = test_sentiment.config(tmp_path, test_sentiment.write_reviews(tmp_path / "reviews"))
    return felt, {
        "data": str(test_sentiment.write_reviews(tmp_path / "more", 61)),
        "pretrain": dataclasses.replace(felt.pretrain, lr=0.5),
        "reward": dataclasses.replace(felt.reward, lr=0.5),
        "ppo": dataclasses.replace(felt.ppo, lr=0.5),
    }


@pytest.fixture
def made_up(monkeypatch, done, asked):
    """Answers without a model, and stages that are asked for and leave what the quickstart's left."""
    quick, _ = done

    def episodes(model, prompts, key, cfg, **kwargs):
        asked.append(("episodes", np.shape(prompts.tokens), described(cfg), described(kwargs)))
        rng, shape = np.random.default_rng(0), (len(prompts.index), cfg.max_new_tokens)
        tokens, mask, logp = rng.integers(3, 512, shape).astype(np.int32), np.ones(shape, bool), rng.normal(size=shape)
        return types.Rollout(
            tokens=np.concatenate([prompts.tokens, tokens], axis=1),
            mask=np.concatenate([prompts.mask, mask], axis=1),
            response_mask=mask,
            logp=logp,
            logp_ref=logp,
            ended=np.ones(len(mask), bool),
            index=prompts.index,
            score=logp[:, 0],
        )

    def begin(*args, **kwargs):
        raise Begun

    def stage(name):
        def main(cfg):
            asked.append((name, cfg))
            cfg.out.mkdir(parents=True, exist_ok=True)
            for left in ("model", "train.jsonl"):
                if (quick.out / name / left).exists() and not (cfg.out / left).exists():
                    (cfg.out / left).symlink_to(quick.out / name / left)
            return {"gold": 0.5, "reward": 0.25, "kl": 1.0, "nll": 2.0, "accuracy": 0.7}

        return main

    def losses(*args):
        raise Begun
        yield

    def remembered(kind, load):
        load = functools.cache(load)

        def again(path, compute=None, place=None):
            asked.append((kind, path, compute))
            return load(path, compute=compute)

        return again

    for kind in ("load", "load_reward"):
        monkeypatch.setattr(models, kind, remembered(kind, getattr(models, kind)))
    monkeypatch.setattr(sentiment, "text_nll", losses)
    monkeypatch.setattr(rollout, "episodes", episodes)
    monkeypatch.setattr(sft_lib, "evaluate", begin)
    monkeypatch.setattr(plots, "lines", lambda *args, **kwargs: None)
    monkeypatch.setattr(runs, "once", lambda main, config, out=None: main(config))  # each time
    return stage


STAGES_OF = {
    "rejection": [sft],
    "rounds": [rank, reward, ppo, dpo, evaluate],
    "sentiment": [pretrain, reward, ppo],
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_setting_of_another_experiment_is_dead(name, done, tmp_path, monkeypatch, asked, made_up):
    quick, _ = done
    base, special = other_settings(name, quick, tmp_path)
    base = dataclasses.replace(base, out=tmp_path / "run", data_dir=quick.out / "data")
    special["data_dir"] = tmp_path / "data"
    main = OTHERS[name].main
    for module in STAGES_OF.get(name, ()):
        monkeypatch.setattr(module, "main", made_up(module.__name__.split(".")[1]))

    def trace(cfg):
        asked.clear()
        with contextlib.suppress(Begun):
            main(cfg)
        return list(asked), {path.name: path.read_text() for path in (tmp_path / "run").glob("*.jsonl")}

    trace(base)  # what is loaded is remembered from here on
    check_each_setting(base, special, trace, LATER | SPECIAL.get(name, set()))
