"""The tokenizer in a GGUF file as one of the library `tokenizers`, with its special tokens and its chat template.

A file has one of two kinds. "gpt2" is a byte-level BPE with its merges; how text is cut up before them is a name,
`tokenizer.ggml.pre`, whose meaning is in llama.cpp's code and, for those of `_KINDS`, here. "llama" is SentencePiece's
BPE, with a score for each token in place of merges: two neighbours merge in the order of the scores of what they make.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_jax.models.files import shown
from rlhf_jax.types import InputError

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6  # types of tokens; 1 is a normal one
_SPACE = "▁"  # what SentencePiece writes for a space

_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # contractions
_FRONT = r"[^\r\n\p{L}\p{N}]?"  # a sign or a space in front of a word is part of it
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"  # letters without case are both
_WORDS = _SHORT, rf"{_FRONT}\p{{L}}+"
_CASED_WORDS = rf"{_FRONT}{_UPPER}*{_LOWER}+", rf"{_FRONT}{_UPPER}+{_LOWER}*"  # "aB" is two


def _split(words: Sequence[str], digits: str, ends: str = r"\r\n") -> pre_tokenizers.PreTokenizer:
    """The cuts of GPT-4 and later: words, numbers of so many `digits`, other signs and their `ends`, lines, space."""
    pattern = "|".join([*words, rf"\p{{N}}{digits}", rf" ?[^\s\p{{L}}\p{{N}}]+[{ends}]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"])
    cut = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits() -> pre_tokenizers.PreTokenizer:
    """GPT-2's cuts, with each digit apart."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _gpt4() -> pre_tokenizers.PreTokenizer:
    return _split(_WORDS, "{1,3}")


def _qwen2() -> pre_tokenizers.PreTokenizer:
    return _split(_WORDS, "")


def _gpt4o() -> pre_tokenizers.PreTokenizer:
    return _split([f"{word}{_SHORT}?" for word in _CASED_WORDS], "{1,3}", r"\r\n/")


def _tekken() -> pre_tokenizers.PreTokenizer:
    return _split(_CASED_WORDS, "", r"\r\n/")


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How text is prepared for the merges of a byte-level BPE."""

    names: tuple[str, ...]  # in files
    cut: Callable[[], pre_tokenizers.PreTokenizer]
    composed: bool = False  # text is in Unicode's normal form C
    whole: bool = False  # a word that is a token is not merged step by step
    bos: bool = False  # BOS is in front of a text, unless the file says otherwise


_KINDS = (
    _Kind(("gpt-2", "olmo", "phi-2"), _gpt2),
    _Kind(("smollm", "starcoder", "refact"), _digits),
    _Kind(("llama-bpe", "llama3", "llama-v3"), _gpt4, whole=True, bos=True),
    # Llama 3's vocabulary without BOS, as SmolLM 3 has it; llama.cpp merges its words step by step all the same.
    _Kind(("smaug-bpe",), _gpt4, whole=True),
    _Kind(("dbrx",), _gpt4),  # OLMo 2 and 3, Phi-4
    _Kind(("qwen2", "deepseek-r1-qwen"), _qwen2, composed=True),
    _Kind(("gpt-4o",), _gpt4o),  # Phi-4-mini
    _Kind(("tekken",), _tekken, whole=True, bos=True),  # Mistral NeMo and later
)
_NAMED = {name: kind for kind in _KINDS for name in kind.names}


def build(value: Callable[..., Any]) -> PreTrainedTokenizerFast:
    """A tokenizer from the settings of a GGUF file, which `value(name, default)` returns.

    Raises InputError for a kind that is unknown, or settings that are not of one piece.
    """
    kind, pre = value("tokenizer.ggml.model"), value("tokenizer.ggml.pre", "default")
    tokens, types = value("tokenizer.ggml.tokens", []), value("tokenizer.ggml.token_type", [])
    types = types or [1] * len(tokens)
    if len(types) != len(tokens) or not tokens:
        raise InputError(f"tokenizer.ggml.tokens has {len(tokens)} tokens, and token_type {len(types)}: expected equal")
    ids = {token: i for i, token in enumerate(tokens) if not (types[i] == _UNUSED and token.startswith("[PAD"))}
    if kind == "gpt2":
        backend = _byte_level(ids, value("tokenizer.ggml.merges", []), pre)
    elif kind == "llama":
        scores = value("tokenizer.ggml.scores", [])
        if len(scores) != len(tokens):
            raise InputError(f"tokenizer.ggml.scores has {len(scores)} scores for {len(tokens)} tokens: expected equal")
        prefix = value("tokenizer.ggml.add_space_prefix", True)
        backend = _sentencepiece(ids, types, scores, prefix)
    else:
        raise InputError(f"tokenizer.ggml.model {shown(kind)} is not supported: expected gpt2 or llama")
    added = {token: types[i] for token, i in ids.items() if types[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED)}
    backend.add_tokens(
        [
            tokenizers.AddedToken(token, special=which != _USER_DEFINED, normalized=False)
            for token, which in added.items()
        ]
    )
    special = {f"{name}_token": _special(value, f"{theirs}_token_id", tokens) for name, theirs in _SPECIAL.items()}
    bos = special["bos_token"]
    if bos is not None and value("tokenizer.ggml.add_bos_token", kind == "llama" or _NAMED[pre].bos):
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, ids[bos])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special["bos_token"],
        eos_token=special["eos_token"],
        unk_token=special["unk_token"],
        pad_token=special["pad_token"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = value("tokenizer.chat_template")
    return tokenizer


_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _special(value: Callable[..., Any], name: str, tokens: Sequence[str]) -> str | None:
    """The token whose id a setting names, None where there is no setting."""
    if (i := value(f"tokenizer.ggml.{name}")) is None:
        return None
    if not 0 <= i < len(tokens):
        raise InputError(f"tokenizer.ggml.{name}={i}: expected an id from 0 to {len(tokens) - 1}")
    return tokens[i]


def _byte_level(ids: Mapping[str, int], merges: Sequence[str], pre: str) -> tokenizers.Tokenizer:
    if pre not in _NAMED:
        raise InputError(f"tokenizer.ggml.pre {shown(pre)} is not supported: expected one of {', '.join(_NAMED)}")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    for left, right in pairs:
        if not {left, right, left + right} <= ids.keys():
            raise InputError(f"tokenizer.ggml.merges: {shown(f'{left} {right}')} is no merge of two tokens")
    kind = _NAMED[pre]
    backend = tokenizers.Tokenizer(models.BPE(vocab={**ids}, merges=pairs, ignore_merges=kind.whole))
    if kind.composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = kind.cut()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    ids: Mapping[str, int], types: Sequence[int], scores: Sequence[float], prefix: bool
) -> tokenizers.Tokenizer:
    unknown = next((token for token, i in ids.items() if types[i] == _UNKNOWN), None)
    mergeable = {token: i for token, i in ids.items() if types[i] not in (_UNKNOWN, _CONTROL, _UNUSED, _BYTE)}
    found = [
        (-scores[i], mergeable[left], mergeable[right], (left, right))
        for token, i in mergeable.items()
        for left, right in ((token[:n], token[n:]) for n in range(1, len(token)))
        if left in mergeable and right in mergeable
    ]
    bpe = models.BPE(
        vocab={**ids},
        merges=[pair for *_, pair in sorted(found)],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(bpe)
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    spelled = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*spelled, decoders.Strip(" ", 1, 0)] if prefix else spelled)
    return backend
