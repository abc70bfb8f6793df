"""How well a model predicts text: perplexity, and bits a byte, which models of different tokenizers share."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from rlhf_jax import models
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.devices import parallel
from rlhf_jax.evaluation import metrics
from rlhf_jax.evaluation.metrics import Score
from rlhf_jax.rollouts import likelihood
from rlhf_jax.rollouts.likelihood import Request
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Result:
    """How well documents are predicted, over all of them together."""

    bits_per_byte: Score  # of UTF-8
    perplexity: float  # of a token
    byte_perplexity: float
    tokens: int
    bytes: int


def evaluate(
    model: models.Model, texts: Sequence[str], *, layout: parallel.Layout = parallel.PMAP, batch: int = 32
) -> Result:
    """How well the model predicts documents, each from its first token on, in windows of the model's context.

    Raises InputError if there is no text.
    """
    texts = [text for text in texts if text]
    if not texts:
        raise InputError("there is no text to predict: every document is empty")
    tokenizer = models.tokenizer_of(model)
    documents = tokenizers.documents(tokenizer, texts)
    front = tokenizers.front(tokenizer)
    cut = [list(windows(ids[len(front) :], front or [tokenizer.eos_token_id], model.config.max_length))
           for ids in documents]  # fmt: skip
    flat = [request for some in cut for request in some]
    found = iter(likelihood.loglikelihoods(model, flat, layout=layout, batch=batch))
    nll = [-math.fsum(next(found).total for _ in some) for some in cut]
    sizes = [len(text.encode()) for text in texts]
    tokens = sum(len(request.continuation) for request in flat)
    return Result(
        bits_per_byte=metrics.score(np.array(nll) / math.log(2), sizes),
        perplexity=math.exp(math.fsum(nll) / tokens),
        byte_perplexity=math.exp(math.fsum(nll) / sum(sizes)),
        tokens=tokens,
        bytes=sum(sizes),
    )


def windows(ids: tokenizers.Ids, front: Sequence[int], length: int) -> Iterator[Request]:
    """Yield each token of a document once, after a context, in windows of `length` tokens that the model reads.

    The first token follows the last of `front`. A window follows the last token of the one before it, and the last
    window as many as fit.
    """
    whole = [*front[-1:], *ids.tolist()]
    for first in range(1, len(whole), length):
        end = min(first + length, len(whole))
        yield Request(whole[max(0, end - 1 - length) : first], whole[first:end])
