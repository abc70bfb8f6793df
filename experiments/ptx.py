"""What does the pretraining mix cost, and what does it keep? And do InstructGPT's settings do as well as ours?

`ppo` with its mix, the same without, and `ppo_instructgpt`, as many episodes each, against the same reward model.

Run:     python -m experiments.ptx
Parent:  ppo, ppo_no_ptx, ppo_instructgpt, evaluate
Result:  docs/ptx.md
"""

import dataclasses
import functools

import numpy as np

from experiments import evaluate, ppo, ppo_instructgpt, study
from rlhf_jax import cli, plots


@dataclasses.dataclass(frozen=True)
class Config(study.Config):
    """Sizes with which four seeds of every study take two CPU cores less than an hour."""

    evaluate: "evaluate.Config" = evaluate.Config()


MEASURES = {
    "gold": "gold on held-out prompts (0 to 1)",
    "nll": "loss on held-out text (nats a token)",
    "kl": "KL (nats)",
}


def main(cfg: Config) -> dict[str, list[dict]]:
    """Run what has not been run, then write table and plot; returns what each policy of each seed is worth."""
    mixed = dataclasses.replace(cfg.ppo, samples_every=ppo.Config.samples_every, samples=ppo.Config.samples)
    names = "data", "text", "prompt_length", "max_new_tokens", "text_length", "batch", "steps"
    letter = dataclasses.replace(ppo_instructgpt.CONFIG, **{name: getattr(mixed, name) for name in names})
    arms = {
        "PPO": dataclasses.replace(mixed, text=None),
        "PPO-ptx": mixed,
        "PPO-ptx, InstructGPT's settings": letter,
    }
    init = study.tuned(cfg)
    results: dict[str, list[dict]] = {}
    for seed in range(cfg.seeds):
        home = cfg.out / f"seed{seed}"
        judge = study.judge(cfg, seed)["model"]

        def worth(model, out, seed=seed, judge=judge):
            given = {"model": model, "reference": init, "reward": judge, "seed": seed, "out": None}
            asked = cli.hand_down("evaluate", cfg.evaluate, **given, **study.asking(cfg.ppo), **study.shared(cfg))
            return study.once(evaluate.main, asked, out)

        results.setdefault("SFT", []).append(worth(init, home / "sft-evaluate"))
        for name, arm in arms.items():
            out = home / name.lower().replace(" ", "-").replace(",", "").replace("'", "")
            run = dataclasses.replace(arm, init=init, reward=(judge,), seed=seed, out=out, **study.shared(cfg))
            study.once(ppo.main, run)
            results.setdefault(name, []).append(worth(out / "model", out / "evaluate"))
    report(cfg, results)
    return results


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
        for of in (np.mean, np.std)
    )
    draw = functools.partial(plots.stages, panels=panels, spread=spread)
    study.publish(cfg, "ptx", study.table(["policy", *MEASURES.values()], rows), draw)


if __name__ == "__main__":
    cli.run(main, Config())
