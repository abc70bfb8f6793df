import dataclasses
import json
import re
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.models import directory, families
from rlhf_jax.types import InputError
from tests import tiny

gguf = pytest.importorskip("gguf", reason="the library gguf is not installed")

# Sizes of whole blocks of Q8_0, in every family; Llama 3's scaling has the context and bounds of its models.
WIDE = dataclasses.replace(tiny.LLAMA, d_model=64, head_dim=16, d_ff=96, vocab_size=340)
SCALING = models.Llama3Scaling(factor=8.0, low=1.0, high=4.0, original_length=8192)
GEMMA = dataclasses.replace(
    WIDE,
    mlp="geglu",
    unit_offset=True,
    post_norm=True,
    scale_embedding=True,
    tie_embeddings=True,
    window=3,
    query_size=16,
)
OLMO = dataclasses.replace(WIDE, pre_norm=False, post_norm=True, qk_norm="whole")
YARN = models.YarnScaling(factor=4.0, original_length=12, beta_fast=2.0, beta_slow=0.5, attention_factor=1.25)
LONG = models.LongScaling((1.0,) * 6, (2.0, 2.5, 3.0, 3.5, 4.0, 4.5), original_length=12, attention_factor=1.25)
CONFIGS = {
    "llama": WIDE,
    "llama3": dataclasses.replace(WIDE, rope_scaling=SCALING, rope_theta=5e5, tie_embeddings=True),
    "llama-linear": dataclasses.replace(WIDE, bias="all", rope_scaling=models.LinearScaling(4.0)),
    "mistral": dataclasses.replace(WIDE, window=3),
    "mixtral": dataclasses.replace(WIDE, experts=models.Experts(count=4, active=2)),
    "qwen2": dataclasses.replace(WIDE, bias="qkv", rope_scaling=YARN),
    "qwen3": dataclasses.replace(WIDE, qk_norm="head", head_dim=32, tie_embeddings=True),
    "qwen3_moe": dataclasses.replace(WIDE, qk_norm="head", head_dim=32, experts=models.Experts(count=4, active=3)),
    "gemma2": dataclasses.replace(GEMMA, full_layers=(1,), attention_cap=2.0, logit_cap=3.0),
    "gemma3": dataclasses.replace(
        GEMMA,
        n_layers=7,
        full_layers=(5,),
        qk_norm="head",
        rope_theta=1e6,
        window_theta=1e4,
        rope_scaling=models.LinearScaling(8.0),
    ),
    "olmo2": OLMO,
    "olmo3": dataclasses.replace(OLMO, window=3, full_layers=(0,), rope_scaling=YARN, window_theta=1e4),
    "smollm3": dataclasses.replace(WIDE, n_layers=4, unrotated_layers=(3,)),
    "phi3": dataclasses.replace(WIDE, rotary_size=12, rope_scaling=LONG),
    "phi3-window": dataclasses.replace(WIDE, window=3, rotary_size=12),
}
ARCHITECTURES = {  # in the file
    "mistral": "llama",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "olmo3": "olmo2",
}


def stacked(tensors):
    """The tensors as llama.cpp's converter has them: those of all experts of a layer in one."""
    experts = {}
    for name, tensor in tensors:
        if parts := re.fullmatch(r"model\.(layers\.\d+\.)(.*\.experts)\.\d+\.(.*)", name):
            layer, module, rest = parts.groups()
            whole = f"{layer}feed_forward.experts.{rest}" if "sparse" in module else f"model.{layer}{module}.{rest}"
            experts.setdefault(whole, []).append(tensor)
        else:
            yield name, tensor
    yield from ((name, np.stack(each)) for name, each in experts.items())


def add_settings(writer, kind, config):
    writer.add_block_count(config.n_layers)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_context_length(config.max_length)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if kind == "phi3":
        writer.add_rope_dimension_count(config.rotary_size or config.head_dim)
        writer.add_sliding_window(config.window or 0)
        writer.add_rope_scaling_orig_ctx_len(12)
    else:
        writer.add_key_length(config.head_dim)
    if kind in ("mistral", "gemma2", "gemma3_text", "olmo3"):
        writer.add_sliding_window(config.window)
    if kind == "olmo3":  # Gemma's pattern is in llama.cpp's code
        writer.add_sliding_window_pattern([n not in config.full_layers for n in range(config.n_layers)])
    if config.attention_cap:
        writer.add_attn_logit_softcapping(config.attention_cap)
        writer.add_final_logit_softcapping(config.logit_cap)
    if config.experts:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.active)
        writer.add_expert_feed_forward_length(config.d_ff)


def add_scaling(writer, config):
    scaling = config.rope_scaling
    if isinstance(scaling, models.Llama3Scaling):
        lengths = 2 * np.pi * config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        factors = []
        for length in lengths:  # by cases, as the converter of Llama 3.1 has it
            if length < scaling.original_length / scaling.high:
                factors.append(1.0)
            elif length > scaling.original_length / scaling.low:
                factors.append(scaling.factor)
            else:
                smooth = (scaling.original_length / length - scaling.low) / (scaling.high - scaling.low)
                factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
        assert len({*factors}) > 2
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    elif isinstance(scaling, models.LinearScaling):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    elif isinstance(scaling, models.YarnScaling):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_length)
        writer.add_rope_scaling_yarn_attn_factor(scaling.attention_factor)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
    elif isinstance(scaling, models.LongScaling):
        writer.add_rope_scaling_attn_factors(scaling.attention_factor)
        writer.add_tensor("rope_factors_long.weight", np.array(scaling.long, np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(scaling.short, np.float32))


def write(path, config, change=lambda writer: None, quantised=False, **tokens):
    """A file as llama.cpp's converter writes it: rows of query and key permuted, Gemma's norms with their 1."""
    kind = families.family(config)
    name = ARCHITECTURES.get(kind, kind)
    writer = gguf.GGUFWriter(path, name)
    add_settings(writer, kind, config)
    add_scaling(writer, config)
    architecture = next(each for each, theirs in gguf.MODEL_ARCH_NAMES.items() if theirs == name)
    names = gguf.get_tensor_name_map(architecture, config.n_layers)
    layout = directory._layout(config, scalar=False)
    tensors = (pair for entry, layer, _ in layout for pair in directory._tensors(entry, layer, tiny.policy(config)))
    for name, tensor in stacked(tensors):
        stem, suffix = name.rsplit(".", 1)
        if kind in ("llama", "mistral", "mixtral", "smollm3") and stem.endswith(("q_proj", "k_proj")):
            heads = config.n_heads if "q_proj" in name else config.n_kv_heads
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        if kind in ("gemma2", "gemma3_text") and name.endswith("norm.weight"):
            tensor = tensor + 1
        tensor, theirs = np.ascontiguousarray(tensor), f"{names.get_name(stem)}.{suffix}"
        if quantised and tensor.ndim > 1:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(theirs, gguf.quants.quantize(tensor, q8), raw_dtype=q8)
        else:
            writer.add_tensor(theirs, tensor)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_llama_cpp_writes_is_read_back(config, tmp_path):
    model = models.load(write(tmp_path / "tiny.gguf", config))
    assert model.config == config and model.tokenizer is None and model.generation is None
    tiny.assert_close(model.params, tiny.policy(config), atol=2e-7)  # Gemma's 1 + w rounds


AS_DEFAULT = {  # what the reader of `transformers` does not take from the file
    "llama": {},
    "qwen3": {"head_dim": 128},
    "gemma2": {"head_dim": 256, "query_size": 256, "attention_cap": 50.0, "logit_cap": 30.0},
    "gemma3": {"head_dim": 256, "query_size": 256, "rope_scaling": None},
}


@pytest.mark.parametrize("name", AS_DEFAULT)
def test_transformers_reads_the_same_from_it(name, tmp_path):
    torch, _ = (pytest.importorskip(name, reason="needs the extra 'parity'") for name in ("torch", "accelerate"))
    import transformers

    config = dataclasses.replace(CONFIGS[name], **AS_DEFAULT[name])
    path = write(tmp_path / "tiny.gguf", config, lambda writer: writer.add_vocab_size(config.vocab_size))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    model, tokens = models.load(path), tiny.random_tokens(0, 2, 9)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    ours = jax.jit(model.apply)(model.params, jnp.array(tokens), jnp.ones((2, 9), bool))
    np.testing.assert_allclose(ours, expected, atol=3e-4)


def test_quantised_weights_are_those_of_the_scale_and_bytes(tmp_path):
    """Q8_0: each 32 weights have a scale, the largest of them over 127, and a byte each."""
    loaded = models.load(write(tmp_path / "tiny.gguf", WIDE, quantised=True)).params
    expected = np.asarray(tiny.policy(WIDE)["embedding"]).reshape(-1, 32)
    scale = np.abs(expected).max(axis=1, keepdims=True) / 127
    found = np.asarray(loaded["embedding"]).reshape(-1, 32)
    assert np.abs(found - expected).max() > 0
    most = 0.5 * scale + 127 * scale * 2**-11  # the scale is float16
    assert np.all(np.abs(found - expected) <= most)
    np.testing.assert_array_equal(loaded["final_norm"]["scale"], tiny.policy(WIDE)["final_norm"]["scale"])
    for config in (WIDE, CONFIGS["mixtral"]):  # all experts of a layer are in one tensor
        loaded = models.load(write(tmp_path / "tiny.gguf", config, quantised=True)).params
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(tiny.policy(config)), strict=True):
            np.testing.assert_allclose(a, b, atol=4e-3)


def test_a_saved_one_is_a_model_directory(tmp_path):
    model = models.load(write(tmp_path / "tiny.gguf", WIDE), dtype=jnp.bfloat16)
    models.save(model, model.params, tmp_path / "model")
    tiny.assert_close(models.load(tmp_path / "model", dtype=jnp.bfloat16).params, model.params, atol=0)


TEXTS = [
    "The cat sat, and 1234 dogs' ears don't  fit.\n\n\tNaïve 你好 🎉",
    "",
    "  two spaces",
    "<|endoftext|>x",
    "It's 12 o'clock",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def byte_level(tokenizer, **settings):
    """Writes a tokenizer of `tokenizers` as llama.cpp's converter does."""
    state = tokenizer.backend_tokenizer
    ids = sorted(state.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(state.to_str())["model"]["merges"]
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}

    def change(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(settings.get("pre", "smollm"))
        extra = [f"[PAD{i}]" for i in range(len(ids), WIDE.vocab_size)]
        writer.add_token_list([token for token, _ in ids] + extra)
        writer.add_token_types([3 if token in special else 1 for token, _ in ids] + [5] * len(extra))
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_eos_token_id(settings.get("eos", tokenizer.eos_token_id))
        writer.add_bos_token_id(tokenizer.eos_token_id)
        writer.add_add_bos_token(settings.get("add_bos", False))
        if "eot" in settings:
            writer.add_eot_token_id(settings["eot"])
        if "template" in settings:
            writer.add_chat_template(settings["template"])

    return change


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tokenizers.train(["the cat sat on the mat and the dogs sat too"] * 9, 300, tmp_path_factory.mktemp("bpe"))


def test_a_byte_level_tokenizer(trained, tmp_path):
    model = models.load(write(tmp_path / "tiny.gguf", WIDE, byte_level(trained)))
    assert model.tokenizer.get_vocab() == trained.get_vocab()
    for text in TEXTS:
        ids = trained(text)["input_ids"]
        assert model.tokenizer(text)["input_ids"] == ids and model.tokenizer.decode(ids) == trained.decode(ids)
    assert models.stop_ids(model) == (trained.eos_token_id,) and model.tokenizer.chat_template is not None
    models.save(model, model.params, tmp_path / "model")
    again = models.load(tmp_path / "model").tokenizer
    assert [again(text)["input_ids"] for text in TEXTS] == [trained(text)["input_ids"] for text in TEXTS]


def test_special_tokens_and_the_chat_template(trained, tmp_path):
    a = trained.convert_tokens_to_ids("a")
    change = byte_level(trained, add_bos=True, eot=a, template="{{ messages[0].content }}{{ eos_token }}")
    model = models.load(write(tmp_path / "tiny.gguf", WIDE, change))
    assert model.tokenizer("cat")["input_ids"] == [trained.eos_token_id, *trained("cat")["input_ids"]]
    assert model.tokenizer.bos_token_id == trained.eos_token_id
    assert model.tokenizer.chat_template == "{{ messages[0].content }}{{ eos_token }}"
    assert models.stop_ids(model) == (trained.eos_token_id, a)


def sentencepiece(prefix=True, scores=None):
    spelled = ["▁the", "▁cat", "at", "▁c", "the", "▁t", "th", "he", "a", "c", "t", "h", "e", "▁", "<turn>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *spelled]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(spelled) - 1), 4]

    def change(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(spelled))] if scores is None else scores)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_space_prefix(prefix)

    return change, tokens


def test_a_tokenizer_of_sentencepiece(tmp_path):
    change, tokens = sentencepiece()
    tokenizer = models.load(write(tmp_path / "tiny.gguf", WIDE, change)).tokenizer

    def split(text):
        return [tokens[i] for i in tokenizer(text)["input_ids"]]

    # By score: "at" before "▁c" and "he", so that "th" has lost its h when its turn comes.
    assert split("the cat") == ["<s>", "▁the", "▁cat"]
    assert split("that") == ["<s>", "▁t", "h", "at"]
    assert split("é<turn>") == ["<s>", "▁", "<0xC3>", "<0xA9>", "<turn>"]
    assert tokenizer.decode(tokenizer("the é cat")["input_ids"], skip_special_tokens=True) == "the é cat"
    change, _ = sentencepiece(prefix=False)
    tokenizer = models.load(write(tmp_path / "none.gguf", WIDE, change)).tokenizer
    assert split("the cat") == ["<s>", "the", "▁cat"]


def refused(path):
    with pytest.raises(InputError) as raised:
        models.load(path)
    assert "\n" not in str(raised.value)
    return str(raised.value).removeprefix(str(path))


def test_what_is_not_supported_is_named(trained, tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    for finish in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        finish()
    writer.close()
    known = "llama, qwen2, qwen3, qwen3moe, gemma2, gemma3, olmo2, smollm3, phi3"
    assert refused(path) == f": architecture 'mamba' is not supported: expected one of {known}"
    write(path, WIDE, lambda writer: writer.add_string("llama.rope.scaling.type", "dynamic"))
    assert refused(path) == ": rope.scaling.type 'dynamic' is not supported: expected none, linear, yarn, longrope"
    write(path, WIDE, lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE))
    assert refused(path) == " has no tensor 'rope_factors_short.weight', which longrope needs"
    write(path, CONFIGS["llama3"], lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR) or
          writer.add_rope_scaling_factor(4.0))  # fmt: skip
    assert refused(path).startswith(": rope.scaling.type 'linear' beside rope_freqs.weight is not supported")
    write(path, CONFIGS["gemma2"], lambda writer: writer.add_rope_freq_base_swa(5e3))
    assert refused(path) == ": rope.freq_base_swa=5000.0 is not supported: expected 10000.0, as of the other layers"
    write(path, CONFIGS["gemma2"], lambda writer: writer.add_sliding_window_pattern([True]))
    assert refused(path).startswith(": attention.sliding_window_pattern=[True]: expected a number of layers, or true")
    write(path, WIDE, lambda writer: writer.add_rope_dimension_count(8))
    assert refused(path) == ": rope.dimension_count=8 is not supported: expected 16, as of a head"
    write(path, WIDE, lambda writer: writer.add_uint16("split.count", 3))
    assert refused(path) == " is one of 3 parts: join them first, with llama-gguf-split --merge"
    write(path, WIDE, byte_level(trained, pre="falcon"))
    assert refused(path).startswith(": tokenizer.ggml.pre 'falcon' is not supported: expected one of gpt-2, ")
    write(path, WIDE, byte_level(trained, eos=340))
    assert refused(path) == ": tokenizer.ggml.eos_token_id=340: expected an id from 0 to 339"
    write(path, WIDE, lambda writer: writer.add_tokenizer_model("bert") or writer.add_token_list(["a"]))
    assert refused(path) == ": tokenizer.ggml.model 'bert' is not supported: expected gpt2 or llama"
    write(path, WIDE, lambda writer: writer.add_tensor("blk.0.attn_gate.weight", np.ones((2, 2), np.float32)))
    assert refused(path) == " has tensors that its metadata does not ask for (blk.0.attn_gate.weight)"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    add_settings(writer, "qwen3_moe", WIDE)
    for finish in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        finish()
    writer.close()
    assert refused(path) == " lacks the setting qwen3moe.expert_count: convert the model again"
    write(path, dataclasses.replace(WIDE, rope_scaling=dataclasses.replace(SCALING, high=8.0), rope_theta=5e5))
    assert refused(path).startswith(
        ": rope_freqs.weight scales RoPE in a way that is not supported: expected Llama 3's"
    )


def test_a_quantisation_that_is_not_known(tmp_path):
    path = write(tmp_path / "tiny.gguf", WIDE)
    name = b"blk.0.ffn_up.weight"
    data = bytearray(path.read_bytes())
    at = data.index(name) + len(name) + 4 + 2 * 8  # behind the number of axes and their lengths
    data[at] = 99
    path.write_bytes(data)
    known = "which is not supported: expected F32, F16, Q4_0, Q4_1, "
    assert refused(path).startswith(f": a tensor has the quantisation type 99, {known}")
    data[at] = gguf.GGMLQuantizationType.I32
    path.write_bytes(data)
    assert refused(path).startswith(f": blk.0.ffn_up.weight has the quantisation I32, {known}")


@pytest.mark.slow
def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "tiny.gguf", WIDE)
    data = path.read_bytes()
    for size in (0, 3, 10, 200, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:size])
        assert refused(path).startswith(" cannot be read as GGUF: ")
    at = data.index(b"rope.freq_base") + len("rope.freq_base")
    array = struct.pack("<IIQ", 9, 4, 2**50)  # of so many uint32, in place of a number
    path.write_bytes(data[:at] + array + data[at + len(array) :])
    assert refused(path).startswith(" cannot be read as GGUF: ")
    path.write_bytes(b"text" * 99)
    assert refused(path).startswith(" cannot be read as GGUF: ")
    assert refused(tmp_path / "none.gguf") == " cannot be read: there is no such file"
    assert f"name its GGUF file itself, {path}" in refused(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refused(path).endswith("which the library gguf reads: pip install 'rlhf_jax[gguf]'")


def test_a_language_model_is_no_reward_model(tmp_path):
    path = write(tmp_path / "tiny.gguf", WIDE)
    with pytest.raises(InputError, match="has no score head"):
        models.load_reward(path)


def test_no_element_is_lost_sight_of(tmp_path):
    def change(writer):
        weight = np.array(writer.tensors[0]["output_norm.weight"].tensor)
        weight[3] = np.nan
        writer.tensors[0]["output_norm.weight"].tensor = weight

    said = refused(write(tmp_path / "tiny.gguf", WIDE, change))
    assert said == ": model.norm.weight has an element that is NaN: expected finite weights"
