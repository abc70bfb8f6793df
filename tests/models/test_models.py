import contextlib
import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax import models
from rlhf_jax.data import tokenizer
from rlhf_jax.models import directory, families, heads
from rlhf_jax.rollouts import sampling
from rlhf_jax.types import InputError
from tests import tiny

EVERY = pytest.mark.parametrize("config", tiny.CONFIGS.values(), ids=tiny.CONFIGS)


def model(config):
    return models.Model(config, tiny.policy(config), None, models.bind(models.Transformer(config)))


@EVERY
def test_round_trip_is_exact(config, tmp_path):
    models.save(model(config), tiny.policy(config), tmp_path / "model")
    loaded = models.load(tmp_path / "model")
    assert loaded.config == config and loaded.tokenizer is None
    tiny.assert_close(loaded.params, tiny.policy(config), atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_reward_model_has_no_unembedding():
    untied = dataclasses.replace(tiny.LLAMA, tie_embeddings=False)
    assert "unembedding" in tiny.policy(untied)
    params = heads.from_policy(tiny.policy(untied), untied, jax.random.key(0))
    shapes = jax.eval_shape(
        heads.ScalarModel(untied).init, jax.random.key(0), jnp.ones((1, 2), int), jnp.ones((1, 2), int)
    )
    assert jax.tree.structure(params) == jax.tree.structure(shapes["params"])
    assert "unembedding" not in params["trunk"]


@EVERY
def test_reward_round_trip(config, tmp_path):
    params = tiny.scalar(config) | {"bias": jnp.float32(-0.75)}
    models.save(model(config), params, tmp_path / "reward")
    loaded = models.load_reward(tmp_path / "reward")
    tokens, mask = jnp.array(tiny.random_tokens(0, 3, 6)), jnp.array(tiny.ragged(1, 3, 6))
    per_token = jax.jit(models.bind(heads.ScalarModel(config)))(params, tokens, mask)
    score = jax.jit(loaded.apply)(loaded.params, tokens, mask)
    last = np.max(np.arange(6) * np.asarray(mask), axis=1)
    np.testing.assert_allclose(score, per_token[np.arange(3), last], atol=1e-6)


def test_saving_over_a_directory_replaces_it(tmp_path):
    models.save(model(tiny.GPT), tiny.policy(tiny.GPT, 0), tmp_path / "model")
    models.save(model(tiny.GPT), tiny.policy(tiny.GPT, 1), tmp_path / "model")
    tiny.assert_close(models.load(tmp_path / "model").params, tiny.policy(tiny.GPT, 1), atol=0)


ORACLES = ["llama_gqa", "llama_rope3_tied", "mistral_window", "qwen2", "qwen3", "gemma2", "sharded", "bfloat16"]


NEWER = [  # of the second set
    *("gpt2_inner", "gpt2_inverse_layer", "gpt_neox", "gpt_neox_sequential", "opt", "gemma3", "olmo2", "olmo3"),
    *("phi3", "phi3_partial_rotary", "smollm3", "smollm3_list", "llama_linear", "llama_yarn", "llama_bias"),
    *("mixtral", "qwen3_moe"),
]
REWARD_MODELS = ["llama_reward", "gpt_neox_reward", "qwen3_moe_reward"]


def oracle(shared, name):
    """The directory of an oracle, in the set that has it."""
    return next(path for path in (shared / "oracles" / part / name for part in ("hf", "hf2")) if path.is_dir())


def published(shared, name, config, directory):
    """A copy of an oracle with either of its configs."""
    source = oracle(shared, name)
    for file in source.glob("*.safetensors*"):
        shutil.copy(file, directory)
    shutil.copy(source / config, directory / "config.json")
    return directory, np.load(source / "expected.npz")


ONE_LAYOUT = ["gpt2", "gpt2_inner", "gpt2_inverse_layer"]  # older configs said the same
LAYOUTS = [
    *((name, "config.json") for name in ONE_LAYOUT),
    *itertools.product([*ORACLES, *NEWER[2:]], ["config.json", "config_v4.json"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config"),
    [
        pytest.param(name, config, marks=pytest.mark.full if config != "config.json" and name in NEWER else ())
        for name, config in LAYOUTS
    ],
)
def test_published_layouts_oracle(name, config, shared, tmp_path):
    path, expected = published(shared, name, config, tmp_path)
    loaded = models.load(path)
    tokens, mask = jnp.array(expected["input_ids"], jnp.int32), jnp.array(expected["attention_mask"], bool)
    logits = np.asarray(jax.jit(loaded.apply)(loaded.params, tokens, mask))
    np.testing.assert_allclose(logits[np.asarray(mask)], expected["logits"], rtol=0, atol=3e-4)
    prompt = jnp.array(expected["greedy_prompt_ids"], jnp.int32)
    mask = jnp.arange(prompt.shape[1])[None] < jnp.array(expected["greedy_prompt_length"])[:, None]
    sample = sampling.generate(
        loaded, loaded.params, prompt, mask, jax.random.key(0), sampling.Config(max_new_tokens=12, temperature=0.0)
    )
    np.testing.assert_array_equal(sample.tokens, expected["greedy_tokens"])


@pytest.mark.parametrize("name", ["gpt2", *ORACLES, *NEWER, *REWARD_MODELS])
def test_published_weights_come_out_as_they_went_in(name, shared, tmp_path):
    path = oracle(shared, name)
    load = models.load_reward if name in REWARD_MODELS else models.load
    loaded = load(path, dtype=jnp.bfloat16 if name == "bfloat16" else jnp.float32)
    models.save(loaded, loaded.params, tmp_path / "model")
    theirs = {k: x for file in path.glob("*.safetensors") for k, x in safetensors.numpy.load_file(file).items()}
    ours = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        assert ours[tensor].dtype == value.dtype and ours[tensor].tobytes() == value.tobytes(), tensor
    assert load(tmp_path / "model").config == loaded.config
    kept = ("architectures", "model_type", "dtype", "tie_word_embeddings")
    before, after = (json.loads((at / "config.json").read_text()) for at in (path, tmp_path / "model"))
    assert [before.get(key) for key in kept] == [after.get(key) for key in kept]


@pytest.mark.parametrize("name", REWARD_MODELS)
@pytest.mark.parametrize("config", ["config.json", "config_v4.json"])
def test_reward_model_oracle(name, config, shared, tmp_path):
    path, expected = published(shared, name, config, tmp_path)
    loaded = models.load_reward(path)
    tokens, mask = jnp.array(expected["input_ids"], jnp.int32), jnp.array(expected["attention_mask"], bool)
    score = jax.jit(loaded.apply)(loaded.params, tokens, mask)
    np.testing.assert_allclose(score, expected["scores"], rtol=0, atol=3e-4)


def test_parameters_go_where_they_shall_lie(tmp_path):
    # On their way no device but those of the mesh sees them, and each keeps its share alone.
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[4:])
    params = tiny.policy(tiny.LLAMA)
    models.save(model(tiny.LLAMA), params, tmp_path / "model")
    asked = []

    def place(path, shape):
        asked.append((path, shape))
        axes = [None] * len(shape)
        if shape[-1] % 4 == 0:
            axes[-1] = "fsdp"
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    loaded = models.load(tmp_path / "model", place=place)
    tiny.assert_close(loaded.params, params, atol=0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(loaded.params):
        name = "/".join(key.key for key in path)
        assert (name, leaf.shape) in asked
        assert leaf.sharding == place(name, leaf.shape)
    assert loaded.params["blocks"]["mlp"]["down"]["kernel"].addressable_shards[0].data.shape == (2, 24, 4)


@pytest.mark.slow
def test_loading_holds_no_second_copy(tmp_path):
    command = [sys.executable, "-m", "tests.loading", str(tmp_path), "2e9"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.99 < float(said.stdout.split()[-1]) < 1.2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_types_of_weights(dtype, tmp_path):
    params = jax.tree.map(lambda x: x.astype(dtype), tiny.policy(tiny.LLAMA))
    models.save(model(tiny.LLAMA), params, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    same = models.load(tmp_path / "model", dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(same.params)} == {jnp.dtype(dtype)}
    wide = models.load(tmp_path / "model")
    assert {x.dtype for x in jax.tree.leaves(wide.params)} == {jnp.dtype("float32")}
    for loaded in (same, wide):
        tiny.assert_close(jax.tree.map(lambda x: x.astype(jnp.float32), loaded.params), wide.params, atol=0)
    tiny.assert_close(wide.params, jax.tree.map(lambda x: x.astype(jnp.float32), params), atol=0)


@pytest.mark.parametrize("limit", [1, 4000])
def test_large_models_are_written_in_shards(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "SHARD", limit)
    params = tiny.scalar(tiny.LLAMA)
    models.save(model(tiny.LLAMA), params, tmp_path / "model")
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    held = {name: safetensors.numpy.load_file(tmp_path / "model" / name) for name in files}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    tiny.assert_close(models.load_reward(tmp_path / "model").params, params, atol=0)


@pytest.mark.parametrize("name", models.PRESETS)
def test_every_preset_can_be_saved(name):
    assert families.family(models.PRESETS[name]) in ("gpt2", "gpt_neox", "llama", "mixtral", "qwen3_moe")


def test_a_reward_model_names_no_padding_that_ends_a_response(tmp_path):
    # In transformers the score is that of the last token which is not padding; here it is that of the last one, EOS.
    tok = tokenizer.train(["a few words"], 300, tmp_path / "tokenizer")
    for trunk, expected in ((tiny.policy(), tok.pad_token_id), (tiny.scalar(), None)):
        models.save(dataclasses.replace(model(tiny.GPT), tokenizer=tok), trunk, tmp_path / "model")
        assert json.loads((tmp_path / "model" / "config.json").read_text())["pad_token_id"] == expected


def test_how_to_sample_from_a_model_is_passed_on(tmp_path):
    path, again = tmp_path / "model", tmp_path / "again"
    saved(path)
    assert models.load(path).generation is None
    theirs = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [5, 7], "bos_token_id": 3}
    (path / "generation_config.json").write_text(json.dumps(theirs))
    loaded = models.load(path)
    models.save(loaded, loaded.params, again)
    assert json.loads((again / "generation_config.json").read_text()) == theirs
    models.save(loaded, tiny.scalar(tiny.LLAMA), again)  # a reward model says nothing
    assert not (again / "generation_config.json").exists()


@pytest.mark.parametrize(("named", "ends"), [(None, 0), (9, [0, 9]), ([9, 0], [9, 0])])
def test_whoever_samples_stops_at_eos(named, ends, tmp_path):
    tok = tokenizer.train(["a few words"], 300, tmp_path / "tokenizer")
    assert tok.eos_token_id == 0
    started = dataclasses.replace(model(tiny.LLAMA), tokenizer=tok, generation={"eos_token_id": named})
    models.save(started, tiny.policy(tiny.LLAMA), tmp_path / "model")
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == ends


def test_n_inner_is_the_width_of_the_mlp(tmp_path):
    import transformers

    wide = dataclasses.replace(tiny.GPT, d_ff=24)
    models.save(model(wide), tiny.policy(wide), tmp_path / "model")
    assert transformers.GPT2Config.from_pretrained(tmp_path / "model").n_inner == 24
    assert models.load(tmp_path / "model").config == wide
    config, _ = saved(tmp_path / "model", tiny.GPT)
    assert config["n_inner"] is None
    for named in (None, 64):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"n_inner": named}))
        assert models.load(tmp_path / "model").config == tiny.GPT


@pytest.mark.parametrize(("ends", "stops"), [(None, (0,)), (7, (0, 7)), ([9, 0, 7], (0, 9, 7))])
def test_stop_ids_are_eos_and_what_the_generation_settings_name(ends, stops, tmp_path):
    tok = tokenizer.train(["a few words"], 300, tmp_path / "tokenizer")
    config = dataclasses.replace(tiny.LLAMA, vocab_size=300)
    with_tokenizer = dataclasses.replace(model(config), tokenizer=tok)
    for params, load in ((tiny.policy(config), models.load), (tiny.scalar(config), models.load_reward)):
        models.save(with_tokenizer, params, tmp_path / "model")
        if ends is not None:
            (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert models.stop_ids(load(tmp_path / "model")) == stops
        if ends is not None:  # config.json speaks where there is no generation_config.json
            (tmp_path / "model" / "generation_config.json").unlink()
            named = json.loads((tmp_path / "model" / "config.json").read_text()) | {"eos_token_id": ends}
            (tmp_path / "model" / "config.json").write_text(json.dumps(named))
            loaded = load(tmp_path / "model")
            assert models.stop_ids(loaded) == stops
            models.save(loaded, tiny.policy(config), tmp_path / "again")
            assert models.stop_ids(models.load(tmp_path / "again")) == stops


def fine_tuned(path, config, seed, scalar=True, tok=None):
    """A model that was trained from `tiny`'s, as a directory; returns its parameters."""
    rng = np.random.default_rng(seed)
    params = tiny.scalar(config) if scalar else tiny.policy(config)
    params = jax.tree.map(lambda x: x + jnp.array(rng.normal(0, 0.05, x.shape), x.dtype), params)
    models.save(dataclasses.replace(model(config), tokenizer=tok), params, path)
    return params


@pytest.mark.parametrize("scalar", [True, False], ids=["reward", "language"])
def test_the_average_of_models_is_their_average(scalar, tmp_path):
    paths = [tmp_path / name for name in "abc"]
    each = [fine_tuned(path, tiny.LLAMA, seed, scalar) for seed, path in enumerate(paths)]
    found = models.load_average(paths)
    mean = jax.tree.map(lambda *x: np.mean(np.stack(x).astype(np.float64), axis=0), *each)
    tiny.assert_close(found.params, mean, atol=1e-7)
    tokens, mask = jnp.array(tiny.random_tokens(0, 3, 6)), jnp.array(tiny.ragged(1, 3, 6))
    models.save(found, found.params, tmp_path / "average")
    saved = (models.load_reward if scalar else models.load)(tmp_path / "average")
    outputs = [jax.jit(found.apply)(params, tokens, mask) for params in (saved.params, found.params, *each)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert all(np.abs(outputs[0] - other).max() > 0.01 for other in outputs[2:])


def test_models_that_cannot_be_averaged_are_named(tmp_path):
    tok = tokenizer.train(["a few words"], 300, tmp_path)
    config = dataclasses.replace(tiny.GPT, vocab_size=300)
    other_tok = tokenizer.load(tmp_path)
    other_tok.eos_token = "!"
    first = tmp_path / "first"
    fine_tuned(first, config, 0, tok=tok)
    fine_tuned(tmp_path / "language", config, 1, scalar=False, tok=tok)
    fine_tuned(tmp_path / "wide", dataclasses.replace(config, d_ff=72, max_length=20), 2, tok=tok)
    fine_tuned(tmp_path / "eos", config, 3, tok=other_tok)
    models.save(dataclasses.replace(model(config), tokenizer=tok), tiny.scalar(config, seed=9), tmp_path / "stranger")
    for name, said in {
        "language": "first is a reward model and .*language is a language model: average models of one kind",
        "wide": r"first and .*wide differ in max_length \(24, 20\), d_ff \(64, 72\): average models of one init",
        "eos": r"first and .*eos differ in EOS \('<\|endoftext\|>', '!'\): average models of one init",
        "stranger": "stranger was trained from another init: the cosine .* and those of .*first is -?0.0",
    }.items():
        with pytest.raises(InputError, match=said):
            models.load_average([first, tmp_path / name])


def test_other_conventions_than_the_policys_are_warned_of(tmp_path, capsys):
    tok = tokenizer.train(["a few words"], 300, tmp_path)
    policy = dataclasses.replace(model(tiny.LLAMA), tokenizer=tok)

    def warned(**changes):
        other = tokenizer.load(tmp_path)
        for name, value in changes.items():
            setattr(other, name, value)
        loaded = {tmp_path / "policy": policy, tmp_path / "same": policy}
        models.check_vocabularies(loaded | {tmp_path / "reward": dataclasses.replace(policy, tokenizer=other)})
        return capsys.readouterr().err

    assert warned() == "" and warned(chat_template=tok.chat_template + " \n\n") == ""
    for changes, what in (
        ({"eos_token": "!"}, "differ in EOS ('<|endoftext|>', '!'): "),
        ({"bos_token": "a"}, "differ in BOS (None, 'a'): "),
        ({"pad_token": "a"}, "differ in PAD ('<|endoftext|>', 'a'): "),
        ({"chat_template": "{{ messages[0].content }}"}, "differ in chat template: "),
        ({"eos_token": "!", "chat_template": "{{ 1 }}"}, "differ in EOS ('<|endoftext|>', '!'), chat template: "),
    ):
        message = warned(**changes)
        assert message.startswith(f"warning: {tmp_path / 'policy'} and {tmp_path / 'reward'} {what}")
        assert message.count("\n") == 1


def test_a_length_beyond_the_context(tmp_path, capsys):
    for config in (tiny.GPT, tiny.LLAMA):
        models.check_length(config, length=24)
    assert capsys.readouterr().err == ""
    models.check_length(tiny.LLAMA, length=24, text_length=25)
    warning = "text_length=25 is more than the model's context of 24 tokens, the most that it was trained for"
    assert capsys.readouterr().err == f"warning: {warning}\n"
    with pytest.raises(InputError, match="length=25 is more than the model's context of 24 tokens, beyond which it"):
        models.check_length(tiny.GPT, length=25)


BEYOND = {  # of their range, or of another type
    "size": (0, -1, 2**31, 10**30, 2.0, 0.5, True, "16", [16], {}),
    "positive": (0, -1.0, 1e-300, 1e39, True, "1e-5", [1.0]),
    "rate": (-0.1, 1, 1.0, 2, True, "0.1"),
    "flag": (0, 1, "true", [True]),
}
FIELDS = {
    "gpt": {
        "size": ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"),
        "positive": ("layer_norm_epsilon",),
        "rate": ("attn_pdrop", "embd_pdrop", "resid_pdrop"),
        "flag": ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"),
    },
    "gemma2": {
        "size": (
            *("vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "intermediate_size", "sliding_window", "query_pre_attn_scalar"),
        ),
        "positive": ("rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping", "rope_theta"),
        "rate": ("attention_dropout",),
        "flag": ("attention_bias", "tie_word_embeddings"),
    },
    "llama3": {
        "size": ("rope_parameters.original_max_position_embeddings",),
        "positive": (
            *("rope_parameters.rope_theta", "rope_parameters.factor"),
            *("rope_parameters.low_freq_factor", "rope_parameters.high_freq_factor"),
        ),
    },
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_number_of_a_config_has_its_range(name, tmp_path):
    config, _ = saved(tmp_path / "model", tiny.CONFIGS[name])
    for kind, fields in FIELDS[name].items():
        for field, value in itertools.product(fields, BEYOND[kind]):
            outer, _, inner = field.rpartition(".")
            changed = config | ({outer: config[outer] | {inner: value}} if outer else {field: value})
            (tmp_path / "model" / "config.json").write_text(json.dumps(changed))
            refused(tmp_path / "model", rf"config\.json: {re.escape(field)}=.*: expected (a|true)")


def test_rope_factors_that_are_absent_or_in_another_order(tmp_path):
    config, _ = saved(tmp_path / "model", tiny.CONFIGS["llama3"])
    rope = config["rope_parameters"]
    for changed, message in (
        (rope | {"low_freq_factor": 4.0}, "low_freq_factor=4.0: expected less than high_freq_factor=4.0"),
        ({name: x for name, x in rope.items() if name != "factor"}, "factor"),
        ("llama3", "rope_parameters='llama3': expected an object"),
    ):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"rope_parameters": changed}))
        refused(tmp_path / "model", message)


@pytest.mark.parametrize("ends", [True, -1, 31, 2**40, 2.0, [2, "3"], [2, None], [[2]], {"a": 1}])
def test_eos_ids_are_ids_of_the_vocabulary(ends, tmp_path):
    saved(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    refused(
        tmp_path / "model", r"generation_config\.json: eos_token_id=.*: expected an id, or a list of ids, from 0 to 30"
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(odd, dtype, tmp_path):
    path = tmp_path / "model"
    _, tensors = saved(path, params=tiny.scalar(tiny.LLAMA) | {"bias": jnp.float32(1.0)})
    tensors = {name: x.astype(dtype) for name, x in tensors.items()}
    for name in ("model.norm.weight", "model.layers.1.self_attn.k_proj.weight", "score.weight", "score.bias"):
        spoiled = tensors[name].copy()
        spoiled.reshape(-1)[-1] = odd
        safetensors.numpy.save_file(tensors | {name: spoiled}, path / "model.safetensors")
        what = f"model.safetensors: {re.escape(name)} has an element that is {'NaN' if np.isnan(odd) else 'inf'}"
        refused(path, what, models.load_reward)


def test_weights_that_overflow_the_type_that_they_are_loaded_in(tmp_path):
    _, tensors = saved(tmp_path / "model")
    big = tensors | {"model.norm.weight": np.full(16, -7e4, np.float32)}
    safetensors.numpy.save_file(big, tmp_path / "model" / "model.safetensors")
    models.load(tmp_path / "model")
    refused(tmp_path / "model", "model.norm.weight .* 70000 .*: float16 ends at", lambda p: models.load(p, jnp.float16))


def saved(path, config=tiny.LLAMA, params=None):
    """A model directory, and the config and tensors in it, to break."""
    models.save(model(config), tiny.policy(config) if params is None else params, path)
    return json.loads((path / "config.json").read_text()), safetensors.numpy.load_file(path / "model.safetensors")


def refused(path, message, load=models.load):
    with pytest.raises(InputError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


CONFIG_ERRORS = {
    "gpt": [
        ({"activation_function": "relu"}, "activation_function='relu' is not supported: expected 'gelu_new'"),
        ({"n_inner": 17}, r"mlp.c_fc.weight \[16, 64\] does not fit config.json, which asks for \[16, 17\]"),
        ({"n_head": 3}, "n_embd=16 is not a multiple of n_head=3"),
        ({"n_layer": 3}, r"has no tensor 'transformer\.h\.2\."),
    ],
    "llama": [
        ({"model_type": "mamba"}, "'mamba' is not supported: expected one of gpt2, llama, mistral, qwen2"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported: expected 'silu'"),
        ({"attention_bias": True}, r"has no tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'"),
        ({"mlp_bias": True}, r"has no tensor 'model\.layers\.0\.mlp\.gate_proj\.bias'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}},
            "rope_parameters.rope_theta=-1.0: expected a number a",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic' is not"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_ro"),
        ({"intermediate_size": 20}, r"_proj.weight \[.*24.*\] does not fit config.json, which asks for \[.*20.*\]"),
        ({"vocab_size": 10**9}, r"\[31, 16\] does not fit config.json"),
        ({"num_hidden_layers": 3}, r"has no tensor 'model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"does not ask for \(model\.layers\.1\..* and 6 more\)"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: expected a whole number from 1 to"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers='many': expected a whole number"),
        ({"intermediate_size": 2**63}, "intermediate_size=9223372036854775808: expected a whole number"),
        ({"num_key_value_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: expected a whole number"),
        ({"hidden_size": -16}, "hidden_size=-16: expected a whole number"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from the embedding"),
    ],
    "qwen2-window": [
        ({"num_attention_heads": 64}, r"q_proj.\w+ \[.*16.*\] does not fit config.json, which asks for \[256.*\]"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "cannot be read|layer_types=.* is not supported"),
    ],
    "gemma2": [
        ({"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported: expected 'gelu_pytorch_tanh'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
    ],
}


@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_configs_that_do_not_fit_are_refused_by_name(name, tmp_path):
    path = tmp_path / "model"
    config, _ = saved(path, tiny.CONFIGS[name])
    for changes, message in CONFIG_ERRORS[name]:
        (path / "config.json").write_text(json.dumps(config | changes))
        refused(path, message)


def test_unusable_directories_are_named(tmp_path):
    refused(tmp_path / "nowhere", r"nowhere is not a model directory: it has no config\.json")
    path = tmp_path / "model"
    saved(path)
    refused(path, "no score head", models.load_reward)
    whole = (path / "model.safetensors").read_bytes()
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (path / "model.safetensors").write_bytes(whole[:cut])
        refused(path, "cannot be read")
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"")  # may run code when read
    refused(path, r"holds no model\.safetensors")
    for text in ("{", "[]", "\xff", '{"eos_token_id": "2"}', '{"eos_token_id": [2, true]}'):
        models.save(model(tiny.LLAMA), tiny.policy(tiny.LLAMA), path)
        (path / "generation_config.json").write_text(text, encoding="latin-1")
        refused(
            path, "generation_config.json( cannot be read| holds no object|: eos_token_id=.*: expected an id, or a li)"
        )
    for text in ("{", "[]", '"llama"', "\xff"):
        (path / "config.json").write_text(text, encoding="latin-1")
        refused(path, "cannot be read|holds no object")


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "model"
    _, tensors = saved(path)
    name = "model.layers.1.self_attn.k_proj.weight"

    def check(changes, message):
        kept = {key: x for key, x in (tensors | changes).items() if x is not None}
        safetensors.numpy.save_file(kept, path / "model.safetensors")
        refused(path, message)

    check({name: None}, f"has no tensor '{name}'")
    check({name: np.zeros((16, 8), np.float32)}, r"k_proj.weight \[16, 8\] does not fit .* asks for \[8, 16\]")
    check({name: np.zeros((8, 16), np.int8)}, "k_proj.weight is I8: expected F32, F16, BF16")
    check({"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)}, r"not ask for \(.*q_proj\.bias\)")
    check({"score.weight": np.zeros((1, 16), np.float32)}, "score.weight.*: it is a reward model")
    # What older checkpoints hold beside the weights is no error.
    safetensors.numpy.save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}, path / "model.safetensors"
    )
    models.load(path)
    _, scored = saved(path, params=tiny.scalar(tiny.LLAMA))
    safetensors.numpy.save_file(scored | {"score.weight": np.zeros((3, 16), np.float32)}, path / "model.safetensors")
    refused(path, r"score.weight \[3, 16\] does not fit .* asks for \[1, 16\]", models.load_reward)


def test_a_tied_unembedding_may_be_there_too(tmp_path):
    config = tiny.CONFIGS["qwen3"]
    _, tensors = saved(tmp_path / "model", config)
    both = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    safetensors.numpy.save_file(both, tmp_path / "model" / "model.safetensors")
    tiny.assert_close(models.load(tmp_path / "model").params, tiny.policy(config), atol=0)


def test_shards_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "SHARD", 4000)
    path = tmp_path / "model"
    models.save(model(tiny.LLAMA), tiny.policy(tiny.LLAMA), path)
    index = path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())

    def check(text, message):
        index.write_text(text)
        refused(path, message)

    check("{", "index.json cannot be read")
    check('{"weight_map": ["a"]}', "it needs an object weight_map")
    name = "model.norm.weight"
    check(json.dumps({"weight_map": whole["weight_map"] | {name: "../model.safetensors"}}), "is not the name of a file")
    check(json.dumps({"weight_map": whole["weight_map"] | {name: "absent.safetensors"}}), "absent.* cannot be read")
    other = next(file for file in whole["weight_map"].values() if file != whole["weight_map"][name])
    check(json.dumps({"weight_map": whole["weight_map"] | {name: other}}), "the index does not list there")
    check(json.dumps({"weight_map": {k: v for k, v in whole["weight_map"].items() if k != name}}), "has no tensor")
    index.write_text(json.dumps(whole))
    held = safetensors.numpy.load_file(path / other)
    safetensors.numpy.save_file(held | {"extra": np.ones(2, np.float32)}, path / other)
    refused(path, f"{other} has a tensor 'extra' that the index does not list there")
    safetensors.numpy.save_file(held, path / other)
    models.load(path)


def test_code_that_comes_with_a_checkpoint_does_not_run(tmp_path):
    path = tmp_path / "model"
    config, _ = saved(path)
    (path / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    theirs = {"auto_map": {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}}
    (path / "config.json").write_text(json.dumps(config | theirs))
    models.load(path)
    (path / "config.json").write_text(json.dumps(config | theirs | {"model_type": "theirs"}))
    refused(path, "'theirs' is not supported")
    tokenizer.train(["a few words"], 300, path)
    (path / "config.json").write_text(json.dumps(config))
    named = json.loads((path / "tokenizer_config.json").read_text())
    named |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["modeling.Theirs", "modeling.Theirs"]}}
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    with contextlib.suppress(InputError):
        models.load(path)
    assert not (tmp_path / "ran").exists()


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(safetensors.numpy, "save_file", fail)
        models.save(model(tiny.GPT), tiny.policy(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    models.save(model(tiny.GPT), tiny.policy(), tmp_path / "model")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(safetensors.numpy, "save_file", fail)
        models.save(model(tiny.GPT), tiny.policy(seed=1), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    tiny.assert_close(models.load(tmp_path / "model").params, tiny.policy(), atol=0)


def test_what_a_killed_save_left_is_cleared_away(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    others = {tmp_path / name for name in (".model-2-abcd1234", ".model-notes", "model-abcd1234")}
    for other in others:
        other.mkdir()
    models.save(model(tiny.GPT), tiny.policy(), tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # as if killed before it could
        models.save(model(tiny.GPT), tiny.policy(), tmp_path / "model")
        patch.setattr(safetensors.numpy, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            models.save(model(tiny.GPT), tiny.policy(), tmp_path / "model")
    assert len(list(tmp_path.iterdir())) == len(others) + 3
    models.save(model(tiny.GPT), tiny.policy(), tmp_path / "model")
    assert {*tmp_path.iterdir()} == {*others, tmp_path / "model"}


def test_a_link_is_followed(tmp_path):
    out, disk = tmp_path / "out", tmp_path / "disk"
    out.mkdir(), disk.mkdir()
    (out / "model").symlink_to(disk / "weights")  # dangling, at first
    (out / "relative").symlink_to("../disk/there/weights")
    for name, target in (("model", disk / "weights"), ("relative", disk / "there" / "weights")):
        for seed in (0, 1):
            models.check_writable(out / name)
            models.save(model(tiny.GPT), tiny.policy(seed=seed), out / name)
            assert (out / name).is_symlink() and target.is_dir() and not target.is_symlink()
            tiny.assert_close(models.load(out / name).params, tiny.policy(seed=seed), atol=0)
    assert {path.name for path in out.iterdir()} == {"model", "relative"}
    assert {path.name for path in disk.iterdir()} == {"weights", "there"}


def test_a_path_where_no_model_can_be_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "self").symlink_to(".")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "to_file").symlink_to(tmp_path / "file")
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "precious").write_text("mine")
    (tmp_path / "to_things").symlink_to(tmp_path / "things")
    there = sorted(tmp_path.rglob("*"))
    for name, message in {
        "loop": "it is a link that leads to itself",
        "self": "in which it lies itself",
        "file": "file is a file",
        "to_file": "file is a file",
        "file/model": "file is a file",
        "to_things": "holds other things than a model",
        "a" * 250: "File name too long",
    }.items():
        for write in (models.check_writable, lambda path: models.save(model(tiny.GPT), tiny.policy(), path)):
            with pytest.raises(InputError, match=f"a model cannot be written to .*: .*{message}") as error:
                write(tmp_path / name)
            assert "\n" not in str(error.value)
    monkeypatch.setattr(directory.os, "access", lambda *args: False)
    with pytest.raises(InputError, match=f"{tmp_path} is read-only"):
        models.check_writable(tmp_path / "some" / "model")
    assert sorted(tmp_path.rglob("*")) == there


def test_what_was_there_comes_back_if_the_last_move_fails(tmp_path, monkeypatch):
    models.save(model(tiny.GPT), tiny.policy(), tmp_path / "model")
    rename = directory.Path.rename

    def fail(self, target):
        if re.fullmatch(r"\.model-.{8}", self.name):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(directory.Path, "rename", fail)
        models.save(model(tiny.GPT), tiny.policy(seed=1), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    tiny.assert_close(models.load(tmp_path / "model").params, tiny.policy(), atol=0)
    (tmp_path / ".model-abcd1234-former").symlink_to("gone")  # as links were moved away once
    models.save(model(tiny.GPT), tiny.policy(seed=1), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_shape_that_no_family_has_is_refused(tmp_path):
    odd = dataclasses.replace(tiny.GPT, norm="rmsnorm")
    with pytest.raises(InputError, match="no Hugging Face architecture"):
        models.save(model(odd), tiny.policy(tiny.GPT), tmp_path / "model")


@pytest.mark.parametrize("config", (tiny.CONFIGS | tiny.MORE).values(), ids=tiny.CONFIGS | tiny.MORE)
@pytest.mark.parametrize("kind", ["language", "reward"])
def test_transformers_loads_what_we_save(config, kind, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
    import transformers

    params = tiny.policy(config) if kind == "language" else tiny.scalar(config)
    models.save(model(config), params, tmp_path / "model")
    auto = {
        "language": transformers.AutoModelForCausalLM,
        "reward": transformers.AutoModelForSequenceClassification,
    }[kind]
    theirs = auto.from_pretrained(tmp_path / "model")
    theirs.config.pad_token_id = 0
    loaded = (models.load if kind == "language" else models.load_reward)(tmp_path / "model")
    longer = isinstance(config.rope_scaling, models.LongScaling)  # which has other factors there
    for columns in (6, config.rope_scaling.original_length + 1) if longer else (6,):
        tokens, mask = tiny.random_tokens(0, 2, columns), np.ones((2, columns), bool)
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        ours = np.asarray(jax.jit(loaded.apply)(loaded.params, jnp.array(tokens), jnp.array(mask)))
        np.testing.assert_allclose(ours, expected[:, 0] if kind == "reward" else expected, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", *ORACLES, *NEWER, *REWARD_MODELS])
def test_transformers_finds_published_models_as_they_were(name, shared, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
    import transformers

    path = oracle(shared, name)
    load, auto = models.load, transformers.AutoModelForCausalLM
    if name in REWARD_MODELS:
        load, auto = models.load_reward, transformers.AutoModelForSequenceClassification
    loaded = load(path, dtype=jnp.bfloat16 if name == "bfloat16" else jnp.float32)
    models.save(loaded, loaded.params, tmp_path / "model")
    before, after = (auto.from_pretrained(at) for at in (path, tmp_path / "model"))
    weights = after.state_dict()
    assert weights.keys() == before.state_dict().keys()
    for tensor, value in before.state_dict().items():
        assert weights[tensor].dtype == value.dtype and torch.equal(weights[tensor], value), tensor
    if name not in REWARD_MODELS:
        assert after.generation_config.to_dict() == before.generation_config.to_dict()
