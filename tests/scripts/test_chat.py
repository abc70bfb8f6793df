"""Tests of scripts/chat.py on a model that was never trained, and of what scripts/targets.py prints."""

import io
import json
import signal

import jax
import jax.numpy as jnp
import pytest

from rlhf_jax import models
from rlhf_jax.data import tokenizer as lib
from rlhf_jax.rollouts import sampling
from rlhf_jax.rollouts.conversations import Conversations
from rlhf_jax.runs import cli
from rlhf_jax.types import named_key
from scripts import chat, targets
from tests import tiny


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = lib.train(["Question: hello, you?\nAnswer: naïve, and you?"] * 9, 280, path.parent)
    config = models.gpt(2, 16, 2, vocab_size=280, max_length=96)
    model = models.Model(config, tiny.policy(config), tokenizer, models.bind(models.Transformer(config)))
    models.save(model, model.params, path)
    return path


@pytest.fixture
def talk(path, monkeypatch, capsys):
    """Runs the script on these lines: what it wrote to standard output, and to standard error."""

    def run(lines, *flags):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        cli.run(chat.main, chat.Config(model=path), [str(flag) for flag in flags])
        return capsys.readouterr()

    return run


@pytest.fixture
def prompts(path, monkeypatch):
    """The prompts that were answered, as text; each answer is "yes"."""
    prompts, tokenizer = [], lib.load(path)

    def stream(self, name, prompt, key):
        assert len(prompt) + self._cfg.max_new_tokens <= 96
        prompts.append(lib.decode(tokenizer, prompt))
        yield from lib.render_completion(tokenizer, "?", " yes")

    monkeypatch.setattr(Conversations, "stream", stream)
    return prompts


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_type_of_weights_and_computation_is_a_flag(dtype, talk, monkeypatch):
    used = []
    monkeypatch.setattr(Conversations, "stream", lambda self, *args: used.append(self) or iter([]))
    talk(["hi"], "--dtype", dtype)
    (conversations,) = used
    assert {x.dtype for x in jax.tree.leaves(conversations._params)} == {jnp.dtype(dtype)}
    assert conversations._state.cache.key.dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_answers_are_those_of_generate(path, talk, temperature):
    out, err = talk(["hi", "", "you?"], "--temperature", temperature, "--max-new-tokens", 9, "--seed", 4)
    model = models.load(path)
    messages, expected = [], ""
    for number, asked in enumerate(["hi", "you?"]):
        messages.append({"role": "user", "content": asked})
        tokens = jnp.array([lib.render_prompt(model.tokenizer, messages)])
        key = jax.random.fold_in(named_key(4, "chat"), number)
        cfg = sampling.Config(max_new_tokens=9, temperature=temperature, eos_id=model.tokenizer.eos_token_id)
        sample = sampling.generate(model, model.params, tokens, tokens >= 0, key, cfg)
        said = lib.decode(model.tokenizer, sample.tokens[sample.mask].tolist()).rstrip("\ufffd").strip()
        messages.append({"role": "assistant", "content": said})
        expected += said + "\n"
    assert out == expected and len(expected) > 5
    assert not err


def test_a_turn_reads_only_what_is_new(talk, monkeypatch):
    reads, whole = [], Conversations.stream

    def stream(self, name, prompt, key):
        before = self.prefilled
        yield from whole(self, name, prompt, key)
        reads.append((len(prompt), self.prefilled - before))

    monkeypatch.setattr(Conversations, "stream", stream)
    talk(["hi", "you?", "and", "/reset", "hi"], "--temperature", 0, "--max-new-tokens", 5)
    (first, read_first), (second, read_second), (third, read_third), (_, after_reset) = reads
    assert first == read_first and after_reset == 1
    # No prompt is read again; the answer may be, where the tokenizer would spell its text in other tokens.
    assert read_second <= second - first and read_third <= third - second


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--device", "cpu"], ["--devices.tensor", 2], ["--devices.fsdp", 2]])
def test_devices_are_flags(flags, talk, monkeypatch):
    used, start = [], Conversations.__init__

    def init(self, model, *args, **settings):
        used.extend(jax.tree.leaves(model.params))
        start(self, model, *args, **settings)

    settings = ["--temperature", 0, "--max-new-tokens", 5]
    expected = talk(["hi", "you?"], *settings)
    monkeypatch.setattr(Conversations, "__init__", init)
    platforms = jax.config.jax_platforms
    try:
        assert talk(["hi", "you?"], *flags, *settings) == expected
    finally:
        jax.config.update("jax_platforms", platforms)
    assert {len(x.sharding.device_set) for x in used} == {1 if flags[0] == "--device" else 2}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices.tensor", 16], "a mesh of data=1 x fsdp=1 x tensor=16 devices, but there are 8"),
        (["--devices.data", 2], "devices.data does nothing for one conversation"),
        (["--devices.microbatches", 2], "devices.microbatches does nothing for one conversation"),
        (["--device", "tpu"], "device=tpu: jax already computes on cpu"),
    ],
)
def test_devices_that_cannot_be_used_are_refused(flags, message, talk, capsys):
    platforms = jax.config.jax_platforms
    try:
        with pytest.raises(SystemExit):
            talk(["hi"], *flags)
    finally:
        jax.config.update("jax_platforms", platforms)
    assert message in " ".join(capsys.readouterr().err.split())


def test_turns_reset_and_quit(talk, prompts):
    out, err = talk(["hi", "you?", "/reset", "and", "/quit", "never"], "--system", "Be brief.")
    assert prompts == [
        "Be brief.\nQuestion: hi\nAnswer:",
        "Be brief.\nQuestion: hi\nAnswer: yesQuestion: you?\nAnswer:",
        "Be brief.\nQuestion: and\nAnswer:",
    ]
    assert (out, err) == ("yes\n" * 3, "")


def test_oldest_turns_are_dropped_when_the_context_is_full(talk, prompts):
    lines = ["a" * 8, "b" * 8, "c" * 8, "d" * 99, "e" * 8]
    out, err = talk(lines, "--system", "Be.", "--max-new-tokens", 48)
    assert prompts[1].startswith("Be.\nQuestion: aaaaaaaa\nAnswer: yesQuestion: bbb")
    assert prompts[2] == "Be.\nQuestion: bbbbbbbb\nAnswer: yesQuestion: cccccccc\nAnswer:"
    assert prompts[3] == "Be.\nQuestion: cccccccc\nAnswer: yesQuestion: eeeeeeee\nAnswer:"
    assert out == "yes\n" * 4
    dropped = "(the context of 96 tokens is full: oldest turns dropped: 1)"
    first, second, third = err.splitlines()
    assert first == third == dropped
    assert second.startswith("(too long: the prompt has ") and second.endswith("and 48 leave room for an answer)")


def test_control_c_ends_an_answer_and_keeps_what_it_said(talk, prompts, monkeypatch):
    whole = Conversations.stream

    def interrupted(*args):
        for n, i in enumerate(whole(*args)):
            if n == 2 and len(prompts) == 1:
                signal.raise_signal(signal.SIGINT)
            yield i

    monkeypatch.setattr(Conversations, "stream", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        out, _ = talk(["hi", "you?"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert out == "y\nyes\n"
    assert prompts[1] == "Question: hi\nAnswer: yQuestion: you?\nAnswer:"


def test_text_appears_as_soon_as_it_is_whole(path, capsys):
    tokenizer = lib.load(path)
    ids = lib.render_completion(tokenizer, "?", " né 北京 \n\n! ")
    pieces = []

    def tokens():
        for i in ids:
            yield i
            pieces.append(capsys.readouterr().out)

    said = chat.say(tokenizer, tokens())
    assert said == "né 北京 \n\n!" == "".join(pieces)
    assert {"北", "京", " \n\n!"} <= {piece.strip(" ") if piece[-1:] != "!" else piece for piece in pieces}
    assert capsys.readouterr().out == "\n"


def test_every_setting_reaches_the_sampler(talk, monkeypatch):
    asked = []

    def stream(self, name, prompt, key):
        asked.append((jax.random.key_data(key).tolist(), self._cfg))
        return iter(())

    monkeypatch.setattr(Conversations, "stream", stream)
    talk(["hi"])
    talk(["hi"], "--temperature", 0.5, "--top-k", 3, "--top-p", 0.8, "--max-new-tokens", 7, "--seed", 1)
    assert asked[0][1] == sampling.Config(max_new_tokens=48, temperature=0.7, eos_id=(0,))
    assert asked[1][1] == sampling.Config(max_new_tokens=7, temperature=0.5, top_k=3, top_p=0.8, eos_id=(0,))
    assert asked[0][0] != asked[1][0]


def test_targets(path, tmp_path, capsys):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "z"}]}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
    cli.run(targets.main, targets.Config(model=path, data=str(data), data_dir=tmp_path, rows=2), [])
    out = capsys.readouterr().out
    assert out.startswith("EOS <|endoftext|> 0, BOS none, padding <|endoftext|> 0\n")
    assert out.count("row ") == 2
    assert [line.split()[2] for line in out.splitlines() if line.startswith("*")] == ["Ġ", "z", "<|endoftext|>"] * 2
