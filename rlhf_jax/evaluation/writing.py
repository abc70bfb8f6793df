"""Answers in writing: sampled or greedy, up to where the answer ends, prompts of like length in a batch."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rlhf_jax import models
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import rollout, sampling
from rlhf_jax.settings import Count, NonNegative, Seed, Settings
from rlhf_jax.types import Prompts, named_key


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """How answers are written."""

    max_new_tokens: Count = 32  # most tokens of an answer
    temperature: NonNegative = 0.0  # 0 takes the likeliest token
    stop: str = ""  # text before which an answer ends, where the model does not end it itself; "": there is none
    batch: Count = 32  # answers at a time, over all devices
    seed: Seed = 0


def answers(
    model: models.Model, prompts: Sequence[tokenizers.Ids], cfg: Config, *, layout: parallel.Layout = parallel.PMAP
) -> list[str]:
    """The answer to each prompt, without what ends it; the same prompt twice is answered by two samples."""
    tokenizer = models.tokenizer_of(model)
    width = max(map(len, prompts))
    tokens, mask = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), bool)
    for n, ids in enumerate(prompts):
        tokens[n, width - len(ids) :], mask[n, width - len(ids) :] = ids, True
    written = rollout.episodes(
        model,
        Prompts(tokens=tokens, mask=mask, index=np.arange(len(prompts), dtype=np.int32)),
        named_key(cfg.seed, "evaluation/writing"),
        sampling.Config(
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            eos_id=(*models.stop_ids(model), *_spelling(tokenizer, cfg.stop)),
        ),
        batch=cfg.batch,
        layout=layout,
    )
    texts = [
        tokenizers.decode(tokenizer, ids, on)
        for ids, on in zip(written.response_tokens, written.response_mask, strict=True)
    ]
    return [(text.partition(cfg.stop)[0] if cfg.stop else text).strip() for text in texts]


def _spelling(tokenizer: tokenizers.Tokenizer, stop: str) -> list[int]:
    """The ids that spell the whole stop: the loop on the devices ends at them. What spells it in parts is cut later."""
    if not stop:
        return []
    return [n for n, written in enumerate(tokenizers.token_bytes(tokenizer)) if stop.encode() in written]
