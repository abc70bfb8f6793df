"""A dialogue with a kept cache, token by token that of `sampling.generate`, which reads all of it anew each turn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import conversations, sampling
from rlhf_jax.rollouts.conversations import Conversations
from rlhf_jax.types import InputError
from tests import tiny

CONTEXT, EOS, KEY = 80, 2, jax.random.key(0)
CONFIGS = {name: dataclasses.replace(config, max_length=CONTEXT) for name, config in tiny.CONFIGS.items()}
GPT, LLAMA = CONFIGS["gpt"], CONFIGS["llama"]
GREEDY = sampling.Config(max_new_tokens=6, temperature=0.0, eos_id=(EOS, 5, 7))
SAMPLED = dataclasses.replace(GREEDY, temperature=1.3, top_k=20)


def talks(config, cfg=GREEDY, **settings):
    return Conversations(models.Transformer(config), tiny.policy(config), cfg, **settings)


def generated(config, prompt, key, cfg=GREEDY):
    """The answer of a whole new reading; prompts are padded to the context, so that it is compiled once."""
    tokens = np.zeros((1, CONTEXT - cfg.max_new_tokens), np.int32)
    tokens[0, : len(prompt)] = prompt
    mask = np.arange(tokens.shape[1])[None] < len(prompt)
    module = models.Transformer(config)
    sample = sampling.generate(module, tiny.policy(config), jnp.asarray(tokens), jnp.asarray(mask), key, cfg)
    return sample.tokens[sample.mask].tolist()


def said(seed, count):
    return tiny.random_tokens(seed, count).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cfg"),
    [("gpt", GREEDY), ("mistral", GREEDY), ("llama3", SAMPLED), ("gemma2", SAMPLED)],
)
def test_a_dialogue_is_that_of_reading_it_all_anew(name, cfg):
    talk, prompt = talks(CONFIGS[name], cfg), said(0, 9)
    for turn, more in enumerate([5, 11, 1, 3]):
        key = jax.random.fold_in(KEY, turn)
        answer = list(talk.stream("a", prompt, key))
        assert answer == generated(CONFIGS[name], prompt, key, cfg)
        prompt = [*prompt, *answer, *said(turn + 1, more)]


def test_a_turn_reads_only_what_is_new():
    talk, prompt = talks(LLAMA), said(0, 20)
    answer = list(talk.stream("a", prompt, KEY))
    assert talk.prefilled == 20
    prompt = [*prompt, *answer, *said(1, 7)]
    again = list(talk.stream("a", prompt, KEY))
    unread = len(answer) == GREEDY.max_new_tokens  # then nothing had to be sampled after the last token
    assert talk.prefilled == 20 + 7 + unread
    assert list(talk.stream("a", [*prompt, *again], KEY))  # nothing but the answer: one token is read to go on
    assert talk.prefilled == 20 + 7 + unread + 1


def test_a_prompt_that_departs_from_what_was_read():
    """Turns that were dropped, edited, or rendered in other tokens than those that were sampled."""
    for config in (GPT, CONFIGS["mistral"]):
        talk, prompt = talks(config), said(0, 40)
        list(talk.stream("a", prompt, KEY))
        for kept, other in ((30, 4), (0, 12), (12, 0), (7, 0)):
            prompt, before = [*prompt[:kept], *said(9, other)], talk.prefilled
            assert list(talk.stream("a", prompt, KEY)) == generated(config, prompt, KEY)
            assert talk.prefilled - before == max(other, 1)


@pytest.mark.slow
def test_an_answer_that_is_given_up_is_read_as_far_as_it_was_said():
    talk, prompt = talks(LLAMA, dataclasses.replace(GREEDY, eos_id=None)), said(0, 9)
    stream = talk.stream("a", prompt, KEY)
    begun = [next(stream) for _ in range(3)]
    stream.close()
    assert talk.answering == []
    prompt = [*prompt, *begun, *said(1, 2)]
    cfg = dataclasses.replace(GREEDY, eos_id=None)
    assert list(talk.stream("a", prompt, KEY)) == generated(LLAMA, prompt, KEY, cfg)
    assert talk.prefilled == 9 + 2


@pytest.mark.slow
def test_a_stream_that_is_closed_late_leaves_the_next_turn_alone():
    talk, prompt = talks(LLAMA), said(0, 9)
    late = talk.stream("a", prompt, KEY)
    next(late)
    stream = talk.stream("a", [*prompt, 3], KEY)
    answer = [next(stream)]
    assert not list(late)
    assert answer + list(stream) == generated(LLAMA, [*prompt, 3], KEY)
    stream = talk.stream("a", prompt, KEY)
    next(stream)
    talk.forget("a")
    assert not list(stream)


@pytest.mark.slow
def test_conversations_that_answer_together_do_not_see_each_other():
    config, keys = CONFIGS["mistral"], jax.random.split(KEY, 8)
    talk = talks(config, SAMPLED, rows=3)
    prompts = {name: said(n, 3 + 7 * n) for n, name in enumerate("abc")}
    for turn in range(2):
        answers = {name: [] for name in prompts}
        for n, (name, prompt) in enumerate(prompts.items()):  # each joins while the others are answering
            talk.ask(name, prompt, keys[3 * turn + n])
            for other, token in talk.step().items():
                answers[other].append(token.id)
        while talk.answering:
            for other, token in talk.step().items():
                answers[other].append(token.id)
        for n, (name, prompt) in enumerate(prompts.items()):
            row = jax.random.wrap_key_data(jax.random.key_data(keys[3 * turn + n])[None])
            assert answers[name] == generated(config, prompt, row, SAMPLED)
            prompts[name] = [*prompt, *answers[name], *said(20 + n, 4)]


def test_the_row_of_the_one_asked_longest_ago_is_taken():
    talk = talks(LLAMA, rows=2)
    prompts = {name: said(n, 10) for n, name in enumerate("abc")}
    for name in "ab":
        talk.ask(name, prompts[name], KEY)
    with pytest.raises(InputError, match="all 2 rows are answering: wait until one has, or use more rows"):
        talk.ask("c", prompts["c"], KEY)
    for name in "aab":
        talk.stop(name)
    talk.ask("a", prompts["a"], KEY)
    talk.stop("a")
    talk.ask("c", prompts["c"], KEY)  # in the place of b
    assert talk.prefilled == 31
    talk.ask("a", prompts["a"], KEY)
    assert talk.prefilled == 32
    talk.forget("c")
    assert talk.answering == ["a"]
    talk.ask("b", prompts["b"], KEY)
    assert talk.prefilled == 42


@pytest.mark.slow
def test_a_cache_ends_with_the_context():
    talk = talks(GPT)
    for length in (69, 72, 74):  # the last ones read in parts, since 16 columns behind 69 are more than there are
        prompt = said(0, 74)[:length]
        assert list(talk.stream("a", prompt, KEY)) == generated(GPT, prompt, KEY)
    assert talk.columns == CONTEXT
    with pytest.raises(InputError, match="75 prompt columns and 6 new tokens exceed the model's context of 80"):
        talk.ask("a", said(0, 75), KEY)
    with pytest.raises(InputError, match="the prompt has no tokens"):
        talk.ask("a", [], KEY)


@pytest.mark.slow
def test_turns_share_programs():
    config = dataclasses.replace(LLAMA, max_length=256)
    programs = lambda: (conversations._read._cache_size(), conversations._next._cache_size())
    before, talk, prompt = programs(), talks(config), said(0, 3)
    for turn in range(12):  # 3 to 113 tokens
        answer = list(talk.stream("a", prompt, KEY))
        prompt = [*prompt, *answer, *said(turn, 6)]
    assert programs() == (before[0] + 2, before[1] + 2)  # parts of up to 16 columns, of caches of 64 and of 128
    talk = talks(config, dataclasses.replace(GREEDY, max_new_tokens=4, eos_id=3))
    list(talk.stream("a", said(0, 9), KEY))
    assert programs() == (before[0] + 2, before[1] + 2)


def test_an_interrupted_program_costs_only_time(monkeypatch):
    talk, prompt = talks(LLAMA), said(0, 9)
    list(talk.stream("a", prompt, KEY))
    read = conversations._read

    def interrupted(*args):
        read(*args)  # the cache that it was given is gone
        raise KeyboardInterrupt

    monkeypatch.setattr(conversations, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("a", [*prompt, 3, 4], KEY)
    monkeypatch.undo()
    assert list(talk.stream("a", [*prompt, 3, 4], KEY)) == generated(LLAMA, [*prompt, 3, 4], KEY)


@pytest.mark.slow
def test_a_mesh_answers_the_same():
    layout = parallel.layout(parallel.Config(fsdp=2, tensor=2), jax.devices()[:4])
    params = layout.state(tiny.policy(LLAMA))
    talk = Conversations(models.Transformer(LLAMA), params, None, rows=2, layout=layout)
    prompt = said(0, 9)
    for turn in range(2):
        talk.ask("a", prompt, KEY, GREEDY, scored="answer")
        answer = []
        while talk.answering:
            token = talk.step()["a"]
            assert token.likeliest[0] == (token.id, token.logp)
            answer.append(token.id)
        assert answer == generated(LLAMA, prompt, KEY)
        prompt = [*prompt, *answer, *said(turn, 4)]
    assert talk.prefilled < len(prompt)
    shards = talk._state.cache.key.sharding.shard_shape(talk._state.cache.key.shape)
    assert shards[1:3] == (1, 1)  # of two rows and two heads


# Each answer its own settings -----------------------------------------------------------------------------------------

EVERY = (
    GREEDY,
    SAMPLED,
    dataclasses.replace(SAMPLED, top_k=0, top_p=0.6),
    dataclasses.replace(SAMPLED, temperature=0.4, top_p=0.9, max_new_tokens=3),
)


@pytest.mark.slow
def test_answers_that_are_drawn_otherwise_share_their_steps():
    keys = jax.random.split(KEY, len(EVERY))
    talk, answers = talks(LLAMA, None, rows=len(EVERY)), {n: [] for n in range(len(EVERY))}
    for n, cfg in enumerate(EVERY):
        talk.ask(n, said(n, 5 + n), keys[n], cfg)
    steps = 0
    while talk.answering:
        steps += 1
        for n, token in talk.step().items():
            assert token.logp is None and token.likeliest == ()
            answers[n].append(token.id)
    for n, cfg in enumerate(EVERY):
        row = jax.random.wrap_key_data(jax.random.key_data(keys[n])[None])
        assert answers[n] == generated(LLAMA, said(n, 5 + n), row, cfg)
    assert steps == max(map(len, answers.values()))


@pytest.mark.slow
def test_tokens_come_with_log_probabilities_before_temperature():
    config = CONFIGS["gemma2"]
    talk, prompt = talks(config, None, rows=2), said(0, 40)
    cfg = sampling.Config(max_new_tokens=4, temperature=0.5, top_k=3)
    told = talk.ask("a", prompt, KEY, cfg, scored="prompt")
    talk.ask("b", prompt[:7], KEY, cfg, scored="answer")
    whole_logits = jax.jit(models.bind(models.Transformer(config)))
    tokens = {"a": told, "b": []}
    while talk.answering:
        for which, token in talk.step().items():
            tokens[which].append(token)
    for which, first in (("a", prompt[:1]), ("b", prompt[:7])):
        ids = [*first, *(token.id for token in tokens[which])]
        assert which == "b" or ids[:40] == prompt
        whole = jnp.array([[*ids, *[0] * (44 - len(ids))]])
        logits = whole_logits(tiny.policy(config), whole, whole >= 0)[:, : len(ids)]
        logp = np.asarray(jax.nn.log_softmax(logits[0]))[len(first) - 1 : -1]
        order = np.argsort(-logp, axis=-1)[:, : conversations.LIKELIEST]
        for token, row, likeliest in zip(tokens[which], logp, order, strict=True):
            np.testing.assert_allclose(token.logp, row[token.id], atol=2e-5)
            assert [i for i, _ in token.likeliest] == likeliest.tolist()
            np.testing.assert_allclose([value for _, value in token.likeliest], row[likeliest], atol=2e-5)
            assert token.logp == dict(token.likeliest).get(token.id, token.logp)


@pytest.mark.slow
def test_a_prompt_is_read_in_parts_that_are_scored_as_one(monkeypatch):
    prompt = said(0, 40)
    whole = talks(LLAMA, None).ask("a", prompt, KEY, GREEDY, scored="prompt")
    monkeypatch.setattr(conversations, "WIDEST", 16)
    parts = talks(LLAMA, None).ask("a", prompt, KEY, GREEDY, scored="prompt")
    assert [token.id for token in parts] == [token.id for token in whole] == prompt[1:]
    np.testing.assert_allclose([t.logp for t in parts], [t.logp for t in whole], atol=2e-5)


@pytest.mark.slow
def test_what_another_row_has_read_is_copied():
    talk, prompt = talks(LLAMA, SAMPLED, rows=3), said(0, 40)
    row = lambda n: jax.random.wrap_key_data(jax.random.key_data(jax.random.fold_in(KEY, n))[None])
    for n in range(3):  # three answers to one prompt
        talk.ask(n, prompt, jax.random.fold_in(KEY, n))
    assert talk.prefilled == 40 + 2
    answers = {n: [] for n in range(3)}
    while talk.answering:
        for n, token in talk.step().items():
            answers[n].append(token.id)
    assert answers == {n: generated(LLAMA, prompt, row(n), SAMPLED) for n in range(3)}
    other = [*prompt[:30], *said(5, 6)]
    assert list(talk.stream("other", other, KEY)) == generated(LLAMA, other, KEY, SAMPLED)
    assert talk.prefilled == 42 + 6


def test_the_conversation_that_a_prompt_continues_is_found():
    talk, prompt = talks(LLAMA, rows=3), said(0, 9)
    assert talk.continued(prompt) is None
    answer = list(talk.stream("a", prompt, KEY))
    list(talk.stream("b", prompt[:4], KEY))
    assert talk.continued(prompt[:4]) == "b" and talk.continued(prompt) == "a"
    assert talk.continued([*prompt, *answer, 3]) == "a"
    assert talk.continued([*prompt[:8], prompt[8] + 1]) == "b"  # it departs from what "a" was asked
    assert talk.continued(said(7, 9)) is None
    talk.ask("a", prompt, KEY)
    assert talk.continued(prompt) == "b"  # "a" answers


@pytest.mark.slow
def test_few_answers_compute_few_rows():
    """Any number of answers among many rows, beside rows that are full, is that of reading it all anew."""
    cfg = dataclasses.replace(SAMPLED, eos_id=None)
    talk, keys = talks(LLAMA, cfg, rows=8), jax.random.split(KEY, 8)
    for n in range(8):
        talk.ask(n, said(n, 74), keys[n])
    while talk.answering:
        talk.step()
    assert {len(row.read) for row in talk._rows} >= {79}
    for some in ([6], [1, 7], [0, 2, 5], [3, 4, 5, 6, 7]):
        answers = {n: [] for n in some}
        for n in some:
            talk.ask(n, said(n, 30), keys[n])
            assert talk._some() is None or n in talk._some()
        while talk.answering:
            for n, token in talk.step().items():
                answers[n].append(token.id)
        for n in some:
            row = jax.random.wrap_key_data(jax.random.key_data(keys[n])[None])
            assert answers[n] == generated(LLAMA, said(n, 30), row, cfg)
    before = talk.prefilled  # what the others have read is as it was
    again = {n: list(talk.stream(n, [*said(n, 30), 4], keys[n])) for n in range(8)}
    assert talk.prefilled - before == 8
    for n in range(8):
        assert again[n] == generated(LLAMA, [*said(n, 30), 4], keys[n], cfg)


@pytest.mark.slow
@pytest.mark.parametrize("meshed", [False, True])
def test_a_cache_in_int8_answers_nearly_the_same(meshed):
    """What is read, copied to another row, sampled among few rows and scored: as from a cache in floats."""
    layout = parallel.layout(parallel.Config(fsdp=2, tensor=2), jax.devices()[:4]) if meshed else None
    params = layout.state(tiny.policy(LLAMA)) if layout else tiny.policy(LLAMA)
    found = []
    for kept in ("float", "int8"):
        config = dataclasses.replace(LLAMA, compute=models.Compute(cache=kept))
        talk = Conversations(models.Transformer(config), params, None, rows=4, layout=layout)
        told = talk.ask("a", said(0, 30), KEY, GREEDY, scored="prompt")
        talk.ask("b", [*said(0, 30), 4], KEY, GREEDY, scored="answer")
        assert talk.prefilled < 40  # the second copies
        while talk.answering:
            told += talk.step().values()
        found.append(told)
    assert talk._state.cache.key.values.dtype == np.int8
    assert [token.id for token in found[0]] == [token.id for token in found[1]]
    errors = np.abs(np.subtract(*([token.logp for token in told] for told in found)))
    assert 1e-4 < errors.max() < 0.05
