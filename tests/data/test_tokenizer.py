"""Tests of rlhf_jax.data.tokenizer: training, boundaries between prompt and response, templates, bad directories."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from rlhf_jax.data import tokenizer as lib
from rlhf_jax.types import InputError

TEXTS = [f"Question: what is {n} plus {n + 1}?\nAnswer: it is {2 * n + 1}, naïve friend." for n in range(60)]
# Wraps each turn, writes a newline after EOS and trims what people wrote, as published templates do.
OTHER = (
    "{%- for m in messages -%}{{ '[' + m.role + ']' + m.content | trim + eos_token + '\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '[assistant]' }}{%- endif -%}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return lib.train(TEXTS, 280, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def other(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = lib.load(tmp_path)
    loaded.chat_template = OTHER
    return loaded


def chat(*contents):
    """Messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def test_training_is_deterministic_and_loads_in_transformers(tokenizer, tmp_path):
    lib.train(TEXTS, 280, tmp_path / "a")
    lib.train(iter(TEXTS), 280, tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert len(loaded) == 280
    assert loaded.eos_token == loaded.pad_token == lib.EOS
    assert loaded.chat_template == lib.CHAT_TEMPLATE
    assert loaded.apply_chat_template(chat("hi"), tokenize=False, add_generation_prompt=True) == "Question: hi\nAnswer:"


@pytest.mark.parametrize("text", ["", " ", "naïve 北京 \x00\r\n\t🙂", "Answer:\n\n  12 3.14", "a\n"])
def test_any_text_survives(tokenizer, text):
    (ids,) = lib.encode(tokenizer, [text], special=True)
    assert ids.dtype == np.int32
    assert lib.decode(tokenizer, ids) == text


def test_texts_that_are_encoded_some_at_a_time_keep_their_order(tokenizer, monkeypatch):
    texts = [f"{n} " * n for n in range(60)]
    monkeypatch.setattr(lib, "AT_ONCE", 20)
    assert [lib.decode(tokenizer, ids) for ids in lib.encode(tokenizer, texts, special=False)] == texts


def test_digits_are_tokens(tokenizer):
    (ids,) = lib.encode(tokenizer, ["117"], special=False)
    assert len(ids) == 3 and ids[0] == ids[1] != ids[2]


def test_decode_takes_the_masked_ids_and_drops_eos(tokenizer):
    ids = np.array(lib.render_completion(tokenizer, "say", " yes or no"))
    assert lib.decode(tokenizer, np.append(5, ids), np.arange(len(ids) + 1) > 0) == " yes or no"


@pytest.mark.parametrize("answer", ["4.", "", " 4", "\n\nfour", "  \t4", "'s", "!?", "12 34", "é", "北京"])
@pytest.mark.parametrize("question", ["2 plus 2?", "trailing \n\n", "北"])
def test_prompt_and_response_are_tokens_of_the_whole(tokenizer, question, answer):
    whole = tokenizer(f"Question: {question}\nAnswer: {answer}{lib.EOS}")["input_ids"]
    start = lib.render_prompt(tokenizer, chat(question))
    end = lib.render_completion(tokenizer, chat(question), answer)
    assert start + end == whole
    assert end.count(tokenizer.eos_token_id) == 1 and end[-1] == tokenizer.eos_token_id


def test_our_template_is_rendered_as_jinja_would(tokenizer):
    system = [{"role": "system", "content": "Be {brief}. "}]
    for messages in (chat("a", "b", " c "), system + chat("x\n"), system + chat("1", "2"), chat("{{ 3 }}")):
        for generation in (True, False):
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
            assert lib._template(tokenizer, [messages], generation) == [expected]


def test_verbatim_text_gets_no_template(tokenizer):
    assert lib.decode(tokenizer, lib.render_prompt(tokenizer, "Once upon")) == "Once upon"
    ids = lib.render_completion(tokenizer, "Once upon", " a time")
    assert ids == tokenizer(" a time")["input_ids"] + [tokenizer.eos_token_id]
    assert lib.render_completion(tokenizer, "Once upon", " a time" + lib.EOS) == ids


def test_bulk_rendering_is_one_by_one_rendering(tokenizer):
    prompts = ["plain", chat("asked"), chat("a", "b", "c"), "more"]
    responses = [["x", "y"], [], ["z"], [" w", "", "v"]]
    starts, ends = lib.render(tokenizer, prompts, responses)
    for prompt, texts, start, some in zip(prompts, responses, starts, ends, strict=True):
        assert start.tolist() == lib.render_prompt(tokenizer, prompt)
        assert [ids.tolist() for ids in some] == [lib.render_completion(tokenizer, prompt, text) for text in texts]


def test_response_ends_at_eos_whatever_the_template_writes_after_it(tokenizer, other):
    assert lib.decode(other, lib.render_prompt(other, chat(" hi "))) == "[user]hi\n[assistant]"
    ids = lib.render_completion(other, chat("hi"), " there ")
    assert ids == tokenizer("there" + lib.EOS)["input_ids"]


def shown(tokenizer, ids, learn):
    """The conversation with what is learnt in braces."""
    text = ""
    for n, (token, counts) in enumerate(zip(ids.tolist(), learn.tolist(), strict=True)):
        before = bool(n and learn[n - 1])
        text += "{" * (counts and not before) + "}" * (before and not counts) + tokenizer.decode([token])
    return text + "}" * bool(learn[-1])


def test_conversation_learns_the_assistants_turns_alone(tokenizer, other):
    (one,) = lib.render_conversations(tokenizer, [chat("a?", "b.", "c?", "d.")])
    assert shown(tokenizer, *one) == ("Question: a?\nAnswer:{ b.<|endoftext|>}Question: c?\nAnswer:{ d.<|endoftext|>}")
    two, three = lib.render_conversations(other, [chat("a?", "b.", "c?", "d."), chat("e", "f")])
    assert shown(other, *two) == (
        "[user]a?<|endoftext|>\n[assistant]{b.<|endoftext|>}\n[user]c?<|endoftext|>\n[assistant]{d.<|endoftext|>}"
    )
    assert shown(other, *three) == "[user]e<|endoftext|>\n[assistant]{f<|endoftext|>}"


def test_template_that_rewrites_earlier_turns_is_refused(other):
    other.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="generation prompt does not begin"):
        lib.render_completion(other, chat("a"), "b")
    other.chat_template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(InputError, match="rewrites earlier turns"):
        lib.render_conversations(other, [chat("a", "b", "c", "d")])


@pytest.mark.parametrize("template", ["{{ raise_exception('no\nsystem') }}", "{{ 1 + messages[0].content }}"])
def test_template_that_raises_is_an_input_error(template, other):
    other.chat_template = template
    with pytest.raises(InputError, match="refuses a conversation") as error:
        lib.render_prompt(other, chat("a"))
    assert "\n" not in str(error.value)


def test_bos_and_truncation_of_a_published_tokenizer(tokenizer, tmp_path):
    from tokenizers import processors

    tokenizer.save_pretrained(tmp_path)
    published = lib.load(tmp_path)
    bpe = published.backend_tokenizer
    bpe.post_processor = processors.TemplateProcessing(single="[ $A", special_tokens=[("[", 60)])
    bpe.enable_truncation(2)
    bpe.enable_padding(length=50)
    assert lib.render_prompt(published, "ab")[0] == 60
    assert lib.render_completion(published, "ab", "cd efghi")[0] != 60
    assert lib.render_prompt(published, chat("ab")) == lib.render_prompt(tokenizer, chat("ab"))


def test_pad_and_chat_template_have_defaults(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    loaded = lib.load(tmp_path)
    assert loaded.chat_template == lib.CHAT_TEMPLATE
    loaded.pad_token = None
    assert lib.pad_id(loaded) == loaded.eos_token_id
    loaded.pad_token = "!"
    assert lib.pad_id(loaded) == loaded.convert_tokens_to_ids("!") != loaded.eos_token_id


def test_vocabulary(tokenizer):
    lib.check_vocabulary(tokenizer, 280)
    with pytest.raises(InputError, match=r"ids up to 279 but the model's vocabulary is 279"):
        lib.check_vocabulary(tokenizer, 279)


def test_bad_directories_and_sizes(tokenizer, tmp_path):
    with pytest.raises(InputError, match="no such tokenizer directory"):
        lib.load(tmp_path / "none")
    with pytest.raises(InputError, match="holds no usable tokenizer"):
        lib.load(tmp_path)
    tokenizer.save_pretrained(tmp_path / "cut")
    (tmp_path / "cut/tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(InputError, match="holds no usable tokenizer"):
        lib.load(tmp_path / "cut")
    tokenizer.save_pretrained(tmp_path / "no_eos")
    (tmp_path / "no_eos/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(InputError, match="no EOS token"):
        lib.load(tmp_path / "no_eos")
    with pytest.raises(InputError, match="at least 257"):
        lib.train(TEXTS, 256, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer):
    written = lib.token_bytes(tokenizer)
    for text in ("naïve, 12  \n\tx", "\N{GRINNING FACE} \x00\x7f\xad\u0100", "a" + lib.EOS + "b"):
        ids = lib.encode(tokenizer, [text], special=False)[0]
        assert b"".join(written[i] for i in ids) == text.encode()
