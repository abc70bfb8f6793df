"""A quickstart of two steps a stage, which the tests of the experiments share, and how they look at it."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments import assistant, evaluate, ppo, pretrain, rank, reward, sft
from rlhf_jax import models
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.models import lora
from rlhf_jax.runs import cli, log

LENGTHS = {"prompt_length": 40, "max_new_tokens": 8}
TINY = assistant.Config(
    best_of=2,
    pretrain=pretrain.Config(data="world:rows=200", preset="tiny", vocab_size=512, batch=8, steps=2, warmup=1),
    sft=sft.Config(data="world:rows=24", text="world:rows=200", batch=8, text_batch=8, epochs=1),
    rank=rank.Config(prompts=16, held_out=8, batch=16, **LENGTHS),
    reward=reward.Config(length=64, batch=8, epochs=1, dropout=0.0),
    ppo=ppo.Config(
        data="world:rows=100",
        text="world:rows=200",
        batch=16,
        steps=2,
        warmup=1,
        samples_every=1,
        algorithm=ppo_lib.Config(minibatches=2),
        **LENGTHS,
    ),
    evaluate=evaluate.Config(prompts=16, texts=60, batch=16, **LENGTHS),
)


def metrics_of(directory):
    return [log.without_timings(row) for row in log.read(directory)]


def refused(capsys, main, default, *flags) -> str:
    """What an experiment says on stderr, in one line, when it refuses these flags."""
    with pytest.raises(SystemExit) as stop:
        cli.run(main, default, [str(flag) for flag in flags])
    assert stop.value.code == cli.USAGE
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if "step/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


ADAPTERS = lora.Config(rank=2)


def paths(cfg, out, *names) -> dict:
    """Where an experiment finds what the quickstart left."""
    tuned, judge = cfg.out / "sft" / "model", cfg.out / "reward" / "model"
    known = {"init": tuned, "model": tuned, "reference": tuned, "reward": judge, "rewards": (judge,), "out": out}
    return {name.removesuffix("s") if name == "rewards" else name: known[name] for name in names} | {
        "data_dir": cfg.out / "data"
    }


def check_adapted(cfg, trunk, trained):
    """That a saved trunk is the fine-tuned model with other kernels, and that adapters alone were trained for it."""
    before, after = flatten_dict(models.load(cfg.out / "sft" / "model").params), flatten_dict(trunk)
    kernels = {path for path in before if path[-1] == "kernel"}
    assert {path for path in before if not np.array_equal(before[path], after[path])} == kernels
    assert set(flatten_dict(trained)) == {(*path[:-1], f"kernel_{x}") for path in kernels for x in "ab"}
