"""Model directories, written and read: weights, tokenizer, generation settings."""

import dataclasses
import json
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
from rlhf_jax.types import InputError
from tests import tiny
from tests.models.directories import model, saved

EVERY = pytest.mark.parametrize("config", tiny.CONFIGS.values(), ids=tiny.CONFIGS)


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
        models.check_length(config, 24)
    assert capsys.readouterr().err == ""
    models.check_length(tiny.LLAMA, 25, "text_length")
    warning = "text_length=25 is more than the model's context of 24 tokens, the most that it was trained for"
    assert capsys.readouterr().err == f"warning: {warning}\n"
    with pytest.raises(InputError, match="length=25 is more than the model's context of 24 tokens, beyond which it"):
        models.check_length(tiny.GPT, 25)
