"""Answers in writing: sampled or greedy, up to where the answer ends, prompts of like length in a batch.

What all prompts begin with, such as the examples in front of questions, is read once where that is worth a program of
its own.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from rlhf_jax import models
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import rollout, sampling
from rlhf_jax.settings import Count, NonNegative, Seed, Settings
from rlhf_jax.types import Params, Prompts, named_key


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """How answers are written."""

    samples: Count = 1  # answers to each prompt
    max_new_tokens: Count = 32  # most tokens of an answer
    temperature: NonNegative = 0.0  # 0 takes the likeliest token
    stop: str = ""  # text before which an answer ends, where the model does not end it itself; "": there is none
    batch: Count = 32  # answers at a time, over all devices
    seed: Seed = 0


WORTH = 1e12  # floating-point operations, about as long on two CPU cores as compiling another program


def worth_sharing(config: models.Config, prompts: Sequence[tokenizers.Ids]) -> int:
    """How many tokens with which all prompts begin are worth to be read apart from what follows; 0: none."""
    most = min(map(len, prompts)) - 1  # each has one of its own left
    whole = np.stack([ids[:most] for ids in prompts])
    shared = int(np.argmin([*(whole == whole[0]).all(axis=0), False]))
    saved = 2 * models.parameter_count(config) * shared * (len(prompts) - 1)
    return shared if saved > WORTH else 0


def answers(
    model: models.Model, prompts: Sequence[tokenizers.Ids], cfg: Config, *, layout: parallel.Layout = parallel.PMAP
) -> list[list[str]]:
    """The answers to each prompt, `cfg.samples` of them, without what ends them."""
    return Writer(model, prompts, cfg, layout)()


class Writer:
    """Prompts, and the compiled programs that answer them; who asks more than once keeps it."""

    def __init__(self, model: models.Model, prompts: Sequence[tokenizers.Ids], cfg: Config, layout: parallel.Layout):
        self._model, self._cfg, self._layout = model, cfg, layout
        shared = worth_sharing(model.config, prompts)
        prompts = [ids for ids in prompts for _ in range(cfg.samples)]
        width = max(map(len, prompts))
        tokens, mask = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
        for n, ids in enumerate(prompts):
            tokens[n, width - len(ids) :], mask[n, width - len(ids) :] = ids, True
        self._prompts = Prompts(tokens=tokens, mask=mask, index=np.arange(len(prompts), dtype=np.int32))
        sampled = sampling.Config(
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            eos_id=(*models.stop_ids(model), *_spelling(models.tokenizer_of(model), cfg.stop)),
            group=math.gcd(cfg.samples, cfg.batch),  # a batch begins with a prompt's first answer, or that of a part
            shared=shared,
        )
        self._sampler = rollout.Sampler(model.config, layout, sampled, cfg.batch)

    def __call__(self, params: Params | None = None) -> list[list[str]]:
        """The answers to each prompt, `cfg.samples` of them, without what ends them.

        `params`, as the layout places them, stand in for those of the model, as while it trains.
        """
        cfg, tokenizer = self._cfg, models.tokenizer_of(self._model)
        policy = self._layout.state(self._model.params) if params is None else params
        written = self._sampler({"policy": policy}, self._prompts, named_key(cfg.seed, "evaluation/writing"))
        texts = [
            tokenizers.decode(tokenizer, ids, on)
            for ids, on in zip(written.response_tokens, written.response_mask, strict=True)
        ]
        texts = [(text.partition(cfg.stop)[0] if cfg.stop else text).strip() for text in texts]
        return [texts[first : first + cfg.samples] for first in range(0, len(texts), cfg.samples)]


def _spelling(tokenizer: tokenizers.Tokenizer, stop: str) -> list[int]:
    """The ids that spell the whole stop: the loop on the devices ends at them. What spells it in parts is cut later."""
    if not stop:
        return []
    return [n for n, written in enumerate(tokenizers.token_bytes(tokenizer)) if stop.encode() in written]
