"""Weight-averaged reward models (WARM, arXiv:2401.12187): one model whose weights are the means of several.

The models were trained from one init, with other orders of the data (`--seed`), learning rates or labels. Their average
costs as much as one of them. Language models of one init are averaged in the same way. The result is a model directory,
for `--reward` or `--init`.

Run:     python -m experiments.average --model runs/reward0/model runs/reward1/model runs/reward2/model
Parent:  none
Result:  reward models of the quickstart, seeds 1 to 3, on held-out comparisons: 72.6, 72.8 and 72.7 % with one head,
         72.8 % the mean of their scores, 72.4 % their average; with a head each, 73.4 % the mean and 72.3 % the average
"""

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rlhf_jax import models, runs
from rlhf_jax.algorithms import reward as reward_lib
from rlhf_jax.analysis import calibration
from rlhf_jax.data import pipeline, sources
from rlhf_jax.devices import hosts, parallel
from rlhf_jax.models import heads
from rlhf_jax.runs import cli
from rlhf_jax.settings import Count
from rlhf_jax.types import InputError, Rankings


@dataclasses.dataclass(frozen=True)
class Config(runs.Stage):
    """The settings of the experiment; the defaults suit the assistant world on two CPU cores."""

    out: Path = Path("runs/average")  # run directory; the model goes to its folder "model"
    model: tuple[Path, ...] = ()  # model directories to average, trained from one init
    held_out: str | None = None  # rankings to measure the accuracy of reward models on; None: measure nothing
    length: Count = 36  # most tokens of prompt and answer of these; prompts with a longer answer are left out
    batch: Count = 32  # prompts of these to score at a time, over all devices


def scores(model: models.Model, batches: Iterable[Rankings], layout: parallel.Layout) -> np.ndarray:
    """The score of each response of these rankings, on the host. [B, K]."""
    step = layout.step(functools.partial(reward_lib.scores, score_fn=heads.score_fn(model.config)))
    params = layout.frozen(model.params)
    return np.concatenate([layout.gather(step(params, layout.rows(batch))) for batch in batches])


def compare(cfg: Config, held_out: str, average: models.Model, layout: parallel.Layout) -> dict[str, float]:
    """The accuracy on held-out pairs of each model, of the mean of their scores, and of their average, by name."""
    rows = sources.rows(held_out, "rankings", data_dir=cfg.data_dir)
    tokenizer = models.tokenizer_of(average)

    def batches() -> pipeline.Batches[Rankings]:
        return pipeline.rankings(rows, tokenizer, length=cfg.length, batch=cfg.batch, seed=0, epochs=1)

    print(f"{held_out}: {batches().counts}")
    each = {}
    for path in cfg.model:  # one in memory at a time, beside the average
        model = models.load_reward(path, compute=cfg.compute, place=layout.sharding)
        each[str(path)] = scores(model, batches(), layout)
    each |= {"mean of their scores": np.mean([*each.values()], axis=0), "average": scores(average, batches(), layout)}
    rank, length = (
        np.concatenate(x)
        for x in zip(*(hosts.join((b.rank, b.mask.sum(axis=2, dtype=np.int32))) for b in batches()), strict=True)
    )
    pairs = {name: calibration.pairs(score, rank, length) for name, score in each.items()}
    return {name: float(calibration.correct(one.margin).mean()) for name, one in pairs.items()}


def main(cfg: Config) -> dict[str, float]:
    """Write the average; returns the accuracy of each reward model and of the average by name, if it is measured."""
    if len(set(cfg.model)) < max(2, len(cfg.model)):
        raise InputError(f"model={[*map(str, cfg.model)]}: expected at least two, each once; name them by --model A B")
    runs.claim(cfg.out, cfg)
    models.check_writable(cfg.out / "model")
    layout = parallel.layout(cfg.devices)
    average = models.load_average(cfg.model, compute=cfg.compute, place=layout.sharding)
    if cfg.held_out is not None and "trunk" not in average.params:
        raise InputError(f"held_out={cfg.held_out}: language models give no scores to measure; leave it out")
    models.save(average, average.params, cfg.out / "model")
    runs.share(cfg.out / "model")
    runs.write_config(cfg.out, cfg)
    print(f"the average of {len(cfg.model)} models is in {cfg.out / 'model'}")
    if cfg.held_out is None:
        return {}
    accuracy = compare(cfg, cfg.held_out, average, layout)
    runs.write(cfg.out / "accuracy.json", json.dumps(accuracy, indent=2) + "\n")
    print("accuracy on held-out comparisons:")
    for name, share in accuracy.items():
        print(f"  {100 * share:.1f} %  {name}")
    return accuracy


if __name__ == "__main__":
    cli.run(main, Config())
