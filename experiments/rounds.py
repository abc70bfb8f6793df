"""Do fresh labels help? Policy and labelers take turns (arXiv:1706.03741, arXiv:1909.08593, section 2.3).

In each round labelers rank answers to new prompts, a reward model is trained on all labels so far, and PPO continues
from the last round's policy, with the KL to the fine-tuned model. Online, the current policy answers; offline, the
fine-tuned model does. After each round both arms have the same amount of labels and of PPO.

With `--improve dpo` there is no reward model and no PPO: each round trains the fine-tuned model by DPO on all labels so
far, those of its own later answers among them (iterative DPO, arXiv:2405.07863).

With `--rank.db` people rank the answers, on the pages of `scripts/people.sh`, and each round waits for them (see
`rank`). There is the online arm alone: nobody would label twice as much to have the other one. Each reward model is
then measured on the held-out rankings of its round, and with prompts of your own (`--rank.data`), which gold cannot
judge, on them alone.

Run:     python -m experiments.rounds --init runs/sft/model
Parent:  rank, reward, ppo, dpo, evaluate
Result:  from a quickstart's models, at four seeds: gold 0.706 ± 0.025 with labels on fresh answers, 0.714 ± 0.023 with
         as many labels on the fine-tuned model's answers
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Literal

from experiments import dpo, evaluate, ppo, rank, reward
from rlhf_jax import runs
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count
from rlhf_jax.types import InputError


# The types of the stages are quoted, since inside the class a field's name hides the module of the same name.
@dataclasses.dataclass(frozen=True)
class Config(runs.Stage):
    """The settings of the experiment. Sizes are those of one round; all rounds add up to about the quickstart's."""

    out: Path = Path("runs/rounds")  # run directory; each arm and round has a folder in it
    init: Path = Path("runs/sft/model")  # fine-tuned model, the initial policy and the frozen reference model
    rounds: Count = 3  # number of rounds of labelling and training
    improve: Literal["ppo", "dpo"] = "ppo"  # train by a reward model and PPO, or by DPO on the rankings themselves
    rank: "rank.Config" = rank.Config(prompts=1200, held_out=128)
    reward: "reward.Config" = reward.Config()
    ppo: "ppo.Config" = ppo.Config(steps=24, warmup=4)
    dpo: "dpo.Config" = dpo.Config()
    evaluate: "evaluate.Config" = evaluate.Config()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reward", "ppo") if self.improve == "dpo" else ("dpo",):
            if getattr(self, name) != getattr(Config, name):
                raise InputError(f"--{name} has no effect with --improve {self.improve}: leave its flags out")


@dataclasses.dataclass(frozen=True)
class Round:
    """The configuration of each stage of a round."""

    rank: "rank.Config"
    reward: "reward.Config | None"  # None: DPO needs no reward model
    improve: "ppo.Config | dpo.Config"
    evaluate: "evaluate.Config"


def stages(cfg: Config, out: Path, n: int, policy: Path, answerer: Path) -> Round:
    """The stages of round `n` of an arm that continues from `policy` and ranks the answers of the model `answerer`."""
    home, labels = out / f"round{n}", str(out / "labels.jsonl")
    of_round = dataclasses.replace(cfg, seed=cfg.seed + 1000 * n)
    lengths: ppo.Config | rank.Config = cfg.rank if cfg.improve == "dpo" else cfg.ppo
    temperature = cfg.rank.temperature if cfg.improve == "dpo" else cfg.ppo.algorithm.temperature
    judge: reward.Config | None = None
    improve: ppo.Config | dpo.Config
    if cfg.improve == "dpo":
        improve = cli.hand_down("dpo", cfg.dpo, of_round, out=home / "dpo", init=cfg.init, data=labels)
    else:
        judge = cli.hand_down(
            "reward",
            cfg.reward,
            cfg,
            out=home / "reward",
            init=cfg.init,
            data=labels,
            held_out=None if cfg.rank.db is None else str(home / "rank" / "held_out.jsonl"),
        )
        improve = cli.hand_down(
            "ppo",
            cfg.ppo,
            of_round,
            out=home / "ppo",
            init=policy,
            reference=cfg.init,
            reward=(judge.out / "model",),
        )
    return Round(
        rank=cli.hand_down(
            "rank",
            cfg.rank,
            cfg,
            out=home / "rank",
            init=answerer,
            skip=(n - 1) * cfg.rank.prompts,
            round=n,
            temperature=temperature,
            prompt_length=lengths.prompt_length,
            max_new_tokens=lengths.max_new_tokens,
        ),
        reward=judge,
        improve=improve,
        evaluate=cli.hand_down(
            "evaluate",
            cfg.evaluate,
            cfg,
            out=home / "evaluate.json",
            model=improve.out / "model",
            reference=cfg.init,
            reward=judge.out / "model" if judge else None,
            temperature=temperature,
            prompt_length=lengths.prompt_length,
            max_new_tokens=lengths.max_new_tokens,
        ),
    )


def main(cfg: Config) -> dict[str, list[dict]]:
    """Run the arms; returns gold, the reward model's score, KL and text loss after each round, by arm.

    Where people rank, also the reward model's accuracy; with prompts of their own that alone.
    """
    stages(cfg, cfg.out, 1, cfg.init, cfg.init)  # refuses flags without effect before anything runs
    _check_people(cfg)
    runs.claim(cfg.out, cfg)
    runs.write_config(cfg.out, cfg)
    arms = ("online", "offline") if cfg.rank.db is None else ("online",)
    if cfg.rank.db is not None:
        print("people rank the answers of the current policy: there is no offline arm")
    results = {name: arm(cfg, online=name == "online") for name in arms}
    runs.write(cfg.out / "rounds.json", json.dumps(results, indent=2) + "\n")
    names = {
        "gold": "gold (0 to 1)",
        "reward": "reward model's score",
        "kl": "KL to the reference (nats)",
        "accuracy": "accuracy on held-out pairs",
    }
    names = {name: label for name, label in names.items() if name in results["online"][0]}
    if not names:  # DPO on people's rankings of prompts that gold cannot judge
        return results
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


def _check_people(cfg: Config) -> None:
    """Raises InputError, before people give any rankings, where these would be too few or PPO has other prompts."""
    if cfg.rank.db is None:
        return
    if cfg.improve == "ppo" and cfg.rank.data is not None and cfg.ppo.data == ppo.Config.data:
        raise InputError(
            f"--rank.data {cfg.rank.data}: PPO would train on the world's prompts and text all the same: name others by"
            " --ppo.data and --ppo.text"
        )
    learner, batch = ("dpo", cfg.dpo.batch) if cfg.improve == "dpo" else ("reward", cfg.reward.batch)
    asked = {"prompts": cfg.rank.prompts}
    if cfg.improve == "ppo":  # these measure the reward model
        asked["held-out"] = cfg.rank.held_out * cfg.rank.overlap
    for flag, count in asked.items():
        given = math.ceil(cfg.rank.enough * count)
        if given < batch:
            raise InputError(
                f"--rank.{flag} gives {given} rankings a round, fewer than a batch of --{learner}.batch {batch}: raise"
                " the one or lower the other"
            )


def arm(cfg: Config, online: bool) -> list[dict]:
    """Run the rounds of one arm; returns what was measured in each. The policy answers if `online`, else `cfg.init`."""
    out, policy, results, labels = cfg.out / ("online" if online else "offline"), cfg.init, [], ""
    for n in range(1, cfg.rounds + 1):
        stage = stages(cfg, out, n, policy, policy if online else cfg.init)
        runs.once(rank.main, stage.rank)
        labels += (stage.rank.out / "train.jsonl").read_text(encoding="utf-8")
        runs.write(out / "labels.jsonl", labels)
        measured = runs.once(reward.main, stage.reward) if stage.reward else {}
        runs.once(dpo.main if cfg.improve == "dpo" else ppo.main, stage.improve)
        policy = stage.improve.out / "model"
        measured |= evaluate.main(stage.evaluate) if cfg.rank.data is None else {}
        kept = ("gold", "reward", "kl", "nll", "accuracy")
        results.append({name: measured[name] for name in kept if name in measured})
    return results


if __name__ == "__main__":
    cli.run(main, Config())
