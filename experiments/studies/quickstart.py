"""How much does the quickstart vary with the seed? The first table of README.md, by one command.

Run:     python -m experiments.studies.quickstart
Parent:  assistant
Result:  the first table of README.md, under Results
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from experiments import assistant
from experiments.studies import study, tables
from rlhf_jax import runs
from rlhf_jax.runs import cli

NAME = "README"  # the page
SHARES = ("accuracy", "labeler_agreement")  # what is shown in percent
COLUMNS = [  # heading, and where the summary of a quickstart has its number
    ("gold: base", "pretrain", "gold"),
    ("SFT", "sft", "gold"),
    ("PPO", "ppo", "gold"),
    ("best of {n}", "best_of_n", "gold"),
    ("loss: base", "pretrain", "nll"),
    ("SFT", "sft", "nll"),
    ("PPO", "ppo", "nll"),
    ("KL", "ppo", "kl"),
    ("reward model", "reward", "accuracy"),
    ("labelers", "reward", "labeler_agreement"),
]


# The type of the stage is quoted: by the time it was evaluated, the field would hide the module of its name.
@dataclasses.dataclass(frozen=True)
class Config(study.Seeds):
    """As many quickstarts as there are seeds; a seed is that of all stages."""

    docs: Path | None = Path()  # folder of README.md, whose table is renewed; None for none
    quickstart: "assistant.Config" = assistant.Config()


def main(cfg: Config) -> list[dict]:
    """Run what has not been run, then write the table; returns the summary of each seed."""
    study.read_page(cfg, NAME)  # refused before anything runs
    summaries = study.run_each(cfg, run_seed, cfg.each_seed)
    study.publish(cfg, NAME, table(summaries), lambda _: None)
    return summaries


def run_seed(cfg: Config, seed: int) -> dict:
    """The summary of the quickstart of a seed."""
    shared, out = study.shared_settings(cfg, seed), cfg.out / f"quickstart{seed}"
    return runs.once(assistant.main, cli.hand_down("quickstart", cfg.quickstart, shared, out=out))


def table(summaries: Sequence[dict]) -> str:
    """A row for each seed, and one of mean and standard deviation."""
    header = [heading.format(n=summaries[0]["best_of_n"]["n"]) for heading, _, _ in COLUMNS]
    rows = [[str(summary["seed"]), *row([summary])] for summary in summaries]
    return tables.markdown(["seed", *header], [*rows, ["mean ± SD", *row(summaries)]])


def row(summaries: Sequence[dict]) -> list[str]:
    """The cells of these quickstarts taken together."""
    cells = []
    for _, stage, name in COLUMNS:
        values = [summary[stage][name] for summary in summaries]
        if name in SHARES:
            cells.append(f"{tables.mean_sd([100 * value for value in values], 1)} %")
        else:
            cells.append(tables.mean_sd(values, 2 if name == "kl" else 3))
    return cells


if __name__ == "__main__":
    cli.run(main, Config())
