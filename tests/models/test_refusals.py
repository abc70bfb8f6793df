"""Model directories that cannot be used: each is refused by name, on one line."""

import contextlib
import itertools
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax import models
from rlhf_jax.data import tokenizer
from rlhf_jax.models import directory
from rlhf_jax.types import InputError
from tests import tiny
from tests.models.directories import model, refused, saved

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
