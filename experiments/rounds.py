"""Do fresh labels help? Policy and labelers take turns (arXiv:1706.03741, arXiv:1909.08593, section 2.3).

Each round the current policy answers new prompts, people rank the answers, a reward model is learnt from all labels so
far, and PPO goes on from where it was, held near the fine-tuned model as ever. Beside it the same number of labels, all
on answers of the fine-tuned model, one reward model from them, and as much PPO. What the labels teach differs, and
nothing else.

Run:     python -m experiments.rounds --init runs/sft/model
Parent:  rank, reward, ppo, evaluate
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments import evaluate, ppo, rank, reward
from rlhf_jax import cli, log, plots, transformer
from rlhf_jax.types import check_positive


# The types of the stages are quoted: by the time they were evaluated, the field would hide the module of its name.
@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes are of one round; the defaults add up to those of the quickstart."""

    seed: int = 0  # of every stage
    out: Path = Path("runs/rounds")  # run directory; each arm and round has a folder in it
    init: Path = Path("runs/sft/model")  # fine-tuned model: where the policy starts, and the reference
    data_dir: Path = Path("runs/data")  # where prepared data sets are kept
    rounds: int = 3  # turns of policy and labelers
    compute: transformer.Compute = transformer.Compute()  # of every stage
    rank: "rank.Config" = rank.Config(prompts=1200, held_out=128)
    reward: "reward.Config" = reward.Config()
    ppo: "ppo.Config" = ppo.Config(steps=24, warmup=4)
    evaluate: "evaluate.Config" = evaluate.Config()

    def __post_init__(self) -> None:
        check_positive(self, "rounds")


def main(cfg: Config) -> dict[str, list[dict]]:
    """Run both arms; returns gold, the reward model's score and KL after each round."""
    log.write_config(cfg.out, cfg)
    results = {"online": arm(cfg, fresh=True), "offline": arm(cfg, fresh=False)}
    (cfg.out / "rounds.json").write_text(json.dumps(results, indent=2) + "\n")
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


def arm(cfg: Config, fresh: bool) -> list[dict]:
    """The rounds with labels on answers of the current policy or, unless `fresh`, of the fine-tuned model."""
    out, policy, results = cfg.out / ("online" if fresh else "offline"), cfg.init, []
    shared: dict[str, Any] = {"data_dir": cfg.data_dir, "compute": cfg.compute}
    labels = out / "labels.jsonl"
    answers = {"prompt_length": cfg.ppo.prompt_length, "max_new_tokens": cfg.ppo.max_new_tokens}
    out.mkdir(parents=True, exist_ok=True)
    labels.write_text("")
    for n in range(1, cfg.rounds + 1):
        here, seed = out / f"round{n}", cfg.seed + 1000 * n
        for number in (n,) if fresh else range(1, cfg.rounds + 1) if n == 1 else ():
            asked = dataclasses.replace(
                cfg.rank,
                **(shared | answers),
                seed=cfg.seed + 1000 * number,
                skip=(number - 1) * cfg.rank.prompts,
                init=policy,
                out=out / f"round{number}" / "rank",
            )
            rank.main(asked)
            with labels.open("a") as file:
                file.write((asked.out / "train.jsonl").read_text())
        judge = (here if fresh else out / "round1") / "reward"
        if fresh or n == 1:
            learn = {"seed": cfg.seed, "init": cfg.init, "data": str(labels), "held_out": None, "out": judge}
            reward.main(dataclasses.replace(cfg.reward, **(shared | learn)))
        given = {"init": policy, "reference": cfg.init, "reward": (judge / "model",), "out": here / "ppo", "seed": seed}
        ppo.main(dataclasses.replace(cfg.ppo, **(shared | given)))
        policy = here / "ppo" / "model"
        judged = {"model": policy, "reference": cfg.init, "reward": judge / "model", "out": here / "evaluate.json"}
        result = evaluate.main(dataclasses.replace(cfg.evaluate, seed=cfg.seed, **(shared | answers | judged)))
        results.append({name: result[name] for name in ("gold", "reward", "kl", "nll")})
    return results


if __name__ == "__main__":
    cli.run(main, Config())
