r"""Does a reward model learn which of two answers people found less harmful? (arXiv:2204.05862)

The dialogues hold abuse, and questions that invite it: they are data here. Turns that do not fit `length` are dropped,
the oldest first; rows whose last turns do not fit are refused; both are counted.

Data:    hh:PATH, a .jsonl.gz file as in the folders of Anthropic/hh-rlhf at Hugging Face; the full set of these is
         harmless-base/train.jsonl.gz and its test.jsonl.gz.
Run:     python -m experiments.published.reward_hh --init runs/tinystories/model \
             --data "hh:PATH[:80%]" --held-out "hh:PATH[80%:]"
Parent:  reward
Result:  from the tiny model of `tinystories`, on 995 dialogues of harmless-base (5 more were refused as malformed): 742
         of the first 80 % kept (274 truncated, 54 too long), one epoch; 60.3 % of 179 held-out comparisons, give or
         take 3.7, where chance has 50 %. Of those, where the preferred answer is the shorter by more than some ten
         tokens it is right on 76 % of 88, where it is the longer on 43 % of 61: it learnt mostly to like short ones.
         From SmolLM2-135M-Instruct, with adapters of rank 16: 63.9 % of 194: docs/rankings.md
"""

from pathlib import Path

from experiments import reward
from experiments.published import paths
from rlhf_jax.runs import cli

CONFIG = reward.Config(
    out=Path("runs/reward_hh"),
    init=Path("runs/tinystories/model"),
    data="hh:PATH[:80%]",
    held_out="hh:PATH[80%:]",
    length=256,
)


def main(cfg: reward.Config) -> dict[str, float]:
    """Learn from the comparisons; returns the held-out accuracy."""
    file = "harmless-base/train.jsonl.gz of Anthropic/hh-rlhf at Hugging Face"
    paths.check_given(cfg, CONFIG, file, "data", "held_out")
    return reward.main(cfg)


if __name__ == "__main__":
    cli.run(main, CONFIG)
