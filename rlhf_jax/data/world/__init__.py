"""A small, seeded world of plain English in which an assistant can be pretrained, fine-tuned, ranked and judged.

Prompts ask for facts about people and places, for sums, for word play, for things that nobody can know, and for help to
do harm. All are generated from one table, `KINDS`, which holds the questions of each kind, the sentences that answer
them, and the values that an answer can have. From that table come

    corpus          texts to pretrain on: every fact many times, and questions whose answers are mostly bad or missing
    demonstrations  conversations as people write them, about half of them with a good answer
    prompts         for PPO and evaluation; held-out prompts share no entity with the training prompts
    gold            the true quality of a response: a score in [0, 1], from its text and the text of its prompt

Policies are evaluated by gold and never trained on it: rankings come from `labelers`.

The vocabulary is closed and small (about 420 words), sentences are short, and numbers are digits. So each common word
is one BPE token, and a Transformer with fewer than a million parameters learns the world in a minute or two.
"""

from rlhf_jax.data.world.gold import Gold, Prompt
from rlhf_jax.data.world.tables import CHAT, FAULTS, KINDS, MIX, Category, Kind
from rlhf_jax.data.world.world import Entities, World

__all__ = ["CHAT", "FAULTS", "KINDS", "MIX", "Category", "Entities", "Gold", "Kind", "Prompt", "World"]
