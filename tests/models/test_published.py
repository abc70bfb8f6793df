"""Published model directories and what `transformers` makes of ours: oracles, and, with torch, its own models."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rlhf_jax import models
from rlhf_jax.rollouts import sampling
from tests import tiny
from tests.models.directories import model

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


@pytest.mark.slow
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
