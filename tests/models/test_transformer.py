import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import logprobs, models
from rlhf_jax.models import heads, layers, rope
from rlhf_jax.types import InputError, Tree
from tests import tiny
from tests.devices import test_shared

BOTH = pytest.mark.parametrize("config", [tiny.GPT, tiny.LLAMA], ids=["gpt", "llama"])
ONE_OF_EACH = "gpt", "gemma2", "mixtral"
NAMES = "gpt", "llama", "mistral", "qwen3", "gemma2", "mixtral"  # families that differ in how tokens see each other
EVERY = pytest.mark.parametrize("config", [tiny.CONFIGS[name] for name in NAMES], ids=NAMES)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens, segment, keys=None):
    return models.bind(models.Transformer(config))(params, tokens, segment, keys)


def logits(config, tokens, segment, keys=None):
    return run(config, tiny.policy(config), tokens, segment, keys)


@EVERY
def test_padding_anywhere_gives_the_same_logits(config):
    tokens = tiny.random_tokens(0, 1, 6)
    alone = logits(config, tokens, np.ones((1, 6), bool))[0]
    for columns in ([0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9], [0, 2, 3, 6, 7, 9]):
        padded = tiny.random_tokens(1, 1, 10)
        mask = np.zeros((1, 10), bool)
        padded[:, columns], mask[:, columns] = tokens, True
        np.testing.assert_allclose(logits(config, padded, mask)[0, columns], alone, atol=1e-5)


@EVERY
def test_packed_documents_do_not_see_each_other(config):
    first, second = tiny.random_tokens(0, 1, 5), tiny.random_tokens(1, 1, 4)
    packed = np.concatenate([first, second, np.zeros((1, 2), np.int32)], axis=1)
    segment = np.array([[1] * 5 + [2] * 4 + [0] * 2])
    together = logits(config, packed, segment)[0]
    np.testing.assert_allclose(together[:5], logits(config, first, np.ones((1, 5), bool))[0], atol=1e-5)
    np.testing.assert_allclose(together[5:9], logits(config, second, np.ones((1, 4), bool))[0], atol=1e-5)


# Two documents, the first of which is a prefix of three tokens, two branches, and two branches of the second of these.
REACH = [9, 8, 7, 2, 1, 4, 1, 2, 1, 0, 2, 1]
PATHS = [
    [0, 1, 2, 3, 4],
    [0, 1, 2, 5, 6],
    [0, 1, 2, 5, 7, 8],
    [10, 11],
]  # from the first column of a document to its leaves


def test_a_tree_has_positions_and_a_mask():
    view = layers.whole_view(tiny.CONFIGS["mistral"], Tree(reach=jnp.array([REACH])), None)
    np.testing.assert_array_equal(view.position[0, jnp.array(REACH) > 0], [0, 1, 2, 3, 4, 3, 4, 4, 5, 0, 1])
    for path in PATHS:
        seen, near = (np.flatnonzero(x[0, path[-1]]).tolist() for x in (view.mask, view.window_mask))
        assert seen == path and near == path[-3:]  # the window is of three tokens


@pytest.mark.slow
@EVERY
def test_branches_of_a_tree_are_texts_of_their_own(config):
    """Logits at every column, and the gradients of what all texts have at their own columns, each once."""
    tokens = tiny.random_tokens(0, 1, len(REACH))
    weight = jnp.array(np.random.default_rng(1).normal(size=(len(REACH), 31)), jnp.float32)

    def of_tree(params):
        out = run(config, params, tokens, Tree(reach=jnp.array([REACH])))[0]
        return jnp.sum(jnp.where(jnp.array(REACH)[:, None] > 0, out * weight, 0.0)), out

    def one_by_one(params):
        total, read = 0.0, {}
        for path in PATHS:
            padded = path + [9] * (6 - len(path))
            out = run(config, params, tokens[:, padded], np.arange(6)[None] < len(path))[0]
            new = [n for n, column in enumerate(path) if column not in read]
            total += sum(jnp.sum(out[n] * weight[path[n]]) for n in new)
            read |= {path[n]: out[n] for n in new}
        return total, read

    params = tiny.policy(config)
    (_, out), grads = jax.value_and_grad(of_tree, has_aux=True)(params)
    (_, read), expected = jax.value_and_grad(one_by_one, has_aux=True)(params)
    for column, logits_there in read.items():
        np.testing.assert_allclose(out[column], logits_there, atol=1e-5)
    tiny.assert_close(grads, expected, atol=2e-4)


@pytest.mark.slow
@BOTH
def test_log_probabilities_are_read_at_any_column(config):
    tokens, tree = jnp.array(tiny.random_tokens(0, 2, len(REACH))), Tree(reach=jnp.array([REACH, REACH]))
    columns, targets = jnp.array([[2, 6, 8], [11, 0, 0]]), jnp.array(tiny.random_tokens(1, 2, 3, 2))
    logp = jax.nn.log_softmax(logits(config, tokens, tree))
    likeliest = jnp.argmax(logp[1, 11])
    targets = targets.at[1, 0, 1].set(likeliest)
    for chunk in (0, 2):
        chunked = dataclasses.replace(config, compute=models.Compute(chunk=chunk))
        read = jax.jit(models.bind(models.Transformer(chunked), models.Transformer.logprobs_at))
        found, greedy = read(tiny.policy(config), tokens, tree, columns, targets)
        for b, n, k in np.ndindex(2, 3, 2):
            np.testing.assert_allclose(found[b, n, k], logp[b, columns[b, n], targets[b, n, k]], atol=1e-5)
            assert greedy[b, n, k] == (targets[b, n, k] == jnp.argmax(logp[b, columns[b, n]]))
        assert greedy[1, 0, 1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "unroll"), [("gemma2", True), ("gpt", False)])
def test_a_prompt_that_answers_share_is_computed_once(name, unroll):
    """Log-probabilities, entropies, scores and gradients are those of one by one."""
    config = tiny.CONFIGS[name]
    tokens, mask = tiny.arrays(test_shared.rows_that_share(0, rows=6, group=3, prompt=5, answer=6))
    weight = jnp.array(np.random.default_rng(1).normal(size=(6, 6)), jnp.float32)

    def computed(share):
        compute = models.Compute(unroll=unroll, share_prompts=share)
        changed = dataclasses.replace(config, compute=compute)

        def loss(policy, scalar):
            rows = tokens, mask
            logp, entropy = models.logprobs_fn(changed)(policy, *rows, start=4, with_entropy=True, group=3)
            score = heads.score_fn(changed)(scalar, *rows, start=4, group=3)
            said = *(jnp.where(mask[:, 5:], x, 0.0) for x in (logp, entropy)), score
            return sum(jnp.sum(weight * said[n]) for n in (0, 1)) + jnp.sum(weight[0] * score), said

        traced = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).trace(tiny.policy(config), tiny.scalar(config))
        return traced, traced.lower().compile()(tiny.policy(config), tiny.scalar(config))

    (whole, one_by_one), (once, shared) = computed(False), computed(True)
    tiny.assert_close(shared, one_by_one, atol=1e-4)
    assert "f32[6,11,16]" in str(whole.jaxpr) and "f32[6,11,16]" not in str(once.jaxpr)


def test_a_tree_may_be_wider_than_the_context():
    """Of learned positions it needs as many as it is deep."""
    tokens = tiny.random_tokens(0, 1, 42)
    reach = [42, 41] + list(range(20, 0, -1)) * 2
    out = logits(tiny.GPT, tokens, Tree(reach=jnp.array([reach])))[0]
    alone = logits(tiny.GPT, np.concatenate([tokens[:, :2], tokens[:, 22:]], axis=1), np.ones((1, 22), bool))[0]
    np.testing.assert_allclose(out[22:], alone[2:], atol=1e-5)


@BOTH
def test_tokens_do_not_see_the_future(config):
    tokens = tiny.random_tokens(0, 1, 8)
    changed = tokens.copy()
    changed[0, 5] += 1
    mask = np.ones((1, 8), bool)
    before, after = logits(config, tokens, mask), logits(config, changed, mask)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.allclose(before[:, 5:], after[:, 5:])


def test_positions():
    segment = jnp.array([[0, 1, 1, 0, 1, 2, 2, 0], [1, 1, 1, 2, 3, 3, 0, 0]])
    position = np.where(segment > 0, layers.positions(segment), -1)
    np.testing.assert_array_equal(position, [[-1, 0, 1, -1, 2, 0, 1, -1], [0, 1, 2, 0, 0, 1, -1, -1]])


@pytest.mark.slow
@BOTH
def test_rematerialisation_changes_memory_and_no_gradient(config):
    tokens, mask = jnp.array(tiny.random_tokens(0, 8, 24)), jnp.ones((8, 24), bool)

    def loss(params, config):
        return jnp.sum(models.bind(models.Transformer(config))(params, tokens, mask) ** 2)

    gradients, bytes_of = {}, {}
    for remat in ("none", "dots", "full"):
        changed = dataclasses.replace(config, n_layers=4, compute=models.Compute(remat=remat))
        params = tiny.policy(changed)
        compiled = jax.jit(jax.grad(loss), static_argnums=1).lower(params, changed).compile()
        gradients[remat] = compiled(params)
        bytes_of[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert bytes_of["full"] < bytes_of["dots"] < bytes_of["none"]
    tiny.assert_close(gradients["none"], gradients["dots"], atol=1e-3)
    tiny.assert_close(gradients["none"], gradients["full"], atol=1e-3)


@pytest.mark.slow
def test_the_backward_pass_keeps_what_products_take_and_yield():
    """Of norms and activations it keeps no intermediates."""

    def kept(n_layers, compute):
        config = dataclasses.replace(models.gpt(n_layers, 64, 2, vocab_size=64, max_length=64), compute=compute)
        tokens = jax.ShapeDtypeStruct((64, 8), jnp.int32)
        hidden = models.bind(models.Transformer(config), models.Transformer.hidden)
        loss = lambda params, tokens: jnp.sum(hidden(params, tokens, tokens))
        compiled = jax.jit(jax.grad(loss)).lower(models.parameter_shapes(config), tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    compute = models.Compute(unroll=False)
    widths = (kept(12, compute) - kept(4, compute)) / 8 / (64 * 8 * 4 * 64)  # of the model, a token and layer
    residuals, normed, heads, mixed, up, active = 2, 2, 3, 1, 4, 4
    weights = 2 * 8 / 64
    assert widths == pytest.approx(residuals + normed + heads + mixed + up + active + weights, abs=1.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "remat", "dropout"),
    [
        ("llama", "none", 0.0),
        *(pytest.param(name, "full", 0.5, marks=() if name in ONE_OF_EACH else pytest.mark.full) for name in NAMES),
    ],
)
def test_unrolled_layers_are_those_of_the_scan(name, remat, dropout):
    """Where only the columns asked for are computed of the last layer."""
    config = tiny.CONFIGS[name]
    tokens, mask = jnp.array(tiny.random_tokens(0, 4, 9)), jnp.array(tiny.ragged(0, 4, 9))
    keys, own = jax.random.split(jax.random.key(0), 4), jnp.array([[3, 1], [0, 5], [7, 7], [2, 8]])
    noise = jnp.array(np.random.default_rng(0).normal(size=(4, 9, 16)), jnp.float32)

    def gradient(unroll):
        compute = models.Compute(remat=remat, unroll=unroll)
        changed = dataclasses.replace(config, n_layers=3, dropout=dropout, compute=compute)
        hidden = models.bind(models.Transformer(changed), models.Transformer.hidden)

        def loss(params):
            each = []
            for asked in (slice(0, -1), slice(4, 7), own):
                x = hidden(params, tokens, mask, keys, columns=asked)
                each.append(jnp.where(layers.take_columns(mask, asked)[..., None], x, 0.0))
            return sum(jnp.sum(x * noise[:, : x.shape[1]]) for x in each), each

        return jax.jit(jax.grad(loss, has_aux=True))(tiny.policy(changed))

    tiny.assert_close(gradient(False), gradient(True), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),  # tied and untied, and a cap
    [("gpt", "float32"), ("llama", "float32"), ("gemma2", "float32"), ("gemma2", "bfloat16")],
)
def test_log_probabilities_are_those_of_the_logits_in_chunks_too(name, dtype):
    config, start, temperature = tiny.CONFIGS[name], 2, 0.7
    tokens, mask = jnp.array(tiny.random_tokens(0, 4, 12)), jnp.array(tiny.ragged(0, 4, 12))
    noise = jnp.array(np.random.default_rng(0).normal(size=(2, 4, 9)), jnp.float32)

    def of_logits(params):
        logits = models.bind(models.Transformer(with_chunk(0)))(params, tokens, mask)[:, start:-1]
        return (
            logprobs.token_logprobs(logits, tokens[:, start + 1 :], temperature),
            logprobs.entropy(logits, temperature),
        )

    def with_chunk(chunk):
        return dataclasses.replace(config, compute=models.Compute(dtype, chunk=chunk))

    def in_chunks(params, chunk):
        network = models.logprobs_fn(with_chunk(chunk))
        return network(params, tokens, mask, start=start, temperature=temperature, with_entropy=True)

    def both(read):
        def loss(params):
            results = [jnp.where(mask[:, start:-1], x, 0.0) for x in read(params)]  # of padding anything may be said
            return sum(jnp.sum(x * y) for x, y in zip(results, noise, strict=True)), results

        return jax.jit(jax.grad(loss, has_aux=True))(tiny.policy(config))

    expected = both(of_logits)
    for chunk in (0, 4, 100):  # 9 columns: all, three chunks of which the last is padded, all
        tiny.assert_close(expected, both(lambda params, chunk=chunk: in_chunks(params, chunk)), atol=TOLERANCE[dtype])


TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2}


@pytest.mark.slow
def test_memory_of_the_loss_is_one_chunk_of_logits():
    """What the vocabulary adds to a compiled gradient's temporaries: logits of a chunk, and the table's gradient."""

    def temporaries(vocabulary, chunk):
        compute = models.Compute(chunk=chunk)
        config = dataclasses.replace(models.gpt(1, 16, 2, vocab_size=vocabulary, max_length=129), compute=compute)
        network = models.logprobs_fn(config)
        loss = lambda params, tokens: jnp.mean(network(params, tokens, tokens > 0)[0])
        shapes = models.parameter_shapes(config), jax.ShapeDtypeStruct((16, 129), jnp.int32)
        return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    more = 4096  # words
    table = 4 * 16 * more
    whole, chunked = (temporaries(64 + more, chunk) - temporaries(64, chunk) for chunk in (0, 16))
    logits = 4 * 16 * 128 * more
    assert whole > 1.5 * logits
    assert chunked < 4 * (logits / 8 + table)


@BOTH
def test_bfloat16_trunk_float32_logits(config):
    tokens, mask = tiny.random_tokens(0, 2, 6), np.ones((2, 6), bool)
    half = logits(dataclasses.replace(config, compute=models.Compute(dtype="bfloat16")), tokens, mask)
    assert half.dtype == jnp.float32
    full = logits(config, tokens, mask)
    assert 1e-5 < np.abs(half - full).max() < 0.1


def test_query_heads_share_their_groups_keys():
    # One group for all heads, or each head its own copy of that group's key and value: the same function.
    shared = models.llama(1, 16, 4, 1, 24, vocab_size=31, max_length=24)
    params = tiny.policy(shared)
    tokens, mask = jnp.array(tiny.random_tokens(0, 2, 7)), jnp.ones((2, 7), bool)
    attention = params["blocks"]["attention"]
    qkv = attention["qkv"]["kernel"]  # [1, D, 1, 4 + 2, H]
    split = jnp.stack([jnp.stack([qkv[:, :, 0, r], qkv[:, :, 0, 4], qkv[:, :, 0, 5]], 2) for r in range(4)], 2)
    out = jnp.swapaxes(attention["out"]["kernel"], 1, 2)
    blocks = params["blocks"] | {"attention": {"qkv": {"kernel": split}, "out": {"kernel": out}}}
    separate = run(dataclasses.replace(shared, n_kv_heads=4), params | {"blocks": blocks}, tokens, mask)
    np.testing.assert_allclose(separate, logits(shared, tokens, mask), atol=1e-5)


SETTINGS = {
    "window": 2,
    "full_layers": (0,),
    "query_size": 5,
    "attention_cap": 0.1,
    "logit_cap": 0.1,
    "qk_norm": "head",
    "post_norm": True,
    "unit_offset": True,
    "scale_embedding": True,
    "mlp": "geglu",
    "bias": "qkv",
    "rope_scaling": models.Llama3Scaling(factor=2.0, low=0.5, high=1.0, original_length=24),
    "rope_theta": 50.0,
    "norm_eps": 0.1,
    "pre_norm": False,
    "parallel_residual": True,
    "rotary_size": 2,
    "window_theta": 50.0,
    "unrotated_layers": (1,),
    "inverse_layer_scale": True,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_matter(name):
    base = dataclasses.replace(tiny.LLAMA, window=4) if name in ("full_layers", "window_theta") else tiny.LLAMA
    tokens, mask = tiny.random_tokens(0, 2, 7), np.ones((2, 7), bool)
    changed = dataclasses.replace(base, **{name: SETTINGS[name]})
    loud = lambda config: run(config, jax.tree.map(lambda x: 4 * x, tiny.policy(config)), tokens, mask)
    assert np.abs(loud(base) - loud(changed)).max() > 1e-3


def test_a_window_is_as_wide_as_it_says():
    # One layer with a window of 3: the token at column 5 depends on columns 3, 4 and 5.
    config = dataclasses.replace(tiny.LLAMA, n_layers=1, window=3)
    tokens, mask = tiny.random_tokens(0, 1, 6), np.ones((1, 6), bool)
    before = logits(config, tokens, mask)[0, 5]
    for column in range(6):
        changed = tokens.copy()
        changed[0, column] = 3 + (tokens[0, column] - 2) % 28
        assert np.allclose(logits(config, changed, mask)[0, 5], before, atol=1e-6) == (column < 3), column


def test_llama_3_scales_the_long_wavelengths():
    # Turns over the original 16 tokens: 16 f / (2 pi). From 4 on f stays, up to 1 it is f / 8, between it slides.
    scaling = models.Llama3Scaling(factor=8.0, low=1.0, high=4.0, original_length=16)
    config = dataclasses.replace(tiny.LLAMA, head_dim=8, rope_theta=16.0)
    plain = rope.frequencies(config, 24)
    np.testing.assert_allclose(plain, [1.0, 0.5, 0.25, 0.125])
    kept = (16 / (2 * np.pi) - 1) / 3
    expected = [kept + (1 - kept) / 8, None, 0.25 / 8, 0.125 / 8]
    half = (8 / (2 * np.pi) - 1) / 3
    expected[1] = 0.5 * (half + (1 - half) / 8)
    np.testing.assert_allclose(
        rope.frequencies(dataclasses.replace(config, rope_scaling=scaling), 24), expected, rtol=1e-6
    )


@pytest.mark.slow
def test_dropout_depends_on_the_rows_key_alone():
    config = dataclasses.replace(tiny.GPT, dropout=0.3)
    keys = jax.random.split(jax.random.key(3), 4)
    tokens, mask = tiny.random_tokens(0, 4, 6), np.ones((4, 6), bool)
    full = logits(config, tokens, mask, keys=keys)
    np.testing.assert_allclose(full[2:], logits(config, tokens[2:], mask[2:], keys=keys[2:]), atol=1e-5)
    assert not np.allclose(full, logits(config, tokens, mask, keys=keys[::-1]))
    np.testing.assert_array_equal(logits(config, tokens, mask), logits(tiny.GPT, tokens, mask))


def test_dropout_keeps_the_mean():
    x = jnp.ones((200, 10, 16))
    dropped = layers.dropout(x, jax.random.split(jax.random.key(0), 200), 1, 0.2)
    assert abs(float(jnp.mean(dropped == 0)) - 0.2) < 0.01
    assert abs(float(jnp.mean(dropped)) - 1.0) < 0.02


@pytest.mark.slow
def test_presets_have_the_published_sizes():
    published = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    published |= {"mixtral-8x7b": 46_702_792_704, "qwen3-30b-a3b": 30_532_122_624}
    published |= {"llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496}
    for name, parameters in published.items():
        assert models.parameter_count(models.PRESETS[name]) == parameters
    rounded = {
        "125m": 125e6,
        "350m": 356e6,
        "760m": 760e6,
        "1.3b": 1.3e9,
        "2.7b": 2.65e9,
        "6.7b": 6.66e9,
        "13b": 12.9e9,
    }
    for name, parameters in (rounded | {"175b": 174.6e9}).items():
        assert models.parameter_count(models.PRESETS[f"gpt3-{name}"]) == pytest.approx(parameters, rel=0.015)


def test_impossible_shapes_are_refused():
    with pytest.raises(InputError, match="n_heads=4 is not a multiple of n_kv_heads=3"):
        models.llama(1, 16, 4, 3, 24)
    with pytest.raises(InputError, match="head_dim=3 must be even"):
        models.llama(1, 12, 4, 2, 24)
    with pytest.raises(InputError, match="exceed the model's context of 24"):
        logits(tiny.GPT, tiny.random_tokens(0, 1, 25), np.ones((1, 25), bool))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "precise"), [("float32", True), ("bfloat16", False)])
def test_a_float32_trunk_asks_for_float32_products(dtype, precise):
    config = dataclasses.replace(tiny.GPT, compute=models.Compute(dtype))
    apply_fn = models.bind(models.Transformer(config))
    program = str(jax.make_jaxpr(apply_fn)(tiny.policy(), jnp.ones((1, 4), int), jnp.ones((1, 4), bool)))
    assert ("Precision.HIGHEST" in program) == precise
