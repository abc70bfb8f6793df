"""Text to token ids and back: a byte-level BPE of our own, any Hugging Face tokenizer, and chat templates.

A prompt or response that is a string is verbatim text. A prompt that is a list of messages is rendered by the
tokenizer's chat template up to the point where the assistant starts to write, and a response to it is the content of
the assistant's next message. A prompt and its response are tokenised separately, because a policy meets them so.

Each response ends with the EOS token, and so does each document. EOS is the token with which the chat template ends the
assistant's turns, where that is another than the tokenizer names: one token at which training and generation end. What
a template writes behind it, such as a generation prompt that it always writes, is no part of the answer. In front of
verbatim text stand the special tokens that the tokenizer puts there, such as BOS, once each even if the text spells
them. In our own tokenizer EOS is the one special token and the padding as well, which is safe because masks are
explicit everywhere: nothing infers a mask from a token id.

Two settings of rendering are kept in tokenizer_config.json, so that whatever starts from a directory renders alike:

    template_date   the date that `strftime_now` gives to a chat template, on whichever day it is rendered
    control_tokens  "warn": control tokens that rows spell are read as such, and the pipelines count those rows;
                    "text": they are read as plain text, and only the template and the tokenizer write control tokens
"""

import datetime
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlhf_jax.data import ahead
from rlhf_jax.types import InputError

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found", which is as we want it
from transformers import AutoTokenizer, PreTrainedTokenizerFast

Tokenizer: TypeAlias = PreTrainedTokenizerFast
Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": text}, and perhaps "weight": 0
Prompt = str | list[Message]
Ids = np.ndarray  # [n] int32
ControlTokens = Literal["warn", "text"]

AT_ONCE = 2**18  # characters that are encoded at a time
EOS = "<|endoftext|>"
# The generation prompt ends at the colon and the response starts with the space, where byte-level BPE never merges:
# the tokens of a prompt and of its response are together the tokens of the whole.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{{ 'Question: ' + message.content + '\\n' }}"
    "{%- elif message.role == 'assistant' -%}{{ 'Answer: ' + message.content + eos_token }}"
    "{%- else -%}{{ message.content + '\\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Answer:' }}{%- endif -%}"
)

_STARTS = {"user": "Question: ", "assistant": "Answer: ", "system": ""}

DATE = "2025-01-01"  # a template's today, unless template_date says otherwise
# Put before a template that asks for the time: its own function reads the clock.
_CLOCK = (
    "{% macro strftime_now(format) %}{% set text = namespace(value=format) %}"
    "{% for code, value in template_date.items() %}{% set text.value = text.value | replace(code, value) %}{% endfor %}"
    "{{ text.value }}{% endmacro %}\n"
)
_DIRECTIVES = [f"%{flag}{letter}" for letter in "aAbBcdfHIjmMpSUwWxXyY" for flag in ("-", "")]
_MARK = "\ufdd0\ufdd1"  # noncharacters, which no text holds: around a control token that is to be read as text


def train(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Learn a byte-level BPE of at most `vocab_size` ids from `texts`, save it under `path` and return it.

    The same texts give the same file. Digits are tokens of their own, so that numbers are spelled alike everywhere.
    A small corpus can run out of pairs to merge before `vocab_size` is reached.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise InputError(f"vocab_size is {vocab_size}: it must hold {len(alphabet)} bytes and {EOS}, so at least 257")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = tokenizers.AddedToken(EOS, special=True, normalized=False)
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return load(path)


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in a directory of the Hugging Face layout. Its EOS is the token that ends the assistant's turns.

    One without a chat template is given ours, with a BOS in front where the tokenizer adds one to a text.
    """
    if not Path(path).is_dir():
        raise InputError(f"{path}: no such tokenizer directory")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries raise anything, bare Exception included, on a broken file
        raise InputError(f"{path}: holds no usable tokenizer ({_line(error)})") from error
    if not tokenizer.is_fast:
        raise InputError(f"{path}: holds a slow tokenizer; convert it to a tokenizer.json")
    return prepared(tokenizer, Path(path))


def prepared(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """The tokenizer of a directory or a file at `path`, changed in place as `load` tells."""
    _check_settings(tokenizer, path)
    if tokenizer.chat_template not in (None, CHAT_TEMPLATE):
        tokenizer.eos_token = _turn_end(tokenizer) or tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    if tokenizer.chat_template is None:
        first = front(tokenizer)
        spelled = json.dumps("".join(tokenizer.convert_ids_to_tokens(first)), ensure_ascii=False)
        bos = "bos_token" if first == [tokenizer.bos_token_id] else spelled
        tokenizer.chat_template = f"{{{{- {bos} -}}}}" * bool(first) + CHAT_TEMPLATE
    return tokenizer


def read_control_tokens(tokenizer: Tokenizer, control_tokens: ControlTokens) -> Tokenizer:
    """The tokenizer, set to read control tokens that rows spell as such ("warn") or as plain text ("text").

    It is changed in place, and keeps the setting where it is saved.
    """
    tokenizer.init_kwargs["control_tokens"] = control_tokens
    return tokenizer


def keeps_text(tokenizer: Tokenizer) -> bool:
    """Whether control tokens that rows spell are read as plain text."""
    return tokenizer.init_kwargs.get("control_tokens") == "text"


def _check_settings(tokenizer: Tokenizer, path: Path) -> None:
    """Raise InputError unless the settings of rendering are usable, and record the date that a template gets."""
    file, settings = path / "tokenizer_config.json", tokenizer.init_kwargs
    if (mode := settings.get("control_tokens", "warn")) not in get_args(ControlTokens):
        raise InputError(f"{file}: control_tokens={mode!r}: expected warn or text")
    templates = str(tokenizer.chat_template or "")
    if re.search(r"\|\s*random\b|\blipsum\b", templates):
        raise InputError(f"{path}: the chat template draws at random, so that no run could be repeated; change it")
    if "strftime_now" not in templates:
        return
    date = settings.setdefault("template_date", DATE)
    try:
        datetime.date.fromisoformat(date)
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: template_date={date!r}: expected a date such as {DATE}") from error


def stop_ids(tokenizer: Tokenizer, generation: Mapping[str, Any] | None) -> tuple[int, ...]:
    """The ids at which an answer ends: the tokenizer's own EOS first, then the further ones that `generation` names.

    `generation` holds the settings of a generation_config.json, as `generation` reads them, or None. Raises InputError
    for an eos_token_id that is no id of the tokenizer.
    """
    last = max(tokenizer.get_vocab().values())
    named = _ends(generation or {})
    for i in named:
        if type(i) is not int or not 0 <= i <= last:
            raise InputError(f"eos_token_id={i!r} in generation_config.json or config.json: expected an id of the"
                             f" tokenizer, from 0 to {last}; correct it there")  # fmt: skip
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *named]))


def generation(path: str | Path, tokenizer: Tokenizer | None = None) -> dict[str, Any] | None:
    """The settings in generation_config.json of a directory, None if there is none; InputError if it cannot be read.

    Where there is none, and a `tokenizer` is given, config.json speaks instead, as it does in `transformers`: of the
    EOS that it names, if that is not the tokenizer's own.
    """
    settings = _settings(Path(path) / "generation_config.json")
    if settings is None and tokenizer is not None:
        named = _ends(_settings(Path(path) / "config.json") or {})
        if set(named) - {tokenizer.eos_token_id}:
            return {"eos_token_id": named}
    return settings


def stopping(settings: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The settings of a generation_config.json, such that generation stops at the tokenizer's EOS too."""
    if tokenizer is None or tokenizer.eos_token_id in (ids := _ends(settings)):
        return settings
    return settings | {"eos_token_id": [tokenizer.eos_token_id, *ids] if ids else tokenizer.eos_token_id}


def _settings(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None if there is no file. InputError unless its eos_token_id is one or several ids."""
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{file} cannot be read: expected an object with eos_token_id")
    if not all(type(i) is int and i >= 0 for i in _ends(settings)):
        raise InputError(f"{file}: eos_token_id={settings['eos_token_id']!r}: expected an id, or a list of ids")
    return settings


def _ends(settings: Mapping[str, Any]) -> list[Any]:
    """The EOS ids that settings name, one, several or none."""
    named = settings.get("eos_token_id")
    return named if isinstance(named, list) else [] if named is None else [named]


def pad_id(tokenizer: Tokenizer) -> int:
    """The id that fills unused columns; EOS where the tokenizer names none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def prompt_text(prompt: Prompt) -> str:
    """The question of a prompt: the text itself, or the content of its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of everything that the ids of a document depend on."""
    read = "front once", keeps_text(tokenizer)
    made_of = tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token, tokenizers.__version__, *read
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise InputError if the tokenizer can produce an id for which a model of `vocab_size` ids has no embedding."""
    last = max(tokenizer.get_vocab().values())
    if last >= vocab_size:
        raise InputError(
            f"the tokenizer has ids up to {last} but the model's vocabulary is {vocab_size}: use the model's own"
            " tokenizer, or give the model a larger vocabulary"
        )


def control_tokens(tokenizer: Tokenizer) -> re.Pattern[str]:
    """A pattern that finds any spelling of a special token in a text."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(added | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # the latter finds nothing


def spells_control_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> list[bool]:
    """Whether each text spells control tokens that are read as such, other than what the tokenizer puts in front."""
    if keeps_text(tokenizer):
        return [False for _ in texts]
    pattern = control_tokens(tokenizer)
    first = "".join(tokenizer.convert_ids_to_tokens(front(tokenizer)))
    return [pattern.search(text.removeprefix(first)) is not None for text in texts]


def encode(tokenizer: Tokenizer, texts: Sequence[str], special: bool | Sequence[bool]) -> list[Ids]:
    """The ids of many texts; with `special`, behind what the tokenizer puts in front of a text, such as a BOS.

    What a text begins with already does not come again. What a tokenizer would put behind a text, such as an EOS, does
    not belong there: a prompt goes on.
    """
    bpe = tokenizer.backend_tokenizer
    bpe.no_truncation()  # a published tokenizer.json may ask for either
    bpe.no_padding()
    some = list(ahead.batches(texts, len, AT_ONCE))
    read = functools.partial(bpe.encode_batch_fast, add_special_tokens=False)
    # Encodings take much memory, and copies of their ids much time, in which the tokenizer reads on.
    encoded = ahead.results(read, some, threads=2) if len(some) > 1 else map(read, some)
    ids = [np.fromiter(one.ids, np.int32, len(one)) for batch in encoded for one in batch]
    for n, text in enumerate(texts):
        if _MARK in text:
            ids[n] = _encode_marked(tokenizer, text)
    first = front(tokenizer) if special is True or (special and any(special)) else []
    if first:
        flags = [special] * len(texts) if isinstance(special, bool) else special
        ids = [_behind(first, one) if flag else one for one, flag in zip(ids, flags, strict=True)]
    return ids


def front(tokenizer: Tokenizer) -> list[int]:
    """The ids of the special tokens that the tokenizer puts in front of a text."""
    bpe = tokenizer.backend_tokenizer
    bpe.no_truncation()
    bpe.no_padding()
    encoding = bpe.encode("a")
    return encoding.ids[: encoding.special_tokens_mask.index(0)] if 0 in encoding.special_tokens_mask else []


def _behind(front: list[int], ids: Ids) -> Ids:
    """The ids with those of `front` before them, as far as they do not begin with these already."""
    if ids[:1].tolist() == front[:1]:
        return ids
    missing = next(n for n in range(len(front) + 1) if ids[: len(front) - n].tolist() == front[n:])
    return np.append(np.array(front[:missing], np.int32), ids)


def _marked(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """The texts of rows, in which the control tokens are marked that are to be read as plain text."""
    if not keeps_text(tokenizer):
        return list(texts)
    pattern = control_tokens(tokenizer)
    return [pattern.sub(rf"{_MARK}\g<0>{_MARK}", text.replace(_MARK, "")) for text in texts]


def _encode_marked(tokenizer: Tokenizer, text: str) -> Ids:
    """The ids of a text in which every other piece is a control token that is to be read as plain text."""
    first, *pieces = text.split(_MARK)
    parts = encode(tokenizer, [first], special=False)
    for n, piece in enumerate(pieces):
        tokenizer.backend_tokenizer.encode_special_tokens = n % 2 == 0
        try:
            parts += _follow(tokenizer, ["\n"], [piece])  # behind something: a text of its own may get a space in front
        finally:
            tokenizer.backend_tokenizer.encode_special_tokens = False
    return np.concatenate(parts)


def decode(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, mask: np.ndarray | None = None) -> str:
    """The text of the ids where `mask` is true, without special tokens, spaces kept as they are."""
    kept = np.asarray(ids) if mask is None else np.asarray(ids)[np.asarray(mask)]
    return tokenizer.backend_tokenizer.decode(kept.tolist(), skip_special_tokens=True)


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each id writes, in UTF-8, perhaps only a part of a character; b"" for an id without a token.

    The bytes of a text's tokens together are the text, with the special tokens as they are spelled.
    """
    vocabulary = tokenizer.get_vocab()
    written = [b""] * (max(vocabulary.values()) + 1)
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    kinds = {part["type"] for part in (decoder or {}).get("decoders", [decoder or {"type": None}])}
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    of_letter = _bytes_of_letters()
    for piece, i in vocabulary.items():
        if i in added:
            written[i] = added[i].encode()
        elif "ByteLevel" in kinds:
            written[i] = b"".join(of_letter.get(letter, letter.encode()) for letter in piece)
        elif "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            written[i] = bytes([int(piece[3:5], 16)])
        elif kinds & {"Metaspace", "ByteFallback", "Replace"}:  # after SentencePiece
            written[i] = piece.replace("\u2581", " ").encode()
        else:
            written[i] = tokenizer.backend_tokenizer.decode([i]).encode()
    return written


def _bytes_of_letters() -> dict[str, bytes]:
    """The byte that each letter of a byte-level vocabulary stands for: printable ones stand for themselves, the others
    in order for the letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(0x100 + n): bytes([byte]) for n, byte in enumerate(others)}


def documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """The ids of many documents, behind what the tokenizer puts in front of a text, without an EOS."""
    return encode(tokenizer, _marked(tokenizer, texts), special=True)


def render(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    ended: Sequence[Sequence[bool]] | None = None,
) -> tuple[list[Ids], list[list[Ids]]]:
    """The ids of many prompts, and of the responses to each, which end with EOS.

    A response that is said not to have `ended`, because it was cut, ends without one, where its text does.
    """
    has_end = [[True] * len(texts) for texts in responses] if ended is None else ended
    starts, ends = _texts(tokenizer, prompts, responses, has_end)
    prompt_ids = encode(tokenizer, starts, [isinstance(prompt, str) for prompt in prompts])
    before = [start for start, texts in zip(starts, ends, strict=True) for _ in texts]
    flat = iter(_follow(tokenizer, before, [text for texts in ends for text in texts]))
    return prompt_ids, [
        [_ended(tokenizer, next(flat)) if whole else next(flat) for whole in flags] for flags in has_end
    ]


def render_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The ids that a policy continues."""
    return render(tokenizer, [prompt], [[]])[0][0].tolist()


def render_completion(tokenizer: Tokenizer, prompt: Prompt, completion: str) -> list[int]:
    """The ids of the response `completion` to `prompt`, EOS included; for checking, as rows are rendered together."""
    return render(tokenizer, [prompt], [[completion]])[1][0][0].tolist()


def render_conversations(tokenizer: Tokenizer, conversations: Sequence[list[Message]]) -> list[tuple[Ids, np.ndarray]]:
    """The ids of whole conversations, each with a mask of what the assistant wrote, EOS included.

    Turns of weight 0 are left out of the mask. A template may leave something out of earlier turns, such as what the
    assistant thought: they are learnt as the last one finds them. Raises InputError if it rewrites what an earlier turn
    answered to.
    """
    turns = [[n for n, m in enumerate(messages) if m["role"] == "assistant"] for messages in conversations]
    starts, ends = _texts(
        tokenizer,
        [messages[:n] for messages, ns in zip(conversations, turns, strict=True) for n in ns],
        [[messages[n]["content"]] for messages, ns in zip(conversations, turns, strict=True) for n in ns],
        [[True] for ns in turns for _ in ns],
    )
    past, asked, answered = [], [], []  # all up to a turn of the assistant's, what then led to the next, the next
    turn = zip(starts, ends, strict=True)
    for ns in turns:
        mine = [next(turn) for _ in ns]
        whole = mine[-1][0] + mine[-1][1][0]
        next_starts = [start for start, _ in mine[1:]] + [whole]
        so_far = ""
        for (start, (end,)), next_start in zip(mine, next_starts, strict=True):
            if not whole.startswith(start + end):  # as the last turn finds this one
                content, eos, _ = whole[len(start) : len(next_start)].partition(tokenizer.eos_token)
                if not eos or not whole.startswith(start):
                    raise InputError(
                        "the chat template rewrites earlier turns: split conversations into prompt, completion"
                    )
                end = content + eos
            past.append(so_far)
            asked.append(start[len(so_far) :])
            answered.append(end)
            so_far = start + end
    asked_ids = iter(_follow(tokenizer, past, asked))
    answered_ids = iter(_follow(tokenizer, starts, answered))
    rendered = []
    for messages, ns in zip(conversations, turns, strict=True):
        ids: list[Ids] = []
        learn: list[np.ndarray] = []
        for n in ns:
            before, turn_ids = next(asked_ids), next(answered_ids)
            if n == ns[-1]:  # the template alone says what ends an inner turn
                turn_ids = _ended(tokenizer, turn_ids)
            ids += [before, turn_ids]
            learn += [np.zeros(len(before), bool), np.full(len(turn_ids), messages[n].get("weight", 1) != 0)]
        rendered.append((np.concatenate(ids), np.concatenate(learn)))
    return rendered


def _follow(tokenizer: Tokenizer, before: Sequence[str], texts: Sequence[str]) -> list[Ids]:
    """The ids of texts that each follow another, which is tokenised separately.

    Tokenizers after SentencePiece set a space before a text of its own, which is not there when it follows another:
    with them the ids are what the text adds to the ids of the other one, unless a token reaches across the boundary.
    """
    separate = encode(tokenizer, texts, special=False)
    if tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]:
        return separate
    starts = encode(tokenizer, before, special=False)
    wholes = encode(tokenizer, [start + text for start, text in zip(before, texts, strict=True)], special=False)
    return [
        whole[len(start) :] if np.array_equal(whole[: len(start)], start) else ids
        for start, whole, ids in zip(starts, wholes, separate, strict=True)
    ]


def _turn_end(tokenizer: Tokenizer) -> str | None:
    """The first added token that the chat template writes after what the assistant says, whatever follows.

    It is looked for in what an inner turn and the last one have in common, because a template may also write the next
    turn's header after the last one.
    """
    ask, answer = {"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}
    try:
        (last,) = _template(tokenizer, [[ask, answer]], add_generation_prompt=False)
        after = last.rpartition("answer")[2]
        (inner,) = _template(tokenizer, [[ask, answer, ask, answer]], add_generation_prompt=False)
        if inner.count("answer") == 2:  # all of a template's text, if it leaves earlier answers out
            after = _common(after, inner.split("answer")[1])
    except InputError:  # the template can say so when it is used
        return None
    added = tokenizer.added_tokens_decoder
    (ids,) = encode(tokenizer, [after], special=False)
    return next((str(added[i]) for i in ids.tolist() if i in added), None)


def _texts(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    ended: Sequence[Sequence[bool]],
) -> tuple[list[str], list[list[str]]]:
    """The prompts as text, and what each of their responses adds to that text, up to EOS where that is in it."""
    prompts = [_marked(tokenizer, [prompt])[0] if isinstance(prompt, str) else _plain(tokenizer, prompt)
               for prompt in prompts]  # fmt: skip
    responses = [_marked(tokenizer, texts) for texts in responses]
    chats = [prompt for prompt in prompts if not isinstance(prompt, str)]
    chat_starts = iter(_template(tokenizer, chats, add_generation_prompt=True))
    starts = [prompt if isinstance(prompt, str) else next(chat_starts) for prompt in prompts]
    if not all(starts[n] for n, prompt in enumerate(prompts) if not isinstance(prompt, str)):
        raise InputError("the chat template renders a conversation as no text; correct the tokenizer's template")
    conversations = [
        _answering(prompt, text)
        for prompt, texts in zip(prompts, responses, strict=True)
        if not isinstance(prompt, str)
        for text in texts
    ]
    wholes = zip(conversations, _template(tokenizer, conversations, add_generation_prompt=False), strict=True)
    around = _around(tokenizer, conversations[0][:-1]) if conversations else ("", "")
    special = "|".join(re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values())
    eos_tail = re.compile(rf"({re.escape(tokenizer.eos_token)})(?:\s|{special})+$")  # EOS, and then nothing to say
    ends: list[list[str]] = []
    for prompt, start, texts, flags in zip(prompts, starts, responses, ended, strict=True):
        if not isinstance(prompt, str):
            texts = [_answer(tokenizer, *next(wholes), start, around, flag) for flag in flags]
        ends.append([eos_tail.sub(r"\1", text) if flag else text for text, flag in zip(texts, flags, strict=True)])
    return starts, ends


def _plain(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[Message]:
    """The messages as a template reads them."""
    contents = _marked(tokenizer, [message["content"] for message in messages])
    return [{"role": m["role"], "content": text} for m, text in zip(messages, contents, strict=True)]


def _answering(prompt: Sequence[Message], text: str) -> list[Message]:
    return [*prompt, {"role": "assistant", "content": text}]


def _common(one: str, other: str) -> str:
    """The longest text with which both begin."""
    size = next((n for n, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
    return one[:size]


def _around(tokenizer: Tokenizer, prompt: list[Message]) -> tuple[str, str]:
    """The text that the chat template writes between the prompt and what the assistant says, and the text after that.

    Raises InputError if there is no telling, or if an EOS comes before it.
    """
    probes = [_answering(prompt, text) for text in ("yes", "no")]  # no common start, no common end
    yes, no = _template(tokenizer, probes, add_generation_prompt=False)
    if yes == no:
        raise InputError("the chat template leaves out what the assistant says: correct the tokenizer's template")
    (start,) = _template(tokenizer, [prompt], add_generation_prompt=True)
    before = _common(yes, no).removeprefix(start)
    after = _common(yes[::-1], no[::-1])[::-1]
    if yes.startswith(start) and tokenizer.eos_token in before:
        raise InputError(
            f"the chat template writes the EOS {tokenizer.eos_token} between its generation prompt and what the"
            " assistant says: no answer could begin; correct the tokenizer's template"
        )
    return before, after


def _answer(
    tokenizer: Tokenizer,
    conversation: list[Message],
    whole: str,
    start: str,
    around: tuple[str, str],
    ended: bool,
) -> str:
    """The text that the last turn adds to the prompt's, up to EOS if it ended and the template writes one after it."""
    if not whole.startswith(start):
        raise InputError(
            "the chat template's generation prompt does not begin the turn that it renders; correct the tokenizer's"
            " template, or give the prompt as text"
        )
    if not whole.endswith(around[1]):  # a template may end some conversations otherwise
        around = _around(tokenizer, conversation[:-1])
    before, after = around
    content = whole[len(start) : len(whole) - len(after)]
    if not whole.endswith(after) or (conversation[-1]["content"].strip() and content.strip() == before.strip()):
        raise InputError("the chat template leaves out what the assistant says; correct the tokenizer's template, or"
                         " what it makes of this answer")  # fmt: skip
    to_end, eos, _ = after.partition(tokenizer.eos_token)
    return content + (to_end + eos if ended and eos else "")


def _template(tokenizer: Tokenizer, conversations: list[list[Message]], add_generation_prompt: bool) -> list[str]:
    if tokenizer.chat_template == CHAT_TEMPLATE:  # the same without Jinja, which takes longer than tokenising
        ends = {"user": "\n", "assistant": tokenizer.eos_token, "system": "\n"}
        last = "Answer:" if add_generation_prompt else ""
        return [
            "".join(_STARTS[m["role"]] + m["content"] + ends[m["role"]] for m in messages) + last
            for messages in conversations
        ]
    if not conversations:
        return []
    try:
        template = tokenizer.get_chat_template()
        date = datetime.datetime.fromisoformat(tokenizer.init_kwargs.get("template_date", DATE))
        texts: Any = tokenizer.apply_chat_template(
            conversations,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=_CLOCK + template if "strftime_now" in template else template,
            template_date={code: date.strftime(code) for code in _DIRECTIVES} | {"%%": "%"},
        )
    except Exception as error:  # how a template refuses, for instance, a system message; or trips over one
        raise InputError(
            f"the tokenizer's chat template refuses a conversation: {_line(error)}; change the conversation, or the"
            " template"
        ) from error
    return texts


def _ended(tokenizer: Tokenizer, ids: Ids) -> Ids:
    """The ids with an EOS at the end, which is added if there is none."""
    eos = tokenizer.eos_token_id
    return ids if len(ids) and ids[-1] == eos else np.append(ids, np.int32(eos))


def _line(error: Exception) -> str:
    """The error as one line."""
    return f"{type(error).__name__}: {json.dumps(str(error)[:200], ensure_ascii=False)}"
