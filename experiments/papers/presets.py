"""The published settings of PPO, to import: ziegler2019, stiennon2020, instructgpt.

Each is the algorithm's settings and its optimiser's; batch sizes and learning rates are those of the papers' models, so
a fork for a small model replaces them (experiments/papers/ppo_instructgpt.py).
"""

from pathlib import Path

from experiments.ppo import Config
from rlhf_jax.algorithms import optim, ppo

# Ziegler et al. 2019 (arXiv:1909.08593); where the paper is silent, its code, github.com/openai/lm-human-preferences.
ziegler2019 = Config(
    out=Path("runs/ziegler2019"),
    text=None,  # no pretraining mix
    max_new_tokens=24,  # paper: continuations of 24 tokens
    batch=512,  # its reproduction, "The N implementation details of RLHF with PPO", Huang et al. 2023
    steps=1953,  # there: 1M episodes
    lr=1e-5,  # code: books; 2e-6 for summaries
    critic_lr=1e-5,  # code: one optimiser for both
    schedule="linear",  # code: linear to 0
    warmup=0,
    adam=optim.Adam(b2=0.999, eps=1e-5, tensorflow=True, clip_norm=None),  # code: Adam in TensorFlow's form
    critic="policy",  # code: a value head on the policy's trunk, at first 0
    algorithm=ppo.Config(
        epochs=4,  # code: noptepochs
        minibatches=1,  # code: nminibatches
        temperature=0.7,  # code: books and tldr; .5 for cnndm
        stop_at_eos=False,  # code: every response has its full length; the score is at its last position
        kl_coef=0.15,  # code: books; .01 cnndm, .03 tldr
        kl_target=6.0,  # code: nats a response
        kl_horizon=10_000.0,  # code: episodes
        unfinished_score=-1.0,  # code: penalty_reward_value, where the response cannot be truncated
        whiten_rewards=True,  # code: whiten_rewards, keeping the mean
        gamma=1.0,  # code
        lam=0.95,  # code
        clip=0.2,  # code: cliprange
        value_clip=0.2,  # code: cliprange_value
        value_coef=0.1,  # code: vf_coef
    ),
)

# Stiennon et al. 2020 (arXiv:2009.01325), as worked out in "The N+ implementation details of RLHF with PPO" by Huang et
# al. 2024 (arXiv:2403.17031).
stiennon2020 = Config(
    out=Path("runs/stiennon2020"),
    text=None,  # no pretraining mix
    max_new_tokens=53,  # details: length of a TL;DR summary
    batch=512,  # details: episodes a step
    steps=1953,  # details: 1M episodes
    lr=3e-6,  # details
    critic_lr=3e-6,  # details
    schedule="linear",  # details: linear to 0
    warmup=0,
    adam=optim.Adam(b2=0.999, eps=1e-5, clip_norm=None),  # details: PyTorch's form
    algorithm=ppo.Config(
        epochs=4,  # details
        minibatches=1,  # details
        temperature=0.7,  # details
        kl_coef=0.05,  # details
        score_at="first_pad",  # details: the first pad after EOS
        unfinished_score=-1.0,  # details: EOS trick
        gamma=1.0,  # details
        lam=0.95,  # details
        clip=0.2,  # details
        value_clip=0.2,  # details
        value_coef=0.1,  # details
    ),
)

# Ouyang et al. 2022 (arXiv:2203.02155), appendix C.4, for PPO-ptx at 1.3B.
instructgpt = Config(
    out=Path("runs/instructgpt"),
    prompt_length=1024,  # context of 2k: prompts to 1k,
    max_new_tokens=1024,  # and responses to 1k
    text_length=2048,
    batch=512,  # episodes a step
    text_batch=512,  # 8 times as many pretraining examples as episodes: 512 with each minibatch of 64
    steps=500,  # 256k episodes
    lr=9.65e-6,  # of the 1.3B SFT model's scale
    critic_lr=9e-6,  # of the 6B value function
    schedule="constant",  # after a warm-up over the first ten steps
    warmup=80,  # ten steps of eight updates
    adam=optim.Adam(b1=0.9, b2=0.95),
    algorithm=ppo.Config(
        epochs=1,  # a single inner epoch
        minibatches=8,  # of 64 episodes
        temperature=1.0,
        kl_coef=0.02,  # beta
        gamma=1.0,  # no discount
        lam=0.95,  # of GAE
        clip=0.2,
        value_clip=0.2,
        ptx_coef=27.8,
        ema=0.992,
    ),
)
