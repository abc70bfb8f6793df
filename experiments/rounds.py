"""Do fresh labels help? Policy and labelers take turns (arXiv:1706.03741, arXiv:1909.08593, section 2.3).

Each round people rank answers to new prompts, a reward model is learnt from all labels so far, and PPO goes on from
where it was, held near the fine-tuned model as ever. Online, it is the current policy that answers; offline, the
fine-tuned model. The two have as many labels and as much PPO after each round.

Run:     python -m experiments.rounds --init runs/sft/model
Parent:  rank, reward, ppo, evaluate
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments import evaluate, ppo, rank, reward
from rlhf_jax import models, runs
from rlhf_jax.devices import parallel
from rlhf_jax.runs import cli, plots
from rlhf_jax.types import check_positive


# The types of the stages are quoted: by the time they were evaluated, the field would hide the module of its name.
@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes are of one round; the defaults add up to about those of the quickstart."""

    seed: int = 0  # of every stage
    out: Path = Path("runs/rounds")  # run directory; each arm and round has a folder in it
    init: Path = Path("runs/sft/model")  # fine-tuned model: where the policy starts, and the reference
    data_dir: Path = Path("runs/data")  # where prepared data sets are kept
    rounds: int = 3  # turns of policy and labelers
    compute: models.Compute = models.Compute()  # of every stage
    devices: parallel.Config = parallel.Config()  # likewise
    rank: "rank.Config" = rank.Config(prompts=1200, held_out=128)
    reward: "reward.Config" = reward.Config()
    ppo: "ppo.Config" = ppo.Config(steps=24, warmup=4)
    evaluate: "evaluate.Config" = evaluate.Config()

    def __post_init__(self) -> None:
        check_positive(self, "rounds")


def stages(cfg: Config, out: Path, n: int, policy: Path, answering: Path) -> dict[str, Any]:
    """The configuration of each stage of round `n`."""
    shared: dict[str, Any] = {"data_dir": cfg.data_dir, "compute": cfg.compute, "devices": cfg.devices}
    answers: dict[str, Any] = {"temperature": cfg.ppo.ppo.temperature} | {
        name: getattr(cfg.ppo, name) for name in ("prompt_length", "max_new_tokens")
    }
    skip, labels, judge = (n - 1) * cfg.rank.prompts, str(out / "labels.jsonl"), out / f"round{n}" / "reward" / "model"
    given = {
        "rank": {"init": answering, "skip": skip, "seed": cfg.seed} | answers,
        "reward": {"init": cfg.init, "data": labels, "held_out": None, "seed": cfg.seed},
        "ppo": {"init": policy, "reference": cfg.init, "reward": (judge,), "seed": cfg.seed + 1000 * n},
    }
    configs = {
        name: cli.hand_down(name, getattr(cfg, name), **values, **shared, out=out / f"round{n}" / name)
        for name, values in given.items()
    }
    judged = {"model": configs["ppo"].out / "model", "reference": cfg.init, "reward": judge, "seed": cfg.seed}
    result = out / f"round{n}" / "evaluate.json"
    return configs | {"evaluate": cli.hand_down("evaluate", cfg.evaluate, **judged, **answers, **shared, out=result)}


def main(cfg: Config) -> dict[str, list[dict]]:
    """Run both arms; returns gold, the reward model's score and KL after each round."""
    stages(
        cfg, cfg.out, 1, cfg.init, cfg.init
    )  # before anything runs, so that a flag without effect is refused at once
    runs.write_config(cfg.out, cfg)
    results = {"online": arm(cfg, online=True), "offline": arm(cfg, online=False)}
    runs.write(cfg.out / "rounds.json", json.dumps(results, indent=2) + "\n")
    names = {"gold": "gold (0 to 1)", "reward": "reward model's score", "kl": "KL to the reference (nats)"}
    print("\n" + f"{'labels':<10}{'round':>6}" + "".join(f"{label:>28}" for label in names.values()))
    for labels, rows in results.items():
        for n, row in enumerate(rows, 1):
            print(f"{labels:<10}{n:>6}" + "".join(f"{row[name]:>28.3f}" for name in names))
    panels = {
        label: {labels: [(float(n), row[name]) for n, row in enumerate(rows, 1)] for labels, rows in results.items()}
        for name, label in names.items()
    }
    plots.lines(cfg.out / "rounds.png", panels, x="round")
    return results


def arm(cfg: Config, online: bool) -> list[dict]:
    """The rounds, with labels on answers of the current policy or, unless `online`, of the fine-tuned model."""
    out, policy, results, labels = cfg.out / ("online" if online else "offline"), cfg.init, [], ""
    for n in range(1, cfg.rounds + 1):
        stage = stages(cfg, out, n, policy, policy if online else cfg.init)
        runs.once(rank.main, stage["rank"])
        labels += (stage["rank"].out / "train.jsonl").read_text()
        runs.write(out / "labels.jsonl", labels)
        runs.once(reward.main, stage["reward"])
        runs.once(ppo.main, stage["ppo"])
        policy = stage["ppo"].out / "model"
        result = evaluate.main(stage["evaluate"])
        results.append({name: result[name] for name in ("gold", "reward", "kl", "nll")})
    return results


if __name__ == "__main__":
    cli.run(main, Config())
