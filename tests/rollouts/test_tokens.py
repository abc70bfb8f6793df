"""What a run of PPO records of each token is what the models say of it, and adds up."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import grpo, online_dpo, ppo, rloo, updates
from rlhf_jax.rollouts import tokens
from rlhf_jax.runs import log


@pytest.fixture(scope="module")
def rows(done):
    cfg, _ = done
    return log.read_tokens(cfg.out / "ppo")


def test_every_step_has_the_trained_episodes_and_those_of_the_same_prompts(done, rows):
    cfg, _ = done
    assert [(row["step"], row["part"]) for row in rows] == [
        (step, part) for step in (1, 2) for part in ("trained", "watched") for _ in range(cfg.ppo.token_samples)
    ]
    first, second = ([row for row in rows if (row["step"], row["part"]) == (step, "watched")] for step in (1, 2))
    assert [row["prompt"] for row in first] == [row["prompt"] for row in second]
    assert len({row["prompt"] for row in first}) > 1


def test_the_numbers_are_those_of_the_table_of_samples(done, rows):
    cfg, _ = done
    table = log.read(cfg.out / "ppo", "samples.jsonl")
    trained = [row for row in rows if row["part"] == "trained"]
    for sample, row in zip(table, trained[:8] + trained[16:24], strict=True):
        assert (sample["prompt"], sample["response"]) == (row["prompt"], row["response"])
        kl = np.sum(np.subtract(row["logp"], row["logp_ref"]))
        np.testing.assert_allclose([row["score"], kl], [sample["score"], sample["kl"]], atol=1e-4)


def test_the_rewards_of_the_tokens_add_up(done, rows):
    """To the score, or to that of an answer that has no end, less the penalty of the KL."""
    cfg, _ = done
    for row in rows:
        kl = np.subtract(row["logp"], row["logp_ref"])
        score = row["score"] if row["ended"] else cfg.ppo.algorithm.unfinished_score
        score = row["score"] if score is None else score
        np.testing.assert_allclose(np.sum(row["reward"]), score - cfg.ppo.algorithm.kl_coef * kl.sum(), atol=1e-4)
        assert len(row["tokens"]) == len(row["advantage"]) == len(row["value"]) == len(row["best"])


def test_the_distributions_are_the_model_s(done, rows):
    """At the first step policy and reference are the fine-tuned model; the update then moves the policy."""
    cfg, _ = done
    model = models.load(cfg.out / "sft" / "model")
    spelled = tokens.spell(model.tokenizer, np.arange(model.config.vocab_size), {})
    known = {text: token for token, text in enumerate(spelled) if spelled.count(text) == 1}
    row = next(row for row in rows if known.keys() >= {*row["prompt_tokens"], *row["tokens"]} and row["step"] == 1)
    whole = jnp.array([[known[text] for text in row["prompt_tokens"] + row["tokens"]]])
    logits = np.asarray(model.apply(model.params, whole, jnp.ones_like(whole, bool)), np.float64)[0]
    logits = logits[len(row["prompt_tokens"]) - 1 : -1]
    logp = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    np.testing.assert_allclose(row["entropy"], -np.sum(np.exp(logp) * logp, axis=1), atol=1e-4)
    np.testing.assert_allclose(row["best_logp"], -np.sort(-logp, axis=1)[:, : tokens.BEST], atol=1e-4)
    np.testing.assert_allclose(row["logp"], row["logp_ref"], atol=1e-4)
    assert tokens.spell(model.tokenizer, np.argmax(logp, axis=1), {}) == [best[0] for best in row["best"]]
    assert np.max(np.abs(np.subtract(row["logp_after"], row["logp"]))) > 1e-6


@pytest.mark.parametrize("module", [ppo, grpo, rloo])
def test_each_algorithm_says_what_its_tokens_earned(module):
    from tests.algorithms.test_grpo import EPISODES

    cfg = module.Config(group=4) if module is not ppo else module.Config()
    rollout = EPISODES.replace(value=jnp.zeros_like(EPISODES.logp))
    made = module.experience(rollout, jnp.float32(0.02), cfg) if module is ppo else module.experience(rollout, cfg)
    reward, mask = np.asarray(made[0].reward), np.asarray(rollout.response_mask)
    coef = {ppo: 0.02, grpo: 0.0, rloo: 0.03}[module]  # by default GRPO has its KL in the loss
    kl = np.sum(np.where(mask, rollout.logp - rollout.logp_ref, 0.0), axis=1)
    np.testing.assert_allclose(reward.sum(axis=1), np.asarray(rollout.score) - coef * kl, rtol=1e-5)
    assert not reward[~mask].any()


def test_a_token_with_a_score_of_its_own_has_earned_it_there():
    from tests.algorithms.test_grpo import EPISODES

    cfg = online_dpo.Config(group=4)
    plain = updates.earned(EPISODES, cfg, 0.0)
    scored = EPISODES.replace(token_score=jnp.zeros_like(EPISODES.logp).at[:, 0].set(0.5))
    np.testing.assert_allclose(updates.earned(scored, cfg, 0.0) - plain, scored.token_score, atol=1e-6)


def test_online_dpo_says_how_many_answers_each_one_beats():
    from tests.algorithms.test_grpo import EPISODES, init

    cfg = online_dpo.Config(group=4)
    score = jnp.tile(jnp.array([0.0, 2.0, 1.0, 1.0]), len(EPISODES.score) // 4)
    _, made, _ = online_dpo.assess(init(cfg), EPISODES.replace(score=score), cfg)
    np.testing.assert_allclose(made.advantage[:4], [-0.75, 0.75, 0.0, 0.0])
