import dataclasses
import json
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.models import directory, families, gguf_tokenizer
from rlhf_jax.types import InputError
from tests import tiny

gguf = pytest.importorskip("gguf", reason="the library gguf is not installed")

# Sizes of whole blocks of Q8_0, in every family; Llama 3's scaling has the context and bounds of its models.
WIDE = dataclasses.replace(tiny.LLAMA, d_model=64, head_dim=16, d_ff=96, vocab_size=340)
SCALING = models.Llama3Scaling(factor=8.0, low=1.0, high=4.0, original_length=8192)
CONFIGS = {
    "llama": WIDE,
    "llama3": dataclasses.replace(WIDE, rope_scaling=SCALING, rope_theta=5e5, tie_embeddings=True),
    "qwen2": dataclasses.replace(WIDE, bias="qkv"),
    "qwen3": dataclasses.replace(WIDE, qk_norm="head", head_dim=32, tie_embeddings=True),
    "gemma2": dataclasses.replace(
        WIDE,
        mlp="geglu",
        unit_offset=True,
        post_norm=True,
        scale_embedding=True,
        tie_embeddings=True,
        window=3,
        full_layers=(1,),
        query_size=16,
        attention_cap=2.0,
        logit_cap=3.0,
    ),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def llama_cpp_name(name: str, kind: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    layer = ""
    if stem.startswith("model.layers."):
        _, _, number, stem = stem.split(".", 3)
        layer = f"blk.{number}."
    return f"{layer}{(GEMMA if kind == 'gemma2' else NAMES)[stem]}.{suffix}"


def write(path, config, change=lambda writer: None, quantised=False, **tokens):
    """A file as llama.cpp's converter writes it: rows of query and key permuted, Gemma's norms with their 1."""
    kind = families.family(config)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.n_layers)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_context_length(config.max_length)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if kind == "gemma2":
        writer.add_sliding_window(config.window)
        writer.add_attn_logit_softcapping(config.attention_cap)
        writer.add_final_logit_softcapping(config.logit_cap)
    if scaling := config.rope_scaling:
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
    for entry, layer, _ in directory._layout(config, scalar=False):
        for name, tensor in directory._tensors(entry, layer, tiny.policy(config)):
            if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = config.n_heads if "q_proj" in name else config.n_kv_heads
                tensor = tensor.reshape(heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)
            if kind == "gemma2" and name.endswith("norm.weight"):
                tensor = tensor + 1
            tensor, theirs = np.ascontiguousarray(tensor), llama_cpp_name(name, kind)
            if quantised and tensor.ndim == 2:
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
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(tiny.policy(WIDE)), strict=True):
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


def pieces(pre, text):
    return [piece for piece, _ in gguf_tokenizer._CUTS[pre]().pre_tokenize_str(text)]


def test_text_is_cut_up_as_the_file_says():
    text = "I'LL pay 12345\n now"
    assert pieces("gpt-2", text) == ["I", "'", "LL", "Ġpay", "Ġ12345", "Ċ", "Ġnow"]
    assert pieces("smollm", text) == ["I", "'", "LL", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "Ċ", "Ġnow"]
    assert pieces("llama-bpe", text) == ["I", "'LL", "Ġpay", "Ġ", "123", "45", "Ċ", "Ġnow"]
    assert pieces("qwen2", text) == ["I", "'LL", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "Ċ", "Ġnow"]


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
    expected = ": architecture 'mamba' is not supported: expected one of llama, qwen2, qwen3, gemma2"
    assert refused(path) == expected
    write(path, WIDE, lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN) or
          writer.add_rope_scaling_factor(4.0))  # fmt: skip
    assert refused(path) == ": rope.scaling.type 'yarn' is not supported: expected none"
    write(path, WIDE, lambda writer: writer.add_rope_dimension_count(8))
    assert refused(path) == ": rope.dimension_count=8 is not supported: expected 16, as of a head"
    write(path, WIDE, lambda writer: writer.add_uint16("split.count", 3))
    assert refused(path) == " is one of 3 parts: join them first, with llama-gguf-split --merge"
    write(path, WIDE, byte_level(trained, pre="tekken"))
    assert refused(path).startswith(": tokenizer.ggml.pre 'tekken' is not supported: expected one of gpt-2, ")
    write(path, WIDE, byte_level(trained, eos=340))
    assert refused(path) == ": tokenizer.ggml.eos_token_id=340: expected an id from 0 to 339"
    write(path, WIDE, lambda writer: writer.add_tokenizer_model("bert") or writer.add_token_list(["a"]))
    assert refused(path) == ": tokenizer.ggml.model 'bert' is not supported: expected gpt2 or llama"
    write(path, WIDE, lambda writer: writer.add_tensor("blk.0.attn_gate.weight", np.ones((2, 2), np.float32)))
    assert refused(path) == " has tensors that its metadata does not ask for (blk.0.attn_gate.weight)"
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
