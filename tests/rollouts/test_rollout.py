import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import best_of_n
from rlhf_jax.devices import parallel
from rlhf_jax.models import heads
from rlhf_jax.rollouts import rollout, sampling, scores
from rlhf_jax.types import Prompts
from tests import tiny

MODULE = models.Transformer(tiny.GPT)
LOGPROBS, SCALAR = models.logprobs_fn(tiny.GPT), models.bind(heads.ScalarModel(tiny.GPT))
CRITIC = heads.critic(tiny.GPT)
N, EOS = 5, 2
PARAMS = lambda: {"policy": tiny.policy(), "critic": tiny.scalar(), "reference": tiny.policy(seed=3)}
CFG = sampling.Config(max_new_tokens=N, temperature=0.8, eos_id=EOS)
COLLECT = functools.partial(rollout.collect, policy=MODULE, cfg=CFG, critic_fn=CRITIC)


def prompts(rows: int = 16) -> Prompts:
    return Prompts(tokens=tiny.random_tokens(0, rows, 4), mask=tiny.ragged(1, rows, 4), index=np.arange(rows))


@pytest.mark.slow
def test_a_rollout_says_what_each_model_says():
    sampled = jax.jit(COLLECT)(PARAMS(), tiny.arrays(prompts()), jax.random.key(0), jnp.uint32(0))
    score = jax.jit(lambda p: LOGPROBS(p, sampled.tokens, sampled.mask, start=3, temperature=0.8)[0])
    on = np.asarray(sampled.response_mask)
    assert 0 < on.sum() < on.size  # some responses end early
    np.testing.assert_allclose(sampled.logp, np.where(on, score(tiny.policy()), 0), atol=1e-5)
    np.testing.assert_allclose(sampled.logp_ref, np.where(on, score(tiny.policy(seed=3)), 0), atol=1e-5)
    values = jax.jit(SCALAR)(tiny.scalar(), sampled.tokens, sampled.mask)
    np.testing.assert_allclose(sampled.value, values[:, 3:-1], atol=1e-5)
    assert sampled.score is None
    last = 4 + on.sum(1) - 1
    np.testing.assert_array_equal(sampled.ended, (np.asarray(sampled.tokens)[np.arange(16), last] == EOS))


@pytest.mark.slow
def test_responses_that_go_on_after_their_end():
    args = (PARAMS(), tiny.arrays(prompts()), jax.random.key(0), jnp.uint32(0))
    settings = CFG, dataclasses.replace(CFG, stop_at_eos=False)
    stopped, whole = (jax.jit(functools.partial(COLLECT, cfg=cfg))(*args) for cfg in settings)
    assert np.all(whole.response_mask)
    assert 0 < np.sum(whole.ended) < 16
    np.testing.assert_array_equal(stopped.ended, whole.ended)
    on = np.asarray(stopped.response_mask)
    np.testing.assert_array_equal(whole.tokens[:, 4:][on], stopped.tokens[:, 4:][on])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "compute"),
    [
        (parallel.Config(), models.Compute()),
        (parallel.Config(fsdp=4, tensor=2), models.Compute()),
        (parallel.Config(fsdp=4, tensor=2), models.Compute(rollout="int8", cache="int8")),
    ],
    ids=["pmap", "mesh", "int8"],
)
def test_one_device_equals_eight(cfg, compute):
    """Also where each of the eight samples one row at a time."""
    policy = models.Transformer(dataclasses.replace(tiny.GPT, compute=compute))
    collect = functools.partial(COLLECT, policy=policy)
    one = jax.jit(collect)(PARAMS(), tiny.arrays(prompts()), jax.random.key(0), jnp.uint32(7))
    place = parallel.layout(cfg)
    params, *rest = place.state((PARAMS(), jax.random.key(0), jnp.uint32(7)))
    collect = functools.partial(collect, cfg=dataclasses.replace(CFG, slots=1))
    eight = place.gather(place.step(collect)(params, place.rows(prompts()), *rest))
    tiny.assert_close(jax.tree.map(np.asarray, one), eight, atol=1e-5)
    np.testing.assert_array_equal(one.tokens, eight.tokens)


@pytest.mark.slow
def test_reference_and_reward_model_read_a_prompt_once():
    """Of each group of four, in two buckets on each of two devices."""
    place, asked = parallel.layout(devices=jax.devices()[:2]), best_of_n.repeat(prompts(4), 4)
    cfg = dataclasses.replace(CFG, group=4)
    found, programs = [], []
    for share, parts in ((False, 1), (True, 2)):
        config = dataclasses.replace(tiny.GPT, compute=models.Compute(share_prompts=share))
        collect = rollout.collector(config, place, cfg, buckets=parts)
        judge = scores.scoring(config, EOS, 0.0, place, parts, group=4)
        params = place.state({name: PARAMS()[name] for name in ("policy", "reference")})
        model = place.state(jax.tree.map(lambda x: x[None], tiny.scalar(seed=7)))
        rows = params, place.rows(asked), *place.state((jax.random.key(0), jnp.uint32(7)))
        sampled = collect(*rows)
        found.append(place.gather(judge(model, sampled)))
        program = str(jax.make_jaxpr(judge)(model, sampled)) + str(jax.make_jaxpr(collect)(*rows))
        programs.append(f"f32[{8 // parts},9,16]" in program)  # hidden states of all columns of all rows
    tiny.assert_close(found[1], found[0], atol=2e-5)
    assert np.ptp(found[0].response_mask.sum(axis=1)) > 0
    assert programs == [True, False]


@pytest.mark.slow
def test_two_rollouts_share_no_noise():
    same = tiny.arrays(Prompts(tokens=np.full((32, 3), 5), mask=np.ones((32, 3), bool), index=np.arange(32)))
    collect = jax.jit(functools.partial(COLLECT, cfg=dataclasses.replace(CFG, temperature=3.0)))
    rows = [collect(PARAMS(), same, jax.random.key(0), jnp.uint32(f)).tokens for f in (0, 32)]
    assert len({tuple(row) for row in np.concatenate(rows).tolist()}) > 60


@pytest.mark.slow
def test_responses_do_not_depend_on_the_batch():
    model = models.Model(tiny.GPT, tiny.policy(), None, lambda: None)
    args = model, prompts(20), jax.random.key(0), sampling.Config(max_new_tokens=N, eos_id=EOS)
    small, large = rollout.episodes(*args, batch=8), rollout.episodes(*args, batch=16)
    assert small.response_tokens.shape == (20, N)
    assert small.logp_ref is None and small.value is None and small.score is None
    np.testing.assert_array_equal(small.tokens, large.tokens)
    np.testing.assert_array_equal(small.mask, large.mask)


@pytest.mark.slow
def test_a_batch_has_whole_groups(monkeypatch):
    """Of three answers each, in any of which the rows keep their noise: 32 rows are sampled as 24, three a device."""
    asked, key = best_of_n.repeat(prompts(16), 3), jax.random.key(0)
    model = models.Model(tiny.GPT, tiny.policy(), None, lambda: None)
    plain = rollout.episodes(model, asked, key, CFG, batch=32)
    read, prefill = set(), sampling._Network.prefill
    monkeypatch.setattr(sampling._Network, "prefill", lambda self, *x: read.add(len(x[0])) or prefill(self, *x))
    second, grouped = np.arange(24, 48), dataclasses.replace(CFG, group=3)
    rows = jax.tree.map(lambda x: x[second], asked).replace(noise=second)
    found = rollout.episodes(model, rows, key, grouped, batch=32)
    assert read == {1}
    tiny.assert_close(found, jax.tree.map(lambda x: x[second], plain), atol=1e-5)


@pytest.mark.parametrize(("batch", "group", "rows"), [(256, 9, 216), (256, 1, 256), (72, 9, 72), (64, 9, 64)])
def test_rows_of_whole_groups_on_eight_devices(batch, group, rows):
    assert rollout.whole_groups(batch, group) == rows


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [parallel.Config(), parallel.Config(fsdp=4, tensor=2)], ids=["pmap", "mesh"])
def test_prompts_of_like_length_share_a_batch(cfg, monkeypatch):
    """What each row says, and their order, is what they say in one batch that is padded to the longest."""
    monkeypatch.setattr(rollout, "STEP", 3)
    monkeypatch.setattr(rollout, "BATCHES", 1)
    lengths = np.random.default_rng(0).permutation([12, 7, 5, 5, 4, 4, 4, 4, 3, 3, 2, 1])
    mask = np.random.default_rng(1).permuted(np.arange(12)[None] < lengths[:, None], axis=1)  # padding is anywhere
    mixed = Prompts(tokens=tiny.random_tokens(2, 12, 12), mask=mask, index=np.arange(12)[::-1] + 100)
    model, reference = (models.Model(tiny.GPT, tiny.policy(seed=n), None, lambda: None) for n in (0, 3))
    widths = []

    def score(sampled):
        widths.append(sampled.tokens.shape[-1] - N)
        return sampled

    grouped = rollout.episodes(
        model,
        mixed,
        jax.random.key(0),
        CFG,
        batch=8,
        reference=reference,
        score=score,
        layout=parallel.layout(cfg),
    )
    assert widths == [12, 6]
    alone = jax.jit(COLLECT)(PARAMS(), tiny.arrays(mixed), jax.random.key(0), jnp.uint32(0))
    for name in ("tokens", "mask", "response_mask", "ended", "index"):
        np.testing.assert_array_equal(getattr(grouped, name), getattr(alone, name), err_msg=name)
    tiny.assert_close((grouped.logp, grouped.logp_ref), (alone.logp, alone.logp_ref), atol=1e-5)


def test_widths_of_batches(monkeypatch):
    sizes = np.array([3, 100, 40, 9, 64, 33, 1])

    def batches(sizes, columns, batch):
        return [(numbers.tolist(), width) for numbers, width in rollout.by_width(sizes, columns, batch)]

    assert batches(sizes, 100, 2) == [([1, 4], 100), ([2, 5], 100), ([3, 0], 100), ([6, 6], 100)]  # few batches
    assert batches(sizes[[0, 3]], 100, 2) == [([1, 0], 32)]  # none needs more
    monkeypatch.setattr(rollout, "BATCHES", 1)
    assert batches(sizes, 100, 2) == [([1, 4], 100), ([2, 5], 67), ([3, 0], 34), ([6, 6], 34)]
    assert [width for _, width in batches(np.tile(sizes, 2), 128, 1)] == [128] * 2 + [64] * 6 + [32] * 6
    assert [width for _, width in batches(np.full(99, 9), 20, 1)] == [20] * 99
