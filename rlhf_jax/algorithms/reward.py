"""Reward models from comparisons: Bradley-Terry over K-way rankings (arXiv:2203.02155, eq. 1) and best-of-n choice."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlhf_jax.algorithms import optim
from rlhf_jax.devices import parallel, ragged
from rlhf_jax.logprobs import masked_mean, precise
from rlhf_jax.settings import Count, LabelNoise, NonNegative, Settings
from rlhf_jax.types import InputError, Metrics, Params, Rankings, ScoreFn, TrainState


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of the loss; the defaults are InstructGPT's."""

    loss: Literal["bradley_terry", "choice"] = "bradley_terry"  # all pairs, or the best of each prompt's responses
    margin: NonNegative = 0.0  # by which scores should differ, per step of rank between the two (arXiv:2307.09288)
    label_smoothing: LabelNoise = 0.0  # probability that a pair's label is wrong
    centring: NonNegative = 0.0  # weight of the squared sum of a pair's scores, which keeps their mean near 0
    buckets: Count = 1  # parts of like length in which prompts are learnt from, each as wide as it needs

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "choice" and (self.margin or self.label_smoothing):
            raise InputError("margin and label_smoothing are of pairs: they have no effect with loss=choice")


def better(rank: Int[Array, "B K"]) -> Bool[Array, "B K K"]:
    """True at [b, i, j] where response i was ranked above response j: ties and absent responses (-1) form no pair."""
    present = rank >= 0
    return (rank[:, :, None] < rank[:, None, :]) & present[:, :, None] & present[:, None, :]


def margins(score: Float[Array, "B K"], pair: Bool[Array, "B K K"]) -> Float[Array, "B K K"]:
    """score_i - score_j where [i, j] is a pair, else 0: what absent responses hold reaches no value and no gradient."""
    score = precise(jnp.where(jnp.any(pair, axis=1) | jnp.any(pair, axis=2), score, 0.0))
    return score[:, :, None] - score[:, None, :]


def pair_mean(x: Float[Array, "B K K"], pair: Bool[Array, "B K K"], count: Array | None) -> Float[Array, ""]:
    """Mean over each prompt's pairs, then over the prompts that have any."""
    pairs = jnp.sum(pair, axis=(1, 2))
    return masked_mean(jnp.sum(jnp.where(pair, x, 0.0), axis=(1, 2)) / jnp.maximum(pairs, 1), pairs > 0, count)


def bradley_terry_loss(
    score: Float[Array, "B K"],
    rank: Int[Array, "B K"],
    count: Array | None = None,
    margin: float | Shaped[Array, "B #K #K"] = 0.0,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """`-ln sigmoid(score_better - score_worse)`, mean over each prompt's pairs, then over the prompts that have any.

    All pairs of a prompt stay in one batch element, so that each response is scored once and prompts weigh the same
    whatever their K. `count` replaces the number of prompts with pairs, see `masked_mean`. `margin`, at [b, i, j] for i
    ranked above j, is taken off the difference (arXiv:2307.09288, eq. 2). With `label_smoothing` e the term is
    `-(1 - e) ln sigmoid(d) - e ln sigmoid(-d)`.
    """
    pair = better(rank)
    difference = margins(score, pair) - margin
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(difference)
    if label_smoothing:
        loss -= label_smoothing * jax.nn.log_sigmoid(-difference)
    return pair_mean(loss, pair, count)


def centring_loss(score: Float[Array, "B K"], rank: Int[Array, "B K"], count: Array | None = None) -> Float[Array, ""]:
    """`(score_i + score_j)^2` over the pairs, averaged as in `bradley_terry_loss` (arXiv:2312.09244, section 4).

    Comparisons leave the mean of a prompt's scores free; this term fixes it at 0.
    """
    pair = better(rank)
    score = precise(jnp.where(jnp.any(pair, axis=1) | jnp.any(pair, axis=2), score, 0.0))
    return pair_mean(jnp.square(score[:, :, None] + score[:, None, :]), pair, count)


def choice_loss(score: Float[Array, "B K"], best: Int[Array, "B"], count: Array | None = None) -> Float[Array, ""]:
    """`-ln softmax(score)[best]`, mean over rows: a labeler picked one of K (Ziegler et al. 2019, eq. 1).

    For checking: training goes by `ranked_choice_loss`.
    """
    logp = jax.nn.log_softmax(precise(score))
    chosen = jnp.take_along_axis(logp, best[:, None], axis=1)[:, 0]
    return masked_mean(-chosen, jnp.ones_like(best, bool), count)


def ranked_choice_loss(
    score: Float[Array, "B K"], rank: Int[Array, "B K"], count: Array | None = None
) -> Float[Array, ""]:
    """`choice_loss` where the choice is the response of smallest rank, among equals the first.

    Absent responses (-1) are no candidates; a prompt without a pair counts for nothing, as in `bradley_terry_loss`.
    """
    present = rank >= 0
    logp = jax.nn.log_softmax(precise(jnp.where(present, score, jnp.finfo(jnp.float32).min)))
    best = jnp.argmin(jnp.where(present, rank, jnp.iinfo(rank.dtype).max), axis=1)
    chosen = jnp.take_along_axis(logp, best[:, None], axis=1)[:, 0]
    return masked_mean(-chosen, jnp.any(better(rank), axis=(1, 2)), count)


def loss(
    score: Float[Array, "B K"], rank: Int[Array, "B K"], cfg: Config, count: Array | None = None
) -> Float[Array, ""]:
    """What `cfg` asks for, of the prompts that have a pair."""
    if cfg.loss == "choice":
        value = ranked_choice_loss(score, rank, count)
    else:
        margin = cfg.margin * (rank[:, None, :] - rank[:, :, None]) if cfg.margin else 0.0
        value = bradley_terry_loss(score, rank, count, margin, cfg.label_smoothing)
    return value + cfg.centring * centring_loss(score, rank, count) if cfg.centring else value


def correct_pairs(score: Float[Array, "B K"], rank: Int[Array, "B K"]) -> tuple[Array, Array]:
    """How many pairs the scores order as the ranks do (equal scores count half), and how many pairs there are."""
    pair = better(rank)
    margin = margins(score, pair)
    return jnp.sum(jnp.where(pair, 0.5 * (1 + jnp.sign(margin)), 0.0)), jnp.sum(pair)


def pairwise_accuracy(score: Float[Array, "B K"], rank: Int[Array, "B K"]) -> Float[Array, ""]:
    """Share of all pairs of the batch that the scores order as the ranks do; equal scores count half.

    For checking: a step adds up the `correct_pairs` of its shares.
    """
    correct, pairs = correct_pairs(score, rank)
    return correct / jnp.maximum(pairs, 1)


def scores(
    params: Params,
    batch: Rankings,
    score_fn: ScoreFn,
    keys: Array | None = None,
    buckets: int = 1,
    axis: str | None = None,
) -> Float[Array, "B K"]:
    """The score of each response, one forward pass each; without keys in so many `buckets`, see `ragged`."""
    rows, responses, length = batch.tokens.shape
    tokens, mask = batch.tokens.reshape(-1, length), batch.mask.reshape(-1, length)
    judge = lambda tokens, mask: score_fn(params, tokens, mask, keys)
    return ragged.in_buckets(judge, mask, buckets, tokens, mask).reshape(rows, responses)


def train_step(
    state: TrainState,
    batch: Rankings,
    *,
    score_fn: ScoreFn,
    tx: optax.GradientTransformation,
    cfg: Config = Config(),
    microbatches: int = 1,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update of the reward model on the global batch of rankings, whose prompts are spread over `axis`.

    Prompts with their responses are learnt from in `cfg.buckets`, see `ragged`.
    """
    rows, responses, _ = batch.tokens.shape
    keys = parallel.row_keys(jax.random.fold_in(state.rng, state.step), rows * responses, axis)
    count = parallel.psum(jnp.sum(jnp.any(better(batch.rank), axis=(1, 2))), axis)

    def objective(
        params: Params, padded: tuple[Array, Array], other: tuple[Array, Array], keys: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        (tokens, mask), (start, rank) = padded, other
        batch = Rankings(tokens=tokens, mask=mask, start=start, rank=rank)
        score = scores(params, batch, score_fn, keys.reshape(-1))
        value = loss(score, rank, cfg, count)
        return value, (value, *correct_pairs(score, rank))

    share: Callable = functools.partial(jax.grad(objective, has_aux=True), state.params)
    mine = (batch.tokens, batch.mask), (batch.start, batch.rank), keys.reshape(rows, responses)
    parts = cfg.buckets * microbatches
    if cfg.buckets > 1:
        live = lambda padded: jnp.any(padded[1], axis=1)
        index = ragged.order(live(mine[0]), parts)
        mine = jax.tree.map(lambda x: x[index], mine)
        share = ragged.trimmed(share, live, cfg.buckets)
    grads, found = parallel.accumulate(lambda rows: share(*rows), mine, parts)
    grads, (value, correct, pairs) = parallel.psum((grads, jax.tree.map(jnp.sum, found)), axis)
    metrics = {
        f"loss/{cfg.loss}": value,
        "reward/accuracy": correct / jnp.maximum(pairs, 1),
        "reward/pairs": pairs.astype(jnp.float32),
        "grad_norm": optax.tree.norm(grads),
    }
    return optim.apply_gradients(state, grads, tx), metrics


def normalize(params: Params, mean: float, std: float) -> Params:
    """Fold a gain and bias into the head, so that scores with this mean and standard deviation get 0 and 1.

    Ziegler et al. 2019 normalise on samples of the reference policy, before and after training. Raises InputError when
    there is no spread to normalise.
    """
    if not std > 0:
        raise InputError(f"scores with a standard deviation of {std:.3g} cannot be normalised: no two of them differ")
    return {**params, "kernel": params["kernel"] / std, "bias": (params["bias"] - mean) / std}
