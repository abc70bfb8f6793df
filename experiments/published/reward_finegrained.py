r"""Does a reward model learn people's rankings of K = 4 answers to questions about passages? (arXiv:2306.01693)

Each of a prompt's six pairs was labelled, ties included; `formats.finegrained` makes ranks of the labels. The passages
stand in the prompt, so `length` is what keeps or refuses a row: both are counted. GPT-2's tokenizer makes at most 1,100
tokens of a row here, and 289 of 300 fit the default; where it refuses more than you like, raise --length.

Data:    finegrained:PATH, a .json file as in the folder tasks/qa_feedback/data of github.com/allenai/FineGrainedRLHF:
         its train_feedback.json and dev_feedback.json are the full set.
Run:     python -m experiments.published.reward_finegrained --init runs/tinystories/model \
             --data "finegrained:PATH[:80%]" --held-out "finegrained:PATH[80%:]"
Parent:  reward
Result:  from the tiny model of `tinystories`, whose tokenizer makes 1,484 tokens of a median row and 2,357 of the
         longest: 51 of 240 rows kept, 10 of the 60 held out, the others too long. 53.2 % of 47 held-out comparisons,
         give or take 7, where chance has 50 %: nothing was learnt from so few, of a length, too, that is beyond that
         model's context of 512, as a warning says. 13 more are ties, so of all 60 no scores could agree with more than
         78.3 %. From SmolLM2-135M-Instruct 61.9 % of 310: docs/rankings.md
"""

from pathlib import Path

from experiments import reward
from experiments.published import paths
from rlhf_jax import models
from rlhf_jax.runs import cli

CONFIG = reward.Config(
    out=Path("runs/reward_finegrained"),
    init=Path("runs/tinystories/model"),
    data="finegrained:PATH[:80%]",
    held_out="finegrained:PATH[80%:]",
    length=1024,
    batch=4,
    compute=models.Compute(remat="full"),
)


def main(cfg: reward.Config) -> dict[str, float]:
    """Learn from the rankings; returns the held-out accuracy."""
    file = "tasks/qa_feedback/data/train_feedback.json of github.com/allenai/FineGrainedRLHF"
    paths.check_given(cfg, CONFIG, file, "data", "held_out")
    return reward.main(cfg)


if __name__ == "__main__":
    cli.run(main, CONFIG)
