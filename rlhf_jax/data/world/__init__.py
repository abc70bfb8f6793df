"""A small, seeded world of plain English in which an assistant can be pretrained, fine-tuned, ranked and judged.

The world has people and places with facts about them, sums, words to play with, things that nobody wrote down, and
people who ask for help to do harm. All of it is made from one table, `KINDS`: how a thing is asked for, how it is
stated, and which values it can take. From that table come

    corpus          texts to pretrain on: every fact many times, and questions whose answers are mostly bad or missing
    demonstrations  conversations as people write them, about half of them well
    prompts         for PPO and for judging; held-out prompts share no entity with the training prompts
    gold            the yardstick: a score in [0, 1] by reading a response, given only the text of its prompt

Gold is what a policy is judged by and never what it is trained on: rankings come from `labelers`.

The vocabulary is closed and small (about 420 words), sentences are short, and numbers are digits, so that each common
word is one BPE token and a Transformer of under a million parameters learns the world in a minute or two.
"""

from rlhf_jax.data.world.gold import Gold, Prompt
from rlhf_jax.data.world.tables import CHAT, FAULTS, KINDS, MIX, Category, Kind
from rlhf_jax.data.world.world import Entities, World

__all__ = ["CHAT", "FAULTS", "KINDS", "MIX", "Category", "Entities", "Gold", "Kind", "Prompt", "World"]
