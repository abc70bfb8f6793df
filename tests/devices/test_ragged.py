import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.devices import parallel, ragged
from rlhf_jax.rollouts import rollout, sampling, scores
from rlhf_jax.types import InputError, Prompts
from tests import tiny
from tests.algorithms import test_grpo, test_ppo

KEY = jax.random.key(0)


def live(lengths, columns):
    return jnp.array(np.arange(columns) < np.array(lengths)[:, None])


def test_parts_have_rows_of_like_length():
    lengths = [5, 0, 8, 2, 7, 1]
    index = ragged.order(live(lengths, 8), 3)
    parts = parallel.split(jnp.array(lengths)[index], 3)
    assert [sorted(part) for part in parts.tolist()] == [[0, 1], [2, 5], [7, 8]]
    with pytest.raises(InputError, match="6 rows a device do not divide into 4 parts"):
        ragged.order(live(lengths, 8), 4)


@pytest.mark.parametrize(("columns", "parts", "sizes"), [(64, 4, (16, 32, 48, 64)), (7, 3, (3, 5, 7)), (2, 4, (1, 2))])
def test_widths_go_up_to_all_columns(columns, parts, sizes):
    assert ragged.widths(columns, parts) == sizes


def test_each_part_is_as_wide_as_its_longest_row():
    lengths, widths = [8, 1, 2, 5, 6, 3, 4, 0], []

    def compute(x):
        jax.debug.callback(lambda: widths.append(x.shape[1]), ordered=False)
        return jnp.cumsum(x, axis=1), jnp.sum(x, axis=1)

    x = jnp.where(live(lengths, 8), jax.random.normal(KEY, (8, 8)), 0.0)
    along, whole = jax.jit(functools.partial(ragged.in_buckets, compute, live(lengths, 8), 4))(x)
    jax.effects_barrier()
    assert sorted(widths) == [2, 4, 6, 8]  # of rows with 0 and 1, 2 and 3, 4 and 5, 6 and 8 columns
    np.testing.assert_allclose(whole, jnp.sum(x, axis=1), rtol=1e-6)
    seen = live([8, 2, 4, 6, 8, 4, 6, 2], 8)
    np.testing.assert_allclose(along, jnp.where(seen, jnp.cumsum(x, axis=1), 0.0), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [parallel.Config(), parallel.Config(fsdp=2, tensor=2)], ids=["pmap", "mesh"])
def test_a_rollout_in_buckets_is_the_whole_one(devices):
    place = parallel.layout(devices)
    config = tiny.CONFIGS["gpt"]
    tokens = np.arange(32 * 5, dtype=np.int32).reshape(32, 5) % config.vocab_size
    prompts = Prompts(tokens=tokens, mask=np.ones((32, 5), bool), index=np.arange(32, dtype=np.int32))
    policy = tiny.policy(config)
    params = place.state({"policy": policy, "critic": tiny.scalar(config), "reference": policy})
    cfg = sampling.Config(max_new_tokens=8, eos_id=tuple(range(8)))
    judges = place.state(jax.tree.map(lambda x: x[None], tiny.scalar(config, seed=2)))

    def scored(buckets):
        collect = rollout.collector(config, place, cfg, test_ppo.CRITIC, buckets)
        judge = scores.scoring(config, 0, 0.0, place, buckets)
        sampled = collect(params, place.rows(prompts), place.state(KEY), place.state(np.uint32(0)))
        return place.gather(judge(judges, sampled))

    whole, parts = scored(1), scored(4 if devices == parallel.Config() else 2)
    assert len(set(whole.response_mask.sum(axis=1).tolist())) > 4
    mask = np.pad(whole.response_mask, ((0, 0), (1, 0)), constant_values=True)[:, :-1]  # and a column more
    clean = lambda x: x.replace(value=np.where(mask, x.value, 0.0))
    tiny.assert_close(clean(whole), clean(parts), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo, score at the first pad", "grpo"])
def test_a_step_in_buckets_is_the_whole_one(name):
    if name in test_grpo.ALGORITHMS:
        step, cfg = test_grpo.step(name)
        state = test_grpo.init(cfg)
    else:
        cfg = dataclasses.replace(test_ppo.CFG, score_at="first_pad")
        step, state = test_ppo.step(cfg), test_ppo.state(cfg)
    rows = test_ppo.episodes(0), test_ppo.text(0, cfg.epochs * cfg.minibatches)
    assert len(set(np.asarray(rows[0].response_mask).sum(axis=1).tolist())) > 2
    one, two = (
        jax.jit(functools.partial(step, cfg=dataclasses.replace(cfg, buckets=buckets))).trace(state, *rows)
        for buckets in (1, 2)
    )
    assert str(two.jaxpr).count("cond[") > str(one.jaxpr).count("cond[")
    whole, parts = (traced.lower().compile()(state, *rows) for traced in (one, two))
    tiny.assert_close(whole, parts, atol=1e-5)
