import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import logprobs, models
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import sampling
from rlhf_jax.types import InputError
from tests import tiny

BOTH = pytest.mark.parametrize("config", [tiny.GPT, tiny.LLAMA], ids=["gpt", "llama"])
NAMES = "gpt", "llama", "mistral", "qwen3", "gemma2", "mixtral"  # families that differ in how tokens see each other
EVERY = pytest.mark.parametrize("config", [tiny.CONFIGS[name] for name in NAMES], ids=NAMES)
EOS, KEY = 2, jax.random.key(0)


def generate(config, tokens, mask, key=None, n=8, **settings):
    key = jax.random.key(7) if key is None else key
    cfg = sampling.Config(max_new_tokens=n, **settings)
    module = models.Transformer(config)
    return sampling.generate(module, tiny.policy(config), jnp.asarray(tokens), jnp.asarray(mask), key, cfg)


def scored(config, tokens, mask, sample, temperature=1.0):
    """Log-probabilities of a sample by one forward pass over prompt and response."""
    tokens, mask = sampling.left_pad(jnp.asarray(tokens), jnp.asarray(mask))
    whole = jnp.concatenate([tokens, sample.tokens], 1)
    apply_fn = jax.jit(models.bind(models.Transformer(config)))
    logits = apply_fn(tiny.policy(config), whole, jnp.concatenate([mask, sample.mask], 1))
    start = tokens.shape[1]
    return logits[:, start - 1 : -1], logprobs.token_logprobs(logits[:, start - 1 : -1], sample.tokens, temperature)


@pytest.mark.slow
@EVERY
def test_greedy_is_the_argmax_without_a_cache(config):
    tokens, mask = tiny.random_tokens(0, 4, 6), tiny.ragged(1, 4, 6)
    sample = generate(config, tokens, mask, temperature=0.0)
    logits, _ = scored(config, tokens, mask, sample)
    np.testing.assert_array_equal(sample.tokens, jnp.argmax(logits, -1))
    assert sample.mask.all()


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_behaviour_logprobs_are_the_scorers(config, temperature):
    tokens, mask = tiny.random_tokens(0, 16, 6), tiny.ragged(1, 16, 6, left=True)
    sample = generate(config, tokens, mask, temperature=temperature, eos_id=EOS)
    _, logp = scored(config, tokens, mask, sample, temperature)
    np.testing.assert_allclose(sample.logp, np.where(sample.mask, logp, 0), atol=1e-5)


@pytest.mark.slow
@EVERY
def test_a_rows_sample_depends_on_neither_batch_nor_padding(config):
    keys = jax.random.split(jax.random.key(1), 5)
    tokens, mask = tiny.random_tokens(0, 5, 6), tiny.ragged(1, 5, 6)
    batch = generate(config, tokens, mask, keys, eos_id=EOS)
    for row in range(5):
        prompt = tokens[row, mask[row]]
        wide, real = np.zeros((1, 9), np.int32), np.zeros((1, 9), bool)
        columns = np.sort(np.random.default_rng(row).permutation(9)[: len(prompt)])
        wide[0, columns], real[0, columns] = prompt, True
        alone = generate(config, wide, real, keys[row : row + 1], eos_id=EOS)
        np.testing.assert_array_equal(batch.tokens[row], alone.tokens[0])
        np.testing.assert_array_equal(batch.mask[row], alone.mask[0])


@pytest.mark.slow
@BOTH
def test_rows_that_have_ended_are_left_out_without_a_trace(config):
    tokens, mask = tiny.random_tokens(0, 64, 6), tiny.ragged(1, 64, 6)
    keys = jax.random.split(jax.random.key(4), 64)
    settings = {"eos_id": (EOS, 5, 7, 11), "n": 16}  # one in eight: loops over 64, 32 and 16 rows
    together = generate(config, tokens, mask, keys, **settings)
    parts = [slice(first, first + 8) for first in range(0, 64, 8)]  # too few rows to leave any out
    alone = [generate(config, tokens[part], mask[part], keys[part], **settings) for part in parts]
    tiny.assert_close(together, jax.tree.map(lambda *xs: jnp.concatenate(xs), *alone), atol=1e-5)
    assert 0.25 < together.mask.mean() < 0.75


def on(platform, monkeypatch):
    """Has `generate` traced as for this platform, and its part of the trace run here."""
    monkeypatch.setattr(parallel, "platform", lambda: platform)
    own = "cpu" if platform == "cpu" else "default"
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, **run: run[own](*args))


def fresh(monkeypatch):
    """Has `generate` traced anew, which for the same function it would not be."""
    run = sampling._generate.__wrapped__
    traced = jax.jit(lambda *args: run(*args), static_argnums=(0, 5))
    monkeypatch.setattr(sampling, "_generate", traced)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@BOTH
def test_other_devices_sample_the_same(config, platform, monkeypatch):
    """TPUs by a scan over layers, on one cache; GPUs layer by layer, but all rows to the end."""
    tokens, mask = tiny.random_tokens(0, 32, 6), tiny.ragged(1, 32, 6)
    here = generate(config, tokens, mask, eos_id=(EOS, 5, 7))
    on(platform, monkeypatch)
    fresh(monkeypatch)
    there = generate(config, tokens, mask, eos_id=(EOS, 5, 7))
    tiny.assert_close(here, there, atol=1e-5)
    assert not here.mask.all()


@pytest.mark.slow
@pytest.mark.parametrize(("config", "platform"), [(tiny.GPT, "cpu"), (tiny.LLAMA, "tpu")])
def test_a_prompt_is_read_once_for_its_group(config, platform, monkeypatch):
    """With the tokens of the plain way, also where a batch has parts of groups alone."""
    tokens, mask = (np.repeat(x, 6, axis=0) for x in (tiny.random_tokens(0, 2, 6), tiny.ragged(1, 2, 6)))
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(7)))(jnp.arange(12))
    plain = generate(config, tokens, mask, keys, eos_id=EOS)
    on(platform, monkeypatch)
    read, prefill = [], sampling._Network.prefill
    monkeypatch.setattr(sampling._Network, "prefill", lambda self, *x: read.append(len(x[0])) or prefill(self, *x))
    for rows, prompts in ((slice(None), 2), (slice(3, 12), 3)):
        fresh(monkeypatch)
        read.clear()
        sample = generate(config, tokens[rows], mask[rows], keys[rows], eos_id=EOS, group=6)
        assert set(read) == {prompts}
        np.testing.assert_array_equal(sample.tokens, plain.tokens[rows])
        np.testing.assert_allclose(sample.logp, plain.logp[rows], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "platform"), [(tiny.GPT, "cpu"), (tiny.LLAMA, "tpu")])
def test_what_prompts_have_in_common_is_read_once(config, platform, monkeypatch):
    """With the tokens of the plain way, wherever the padding is, and for a group of answers to each prompt."""
    config = dataclasses.replace(config, window=3 if config.position == "rope" else None)
    tokens, mask = tiny.random_tokens(0, 6, 9), np.arange(9) < np.array([5, 9, 6, 7, 5, 8])[:, None]
    tokens[:, :4] = [5, 3, 7, 6]
    tokens, mask = (np.repeat(x, 2, axis=0) for x in (tokens, mask))
    tokens[8:], mask[8:] = (
        np.roll(tokens[8:], 1, axis=1),
        np.roll(mask[8:], 1, axis=1),
    )  # these begin later
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(7)))(jnp.arange(12))
    plain = generate(config, tokens, mask, keys, eos_id=EOS)
    on(platform, monkeypatch)
    read, prefill = [], sampling._Network.prefill
    monkeypatch.setattr(sampling._Network, "prefill", lambda self, *x: read.append(x[0].shape) or prefill(self, *x))
    for group in (1, 2):
        fresh(monkeypatch)
        sample = generate(config, tokens, mask, keys, eos_id=EOS, group=group, shared=4)
        np.testing.assert_array_equal(sample.tokens, plain.tokens)
        np.testing.assert_allclose(sample.logp, plain.logp, atol=1e-5)
    assert set(read) == {(1, 4)}


@pytest.mark.slow
@BOTH
def test_matrices_converted_beforehand_sample_the_same(config, monkeypatch):
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, dtype="bfloat16"))
    tokens, mask = tiny.random_tokens(0, 8, 6), tiny.ragged(1, 8, 6)
    before = generate(config, tokens, mask, eos_id=EOS)
    monkeypatch.setattr(sampling, "_converted", lambda config, params: sampling._Network(config, params))
    fresh(monkeypatch)
    tiny.assert_close(before, generate(config, tokens, mask, eos_id=EOS), atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "platform", "given"),
    [("gpt", "cpu", {"parts": 4, "group": 2}), ("gemma2", "tpu", {"slots": 8, "group": 2})],
    ids=["parts", "slots"],
)
def test_neither_a_growing_cache_nor_slots_leave_a_trace(name, platform, given, monkeypatch):
    """A cache in two parts, and loops over 24 and 12 rows, or eight slots, where two rows share each prompt."""
    config = tiny.CONFIGS[name]
    tokens, mask = (np.repeat(x, 2, axis=0) for x in (tiny.random_tokens(0, 12, 6), tiny.ragged(1, 12, 6)))
    settings = {"eos_id": (EOS, 5, 7, 11), "n": 11}
    plain = generate(config, tokens, mask, parts=1, **settings)
    assert plain.mask.all(1).any() and (plain.mask.sum(1) == 1).any()
    on(platform, monkeypatch)
    fresh(monkeypatch)
    monkeypatch.setattr(sampling, "PART", 5)
    monkeypatch.setattr(sampling, "MIN_ROWS", 24)
    sample = generate(config, tokens, mask, **given, **settings)
    np.testing.assert_array_equal(sample.tokens, plain.tokens)
    tiny.assert_close(sample, plain, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "platform", "given"),
    [("gpt", "cpu", {"parts": 4, "group": 2}), ("gemma2", "tpu", {"slots": 8, "group": 2})],
    ids=["parts", "slots"],
)
def test_an_int8_cache_samples_nearly_the_same(name, platform, given, monkeypatch):
    """Whatever the cache looks like, and not far from what the whole rows say."""
    config = tiny.CONFIGS[name]
    int8 = dataclasses.replace(config, compute=models.Compute(cache="int8"))
    tokens, mask = (np.repeat(x, 2, axis=0) for x in (tiny.random_tokens(0, 12, 6), tiny.ragged(1, 12, 6)))
    settings = {"eos_id": (EOS, 5, 7, 11), "n": 11}
    mine = generate(int8, tokens, mask, parts=1, **settings)
    error = np.abs(mine.logp - scored(config, tokens, mask, mine)[1])[mine.mask]
    assert 1e-4 < error.max() < 0.02
    on(platform, monkeypatch)
    fresh(monkeypatch)
    monkeypatch.setattr(sampling, "PART", 5)
    monkeypatch.setattr(sampling, "MIN_ROWS", 24)
    again = generate(int8, tokens, mask, **given, **settings)
    np.testing.assert_array_equal(again.tokens, mine.tokens)
    tiny.assert_close(again, mine, atol=1e-5)


def test_slots_hold_the_only_caches_of_new_tokens():
    tokens, mask = tiny.random_tokens(0, 32, 6), np.ones((32, 6), bool)
    step = functools.partial(generate, tiny.GPT, n=11, slots=8, eos_id=EOS)
    program = str(jax.make_jaxpr(step)(tokens, mask, KEY))
    assert "f32[8,2,11,8]" in program and "f32[32,2,11,8]" not in program


def within_loops(jaxpr, inside=False):
    """Every equation in the body of a loop."""
    for eqn in jaxpr.eqns:
        if inside:
            yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if inner := getattr(value, "jaxpr", value if hasattr(value, "eqns") else None):
                yield from within_loops(inner, inside or eqn.primitive.name in ("while", "scan"))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@BOTH
def test_no_step_converts_weights(config, platform, monkeypatch):
    on(platform, monkeypatch)
    fresh(monkeypatch)
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, dtype="bfloat16"))
    step = functools.partial(sampling.generate, models.Transformer(config), cfg=sampling.Config(4, eos_id=EOS))
    args = tiny.policy(config), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool), jax.random.key(0)
    made = list(within_loops(jax.make_jaxpr(step)(*args).jaxpr))
    assert any(eqn.primitive.name == "dot_general" for eqn in made)
    converted = [eqn.invars[0].aval for eqn in made if eqn.primitive.name == "convert_element_type"]
    smallest = config.d_model**2  # words of a matrix, which no activation of one row and two columns has
    assert not [x for x in converted if x.size >= smallest and x.dtype == jnp.float32]


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the compiler for another device lays it out otherwise")
@pytest.mark.parametrize("config", [tiny.GPT, tiny.LLAMA], ids=["gpt", "llama"])
def test_the_cache_is_updated_in_place(config):
    tokens, mask = tiny.random_tokens(0, 4, 7), tiny.ragged(0, 4, 7)
    generate = functools.partial(sampling.generate, models.Transformer(config), cfg=sampling.Config(6, eos_id=3))
    program = jax.jit(generate).lower(tiny.policy(config), tokens, mask, jax.random.key(0)).compile().as_text()
    layer = 4 * config.n_kv_heads * 13 * config.head_dim
    copied = re.findall(r" f32\[([\d,]+)\]\S* copy\(", program)
    assert "dynamic-update-slice" in program
    assert layer not in [math.prod(map(int, shape.split(","))) for shape in copied]


@pytest.mark.slow
def test_mask_ends_with_the_first_eos():
    # 4 rows end early at the latest when one token in five is an EOS.
    tokens, mask = tiny.random_tokens(0, 64, 4), np.ones((64, 4), bool)
    sample = generate(tiny.GPT, tokens, mask, eos_id=EOS, temperature=3.0, n=16)
    expected = logprobs.response_mask(sample.tokens, EOS)
    np.testing.assert_array_equal(sample.mask, expected)
    assert 0 < int((~expected).sum()) < expected.size
    assert (sample.tokens[~sample.mask] == EOS).all() and (sample.logp[~sample.mask] == 0).all()


@pytest.mark.slow
def test_any_of_several_ends():
    tokens, mask = tiny.random_tokens(0, 8, 4), np.ones((8, 4), bool)
    everything = generate(tiny.GPT, tokens, mask, eos_id=tuple(range(31)))
    np.testing.assert_array_equal(everything.mask.sum(1), np.ones(8))


@pytest.mark.slow
def test_samples_follow_the_distribution():
    rows = 20_000
    tokens, mask = np.broadcast_to(tiny.random_tokens(0, 1, 3), (rows, 3)), np.ones((rows, 3), bool)
    sample = generate(tiny.GPT, tokens, mask, n=1, temperature=0.8)
    logits, _ = scored(tiny.GPT, tokens[:1], mask[:1], jax.tree.map(lambda x: x[:1], sample))
    prob = jax.nn.softmax(logits[0, 0] / 0.8)
    counts = np.bincount(sample.tokens[:, 0], minlength=31)
    chi2 = np.sum((counts - rows * prob) ** 2 / (rows * prob))
    assert chi2 < 62  # 99.95 % of a chi-squared with 30 degrees of freedom


@pytest.mark.slow
def test_different_keys_and_steps_draw_differently():
    tokens, mask = np.broadcast_to(tiny.random_tokens(0, 1, 4), (8, 4)), np.ones((8, 4), bool)
    one = generate(tiny.GPT, tokens, mask, jax.random.key(0), temperature=5.0)
    two = generate(tiny.GPT, tokens, mask, jax.random.key(1), temperature=5.0)
    assert len({tuple(row) for row in np.asarray(jnp.concatenate([one.tokens, two.tokens]))}) == 16
    assert all(len(set(row)) > 1 for row in np.asarray(one.tokens))


def test_top_k_and_top_p_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
    kept = lambda **kw: np.isfinite(sampling.truncate_logits(logits, **{"top_k": 0, "top_p": 1.0} | kw))[0].tolist()
    assert kept() == [True] * 4
    assert kept(top_k=2) == [False, True, False, True]
    assert kept(top_p=0.65) == [False, True, False, True]  # .4 alone falls short, .4 + .3 reaches it
    assert kept(top_p=0.75) == [False, True, True, True]
    assert kept(top_p=0.01) == [False, True, False, False]
    assert kept(top_k=99) == [True] * 4


def test_draw_never_takes_an_impossible_token():
    logits = jnp.where(jnp.arange(50_000) % 7 == 3, 0.0, -jnp.inf)[None].repeat(64, 0)
    uniform = jnp.concatenate([jnp.zeros(1), jnp.linspace(0, 1 - 2**-23, 63)])
    tokens, logp = jax.jit(sampling.draw)(uniform, logits)
    assert (tokens % 7 == 3).all()
    np.testing.assert_allclose(logp, -np.log(np.isfinite(logits[0]).sum()), rtol=1e-5)


def test_draw_inverts_the_distribution_function():
    logits = jax.random.normal(jax.random.key(0), (1, 700)).repeat(999, 0)
    prob = np.asarray(jax.nn.softmax(logits[0]), np.float64)
    uniform = (np.arange(999) + 0.5) / 999
    tokens, logp = jax.jit(sampling.draw)(jnp.asarray(uniform, jnp.float32), logits)
    edges = np.concatenate([[0], np.cumsum(prob)])
    assert (edges[tokens] - 1e-5 <= uniform).all() and (uniform <= edges[np.asarray(tokens) + 1] + 1e-5).all()
    np.testing.assert_allclose(logp, np.log(prob)[tokens], atol=1e-5)


def test_bad_settings_are_refused():
    tokens, mask = tiny.random_tokens(0, 1, 6), np.ones((1, 6), bool)
    with pytest.raises(InputError, match="6 prompt columns and 19 new tokens exceed the model's context of 24"):
        generate(tiny.GPT, tokens, mask, n=19)
    with pytest.raises(InputError, match="top_p=0"):
        generate(tiny.GPT, tokens, mask, top_p=0.0)
    with pytest.raises(InputError, match="max_new_tokens=0"):
        generate(tiny.GPT, tokens, mask, n=0)


@pytest.mark.slow
def test_each_row_is_drawn_by_settings_of_its_own():
    """Temperature, top_k and top_p of each row, alone and together, as `choose` has them for all rows."""
    cfgs = [
        sampling.Config(max_new_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature, top_k, top_p in (
            (0.0, 5, 0.5), (0.3, 0, 0.7), (1.7, 5, 1.0), (1.7, 5, 0.7), (1.7, 99, 0.999), (0.9, 1, 1.0), (1.7, 0, 1.0),
        )
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    choose = jax.jit(sampling.choose, static_argnums=2)
    for kept in (len(cfgs), 1):  # the last one alone truncates nothing that it would sort
        some = cfgs[-kept:]
        logits = jnp.array(rng.normal(0, 2, (kept, 40)), jnp.float32)
        logits = logits.at[:, 3].set(logits[:, 7])  # a tie
        uniform = jnp.array(rng.uniform(size=kept), jnp.float32)
        tokens = jax.jit(sampling.choose_by_row)(logits, uniform, sampling.ByRow.of(some))
        expected = [choose(logits[n : n + 1], uniform[n : n + 1], cfg)[0][0] for n, cfg in enumerate(some)]
        assert tokens.tolist() == [int(token) for token in expected]
