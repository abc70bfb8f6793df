"""Does PPO do as well as GRPO on a check of the answer? Its critic is a head on the policy: there is no reward model.

Data:    as `gsm8k_sft`
Run:     python -m experiments.published.gsm8k_ppo --init runs/gsm8k_sft/model --data "gsm8k:PATH[:7000]"
Parent:  ppo
Result:  from the tiny model of `gsm8k_sft`, --batch 32 --steps 3 --max-new-tokens 96: 1 right answer of 96, by chance,
         and 0.7 nats from the start after two updates of a rollout; then 2 of 126 held-out problems, by chance too. It
         runs, and there was nothing to learn from.
"""

from pathlib import Path

from experiments import ppo
from experiments.published import paths
from rlhf_jax.algorithms import ppo as ppo_lib
from rlhf_jax.data import gsm8k, sources
from rlhf_jax.runs import cli
from rlhf_jax.types import TrainState

CONFIG = ppo.Config(
    out=Path("runs/gsm8k_ppo"),
    init=Path("runs/gsm8k_sft/model"),
    reward=(),
    critic="policy",
    data="gsm8k:PATH[:7000]",
    text=None,
    prompt_length=208,
    max_new_tokens=256,
    algorithm=ppo_lib.Config(minibatches=4, kl_coef=0.04, value_coef=0.1),
)


def main(cfg: ppo.Config) -> TrainState:
    """PPO on answers that are right or wrong."""
    paths.check_given(cfg, CONFIG, paths.GSM8K, "data")
    rows = sources.rows(cfg.data, "prompts", data_dir=cfg.data_dir)
    return ppo.main(cfg, score_text=gsm8k.score_text(rows))


if __name__ == "__main__":
    cli.run(main, CONFIG)
