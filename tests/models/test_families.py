"""The rows of the table of families: what each says of a config, both ways, and that the block computes it."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax import models
from rlhf_jax.devices import parallel
from rlhf_jax.models import families, heads, lora, rope, rope_fields
from rlhf_jax.models.cache import Cache
from rlhf_jax.rollouts import sampling
from rlhf_jax.types import InputError
from tests import tiny
from tests.models.directories import model, refused, saved

EVERY = pytest.mark.parametrize(("name", "config"), tiny.MORE.items(), ids=tiny.MORE)


@EVERY
def test_a_family_is_written_and_read_as_it_was(name, config, tmp_path):
    written, _ = saved(tmp_path / "model", config)
    loaded = models.load(tmp_path / "model")
    assert written["model_type"] == families.family(config) == loaded.config.family == name.split("-")[0]
    assert loaded.config == config
    tiny.assert_close(loaded.params, tiny.policy(config), atol=0)
    models.save(model(config), tiny.scalar(config), tmp_path / "reward")
    tiny.assert_close(models.load_reward(tmp_path / "reward").params, tiny.scalar(config), atol=0)


@pytest.mark.slow
@EVERY
def test_adapters_samples_scores_and_meshes_take_every_family(name, config):
    """Of each, the programs are traced: what they compute is the block's, which other tests run."""
    params = models.parameter_shapes(config)
    tokens, mask = jax.ShapeDtypeStruct((8, 6), jnp.int32), jax.ShapeDtypeStruct((8, 6), bool)
    key = jax.random.key(0)
    adapters = lora.Config(rank=2)
    trained, base = jax.eval_shape(lambda params: lora.split(params, adapters, key), params)
    assert sum(path[-1].key == "kernel_a" for path, _ in jax.tree_util.tree_leaves_with_path(trained)) == 4
    network = models.logprobs_fn(config)
    loss = lambda trained, base, tokens, mask: jnp.sum(
        lora.with_base(network, base, adapters)(trained, tokens, mask)[0]
    )
    grads = jax.eval_shape(jax.grad(loss), trained, base, tokens, mask)
    assert jax.tree.structure(grads) == jax.tree.structure(trained)
    settings = sampling.Config(max_new_tokens=3)
    sample = lambda params, tokens, mask: sampling.generate(model(config), params, tokens, mask, key, settings)
    assert jax.eval_shape(sample, params, tokens, mask).tokens.shape == (8, 3)
    scalar = jax.eval_shape(lambda params: heads.from_policy(params, config, key), params)
    assert jax.eval_shape(heads.score_fn(config), scalar, tokens, mask).shape == (8,)


# What the block computes ----------------------------------------------------------------------------------------------

FAST = "gpt_neox", "olmo3", "smollm3"  # which have most of what the others do not


@functools.partial(jax.jit, static_argnums=0)
def both_ways(config, params, rows, segment, prompt, mask, later):
    """Logits of whole rows, and of the tokens after a prompt, by way of a cache."""
    network = models.Transformer(config)
    decode = models.bind(network, models.Transformer.decode)
    logits = models.bind(network)(params, rows, segment)
    first, cache = models.bind(network, models.Transformer.prefill)(params, prompt, mask, Cache.empty(config, 1, 10))
    step = lambda cache, token: decode(params, token, cache)[::-1]
    _, others = jax.lax.scan(step, cache, later[:, None])
    return logits, jnp.concatenate([first[None], others])[:, 0]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in tiny.MORE]
)
def test_padded_packed_and_cached_tokens_are_the_same(name):
    config = dataclasses.replace(tiny.MORE[name], compute=models.Compute(unroll=False))
    tokens = tiny.random_tokens(0, 6)
    rows, segment = tiny.random_tokens(1, 4, 10), np.zeros((4, 10), np.int32)
    for row, columns in enumerate(([0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9], [0, 2, 3, 6, 7, 9], [3, 4, 5, 6, 7, 8])):
        rows[row, columns], segment[row, columns] = tokens, 2
    segment[3, :3] = 1  # a document before it
    prompt, mask = np.array([[7, 7, *tokens[:3]]]), np.array([[False] * 2 + [True] * 3])
    logits, cached = both_ways(config, tiny.policy(config), rows, segment, prompt, mask, jnp.array(tokens[3:]))
    for row in range(1, 4):
        np.testing.assert_allclose(logits[row][segment[row] == 2], logits[0, :6], atol=1e-5)
    np.testing.assert_allclose(cached, logits[0, 2:6], atol=1e-5)


@pytest.mark.slow
@EVERY
def test_every_family_says_the_same_on_a_mesh(name, config):
    tokens, mask = tiny.random_tokens(0, 8, 9), tiny.ragged(0, 8, 9)
    logprobs_fn = models.logprobs_fn(config)
    place = parallel.layout(parallel.Config(data=2, fsdp=2, tensor=2))
    read = lambda params, rows, axis=None: logprobs_fn(params, *rows)[0]
    spread = place.step(read)(place.state(tiny.policy(config)), place.rows((tokens, mask)))
    np.testing.assert_allclose(spread, jax.jit(read)(tiny.policy(config), (tokens, mask)), atol=1e-5)


def test_a_part_of_each_head_rotates():
    x = jnp.array(np.random.default_rng(0).normal(size=(1, 2, 1, 1, 6)), jnp.float32)
    config = dataclasses.replace(tiny.LLAMA, head_dim=6, rotary_size=4, rope_theta=100.0)
    np.testing.assert_allclose(rope.frequencies(config, 24), [1.0, 0.1])  # 100^0 and 100^(-1/2), of 4 features, not 6
    table = rope.look_up(rope.rotary_table(24, config), jnp.array([[0, 3]]))
    turned = rope.rotate(x, rope.layer_rotation(config, table, 0))[0, :, 0, 0]
    np.testing.assert_allclose(turned[0], x[0, 0, 0, 0], atol=1e-6)
    a, b, c, d, *others = x[0, 1, 0, 0].tolist()
    (fast, slow), (up, down) = np.cos([3.0, 0.3]), np.sin([3.0, 0.3])
    expected = [a * fast - c * up, b * slow - d * down, c * fast + a * up, d * slow + b * down, *others]
    np.testing.assert_allclose(turned[1], expected, rtol=1e-5)


def test_layers_without_positions_and_with_their_own():
    config = dataclasses.replace(
        tiny.LLAMA,
        window=3,
        full_layers=(0, 2),
        window_theta=100.0,
        unrotated_layers=(2, 3),
        rope_scaling=models.YarnScaling(8.0, 64),
    )
    rotations = rope.look_up(rope.rotary_table(24, config), jnp.array([[5]]))
    magnitude = 0.1 * np.log(8) + 1
    full, windowed = rope.frequencies(config, 24), rope.frequencies(config, 24, windowed=True)
    np.testing.assert_allclose(windowed, [1.0, 0.1])
    expected = [magnitude * np.cos(5 * full), np.cos(5 * windowed), [1.0, 1.0], [1.0, 1.0]]
    for layer, cosine in enumerate(expected):
        cos, sin = rope.layer_rotation(config, rotations, layer)
        np.testing.assert_allclose(cos[0, 0], cosine, rtol=1e-5)
        assert bool(jnp.all(sin == 0)) == (layer >= 2)


def test_scalings_by_hand():
    config = dataclasses.replace(tiny.LLAMA, head_dim=8, rope_theta=16.0)

    def scaled(scaling, columns=24):
        return rope.frequencies(dataclasses.replace(config, rope_scaling=scaling), columns)

    plain = np.array([1.0, 0.5, 0.25, 0.125])
    np.testing.assert_allclose(scaled(models.LinearScaling(4.0)), plain / 4)
    # Pair n turns 64 f / (2 pi) times within 64 tokens: 10.2, 5.1, 2.5 and 1.3. 4 turns are at pair 1.35, 2 at 2.35.
    yarn = models.YarnScaling(8.0, 64, beta_fast=4.0, beta_slow=2.0)
    np.testing.assert_allclose(scaled(yarn), plain * [1, 1, 0.5 + 0.5 / 8, 1 / 8], rtol=1e-6)
    part = 2 - 4 * np.log(64 / (8 * np.pi)) / np.log(16)
    exact = dataclasses.replace(yarn, truncate=False)
    np.testing.assert_allclose(scaled(exact), plain * [1, 1, 1 - part + part / 8, 1 / 8], rtol=1e-6)
    assert yarn.magnitude == pytest.approx(1.2079442)
    assert dataclasses.replace(yarn, attention_factor=1.0).magnitude == 1.0
    long = models.LongScaling((1.0, 1.0, 2.0, 4.0), (1.0, 2.0, 4.0, 8.0), 24, 1.5)
    np.testing.assert_allclose(scaled(long), plain / [1, 1, 2, 4])
    np.testing.assert_allclose(scaled(long, 25), plain / [1, 2, 4, 8])
    with pytest.raises(InputError, match="short has 4 factors: expected one for each of 2 pairs"):
        dataclasses.replace(tiny.LLAMA, rope_scaling=long)
    with pytest.raises(InputError, match="YaRN needs rope_theta above 1"):
        dataclasses.replace(tiny.LLAMA, rope_scaling=yarn, rope_theta=1.0)


def test_rows_that_have_other_factors_are_warned_of(capsys):
    config = tiny.MORE["phi3-long"]
    models.check_length(config, 12)
    assert capsys.readouterr().err == ""
    models.check_length(config, 13)
    what = "length=13 is more than 12 tokens, for which longrope has other factors"
    assert capsys.readouterr().err == f"warning: {what}: shorter rows are read as by another model\n"


# What a config.json may say -------------------------------------------------------------------------------------------


def test_a_model_is_written_as_the_family_that_it_came_from(tmp_path):
    plain = dataclasses.replace(tiny.LLAMA, tie_embeddings=True)
    assert families.family(plain) == "llama"
    for kind in ("mistral", "qwen3", "smollm3", "phi3"):
        config = dataclasses.replace(plain, family=kind, qk_norm="head" if kind == "qwen3" else "none")
        written, _ = saved(tmp_path / kind, config)
        assert written["model_type"] == kind and models.load_config(tmp_path / kind).family == kind
    assert config == plain and hash(config) == hash(plain)
    assert families.family(dataclasses.replace(config, unrotated_layers=(0,))) == "smollm3"  # Phi-3 has none
    with pytest.raises(InputError, match=r"no Hugging Face architecture among gpt2, llama, .*, opt expresses"):
        families.family(dataclasses.replace(config, rotary_size=2, qk_norm="head"))


def test_a_part_of_a_head_is_written_as_a_share():
    for whole in range(2, 300):
        for part in range(2, whole + 1, 2):
            assert int(whole * rope_fields.share(part, whole)) == part


FIELDS = {
    "gpt_neox": (
        *("hidden_size", "num_hidden_layers", "layer_norm_eps", "use_parallel_residual", "attention_bias"),
        *("hidden_dropout", "rope_parameters.partial_rotary_factor", "rope_parameters.rope_theta"),
    ),
    "opt": ("ffn_dim", "word_embed_proj_dim", "enable_bias", "do_layer_norm_before", "dropout", "layerdrop"),
    "gemma3_text": (
        *("query_pre_attn_scalar", "sliding_window", "rope_parameters.full_attention.factor"),
        "rope_parameters.sliding_attention.rope_theta",
    ),
    "llama-yarn": ("rope_parameters.beta_fast", "rope_parameters.beta_slow", "rope_parameters.factor"),
    "phi3-long": (
        *("original_max_position_embeddings", "rope_parameters.attention_factor"),
        *("rope_parameters.long_factor", "rope_parameters.short_factor"),
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_number_has_its_range(name, tmp_path):
    config, _ = saved(tmp_path / "model", tiny.MORE[name])
    for field in FIELDS[name]:
        for value in (-1, -0.5, 1e39, "1", [1, "2"], {}):
            changed = json.loads(json.dumps(config))
            *outer, inner = field.split(".")
            functools.reduce(dict.__getitem__, outer, changed)[inner] = value
            (tmp_path / "model" / "config.json").write_text(json.dumps(changed))
            refused(tmp_path / "model", rf"config\.json: {re.escape(field)}(\[.\])?=.*: expected (a|true)")


def rope_of(**settings):
    return {"rope_parameters": {"rope_theta": 1e4} | settings}


ERRORS = {
    "gpt_neox": [
        ({"hidden_act": "silu"}, "hidden_act='silu' is not supported: expected 'gelu' or 'gelu_new' or 'gelu_fast'"),
        ({"num_attention_heads": 3}, "hidden.size .*is not .*divisible|hidden_size=16 is not a multiple"),
        (
            rope_of(rope_type="default", partial_rotary_factor=0.2),
            "it rotates 1 of 8 features of a head, expected an ev",
        ),
        (rope_of(rope_type="dynamic", factor=2.0), "rope_type 'dynamic' is not supported: expected 'default' or 'line"),
        ({"intermediate_size": 60}, r"dense_h_to_4h.weight \[64, 16\] does not fit config.json, .* \[60, 16\]"),
        ({"tie_word_embeddings": True}, "embed_out.weight differs from the embedding"),
        ({"attention_bias": False}, r"does not ask for \(gpt_neox\.layers\.0\.attention\."),
    ],
    "opt": [
        ({"do_layer_norm_before": False}, "do_layer_norm_before=False is not supported: expected True"),
        ({"word_embed_proj_dim": 8}, "word_embed_proj_dim=8 is not supported: expected hidden_size=16"),
        ({"activation_function": "silu"}, "activation_function='silu' is not supported: expected 'relu' or 'gelu'"),
        ({"max_position_embeddings": 30}, r"embed_positions.weight \[26, 16\] does not fit config.json.* \[32, 16\]"),
        ({"enable_bias": False}, r"does not ask for \(model\.decoder\.layers\.0\."),
    ],
    "smollm3": [
        ({"no_rope_layers": [1, 2]}, r"no_rope_layers=\[1, 2\]: expected 1 or 0 for each of 2 layers"),
        ({"no_rope_layers": [1]}, r"no_rope_layers=\[1\]: expected 1 or 0|cannot be read"),
        ({"no_rope_layers": "10"}, "no_rope_layers|cannot be read"),
    ],
    "olmo3": [
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types=.* is not supported|cannot be read"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e4, "rope_type": "default"},
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
                }
            },
            "rope_type 'linear' of sliding_attention is not supported: expected 'default'",
        ),
    ],
    "phi3-long": [
        (rope_of(rope_type="longrope", short_factor=[1.0], long_factor=[1.0]), "short.factor.*expected|cannot be read"),
        (rope_of(rope_type="linear", factor=2.0), "rope_type|cannot be read"),
        ({"num_key_value_heads": 2}, r"qkv_proj.weight \[32, 16\] does not fit config.json, .* \[48, 16\]"),
    ],
    "llama-yarn": [
        (
            rope_of(rope_type="yarn", factor=4.0, beta_fast=1.0, beta_slow=2.0),
            "beta_slow=2.0: expected less than beta_f",
        ),
        (rope_of(rope_type="linear"), "rope_type 'linear' needs factor|cannot be read"),
        (rope_of(rope_type="yarn", factor=4.0, truncate=1), "rope_parameters.truncate=1: expected true or false"),
    ],
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_a_family_does_not_have_is_refused_by_name(name, tmp_path):
    config, _ = saved(tmp_path / "model", tiny.MORE[name])
    for changes, message in ERRORS[name]:
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | changes))
        refused(tmp_path / "model", message)


def test_factors_that_others_imply(tmp_path):
    def scaling(name, **settings):
        config, _ = saved(tmp_path / "model", tiny.MORE[name])
        changed = config | {"max_position_embeddings": 48} | rope_of(**settings)
        (tmp_path / "model" / "config.json").write_text(json.dumps(changed))
        return models.load_config(tmp_path / "model").rope_scaling

    lengths = {"rope_type": "yarn", "original_max_position_embeddings": 12}
    assert scaling("llama-yarn", factor=None, **lengths) == models.YarnScaling(4.0, 12)
    both = scaling("llama-yarn", factor=4.0, mscale=0.5, mscale_all_dim=2.0, **lengths)
    up, down = 0.05 * np.log(4) + 1, 0.2 * np.log(4) + 1
    assert both.magnitude == pytest.approx(up / down)
    factors = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
    long = scaling("phi3-long", rope_type="longrope", partial_rotary_factor=0.5, **factors)
    assert long.attention_factor == pytest.approx(np.sqrt(1 + np.log(4) / np.log(12)))
    assert (long.short, long.long, long.original_length) == ((1.0, 1.5), (2.0, 3.0), 12)


def test_masks_in_published_files_are_no_weights(tmp_path):
    _, tensors = saved(tmp_path / "model", tiny.MORE["gpt_neox"])
    masks = {
        f"gpt_neox.layers.{n}.attention.{x}": np.ones((1, 1), bool) for n in (0, 1) for x in ("bias", "masked_bias")
    }
    safetensors.numpy.save_file(tensors | masks, tmp_path / "model" / "model.safetensors")
    tiny.assert_close(models.load(tmp_path / "model").params, tiny.policy(tiny.MORE["gpt_neox"]), atol=0)
