"""The worth of every token of some episodes: the rows of a run's `tokens/`, which `experiments.report` shows.

They are the first rows of a rollout, and of answers to a fixed batch of prompts. What a network says of them comes from
one small program, which reads these rows alone: by the policy that sampled them, by the reference and by the policy
after the update. Rewards and advantages are those of the algorithm, which whitens over the whole rollout.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from rlhf_jax import models
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.data.rows import Rows
from rlhf_jax.devices import hosts, parallel
from rlhf_jax.rollouts import rollout as rollout_lib
from rlhf_jax.types import Leaf, Params, Prompts, Rollout, TrainState

BEST = 5  # likeliest tokens that are recorded beside the one that was sampled
STATISTICS = ("kl_coef", "rewards")  # what a state's opt_state has beside its optimiser, and rewards depend on

# The `assess` of an algorithm with its settings: (state, rollout) -> (state, experience, metrics).
Assess = Callable[[TrainState, Rollout], tuple[TrainState, Any, Any]]


class Reading(struct.PyTreeNode):
    """A language model's distribution over each response token."""

    logp: Leaf  # [B, N] nats, of the token that was sampled
    entropy: Leaf  # [B, N] nats
    best: Leaf  # [B, N, K] int32, the likeliest tokens
    best_logp: Leaf  # [B, N, K] nats


def read(
    params: Params,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    distributions: Callable[..., tuple[jax.Array, ...]],
    new_tokens: int,
    axis: str | None = None,
) -> Reading:
    """A model's distributions over the last `new_tokens` columns of these rows [B, T]."""
    return Reading(*distributions(params, tokens, mask, start=tokens.shape[1] - new_tokens - 1))


@dataclasses.dataclass(frozen=True)
class Part:
    """Some rows of a rollout before the update on it."""

    name: str
    rows: Rollout  # on the host
    placed: tuple[Any, Any]  # tokens and mask on the devices
    reward: np.ndarray  # [B, N]
    advantage: np.ndarray  # [B, N]
    policy: Reading  # of the policy that sampled them, on the devices
    reference: Reading


class Recorder:
    """Records the first episodes of rollouts: `before` an update reads them, `after` it gives their rows."""

    def __init__(
        self,
        config: models.Config,
        layout: parallel.Layout,
        assess: Assess,
        temperature: float,
        rows: Rows,
        tokenizer: tokenizer_lib.Tokenizer,
    ):
        """`rows` are what the index of episodes counts; `temperature` is that at which they are sampled."""
        self._layout, self._assess, self._count = layout, jax.jit(assess), 0
        self._rows, self._tokenizer = rows, tokenizer
        self._pieces: dict[int, str] = {}
        self._distributions = functools.partial(
            models.bind(models.Transformer(config), models.Transformer.distributions),
            temperature=temperature,
            best=min(BEST, config.vocab_size),
        )
        self._read = functools.cache(self._reader)

    def watch(self, count: int, answer: Callable[..., Rollout], prompts: Prompts, key: jax.Array) -> None:
        """Record `count` episodes of each rollout, and of answers to these prompts, sampled with the same noise always.

        `answer` takes (params, prompts, key, number of the first row), and returns a scored rollout. A count of 0
        records nothing.
        """
        place = self._layout.state
        self._count, self._watched = count, functools.partial(self._answered, answer, prompts, place(key))

    def _answered(self, answer: Callable[..., Rollout], prompts: Prompts, key: Any, params: Any) -> Rollout:
        return answer(params, self._layout.rows(prompts), key, self._layout.state(np.uint32(0)))

    def _reader(self, new_tokens: int) -> Callable:
        return self._layout.step(
            functools.partial(read, distributions=self._distributions, new_tokens=new_tokens),
        )

    def before(self, state: TrainState, params: Mapping[str, Params], episodes: Rollout) -> list[Part]:
        """The parts to record of a scored rollout and of the watched answers, while the state is that which sampled."""
        if not self._count:
            return []
        kept = {name: state.opt_state[name] for name in STATISTICS if name in state.opt_state}
        statistics = self._layout.get(state.replace(params=None, opt_state=kept))
        parts = {"trained": episodes, "watched": self._watched(params)}
        return [self._part(name, statistics, params, one) for name, one in parts.items()]

    def _part(self, name: str, statistics: TrainState, params: Mapping[str, Params], placed: Rollout) -> Part:
        whole = self._layout.gather(placed)
        _, experience, _ = self._assess(statistics, whole)
        devices = jax.device_count()
        count = min(devices * -(-self._count // devices), len(whole.index))
        rows = jax.tree.map(lambda x: x[:count], whole)
        mask = rows.response_mask
        advantage = np.asarray(experience.advantage)[:count]
        tokens = self._layout.rows(hosts.share(rows.tokens)), self._layout.rows(hosts.share(rows.mask))
        one_reading = self._read(mask.shape[1])
        return Part(
            name=name,
            rows=rows,
            placed=tokens,
            reward=np.asarray(experience.reward)[:count],
            advantage=advantage if advantage.ndim == 2 else np.broadcast_to(advantage[:, None], mask.shape),
            policy=one_reading(params["policy"], *tokens),
            reference=one_reading(params["reference"], *tokens),
        )

    def after(self, parts: Sequence[Part], policy: Params) -> list[dict[str, Any]]:
        """The rows of these parts, for `runs.Run.tokens`; `policy` is what the update has made of the policy."""
        return [row for part in parts for row in self._table(part, policy)]

    def _table(self, part: Part, policy: Params) -> list[dict[str, Any]]:
        rows = part.rows
        new_tokens = rows.response_mask.shape[1]
        updated = self._read(new_tokens)(policy, *part.placed)
        policy_, reference, updated = (self._layout.gather(x) for x in (part.policy, part.reference, updated))
        texts = rollout_lib.texts(self._tokenizer, rows.response_tokens, rows.response_mask)
        table = []
        for b in range(min(self._count, len(rows.index))):
            on, prompt_on = rows.response_mask[b], rows.mask[b, :-new_tokens]
            numbers = {name: getattr(rows, name) for name in ("score", "cost", "disagreement", "scores")}
            table.append(
                {
                    "part": part.name,
                    "index": int(rows.index[b]),
                    "prompt": tokenizer_lib.prompt_text(self._rows[int(rows.index[b])]["prompt"]),
                    "response": texts[b],
                    "ended": bool(rows.ended[b]),
                    "prompt_tokens": self._spell(rows.tokens[b, :-new_tokens][prompt_on]),
                    "tokens": self._spell(rows.response_tokens[b][on]),
                    "logp": rows.logp[b][on],
                    "logp_ref": reference.logp[b][on],
                    "logp_after": updated.logp[b][on],
                    "entropy": policy_.entropy[b][on],
                    "entropy_ref": reference.entropy[b][on],
                    "reward": part.reward[b][on],
                    "advantage": part.advantage[b][on],
                    "best": [self._spell(ids) for ids in policy_.best[b][on]],
                    "best_logp": list(policy_.best_logp[b][on]),
                    "best_ref": [self._spell(ids) for ids in reference.best[b][on]],
                    "best_ref_logp": list(reference.best_logp[b][on]),
                }
                | ({} if rows.value is None else {"value": rows.value[b][on]})
                | {name: x[b].tolist() for name, x in numbers.items() if x is not None}
            )
        return table

    def _spell(self, ids: np.ndarray) -> list[str]:
        return spell(self._tokenizer, ids, self._pieces)


def spell(tokenizer: tokenizer_lib.Tokenizer, ids: np.ndarray, known: dict[int, str]) -> list[str]:
    """The text of each token by itself, with the space that it begins with; `known` remembers them."""
    for token in set(ids.tolist()) - known.keys():
        text = tokenizer.decode([token])
        starts_word = str(tokenizer.convert_ids_to_tokens(token)).startswith("▁")  # SentencePiece's space
        known[token] = f" {text}" if starts_word and not text.startswith(" ") else text
    return [known[token] for token in ids.tolist()]
