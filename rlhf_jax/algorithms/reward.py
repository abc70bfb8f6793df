"""Reward models from comparisons: all pairs of K-way rankings (arXiv:2203.02155, eq. 1), whole orders, best-of-n."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlhf_jax.algorithms import optim
from rlhf_jax.algorithms.balance import attach, detach
from rlhf_jax.devices import parallel, ragged
from rlhf_jax.logprobs import masked_mean, precise
from rlhf_jax.settings import Count, LabelNoise, NonNegative, Settings
from rlhf_jax.types import InputError, Metrics, Params, Rankings, ScoreFn, TrainState


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Settings of the loss; the defaults are InstructGPT's."""

    # Learn from all pairs of responses, the whole order, or the best one; or learn a cost: pairs by harm, and which
    # responses are harmful.
    loss: Literal["bradley_terry", "plackett_luce", "choice", "cost"] = "bradley_terry"
    margin: NonNegative = 0.0  # required difference of a pair's scores, per step between their ranks (arXiv:2307.09288)
    label_smoothing: LabelNoise = 0.0  # assumed probability that a pair's label is wrong
    centring: NonNegative = 0.0  # weight of the squared sum of a pair's scores, which keeps the mean score near 0
    buckets: Count = 1  # group prompts by length into so many buckets, each padded only to its longest response

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss in ("choice", "plackett_luce") and (self.margin or self.label_smoothing):
            raise InputError(
                f"margin and label_smoothing apply to pairs and have no effect with loss={self.loss}: leave them out"
            )
        if self.loss == "cost" and (self.margin or self.label_smoothing or self.centring):
            raise InputError("margin, label_smoothing and centring have no effect with loss=cost: leave them out")


def pair_mask(rank: Int[Array, "B K"]) -> Bool[Array, "B K K"]:
    """A mask of pairs: True at [b, i, j] where response i is ranked above response j.

    Ties and absent responses (rank -1) form no pair.
    """
    present = rank >= 0
    return (rank[:, :, None] < rank[:, None, :]) & present[:, :, None] & present[:, None, :]


def margins(score: Float[Array, "B K"], pair: Bool[Array, "B K K"]) -> Float[Array, "B K K"]:
    """The difference score_i - score_j of each pair [i, j] of `pair`; other entries are meaningless.

    The score of a response that is in no pair is replaced by 0, so it affects neither values nor gradients.
    """
    score = precise(jnp.where(jnp.any(pair, axis=1) | jnp.any(pair, axis=2), score, 0.0))
    return score[:, :, None] - score[:, None, :]


def pair_mean(x: Float[Array, "B K K"], pair: Bool[Array, "B K K"], count: Array | None) -> Float[Array, ""]:
    """The mean of `x` over each prompt's pairs, then over the prompts that have a pair (or divided by `count`)."""
    pairs = jnp.sum(pair, axis=(1, 2))
    return masked_mean(jnp.sum(jnp.where(pair, x, 0.0), axis=(1, 2)) / jnp.maximum(pairs, 1), pairs > 0, count)


def bradley_terry_loss(
    score: Float[Array, "B K"],
    rank: Int[Array, "B K"],
    count: Array | None = None,
    margin: float | Shaped[Array, "B #K #K"] = 0.0,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """The Bradley-Terry loss of rankings, mean over each prompt's pairs, then over prompts with a pair.

        -(1 - e) ln sigmoid(d) - e ln sigmoid(-d),  d = score_w - score_l - margin

    w is the response ranked above l (arXiv:2203.02155, eq. 1), e is `label_smoothing`, and `margin` is the difference
    that the scores should have, by pair at [b, w, l] (arXiv:2307.09288, eq. 2). All pairs of a prompt are in one batch
    element, so each response is scored once and prompts have equal weight whatever their K. `count` replaces the number
    of prompts with a pair, see `masked_mean`.
    """
    pair = pair_mask(rank)
    difference = margins(score, pair) - margin
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(difference)
    if label_smoothing:
        loss -= label_smoothing * jax.nn.log_sigmoid(-difference)
    return pair_mean(loss, pair, count)


def centring_loss(score: Float[Array, "B K"], rank: Int[Array, "B K"], count: Array | None = None) -> Float[Array, ""]:
    """The penalty (score_i + score_j)^2 on pairs (arXiv:2312.09244, section 4), averaged as `bradley_terry_loss`.

    Comparisons do not determine the mean of a prompt's scores; this term pulls it to 0.
    """
    pair = pair_mask(rank)
    score = precise(jnp.where(jnp.any(pair, axis=1) | jnp.any(pair, axis=2), score, 0.0))
    return pair_mean(jnp.square(score[:, :, None] + score[:, None, :]), pair, count)


def choice_loss(score: Float[Array, "B K"], best: Int[Array, "B"], count: Array | None = None) -> Float[Array, ""]:
    """The cross-entropy -ln softmax(score)[best], mean over rows (arXiv:1909.08593, eq. 1).

    `best` is the number of the response that the labeler chose among K. Only for comparison with other code: training
    uses `ranked_choice_loss`.
    """
    logp = jax.nn.log_softmax(precise(score))
    chosen = jnp.take_along_axis(logp, best[:, None], axis=1)[:, 0]
    return masked_mean(-chosen, jnp.ones_like(best, bool), count)


def ranked_choice_loss(
    score: Float[Array, "B K"], rank: Int[Array, "B K"], count: Array | None = None
) -> Float[Array, ""]:
    """The `choice_loss` of rankings, in which the choice is the response of smallest rank, the first among equals.

    Absent responses (rank -1) are not candidates. A prompt without a pair is left out, as in `bradley_terry_loss`.
    """
    present = rank >= 0
    logp = jax.nn.log_softmax(precise(jnp.where(present, score, jnp.finfo(jnp.float32).min)))
    best = jnp.argmin(jnp.where(present, rank, jnp.iinfo(rank.dtype).max), axis=1)
    chosen = jnp.take_along_axis(logp, best[:, None], axis=1)[:, 0]
    return masked_mean(-chosen, jnp.any(pair_mask(rank), axis=(1, 2)), count)


MOST_RANKED = 12  # responses, of whose subsets the listwise loss is a sum


def plackett_luce_loss(
    score: Float[Array, "B K"], rank: Int[Array, "B K"], count: Array | None = None
) -> Float[Array, ""]:
    """The listwise loss of whole rankings, mean over the prompts that have a pair (or divided by `count`).

    The probability of an order is that of choosing its best response among all by softmax(score), then the next among
    the others, and so on (Plackett-Luce); the loss is -ln of it, and where ranks tie the mean over the orders that
    agree with them. That mean is a sum over the sets U that can be left at some point of such an order:

        sum_U ln sum_{j in U} exp(score_j) / C(m, u)  -  sum_j score_j

    where m responses share the smallest rank in U, and u of them are in U. Raises InputError for more than
    `MOST_RANKED` responses.
    """
    size = rank.shape[1]
    if size > MOST_RANKED:
        raise InputError(f"loss=plackett_luce takes at most {MOST_RANKED} responses a prompt, got {size}")
    left = (np.arange(1, 2**size)[None, :, None] >> np.arange(size)) & 1 == 1  # [1 U K], all sets but the empty one
    present = rank >= 0
    score = precise(jnp.where(present, score, 0.0))
    absent = jnp.iinfo(rank.dtype).max
    ranks = jnp.where(present, rank, absent)[:, None, :]  # [B 1 K]
    least = jnp.min(jnp.where(left, ranks, absent), axis=2, keepdims=True)  # [B U 1]
    tied = present[:, None, :] & (ranks == least)
    # A set can be left if all its members are present, and whoever is worse than its best is a member.
    possible = jnp.all(jnp.where(left, present[:, None, :], ~present[:, None, :] | (ranks <= least)), axis=2)
    orders = np.array([[math.comb(m, u) for u in range(size + 1)] for m in range(size + 1)], np.float32)
    share = 1 / jnp.asarray(orders)[jnp.sum(tied, axis=2), jnp.sum(tied & left, axis=2)]
    among = jax.nn.logsumexp(jnp.where(left, score[:, None, :], -jnp.inf), axis=2)
    loss = jnp.sum(jnp.where(possible, among * share, 0.0), axis=1) - jnp.sum(score, axis=1)
    return masked_mean(loss, jnp.any(pair_mask(rank), axis=(1, 2)), count)


def cost_loss(
    cost: Float[Array, "B K"], rank: Int[Array, "B K"], harmful: Bool[Array, "B K"], count: Array | None = None
) -> Float[Array, ""]:
    """The loss of a cost model (arXiv:2310.12773, eq. 7), mean over the prompts that have a pair (or over `count`).

        mean over pairs of -ln sigmoid(c_l - c_w)  +  2 mean over responses of -ln sigmoid(s c)

    c is the cost, w the less harmful response of a pair (the one ranked above l), and s the sign of a response: 1 if it
    is `harmful`, else -1. So a cost orders responses by harm, and 0 divides the harmful from the others. The factor 2
    makes it the paper's loss where K = 2.
    """
    pair = pair_mask(rank)
    has_pair = jnp.any(pair, axis=(1, 2))
    order = pair_mean(-jax.nn.log_sigmoid(-margins(cost, pair)), pair, count)
    present = rank >= 0
    cost = precise(jnp.where(present, cost, 0.0))
    sign = jnp.where(present, -jax.nn.log_sigmoid(jnp.where(harmful, cost, -cost)), 0.0)
    each = jnp.sum(sign, axis=1) / jnp.maximum(jnp.sum(present, axis=1), 1)
    return order + 2 * masked_mean(each, has_pair, count)


def correct_signs(
    cost: Float[Array, "B K"], rank: Int[Array, "B K"], harmful: Bool[Array, "B K"]
) -> tuple[Array, Array]:
    """The number of responses whose cost has the sign that their label says, and of all responses. [], []."""
    present = rank >= 0
    return jnp.sum(present & (jnp.where(harmful, cost, -cost) > 0)), jnp.sum(present)


def loss(
    score: Float[Array, "B K"],
    rank: Int[Array, "B K"],
    cfg: Config,
    count: Array | None = None,
    harmful: Bool[Array, "B K"] | None = None,
) -> Float[Array, ""]:
    """The loss that `cfg` selects, averaged over the prompts that have a pair (or divided by `count`)."""
    if cfg.loss == "cost":
        if harmful is None:
            raise InputError("loss=cost needs labels of harmful responses: learn from ratings, by --virtue harmless")
        return cost_loss(score, rank, harmful, count)
    if cfg.loss == "choice":
        value = ranked_choice_loss(score, rank, count)
    elif cfg.loss == "plackett_luce":
        value = plackett_luce_loss(score, rank, count)
    else:
        margin = cfg.margin * (rank[:, None, :] - rank[:, :, None]) if cfg.margin else 0.0
        value = bradley_terry_loss(score, rank, count, margin, cfg.label_smoothing)
    return value + cfg.centring * centring_loss(score, rank, count) if cfg.centring else value


def correct_pairs(score: Float[Array, "B K"], rank: Int[Array, "B K"]) -> tuple[Array, Array]:
    """The number of pairs that the scores order as the ranks do (equal scores count half), and of all pairs. [], []."""
    pair = pair_mask(rank)
    margin = margins(score, pair)
    return jnp.sum(jnp.where(pair, 0.5 * (1 + jnp.sign(margin)), 0.0)), jnp.sum(pair)


def pairwise_accuracy(score: Float[Array, "B K"], rank: Int[Array, "B K"]) -> Float[Array, ""]:
    """The share of the batch's pairs that the scores order as the ranks do; equal scores count half.

    Only for comparison with other code: a step sums the `correct_pairs` of its shares.
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
    """The score of each response, from one forward pass over it and its prompt.

    A prompt that has a `prefix` is read once for all responses, where that pays. `keys` [B K] turn dropout on.
    Responses are read in `buckets` by length, see `devices.ragged`.
    """
    rows, responses, length = batch.tokens.shape
    tokens, mask = batch.tokens.reshape(-1, length), batch.mask.reshape(-1, length)
    start, group = (batch.prefix - 1, responses) if batch.prefix else (0, 1)
    judge = lambda tokens, mask: score_fn(params, tokens, mask, keys, start=start, group=group)
    found = ragged.in_buckets(judge, mask[:, batch.prefix :], buckets, tokens, mask, group=group)
    return found.reshape(rows, responses)


def train_step(
    state: TrainState,
    batch: Rankings,
    *,
    score_fn: ScoreFn,
    tx: optax.GradientTransformation,
    cfg: Config = Config(),
    microbatches: int = 1,
    balance: float = 0.0,
    axis: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update of the reward model on the global batch of rankings, whose prompts are spread over `axis`.

    Prompts are grouped by length into `cfg.buckets`, see `devices.ragged`. `balance` is the weight of a load-balancing
    loss, see `algorithms.balance`. The metrics describe the parameters before
    the update.
    """
    rows, responses, _ = batch.tokens.shape
    keys = parallel.row_keys(jax.random.fold_in(state.rng, state.step), rows * responses, axis)
    count = parallel.psum(jnp.sum(jnp.any(pair_mask(batch.rank), axis=(1, 2))), axis)

    def objective(
        params: Params, padded: tuple[Array, Array], other: tuple[Array, Array, Array | None], keys: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        (tokens, mask), (start, rank, harmful) = padded, other
        part = Rankings(tokens=tokens, mask=mask, start=start, rank=rank, prefix=batch.prefix)
        score = scores(params, part, score_fn, keys.reshape(-1))
        value = loss(score, rank, cfg, count, harmful)
        # A cost is larger for the response ranked below.
        signs = (jnp.zeros(()),) * 2 if harmful is None else correct_signs(score, rank, harmful)
        return value, (value, *correct_pairs(-score if cfg.loss == "cost" else score, rank), *signs)

    parts = cfg.buckets * microbatches
    params = attach(state.params, balance, parts, axis)
    share: Callable = functools.partial(jax.grad(objective, has_aux=True), params)
    local = (batch.tokens, batch.mask), (batch.start, batch.rank, batch.harmful), keys.reshape(rows, responses)
    if cfg.buckets > 1:
        live = lambda padded: jnp.any(padded[1], axis=1)[:, batch.prefix :]
        index = ragged.order(live(local[0]), parts)
        local = jax.tree.map(lambda x: x[index], local)
        share = ragged.trimmed(share, live, cfg.buckets)
    grads, sums = parallel.accumulate(share, parts)(*local)
    grads, (value, correct, pairs, signed, signs) = parallel.psum((grads, jax.tree.map(jnp.sum, sums)), axis)
    grads, load = detach(grads)
    metrics = {
        f"loss/{cfg.loss}": value,
        "reward/accuracy": correct / jnp.maximum(pairs, 1),
        "reward/pairs": pairs.astype(jnp.float32),
        "grad_norm": optax.tree.norm(grads),
    } | ({"cost/sign_accuracy": signed / signs} if cfg.loss == "cost" else {})
    return optim.apply_gradients(state, grads, tx), metrics | load


def normalize(params: Params, mean: float, std: float) -> Params:
    """Fold a gain and bias into the head: scores with this mean and standard deviation get 0 and 1 instead.

    Ziegler et al. (arXiv:1909.08593) normalise on samples of the reference policy, before and after training. Raises
    InputError when `std` is not above 0.
    """
    if not std > 0:
        raise InputError(f"scores with a standard deviation of {std:.3g} cannot be normalised: no two of them differ")
    return {**params, "kernel": params["kernel"] / std, "bias": (params["bias"] - mean) / std}
