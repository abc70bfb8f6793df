"""How the text of a byte-level BPE in a GGUF file is cut up before it is merged."""

import random

import pytest
import regex

from rlhf_jax.models import gguf_tokenizer


def pieces(pre, text):
    found = gguf_tokenizer._NAMED[pre].cut().pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in found]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", "I|'|LL| pay| McDonald|'s| 12345|\n| now"),
        ("smollm", "I|'|LL| pay| McDonald|'s| |1|2|3|4|5|\n| now"),
        ("llama-bpe", "I|'LL| pay| McDonald|'s| |123|45|\n| now"),
        ("smaug-bpe", "I|'LL| pay| McDonald|'s| |123|45|\n| now"),
        ("dbrx", "I|'LL| pay| McDonald|'s| |123|45|\n| now"),
        ("qwen2", "I|'LL| pay| McDonald|'s| |1|2|3|4|5|\n| now"),
        ("gpt-4o", "I'LL| pay| Mc|Donald's| |123|45|\n| now"),
        ("tekken", "I|'LL| pay| Mc|Donald|'s| |1|2|3|4|5|\n| now"),
    ],
)
def test_text_is_cut_up_as_the_file_says(pre, expected):
    assert pieces(pre, "I'LL pay McDonald's 12345\n now") == expected.split("|")


# The encodings as tiktoken publishes them: cl100k_base, whose groups are possessive there, and o200k_base.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = rf"""[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?
|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?
|\p{{N}}{{1,3}}|[ ]?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
PUBLISHED = {
    "dbrx": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}
|[ ]?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+""",
    "gpt-4o": O200K,
    "tekken": O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", ""),
}


@pytest.mark.parametrize("pre", PUBLISHED)
def test_cuts_are_those_of_the_published_expressions(pre):
    rng = random.Random(0)
    parts = [
        "a",
        "Bc",
        "DEF",
        "é",
        "É",
        "e\u0301",
        "ǅ",
        "ß",
        "你好",
        "ひ",
        "ع",
        "1",
        "2345",
        "½",
        "٣",
        "'s",
        "'LL",
        "'x",
    ]
    parts += [".", "/", "//", "€", "🎉", "_", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000"]
    for _ in range(300):
        text = "".join(rng.choices(parts, k=12))
        assert pieces(pre, text) == regex.findall(PUBLISHED[pre], text, regex.VERBOSE), repr(text)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        *((name, ["a", "bc"]) for name in ("gpt-2", "smollm", "qwen2", "dbrx", "gpt-4o")),
        ("smaug-bpe", ["abc"]),
        *((name, ["<s>", "abc"]) for name in ("llama-bpe", "tekken")),
    ],
)
def test_whole_words_and_bos(pre, expected):
    settings = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["<s>", "a", "b", "c", "bc", "abc"],
        "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["b c"],
        "tokenizer.ggml.bos_token_id": 0,
    }
    tokenizer = gguf_tokenizer.build(lambda name, default=None: settings.get(name, default))
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc")["input_ids"]) == expected
