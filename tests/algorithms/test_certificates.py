"""Whole algorithms against exact solutions: what each converges to, not only what each step computes."""

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import best_of_n, grpo, ppo, reward, rloo, updates
from rlhf_jax.devices import parallel
from rlhf_jax.logprobs import token_logprobs
from rlhf_jax.types import Rollout

EOS, EPISODES = 0, 512


@dataclasses.dataclass(frozen=True)
class Tree:
    """Responses of up to `depth` tokens out of `vocab`, which EOS ends early; a policy is a table of logits a node.

    Nodes are numbered as tokens are read: 0 is the empty response, 1 + token a response of that one token.
    """

    vocab: int
    depth: int  # 1 or 2

    @property
    def nodes(self) -> int:
        return 1 if self.depth == 1 else 1 + self.vocab

    def table(self, seed: int) -> jax.Array:
        return jnp.array(np.random.default_rng(seed).normal(0, 1, (self.nodes, self.vocab)), jnp.float32)

    @property
    def leaves(self) -> list[tuple[int, ...]]:
        if self.depth == 1:
            return [(a,) for a in range(self.vocab)]
        return [(EOS,), *((a, b) for a in range(self.vocab) if a != EOS for b in range(self.vocab))]

    def log_probabilities(self, table: jax.Array) -> np.ndarray:
        """Of each leaf."""
        logp = np.asarray(jax.nn.log_softmax(table), np.float64)
        return np.array(
            [sum(logp[0 if n == 0 else 1 + leaf[0], a] for n, a in enumerate(leaf)) for leaf in self.leaves]
        )

    def node(self, tokens: jax.Array) -> jax.Array:
        """The node that each column of [prompt, response] leads to."""
        columns = jnp.arange(tokens.shape[1])
        return jnp.where(columns == 0, 0, jnp.minimum(1 + tokens, self.nodes - 1))

    def policy(self, params, tokens, mask, keys=None, *, start, temperature, with_entropy, group):
        assert (temperature, with_entropy) == (1.0, False)
        return token_logprobs(params["policy"][self.node(tokens)[:, start:-1]], tokens[:, start + 1 :]), None

    def critic(self, params, tokens, mask, start):
        return params["critic"][self.node(tokens)[:, start:-1]]

    def sample(self, params, reference, score: jax.Array, key: jax.Array) -> Rollout:
        """`score` is a table [nodes, vocab]: what a response is worth that ends by this token at this node."""
        node, live = jnp.zeros(EPISODES, jnp.int32), jnp.ones(EPISODES, bool)
        columns = []
        for n in range(self.depth):
            logits = params["policy"][node]
            token = jax.random.categorical(jax.random.fold_in(key, n), logits).astype(jnp.int32)
            at = lambda table, node=node, token=token: jax.nn.log_softmax(table)[node, token]
            value = params["critic"][node] if "critic" in params else jnp.zeros(EPISODES)
            columns.append((token, live, at(params["policy"]), at(reference), value, score[node, token]))
            live = live & (token != EOS)
            node = jnp.minimum(1 + token, self.nodes - 1)
        tokens, mask, logp, logp_ref, value, worth = (jnp.stack(x, axis=1) for x in zip(*columns, strict=True))
        last = jnp.sum(mask, axis=1) - 1
        return Rollout(
            tokens=jnp.pad(tokens, ((0, 0), (1, 0))),
            mask=jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True),
            response_mask=mask,
            logp=jnp.where(mask, logp, 0.0),
            logp_ref=jnp.where(mask, logp_ref, 0.0),
            value=value,
            score=jnp.take_along_axis(worth, last[:, None], axis=1)[:, 0],
            ended=jnp.ones(EPISODES, bool),
            index=jnp.arange(EPISODES),
        )

    def optimum(self, reference: jax.Array, score: jax.Array, beta: float) -> np.ndarray:
        """ln of pi_ref exp(r / beta), normalised: the policy that maximises E[r] - beta KL(pi || pi_ref)."""
        worth = np.array([score[0 if len(leaf) == 1 else 1 + leaf[0], leaf[-1]] for leaf in self.leaves], np.float64)
        log_weight = self.log_probabilities(reference) + worth / beta
        return log_weight - np.logaddexp.reduce(log_weight)


def distance(tree: Tree, algorithm: ModuleType = ppo, **settings) -> tuple[float, float]:
    """KL to the optimum of E[r] - beta KL(pi || pi_ref), of the reference and of what the algorithm makes of it."""
    beta, steps = 0.7, 400
    cfg = algorithm.Config(**({"epochs": 2, "minibatches": 4, "kl_coef": beta} | settings))
    reference, score = tree.table(0), 2 * tree.table(1)
    rate = optax.cosine_decay_schedule(0.03, steps * cfg.epochs * cfg.minibatches, 0.01)
    params, functions, tx = {"policy": reference}, {"policy_fn": tree.policy}, optax.adam(rate)
    init = updates.init
    if algorithm is ppo:
        init, tx = ppo.init, ppo.optimizer(tx, tx)
        params["critic"], functions["critic_fn"] = jnp.zeros(tree.nodes), tree.critic
    state = init(params, tx, cfg, jax.random.key(0))

    @jax.jit
    def train(state):
        def step(state, n):
            rollout = tree.sample(state.params, reference, score, jax.random.fold_in(jax.random.key(1), n))
            return algorithm.train_step(state, rollout, **functions, tx=tx, cfg=cfg)

        return jax.lax.scan(step, state, jnp.arange(steps))

    state, _ = train(state)
    optimum = tree.optimum(reference, score, beta)

    def divergence(table: jax.Array) -> float:
        logp = tree.log_probabilities(table)
        return float(np.sum(np.exp(logp) * (logp - optimum)))

    return divergence(reference), divergence(state.params["policy"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"penalty": 0.5},
        {"epochs": 1, "lam": 1.0, "whiten_advantages": None, "dual_clip": 3.0},
        {"score_at": "first_pad", "value_coef": 0.5},
    ],
    ids=lambda settings: next(iter(settings), "default"),
)
@pytest.mark.parametrize("tree", [Tree(vocab=2, depth=1), Tree(vocab=4, depth=2)], ids=["two-state", "token-tree"])
def test_ppo_reaches_the_optimum_of_the_penalised_objective(tree, settings):
    before, after = distance(tree, **settings)
    assert before > 0.1
    assert after < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("tree", [Tree(vocab=2, depth=1), Tree(vocab=4, depth=2)], ids=["two-state", "token-tree"])
@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        (rloo, {"group": 4, "epochs": 1}),
        (rloo, {"group": 8}),
        (grpo, {"group": 8, "kl_in": "reward", "scale": False, "mean": "token"}),
        (grpo, {"group": 8, "kl_in": "reward"}),
    ],
    ids=["rloo-4", "rloo-8-two-epochs", "grpo", "grpo-scaled"],
)
def test_algorithms_without_a_critic_reach_it_too(tree, algorithm, settings):
    before, after = distance(tree, algorithm, **settings)
    assert before > 0.1
    assert after < 0.02


@pytest.mark.slow
def test_the_published_grpo_has_another_optimum():
    # Its k3 in the loss descends the KL of the reference to the policy.
    assert distance(Tree(vocab=4, depth=1), grpo, scale=False)[1] > 0.02


@pytest.mark.slow
def test_a_penalty_in_the_loss_has_this_optimum_for_a_single_token_alone():
    # Over more tokens, it does not see what a token does to the KL of those that follow.
    settings = {"kl_in": "loss", "kl_kind": "k2", "whiten_advantages": None}  # whitening would rescale the score alone
    assert distance(Tree(vocab=4, depth=1), **settings)[1] < 0.02
    assert distance(Tree(vocab=4, depth=2), **settings)[1] > 0.02


@pytest.mark.slow
def test_comparisons_reveal_strengths_at_the_statistical_rate():
    rng = np.random.default_rng(0)
    items, k = 6, 4
    strength = rng.normal(0, 1, items)
    strength -= strength.mean()

    def compare(prompts: int) -> tuple[np.ndarray, np.ndarray]:
        """Two of k items are compared, the better one by a coin of the Bradley-Terry model; the others are absent."""
        shown = np.array([rng.choice(items, k, replace=False) for _ in range(prompts)])
        probability = 1 / (1 + np.exp(strength[shown[:, 1]] - strength[shown[:, 0]]))
        first_wins = rng.random(prompts) < probability
        rank = np.full((prompts, k), -1)
        rank[:, 0], rank[:, 1] = ~first_wins, first_wins
        return shown, rank

    @jax.jit
    @jax.vmap
    def estimate(shown: jax.Array, rank: jax.Array) -> jax.Array:
        """Maximum likelihood of pairwise comparisons, by the loss itself."""
        tx = optax.adam(optax.cosine_decay_schedule(0.05, 400))

        def step(carry, _):
            s, opt = carry
            updates, opt = tx.update(jax.grad(lambda s: reward.bradley_terry_loss(s[shown], rank))(s), opt)
            return (s + updates, opt), None

        s, _ = jax.lax.scan(step, (jnp.zeros(items), tx.init(jnp.zeros(items))), length=400)[0]
        return s - jnp.mean(s)

    def error(prompts: int) -> float:
        shown, rank = (np.stack(x) for x in zip(*(compare(prompts) for _ in range(8)), strict=True))
        return float(np.sqrt(np.mean((np.asarray(estimate(shown, rank)) - strength) ** 2)))

    # Fisher information of one comparison of a random pair, p (1 - p) on the difference; errors go by its inverse root.
    pairs = [(i, j) for i in range(items) for j in range(items) if i != j]
    information = np.zeros((items, items))
    for i, j in pairs:
        p = 1 / (1 + np.exp(strength[j] - strength[i]))
        e = np.eye(items)[i] - np.eye(items)[j]
        information += p * (1 - p) * np.outer(e, e) / len(pairs)
    predicted = lambda prompts: np.sqrt(np.trace(np.linalg.pinv(information)) / items / prompts)
    for prompts in (500, 2000):
        assert 0.75 < error(prompts) / predicted(prompts) < 1.3


@pytest.mark.parametrize("n", [2, 4, 16])
def test_best_of_n_moves_as_far_as_its_formula_says(n):
    # Scores of the base policy are uniform; the best of n has density n u^(n-1) against 1.
    best = np.random.default_rng(n).random((200_000, n)).max(axis=1)
    measured = np.log(n) + (n - 1) * np.log(best)
    np.testing.assert_allclose(best_of_n.kl(n), measured.mean(), atol=4 * measured.std() / np.sqrt(200_000))


@pytest.mark.slow
def test_neither_the_order_of_episodes_nor_devices_change_an_update():
    tree, cfg = Tree(vocab=4, depth=2), ppo.Config(epochs=2, minibatches=1, kl_coef=0.3, whiten_rewards=True)
    tx = ppo.optimizer(optax.sgd(0.1), optax.sgd(0.1))
    state = ppo.init({"policy": tree.table(2), "critic": jnp.ones(tree.nodes)}, tx, cfg, jax.random.key(0))
    rollout = jax.jit(tree.sample)(state.params, tree.table(0), tree.table(1), jax.random.key(3))
    step = functools.partial(ppo.train_step, policy_fn=tree.policy, critic_fn=tree.critic, tx=tx, cfg=cfg)
    plain, _ = jax.jit(step)(state, rollout)
    shuffled, _ = jax.jit(step)(state, jax.tree.map(lambda x: x[::-1], rollout))
    spread, _ = parallel.pmap(step)(parallel.replicate(state), parallel.shard(rollout))
    for other in (shuffled, parallel.unreplicate(spread)):
        for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(other.params), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
