"""Chat templates in the styles of published models: what is rendered, and which tokens count in the loss."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from rlhf_jax.data import pipeline
from rlhf_jax.data import tokenizer as lib
from rlhf_jax.types import InputError, Tokens

HEAD = "{% for m in messages %}"
TAIL = "{% endfor %}{% if add_generation_prompt %}"
CHATML = (
    HEAD
    + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    + TAIL
    + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    HEAD
    + "{% if loop.first %}{{ bos_token }}{% endif %}"
    + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    + TAIL
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}"
    "{% endif %}" + HEAD + "{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}"
    + HEAD
    + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + HEAD
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}" + TAIL + "{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    HEAD
    + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
    + TAIL
    + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# name: (template, kind of BPE, special tokens by use, further ones, EOS after loading, what is rendered, with what
# counts in braces)
STYLES = {
    "chatml": (
        CHATML,
        "bytes",
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{oh dear<|im_end|>}\n"
        "<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n{no<|im_end|>}",
    ),
    "llama 3": (
        LLAMA_3,
        "bytes",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{oh dear<|eot_id|>}"
        "<|start_header_id|>user<|end_header_id|>\n\nso?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{no<|eot_id|>}",
    ),
    "llama 2": (
        LLAMA_2,
        "sentencepiece",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        [],
        "</s>",
        "<s> [INST] hi [/INST]{ oh dear </s>}<s> [INST] so? [/INST]{ no </s>}",
    ),
    "mistral": (
        MISTRAL,
        "sentencepiece",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        [],
        "</s>",
        "<s> [INST] hi [/INST]{oh dear</s>} [INST] so? [/INST]{no</s>}",
    ),
    "gemma": (
        GEMMA,
        "spaces",
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        ["<start_of_turn>", "<end_of_turn>"],
        "<end_of_turn>",
        "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n{oh dear<end_of_turn>}\n"
        "<start_of_turn>user\nso?<end_of_turn>\n<start_of_turn>model\n{no<end_of_turn>}",
    ),
    "phi": (
        PHI,
        "sentencepiece",
        {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"},
        ["<|user|>", "<|system|>", "<|assistant|>", "<|end|>"],
        "<|end|>",
        "<|user|> \nhi<|end|> \n<|assistant|> \n{oh dear<|end|>} \n<|user|> \nso?<|end|> \n<|assistant|> \n{no<|end|>}",
    ),
    "gpt-2": (
        None,
        "bytes",
        {"eos_token": "<|endoftext|>"},
        [],
        "<|endoftext|>",
        "Question: hi\nAnswer:{ oh dear<|endoftext|>}Question: so?\nAnswer:{ no<|endoftext|>}",
    ),
    "llama 2 base": (
        None,
        "sentencepiece",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        [],
        "</s>",
        "<s> Question: hi\nAnswer:{ oh dear</s>} Question: so?\nAnswer:{ no</s>}",
    ),
}
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "oh dear"},
    {"role": "user", "content": "so?"},
    {"role": "assistant", "content": "no"},
]


def bpe(kind, special):
    """A vocabulary of characters, words with the space before them, and special tokens, which include BOS if any."""
    letters = [chr(n) for n in range(33, 127)]
    space = "Ġ" if kind == "bytes" else "▁"
    if kind == "bytes":
        letters = pre_tokenizers.ByteLevel.alphabet()
    names = [*special, *(f"<0x{n:02X}>" for n in range(256)), *sorted({*letters, space})]
    starts = [space + letter for letter in "abcdefghijklmnopqrstuvwxyz["]
    vocabulary = {name: n for n, name in enumerate(names + starts)}
    model = models.BPE(vocabulary, [tuple(pair) for pair in starts], byte_fallback=kind != "bytes", unk_token=None)
    backend = tokenizers.Tokenizer(model)
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        spaces = normalizers.Replace(" ", space)
        first = [normalizers.Prepend(space)] if kind == "sentencepiece" else []
        backend.normalizer = normalizers.Sequence([*first, spaces])
        strip = [decoders.Strip(" ", 1, 0)] if first else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in special])
    return backend


def directory(style, path):
    """A tokenizer of this style in the files of a published one."""
    template, kind, used, further, _, _ = STYLES[style]
    backend = bpe(kind, [*dict.fromkeys(used.values()), *further])
    if bos := used.get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **used}
    if template and "<|" in template:  # either place is in use
        (path / "chat_template.jinja").write_text(template)
    elif template:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(params=STYLES)
def style(request):
    return request.param


@pytest.fixture
def tokenizer(style, tmp_path):
    return lib.load(directory(style, tmp_path / "model"))


def marked(batch, tokenizer):
    """The text of a batch, with the tokens that count in braces."""
    real, text, before = batch.segment > 0, "", False
    for i, counts in zip(batch.tokens[real].tolist(), batch.target[real].tolist(), strict=True):
        token = tokenizer.convert_ids_to_tokens(i)
        for spelling, character in {"▁": " ", "Ġ": " ", "Ċ": "\n", "<0x0A>": "\n"}.items():
            token = token.replace(spelling, character)
        text += "{" * (counts and not before) + "}" * (before and not counts) + token
        before = counts
    return text + "}" * before


def demonstrations(row, tokenizer):
    (batch,) = pipeline.demonstrations([row], tokenizer, length=200, batch=1, seed=0, epochs=1)
    return batch


def test_the_assistants_turns_alone_count(style, tokenizer):
    batch = demonstrations({"messages": TALK}, tokenizer)
    print(f"\n{style}\n{pipeline.listing(batch, tokenizer)}")  # pytest shows it when what follows fails, or with -s
    assert marked(batch, tokenizer) == STYLES[style][5]
    # The last turn as a prompt and its completion.
    batch = demonstrations({"prompt": TALK[:3], "completion": "no"}, tokenizer)
    before, counts, last = STYLES[style][5].rpartition("{")
    assert marked(batch, tokenizer) == before.replace("{", "").replace("}", "") + counts + last


def test_each_turn_is_learnt_as_it_is_generated(style, tokenizer):
    """Each assistant's turn follows what a policy is prompted with, and ends where it stops."""
    ((ids, learn),) = lib.render_conversations(tokenizer, [TALK])
    ends = np.flatnonzero(learn & ~np.append(learn[1:], False)) + 1
    for n, end in zip((1, 3), ends, strict=True):
        turn = lib.render_completion(tokenizer, TALK[:n], TALK[n]["content"])
        assert ids[:end].tolist() == lib.render_prompt(tokenizer, TALK[:n]) + turn
        assert turn.count(tokenizer.eos_token_id) == 1 and turn[-1] == tokenizer.eos_token_id
        assert lib.decode(tokenizer, turn).strip() == TALK[n]["content"]
    assert tokenizer.eos_token == STYLES[style][4]
    assert lib.pad_id(tokenizer) == tokenizer.convert_tokens_to_ids(STYLES[style][2].get("pad_token", STYLES[style][4]))


def test_the_ids_are_those_of_transformers(style, tokenizer, tmp_path):
    if STYLES[style][0]:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    whole = tokenizer.apply_chat_template(TALK)["input_ids"]
    ((ids, _),) = lib.render_conversations(lib.load(tmp_path / "model"), [TALK])
    assert whole[: len(ids)] == ids.tolist()
    assert whole.count(tokenizer.bos_token_id) == (2 if style == "llama 2" else style not in ("chatml", "gpt-2", "phi"))


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    again = lib.load(tmp_path / "saved")
    assert (again.eos_token, again.chat_template) == (tokenizer.eos_token, tokenizer.chat_template)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == tokenizer.eos_token


@pytest.mark.parametrize("style", ["chatml", "llama 3", "llama 2", "phi", "gpt-2"], indirect=True)
def test_system_message(style, tokenizer):
    batch = demonstrations({"messages": [{"role": "system", "content": "Be brief."}, *TALK]}, tokenizer)
    text = marked(batch, tokenizer)
    assert "Be brief." in text
    assert text.count("{") == 2 and text.endswith(STYLES[style][5][STYLES[style][5].index("{") :])


@pytest.mark.parametrize("style", ["gemma", "mistral"], indirect=True)
def test_refused_system_message(style, tokenizer):
    with pytest.raises(InputError, match="refuses a conversation: TemplateError"):
        demonstrations({"messages": [{"role": "system", "content": "Be brief."}, *TALK]}, tokenizer)


def test_what_earlier_turns_leave_out_is_not_learnt(tmp_path):
    # As Qwen3: the last turn has its thoughts, which are gone from the turns before it.
    thinking = CHATML.replace("m.content", "(thought if loop.last and m.role == 'assistant' else '') + m.content")
    tokenizer = lib.load(directory("chatml", tmp_path))
    tokenizer.chat_template = "{% set thought = '<think> </think>' %}" + thinking
    talk = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    ((ids, learn),) = lib.render_conversations(tokenizer, [talk])
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    text += "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think> </think>d<|im_end|>"
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids[learn]) == "b<|im_end|><think> </think>d<|im_end|>"


@pytest.mark.parametrize("style", ["llama 2"], indirect=True)
def test_a_response_has_no_space_that_was_not_asked_for(tokenizer):
    assert marked(demonstrations({"prompt": "so ", "completion": "no"}, tokenizer), tokenizer) == "<s> so { no</s>}"
    for prompt, completion, text in [("so", " no", "<s> so{ no</s>}"), ("so:", "no", "<s> so:{no</s>}")]:
        assert marked(demonstrations({"prompt": prompt, "completion": completion}, tokenizer), tokenizer) == text


def test_listing(tmp_path):
    tokenizer = lib.load(directory("gpt-2", tmp_path / "model"))
    eos, a, space_b = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "a", "Ġb"])
    tokens = np.array([[a, space_b, eos], [a, eos, eos]])
    target = np.array([[False, True, True], [False] * 3])
    shown = pipeline.listing(Tokens(tokens, np.array([[1, 1, 1], [1, 0, 0]]), target), tokenizer)
    assert shown.split("\n") == [f"  {a:>6}  a", f"* {space_b:>6}  Ġb", "*      0  <|endoftext|>", f"  {a:>6}  a"]


def processed(path, single, **special):
    """The tokenizer of a directory, whose post-processor is another."""
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    named = [(token, backend.token_to_id(token)) for token in single.split() if token != "$A"]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    backend.save(str(path / "tokenizer.json"))
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | special))
    return lib.load(path)


@pytest.mark.parametrize(
    ("single", "special", "front"),
    [
        ("$A </s>", {}, ""),
        ("<s> $A </s>", {}, "<s>"),
        ("<s> $A <unk>", {"pad_token": "<unk>"}, "<s>"),
        ("<s> $A <s>", {"eos_token": "<s>"}, "<s>"),
        ("$A <s>", {"eos_token": "<s>"}, ""),
        ("<unk> <s> $A </s> <unk>", {"cls_token": "<unk>", "sep_token": "</s>"}, "<unk><s>"),
    ],
)
def test_only_what_stands_in_front_of_a_text_is_taken(single, special, front, tmp_path):
    tokenizer = processed(directory("llama 2 base", tmp_path / "model"), single, **special)
    eos = tokenizer.eos_token
    for prompt in ("so:", front + "so:"):
        batch = demonstrations({"prompt": prompt, "completion": "no"}, tokenizer)
        assert marked(batch, tokenizer) == f"{front} so:{{no{eos}}}"
        asked, _ = pipeline.every_prompt([{"prompt": prompt}], tokenizer, length=20)
        assert asked.tokens[asked.mask].tolist() == batch.tokens[batch.segment > 0].tolist()[: -len("no") - 1]
        ranking = {"prompt": prompt, "responses": ["a", "b"], "ranks": [0, 1]}
        (pair,) = pipeline.rankings([ranking], tokenizer, length=20, batch=1, seed=0, epochs=1)
        assert tokenizer.convert_ids_to_tokens(pair.tokens[0, 0][pair.mask[0, 0]])[-2:] == ["a", eos]
        (text,) = pipeline.text([{"text": prompt}], tokenizer, length=20, batch=1, seed=0, epochs=1)
        read = tokenizer.convert_ids_to_tokens(text.tokens[text.segment > 0])
        assert "".join(read) == f"{front}▁so:{eos}"
    chat = lib.render_prompt(tokenizer, [{"role": "user", "content": "hi"}])
    assert "".join(tokenizer.convert_ids_to_tokens(chat)) == f"{front}▁Question:▁hi<0x0A>Answer:"


def test_a_document_that_is_empty_behind_what_stands_in_front_is_refused(tmp_path):
    tokenizer = lib.load(directory("llama 2 base", tmp_path / "model"))
    rows = [{"text": ""}, {"text": "a"}, {"text": "<s>"}]
    assert pipeline.text(rows, tokenizer, length=20, batch=1, seed=0).counts == pipeline.Counts(kept=1, empty=2)


ALWAYS = HEAD + (
    "{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n' }}"
    "{% else %}{{ '### Response:\n' + m.content + END }}{% endif %}{% endfor %}"
    "{{ '### Response:' }}"
)


def with_template(path, template):
    directory("chatml", path)
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return lib.load(path)


@pytest.mark.parametrize(
    ("template", "first", "last"),
    [
        (ALWAYS.replace("END", r"'\n<|im_end|>\n'"), "\ntwo\n<|im_end|>", "\nfour\n<|im_end|>"),
        (ALWAYS.replace("END", "'<|endoftext|>'"), "\ntwo<|endoftext|>", "\nfour<|endoftext|>"),
        # Nothing ends a turn: what the template writes next is no part of it, and the last one is ended.
        (ALWAYS.replace("END", r"'\n'"), "\ntwo", "\nfour<|endoftext|>"),
        (CHATML.replace(r"'<|im_end|>\n'", r"'\n'").replace("<|im_end|>\n", "\n"), "two", "four<|endoftext|>"),
        # Nor does a generation prompt that is a control token, and always written.
        (
            HEAD
            + "{{ ('<|im_start|>' if m.role == 'user' else '<|im_end|>') + m.content + '\n' }}{% endfor %}<|im_end|>",
            "two",
            "four<|endoftext|>",
        ),
        (CHATML.replace("m.content", "m.content | trim"), "two<|im_end|>", "four<|im_end|>"),
        (CHATML.replace("m.content", "m.content + ' ###'"), "two ###<|im_end|>", "four ###<|im_end|>"),
    ],
)
def test_an_answer_ends_with_the_eos_that_the_template_writes_after_it(template, first, last, tmp_path):
    tokenizer = with_template(tmp_path / "model", template)
    texts = ["one", "two", "three", "four"]
    talk = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts, strict=True)]
    ids = lib.render_completion(tokenizer, talk[:1], "two")
    assert tokenizer.decode(ids) == last.replace("four", "two")
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(lib.render_completion(tokenizer, talk[:3], "four")) == last
    ((ids, learn),) = lib.render_conversations(tokenizer, [talk])
    assert tokenizer.decode(ids[learn]) == first + last
    ((ids, learn),) = lib.render_conversations(tokenizer, [talk[:2]])
    assert tokenizer.decode(ids[learn]) == last.replace("four", "two")
    assert tokenizer.decode(lib.render(tokenizer, [talk[:1]], [["two"]], [[False]])[1][0][0]).endswith("two")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "renders a conversation as no text"),
        ("{# nothing #}", "renders a conversation as no text"),
        (HEAD + "{{ m.content if m.role == 'user' }}{% endfor %}", "leaves out what the assistant says"),
        (
            CHATML.replace("+ m.content", "+ ('' if m.content == 'b' else m.content)"),
            "leaves out what the assistant says",
        ),
        (
            CHATML.replace("+ m.content", "+ ('<|im_end|>' if m.role == 'assistant' else '') + m.content"),
            "writes the EOS",
        ),
        (CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}"), "does not begin the turn"),
    ],
)
def test_a_template_that_ends_no_answer_is_refused(template, message, tmp_path):
    tokenizer = with_template(tmp_path / "model", template)
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": "b"}
    with pytest.raises(InputError, match=message) as error:
        demonstrations(row, tokenizer)
    assert "\n" not in str(error.value)


def test_a_template_renders_on_one_date(tmp_path):
    template = "{{ strftime_now('%d %b %Y, %-d %H:%M') }}" + CHATML
    tokenizer = with_template(tmp_path / "model", template)
    prompt = [{"role": "user", "content": "a"}]
    assert tokenizer.decode(lib.render_prompt(tokenizer, prompt)).startswith("01 Jan 2025, 1 00:00<|im_start|>user")
    tokenizer.save_pretrained(tmp_path / "saved")  # what was rendered is written down beside the model
    assert json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["template_date"] == "2025-01-01"
    config = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(config | {"template_date": "2026-11-09"}))
    asked = lib.render_prompt(lib.load(tmp_path / "model"), prompt)
    assert tokenizer.decode(asked).startswith("09 Nov 2026, 9 00:00<|im_start|>user")
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(config | {"template_date": "today"}))
    with pytest.raises(InputError, match=r"tokenizer_config.json: template_date='today': expected a date"):
        lib.load(tmp_path / "model")


def test_a_template_that_draws_at_random_is_refused(tmp_path):
    with pytest.raises(InputError, match="draws at random"):
        with_template(tmp_path / "model", "{{ ['a', 'b'] | random }}" + CHATML)


@pytest.mark.parametrize("style", ["chatml", "llama 2", "gemma", "gpt-2", "phi"], indirect=True)
def test_control_tokens_that_rows_spell_can_be_kept_as_text(style, tokenizer, tmp_path):
    eos = tokenizer.eos_token
    said = f"x{eos} y"
    rows = [
        {"prompt": [{"role": "user", "content": said}], "completion": said},
        {"prompt": said, "completion": said},
    ]
    for row in rows:
        ids = lib.render_completion(tokenizer, row["prompt"], row["completion"])
        assert ids.count(tokenizer.eos_token_id) == 2
    lib.read_control_tokens(tokenizer, "text")
    for row in rows:
        start, end = lib.render_prompt(tokenizer, row["prompt"]), lib.render_completion(tokenizer, row["prompt"], said)
        assert end.count(tokenizer.eos_token_id) == 1 and end[-1] == tokenizer.eos_token_id
        assert lib.decode(tokenizer, end).strip() == said and said in lib.decode(tokenizer, start)
        batch = demonstrations(row, tokenizer)
        assert batch.tokens[batch.segment > 0].tolist() == start + end
    (document,) = lib.documents(tokenizer, [said])
    assert tokenizer.eos_token_id not in document and lib.decode(tokenizer, document).strip() == said
    tokenizer.save_pretrained(tmp_path / "saved")
    assert lib.keeps_text(lib.load(tmp_path / "saved"))


def test_what_ends_an_answer(tmp_path):
    path = directory("gemma", tmp_path / "model")
    tokenizer = lib.load(path)
    eos, bos, turn = tokenizer.convert_tokens_to_ids(["<eos>", "<bos>", "<end_of_turn>"])

    def stops():
        return lib.stop_ids(tokenizer, lib.generation(path, tokenizer))

    assert stops() == (turn,)
    (path / "config.json").write_text(json.dumps({"eos_token_id": turn}))
    assert stops() == (turn,) and lib.generation(path, tokenizer) is None
    (path / "config.json").write_text(json.dumps({"eos_token_id": [eos, bos]}))
    assert stops() == (turn, eos, bos) and lib.generation(path) is None
    (path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        stops()
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, turn, bos, eos]}))
    assert stops() == (turn, eos, bos)
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    assert stops() == (turn,)


@pytest.mark.parametrize("ends", [-1, 10**9, True, 2.0, "2", [2, None], [2, [3]]])
def test_an_end_that_is_no_id_is_refused(ends, tmp_path):
    tokenizer = lib.load(directory("gemma", tmp_path / "model"))
    with pytest.raises(
        InputError, match=r"eos_token_id=.* in generation_config.json.*: expected an id .* from 0 to \d+"
    ):
        lib.stop_ids(tokenizer, {"eos_token_id": ends})


def test_the_bytes_of_tokens_are_those_of_the_text(style, tokenizer):
    written, text = lib.token_bytes(tokenizer), "ab 12 [naïve] \n\N{GRINNING FACE} " + tokenizer.eos_token
    (ids,) = lib.encode(tokenizer, [text], special=False)
    joined = b"".join(written[i] for i in ids)
    assert joined.removeprefix(b" " * (STYLES[style][1] == "sentencepiece")) == text.encode()
