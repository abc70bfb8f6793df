import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax import heads, models, sampling, transformer
from rlhf_jax.types import InputError
from tests import tiny

BOTH = pytest.mark.parametrize("config", [tiny.GPT, tiny.LLAMA], ids=["gpt", "llama"])


def model(config):
    return models.Model(config, tiny.policy(config), None, transformer.bind(transformer.Transformer(config)))


@BOTH
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


@BOTH
def test_reward_round_trip(config, tmp_path):
    params = tiny.scalar(config) | {"bias": jnp.float32(-0.75)}
    models.save(model(config), params, tmp_path / "reward")
    loaded = models.load_reward(tmp_path / "reward")
    tokens, mask = jnp.array(tiny.random_tokens(0, 3, 6)), jnp.array(tiny.ragged(1, 3, 6))
    per_token = jax.jit(transformer.bind(heads.ScalarModel(config)))(params, tokens, mask)
    score = jax.jit(loaded.apply)(loaded.params, tokens, mask)
    np.testing.assert_allclose(score, heads.at_last(per_token, mask), atol=1e-6)


def test_saving_over_a_directory_replaces_it(tmp_path):
    models.save(model(tiny.GPT), tiny.policy(tiny.GPT, 0), tmp_path / "model")
    models.save(model(tiny.GPT), tiny.policy(tiny.GPT, 1), tmp_path / "model")
    tiny.assert_close(models.load(tmp_path / "model").params, tiny.policy(tiny.GPT, 1), atol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "sharded"])
def test_published_layouts_oracle(name, shared):
    path = shared / "oracles" / "hf" / name
    expected = np.load(path / "expected.npz")
    loaded = models.load(path)
    tokens, mask = jnp.array(expected["input_ids"], jnp.int32), jnp.array(expected["attention_mask"], bool)
    logits = np.asarray(jax.jit(loaded.apply)(loaded.params, tokens, mask))
    np.testing.assert_allclose(logits[np.asarray(mask)], expected["logits"], rtol=0, atol=3e-4)
    prompt = jnp.array(expected["greedy_prompt_ids"], jnp.int32)
    mask = jnp.arange(prompt.shape[1])[None] < jnp.array(expected["greedy_prompt_length"])[:, None]
    sample = sampling.generate(loaded, loaded.params, prompt, mask, jax.random.key(0), 12, temperature=0.0)
    np.testing.assert_array_equal(sample.tokens, expected["greedy_tokens"])


def test_reward_model_oracle(shared):
    path = shared / "oracles" / "hf" / "llama_reward"
    expected = np.load(path / "expected.npz")
    loaded = models.load_reward(path)
    tokens, mask = jnp.array(expected["input_ids"], jnp.int32), jnp.array(expected["attention_mask"], bool)
    score = jax.jit(loaded.apply)(loaded.params, tokens, mask)
    np.testing.assert_allclose(score, expected["scores"], rtol=0, atol=3e-4)


def test_unusable_directories_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere is not a model directory: it has no config\.json"):
        models.load(tmp_path / "nowhere")
    path = tmp_path / "model"
    models.save(model(tiny.LLAMA), tiny.policy(tiny.LLAMA), path)
    with pytest.raises(InputError, match="no score head"):
        models.load_reward(path)
    config = json.loads((path / "config.json").read_text())

    def check(changes: dict, message: str) -> None:
        (path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InputError, match=message) as error:
            models.load(path)
        assert "\n" not in str(error.value)

    check({"model_type": "mamba"}, "'mamba' is not supported: expected one of gpt2, llama")
    check({"hidden_act": "relu"}, "hidden_act='relu' is not supported: expected 'silu'")
    check({"intermediate_size": 20}, r"gate_proj.weight \[24, 16\].* does not fit config.json")
    check({"num_hidden_layers": 3}, r"has no tensor 'model\.layers\.2\.")
    (path / "config.json").write_text(json.dumps(config))
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        models.load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        models.load(path)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        models.save(model(tiny.GPT), tiny.policy(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_shape_that_no_family_has_is_refused(tmp_path):
    odd = dataclasses.replace(tiny.GPT, norm="rmsnorm")
    with pytest.raises(InputError, match="no Hugging Face architecture"):
        models.save(model(odd), tiny.policy(tiny.GPT), tmp_path / "model")


@BOTH
@pytest.mark.parametrize("kind", ["language", "reward"])
def test_transformers_loads_what_we_save(config, kind, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
    import transformers

    tokens, mask = tiny.random_tokens(0, 2, 6), np.ones((2, 6), bool)
    params = tiny.policy(config) if kind == "language" else tiny.scalar(config)
    models.save(model(config), params, tmp_path / "model")
    auto = {
        "language": transformers.AutoModelForCausalLM,
        "reward": transformers.AutoModelForSequenceClassification,
    }[kind]
    theirs = auto.from_pretrained(tmp_path / "model")
    theirs.config.pad_token_id = 0
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    load = models.load if kind == "language" else models.load_reward
    loaded = load(tmp_path / "model")
    ours = np.asarray(jax.jit(loaded.apply)(loaded.params, jnp.array(tokens), jnp.array(mask)))
    np.testing.assert_allclose(ours, expected[:, 0] if kind == "reward" else expected, atol=1e-4)
