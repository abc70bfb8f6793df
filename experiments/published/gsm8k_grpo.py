"""Does GRPO raise the share of problems solved, when the reward is nothing but a check of the answer?

As DeepSeekMath (arXiv:2402.03300), but that no reward model is asked: 1 for the number of the reference answer, else 0.
A group whose answers are all right or all wrong teaches nothing, so the model must sometimes be right to begin with.

Data:    as `gsm8k_sft`
Run:     python -m experiments.published.gsm8k_grpo --init runs/gsm8k_sft/model --data "gsm8k:PATH[:7000]"
Parent:  grpo
Result:  from the tiny model of `gsm8k_sft`, --batch 32 --steps 3 --max-new-tokens 96: the reward of all 96 answers is
         0, so nothing is learnt (KL 4e-5 nats). Held out, 1 of 126 problems before, 4 after (0.8 %, 3.2 %), none with a
         ####: numbers that are right by chance. On single-digit sums, which a tiny model can learn, the share of right
         answers does rise: tests/experiments/test_published.py.
"""

from pathlib import Path

from experiments import grpo
from experiments.published import paths
from rlhf_jax.algorithms import grpo as grpo_lib
from rlhf_jax.data import gsm8k, sources
from rlhf_jax.runs import cli
from rlhf_jax.types import TrainState

CONFIG = grpo.Config(
    out=Path("runs/gsm8k_grpo"),
    init=Path("runs/gsm8k_sft/model"),
    reward=(),
    data="gsm8k:PATH[:7000]",
    text=None,
    prompt_length=208,
    max_new_tokens=256,
    algorithm=grpo_lib.Config(),
)


def main(cfg: grpo.Config) -> TrainState:
    """GRPO on answers that are right or wrong."""
    paths.check_given(cfg, CONFIG, paths.GSM8K, "data")
    rows = sources.rows(cfg.data, "prompts", data_dir=cfg.data_dir)
    return grpo.main(cfg, score_text=gsm8k.score_text(rows))


if __name__ == "__main__":
    cli.run(main, CONFIG)
