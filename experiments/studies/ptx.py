"""What does the pretraining mix cost, and what does it keep? And do InstructGPT's settings do as well as ours?

`ppo` with its mix, the same without, and `ppo_instructgpt`, as many episodes each, against the same reward model.

Run:     python -m experiments.studies.ptx
Parent:  ppo, ppo_no_ptx, ppo_instructgpt, evaluate
Result:  docs/ptx.md
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from experiments import evaluate, ppo
from experiments.papers import ppo_instructgpt
from experiments.studies import study, tables
from rlhf_jax import runs
from rlhf_jax.runs import cli, plots

NAME = "ptx"
MEASURES = {
    "gold": "gold on held-out prompts (0 to 1)",
    "nll": "loss on held-out text (nats a token)",
    "kl": "KL (nats)",
}


# The type of the stage is quoted: by the time it was evaluated, the field would hide the module of its name.
@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Sizes with which four seeds of every study take two CPU cores less than an hour."""

    ppo: "ppo.Config" = ppo.Config(steps=40)
    evaluate: "evaluate.Config" = evaluate.Config()


def main(cfg: Config) -> dict[str, list[dict]]:
    """Run what has not been run, then write table and plot; returns what each policy of each seed is worth."""
    study.read_page(cfg, NAME)  # refused before anything runs
    study.fine_tune(cfg)
    seeds = study.run_each(cfg, run_seed, cfg.each_seed)
    results = {name: [found[name] for found in seeds] for name in seeds[0]}
    report(cfg, results)
    return results


def run_seed(cfg: Config, seed: int) -> dict[str, dict]:
    """Train each policy against the reward model of a seed, and evaluate them and what they start from."""
    home = cfg.out / f"seed{seed}"
    judge = study.learn_reward(cfg, seed, study.all_labels(cfg)).model
    results = {"SFT": evaluate_model(cfg, seed, study.fine_tune(cfg), home / "sft-evaluated")}
    for name, arm in arms(study.ppo_run(cfg, seed, judge, home)).items():
        out = home / f"mix-{name.lower()}"
        runs.once(ppo.main, dataclasses.replace(arm, out=out))
        results[name] = evaluate_model(cfg, seed, out / "model", out / "evaluated")
    return results


def arms(mixed: ppo.Config) -> dict[str, ppo.Config]:
    """PPO with the mix as it is given, without, and with InstructGPT's settings at the same sizes."""
    instructgpt = dataclasses.replace(
        ppo_instructgpt.CONFIG,
        seed=mixed.seed,
        data_dir=mixed.data_dir,
        compute=mixed.compute,
        devices=mixed.devices,
        init=mixed.init,
        reward=mixed.reward,
        data=mixed.data,
        text=mixed.text,
        prompt_length=mixed.prompt_length,
        max_new_tokens=mixed.max_new_tokens,
        text_length=mixed.text_length,
        batch=mixed.batch,
        steps=mixed.steps,
    )
    return {"PPO": dataclasses.replace(mixed, text=None), "PPO-ptx": mixed, "InstructGPT": instructgpt}


def evaluate_model(cfg: Config, seed: int, model: Path, out: Path) -> dict:
    """The result of `evaluate` for a model."""
    run = cli.hand_down(
        "evaluate",
        cfg.evaluate,
        study.shared_settings(cfg, seed),
        model=model,
        reference=study.fine_tune(cfg),
        temperature=cfg.ppo.algorithm.temperature,
        prompt_length=cfg.ppo.prompt_length,
        max_new_tokens=cfg.ppo.max_new_tokens,
    )
    return runs.once(evaluate.main, run, out)


def report(cfg: Config, results: dict[str, list[dict]]) -> None:
    """Publish a row for each policy, and bars with whiskers."""
    columns = {
        name: {measure: [result[measure] for result in seeds] for measure in MEASURES}
        for name, seeds in results.items()
    }
    rows = [[name, *(tables.mean_sd(values[measure]) for measure in MEASURES)] for name, values in columns.items()]
    means, spreads = (
        {
            label: {name: float(statistic(values[measure])) for name, values in columns.items()}
            for measure, label in MEASURES.items()
        }
        for statistic in (np.mean, tables.spread)
    )
    draw = functools.partial(plots.stages, panels=means, spread=spreads)
    study.publish(cfg, NAME, tables.markdown(["policy", *MEASURES.values()], rows), draw)


if __name__ == "__main__":
    cli.run(main, Config())
