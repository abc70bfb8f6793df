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
from experiments.studies import study
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
    study.page(cfg, NAME)
    study.tuned(cfg)
    seeds = study.together(cfg, of_seed, range(cfg.seeds))
    results = {name: [found[name] for found in seeds] for name in seeds[0]}
    report(cfg, results)
    return results


def of_seed(cfg: Config, seed: int) -> dict[str, dict]:
    """What each policy is worth."""
    sizes = "data", "text", "prompt_length", "max_new_tokens", "text_length", "batch", "steps"
    same = {name: getattr(cfg.ppo, name) for name in sizes}
    arms = {
        "PPO": dataclasses.replace(cfg.ppo, text=None),
        "PPO-ptx": cfg.ppo,
        "InstructGPT": dataclasses.replace(ppo_instructgpt.CONFIG, **same),
    }
    given = study.policy(cfg, seed, study.judge(cfg, seed)["model"])
    home = cfg.out / f"seed{seed}"
    found = {"SFT": worth(cfg, seed, given["init"], home / "sft-evaluated")}
    for name, arm in arms.items():
        out = home / f"mix-{name.lower()}"
        runs.once(ppo.main, dataclasses.replace(arm, out=out, **given))
        found[name] = worth(cfg, seed, out / "model", out / "evaluated")
    return found


def worth(cfg: Config, seed: int, model: Path, out: Path) -> dict:
    """What `evaluate` says of a model."""
    given = {"model": model, "reference": study.tuned(cfg), "seed": seed, **study.shared(cfg)}
    return runs.once(evaluate.main, cli.hand_down("evaluate", cfg.evaluate, **given, **study.sampling(cfg.ppo)), out)


def report(cfg: Config, results: dict[str, list[dict]]) -> None:
    """A row a policy; bars with whiskers."""
    columns = {
        name: {measure: [one[measure] for one in runs] for measure in MEASURES} for name, runs in results.items()
    }
    rows = [[name, *(study.mean_sd(found[measure]) for measure in MEASURES)] for name, found in columns.items()]
    panels, spread = (
        {
            label: {name: float(of(found[measure])) for name, found in columns.items()}
            for measure, label in MEASURES.items()
        }
        for of in (np.mean, study.spread)
    )
    draw = functools.partial(plots.stages, panels=panels, spread=spread)
    study.publish(cfg, NAME, study.table(["policy", *MEASURES.values()], rows), draw)


if __name__ == "__main__":
    cli.run(main, Config())
