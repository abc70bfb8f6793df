"""Written answers: those of the sampler, cut where they end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.evaluation import writing
from rlhf_jax.rollouts import sampling
from rlhf_jax.types import named_key
from tests.evaluation.models import model


@pytest.mark.slow
def test_answers_of_the_sampler():
    """Each row draws by its own key, so that one prompt has several answers."""
    tokenizer, one = model().tokenizer, model()
    (ids,) = tokenizers.encode(tokenizer, ["Is it?"], special=False)
    (found,) = writing.answers(one, [ids], writing.Config(samples=2, max_new_tokens=6, batch=8, temperature=1.0))
    cfg = sampling.Config(max_new_tokens=6, eos_id=tokenizer.eos_token_id)
    prompts = jnp.asarray([ids, ids])
    drawn = sampling.generate(one, one.params, prompts, prompts >= 0, named_key(0, "evaluation/writing"), cfg)
    texts = [tokenizers.decode(tokenizer, *map(np.asarray, row)) for row in zip(drawn.tokens, drawn.mask, strict=True)]
    assert found == [text.strip() for text in texts] and found[0] != found[1]


@pytest.mark.slow
def test_what_prompts_share_is_read_apart_where_it_is_worth_it(monkeypatch):
    """With the same answers: the examples in front of two questions, of three answers each."""
    tokenizer, one = model().tokenizer, model()
    texts = ["Is it? It is.\n\nIs it hot?", "Is it? It is.\n\nIs that so or is it not?"]
    prompts = tokenizers.encode(tokenizer, texts, special=False)
    cfg = writing.Config(samples=3, max_new_tokens=6, batch=8, temperature=1.0)
    assert writing.worth_sharing(one.config, prompts) == 0
    plain = writing.answers(one, prompts, cfg)
    monkeypatch.setattr(writing, "WORTH", 1.0)
    shared = writing.worth_sharing(one.config, prompts)
    assert tokenizer.decode(prompts[0][:shared]).strip() == "Is it? It is.\n\nIs"
    assert writing.worth_sharing(one.config, prompts[:1]) == 0
    assert writing.worth_sharing(one.config, [prompts[0][:shared], prompts[0]]) == shared - 1
    assert writing.answers(one, prompts, cfg) == plain and len(set(plain[0])) > 1


def test_where_answers_end(monkeypatch):
    """At a token that spells the stop, on the devices, and otherwise where the text has it."""
    tokenizer, seen = model().tokenizer, []

    def sample(sampler, params, prompts, key):
        seen.append(key)
        texts = ["\nyes\n\nQ: no", "no"]
        ids = [tokenizers.encode(tokenizer, [text], special=False)[0] for text in texts]
        width = max(map(len, ids))
        tokens = np.stack([np.pad(one, (0, width - len(one))) for one in ids])
        mask = np.stack([np.arange(width) < len(one) for one in ids])
        return type("Rollout", (), {"response_tokens": tokens, "response_mask": mask})

    def collector(config, layout, cfg):
        settings.append(cfg)

    settings = []
    monkeypatch.setattr(writing.rollout, "collector", collector)
    monkeypatch.setattr(writing.rollout.Sampler, "__call__", sample)
    prompts = [np.array([5], np.int32), np.array([5, 6], np.int32)]
    assert writing.answers(model(), prompts, writing.Config(stop="\n\n", seed=3)) == [["yes"], ["no"]]
    assert writing.answers(model(), prompts, writing.Config(stop="\n"))[0] == [""]
    (newline,) = tokenizers.encode(tokenizer, ["\n"], special=False)[0].tolist()
    assert newline in settings[1].ends and newline not in settings[0].ends
    assert jax.random.key_data(seen[0]).tolist() == jax.random.key_data(named_key(3, "evaluation/writing")).tolist()
