"""A quickstart of two steps a stage, which the tests of the experiments share, and how they look at it."""

import pytest

from experiments import assistant, evaluate, ppo, pretrain, rank, reward, sft
from rlhf_jax.algorithms import ppo as ppo_lib
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
        ppo=ppo_lib.Config(minibatches=2),
        **LENGTHS,
    ),
    evaluate=evaluate.Config(prompts=16, texts=60, batch=16, **LENGTHS),
)


def metrics_of(directory):
    return [log.untimed(row) for row in log.read(directory)]


def refused(capsys, main, default, *flags) -> str:
    """What an experiment says on stderr, in one line, when it refuses these flags."""
    with pytest.raises(SystemExit) as stop:
        cli.run(main, default, [str(flag) for flag in flags])
    assert stop.value.code == cli.USAGE
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if "step/s" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]
