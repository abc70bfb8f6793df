"""Text to token ids and back: a byte-level BPE of our own, any Hugging Face tokenizer, and chat templates.

A prompt or response that is a string is verbatim text. A prompt that is a list of messages is rendered by the
tokenizer's chat template up to the point where the assistant starts to write, and a response to it is the content of
the assistant's next message. A prompt and its response are tokenised apart, because that is how a policy meets them.

Each response ends with the EOS token, and so does each document. EOS is what the chat template ends the assistant's
turns with, where that is another token than the tokenizer names: one token at which training and generation end. BOS is
what the template writes or, before verbatim text, what the tokenizer adds. In our own tokenizer EOS is the one special
token and the padding as well, which is safe because masks are explicit everywhere: nothing infers a mask from a token
id.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rlhf_jax.types import InputError

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found", which is as we want it
from transformers import AutoTokenizer, PreTrainedTokenizerFast

Tokenizer: TypeAlias = PreTrainedTokenizerFast
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Prompt = str | list[Message]
Ids = np.ndarray  # [n] int32

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


def train(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Learns a byte-level BPE of at most `vocab_size` ids from `texts`, saves it under `path` and returns it.

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
    """The tokenizer in a directory of the Hugging Face layout. Its EOS is what ends the assistant's turns.

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
    if tokenizer.chat_template not in (None, CHAT_TEMPLATE):
        tokenizer.eos_token = _turn_end(tokenizer) or tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    if tokenizer.chat_template is None:
        adds_bos = tokenizer.bos_token_id in encode(tokenizer, ["a"], special=True)[0].tolist()
        tokenizer.chat_template = "{{- bos_token -}}" * adds_bos + CHAT_TEMPLATE
    return tokenizer


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
    """What a prompt asks: the text itself, or the content of its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def fingerprint(tokenizer: Tokenizer) -> str:
    """Of all that the ids of a text depend on."""
    made_of = tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token, tokenizers.__version__
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """InputError if the tokenizer can produce an id for which a model of `vocab_size` ids has no embedding."""
    last = max(tokenizer.get_vocab().values())
    if last >= vocab_size:
        raise InputError(
            f"the tokenizer has ids up to {last} but the model's vocabulary is {vocab_size}: use the model's own"
            " tokenizer, or give the model a larger vocabulary"
        )


def encode(tokenizer: Tokenizer, texts: Sequence[str], special: bool | Sequence[bool]) -> list[Ids]:
    """The ids of many texts; with `special`, together with what the tokenizer puts around a text, such as a BOS."""
    if not isinstance(special, bool):
        parts = {
            flag: iter(encode(tokenizer, [text for text, s in zip(texts, special, strict=True) if s == flag], flag))
            for flag in (False, True)
        }
        return [next(parts[flag]) for flag in special]
    bpe = tokenizer.backend_tokenizer
    bpe.no_truncation()  # a published tokenizer.json may ask for either
    bpe.no_padding()
    ids: list[Ids] = []
    for start in range(0, len(texts), 4096):  # bounds the memory that the encodings take
        batch = bpe.encode_batch_fast(list(texts[start : start + 4096]), add_special_tokens=special)
        ids.extend(np.array(encoding.ids, np.int32) for encoding in batch)
    return ids


def decode(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, mask: np.ndarray | None = None) -> str:
    """The text of the ids where `mask` is true, without special tokens, spaces kept as they are."""
    kept = np.asarray(ids) if mask is None else np.asarray(ids)[np.asarray(mask)]
    return tokenizer.backend_tokenizer.decode(kept.tolist(), skip_special_tokens=True)


def render(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
) -> tuple[list[Ids], list[list[Ids]]]:
    """The ids of many prompts, and of the responses to each, which end with EOS."""
    starts, ends = _texts(tokenizer, prompts, responses)
    prompt_ids = encode(tokenizer, starts, [isinstance(prompt, str) for prompt in prompts])
    before = [start for start, texts in zip(starts, ends, strict=True) for _ in texts]
    flat = iter(_follow(tokenizer, before, [text for texts in ends for text in texts]))
    return prompt_ids, [[_ended(tokenizer, next(flat)) for _ in texts] for texts in ends]


def render_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The ids that a policy continues."""
    return render(tokenizer, [prompt], [[]])[0][0].tolist()


def render_completion(tokenizer: Tokenizer, prompt: Prompt, completion: str) -> list[int]:
    """The ids of the response `completion` to `prompt`, EOS included."""
    return render(tokenizer, [prompt], [[completion]])[1][0][0].tolist()


def render_conversations(tokenizer: Tokenizer, conversations: Sequence[list[Message]]) -> list[tuple[Ids, np.ndarray]]:
    """The ids of whole conversations, each with a mask of what the assistant wrote, EOS included.

    A template may leave something out of earlier turns, such as what the assistant thought: they are learnt as the
    last one finds them. Raises InputError if it rewrites what an earlier turn answered to.
    """
    turns = [[n for n, m in enumerate(messages) if m["role"] == "assistant"] for messages in conversations]
    starts, ends = _texts(
        tokenizer,
        [messages[:n] for messages, ns in zip(conversations, turns, strict=True) for n in ns],
        [[messages[n]["content"]] for messages, ns in zip(conversations, turns, strict=True) for n in ns],
    )
    past, asked, answered = [], [], []  # all up to a turn of the assistant's, what then led to the next, the next
    turn = zip(starts, ends, strict=True)
    for ns in turns:
        mine = [next(turn) for _ in ns]
        whole = mine[-1][0] + mine[-1][1][0]
        so_far = ""
        for start, (end,) in mine:
            if not whole.startswith(start + end):
                end = whole[len(start) :].partition(tokenizer.eos_token)[0] + tokenizer.eos_token
            if not whole.startswith(start + end):
                raise InputError(
                    "the chat template rewrites earlier turns: split conversations into prompt, completion"
                )
            past.append(so_far)
            asked.append(start[len(so_far) :])
            answered.append(end)
            so_far = start + end
    asked_ids = iter(_follow(tokenizer, past, asked))
    answered_ids = iter(_follow(tokenizer, starts, answered))
    rendered = []
    for ns in turns:
        ids: list[Ids] = []
        learn: list[np.ndarray] = []
        for n in ns:
            before, turn_ids = next(asked_ids), next(answered_ids)
            if n == ns[-1]:  # the template alone says what ends an inner turn
                turn_ids = _ended(tokenizer, turn_ids)
            ids += [before, turn_ids]
            learn += [np.zeros(len(before), bool), np.ones(len(turn_ids), bool)]
        rendered.append((np.concatenate(ids), np.concatenate(learn)))
    return rendered


def _follow(tokenizer: Tokenizer, before: Sequence[str], texts: Sequence[str]) -> list[Ids]:
    """The ids of texts that each follow another, which is tokenised apart.

    Tokenizers after SentencePiece set a space before a text of its own, which is not there when it follows another:
    with them the ids are what the text adds to the ids of the other one, unless a token reaches across the boundary.
    """
    apart = encode(tokenizer, texts, special=False)
    if tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]:
        return apart
    starts = encode(tokenizer, before, special=False)
    wholes = encode(tokenizer, [start + text for start, text in zip(before, texts, strict=True)], special=False)
    return [
        whole[len(start) :] if np.array_equal(whole[: len(start)], start) else ids
        for start, whole, ids in zip(starts, wholes, apart, strict=True)
    ]


def _turn_end(tokenizer: Tokenizer) -> str | None:
    """The first added token that the chat template writes after what the assistant says."""
    probe = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]
    try:
        (text,) = _template(tokenizer, [probe], add_generation_prompt=False)
    except InputError:  # the template can say so when it is used
        return None
    added = tokenizer.added_tokens_decoder
    (ids,) = encode(tokenizer, [text.rpartition("answer")[2]], special=False)
    return next((str(added[i]) for i in ids.tolist() if i in added), None)


def _texts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """The prompts as text, and what each of their responses adds to that text, up to EOS where that is in it."""
    chats = [prompt for prompt in prompts if not isinstance(prompt, str)]
    chat_starts = iter(_template(tokenizer, chats, add_generation_prompt=True))
    starts = [prompt if isinstance(prompt, str) else next(chat_starts) for prompt in prompts]
    wholes = iter(
        _template(
            tokenizer,
            [
                [*prompt, {"role": "assistant", "content": text}]
                for prompt, texts in zip(prompts, responses, strict=True)
                if not isinstance(prompt, str)
                for text in texts
            ],
            add_generation_prompt=False,
        )
    )
    special = "|".join(re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values())
    eos_tail = re.compile(rf"({re.escape(tokenizer.eos_token)})(?:\s|{special})+$")  # a template may end with a newline
    ends = []
    for prompt, start, texts in zip(prompts, starts, responses, strict=True):
        if isinstance(prompt, str):
            ends.append([eos_tail.sub(r"\1", text) for text in texts])
            continue
        ends.append([])
        for _ in texts:
            whole = next(wholes)
            if not whole.startswith(start):
                raise InputError("the chat template's generation prompt does not begin the turn that it renders")
            ends[-1].append(eos_tail.sub(r"\1", whole[len(start) :]))
    return starts, ends


def _template(tokenizer: Tokenizer, conversations: list[list[Message]], add_generation_prompt: bool) -> list[str]:
    if tokenizer.chat_template == CHAT_TEMPLATE:  # the same without Jinja, which takes longer than tokenising
        ends = {"user": "\n", "assistant": tokenizer.eos_token, "system": "\n"}
        last = "Answer:" if add_generation_prompt else ""
        return [
            "".join(_STARTS[m["role"]] + m["content"] + ends[m["role"]] for m in messages) + last
            for messages in conversations
        ]
    try:
        texts: Any = conversations and tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # how a template refuses, for instance, a system message; or trips over one
        raise InputError(f"the tokenizer's chat template refuses a conversation: {_line(error)}") from error
    return texts


def _ended(tokenizer: Tokenizer, ids: Ids) -> Ids:
    """The ids with an EOS at the end, which is added if there is none."""
    eos = tokenizer.eos_token_id
    return ids if len(ids) and ids[-1] == eos else np.append(ids, np.int32(eos))


def _line(error: Exception) -> str:
    """The error as one line."""
    return f"{type(error).__name__}: {json.dumps(str(error)[:200], ensure_ascii=False)}"
