"""Accuracy on tasks as a model trains."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import instruct
from rlhf_jax import models
from rlhf_jax.data.tasks import Example
from rlhf_jax.devices import parallel
from rlhf_jax.evaluation import likelihood, probe
from rlhf_jax.types import InputError
from tests.experiments.test_instruct import write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("probe"))


def test_a_probe_by_hand(base, tmp_path):
    """The likeliest option is the answer, each in the next template; without options, the likeliest tokens are."""
    model = models.load(base.init)
    tok = models.tokenizer_of(model)
    split = instruct.split_tasks(base)
    (task,) = split.held_out
    asked = probe.prepare([task], tok, probe.Config(questions=3, length=96), data_dir=base.data_dir)
    layout = parallel.layout()
    found = asked.ask(likelihood.Reader(model, layout, 8), layout.state(model.params))
    right = []
    for question in asked.questions:
        totals = []
        for request in question.requests:
            ids = jnp.array([[*request.context, *request.continuation]], jnp.int32)
            logits = np.asarray(model.apply(model.params, ids, jnp.ones(ids.shape, bool)), np.float64)[0]
            logp = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
            start = len(request.context)
            totals.append(sum(logp[start + n - 1, token] for n, token in enumerate(request.continuation)))
        right.append(question.right[int(np.argmax(totals))])
    assert found["odd"] == probe.Answered(np.mean(right), 0.5, 3)
    assert asked.questions[0].requests[0].continuation[-1] == tok.eos_token_id
    rows = [{"question": "Is it?", "answer": "yes"}]
    (tmp_path / "free.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 5))
    (free,) = instruct.split_tasks(dataclasses.replace(base, tasks=(str(tmp_path / "free.jsonl"),), held_out=())).train
    written = probe.prepare([free], tok, probe.Config(), data_dir=tmp_path / "data")
    assert written.questions[0].right == () and len(written.questions[0].requests) == 1
    unasked = dataclasses.replace(
        task, templates=tuple(dataclasses.replace(t, target="{question}") for t in task.templates)
    )
    with pytest.raises(InputError, match="no template asks"):
        probe.prepare([unasked], tok, probe.Config(), data_dir=base.data_dir)
    with pytest.raises(InputError, match="can be asked with 9 tokens"):
        probe.prepare([task], tok, probe.Config(length=9), data_dir=base.data_dir)
    missing = dataclasses.replace(task, held_out="validation")
    with pytest.raises(InputError, match=r"task odd has no held-out rows: .* no rows in split 'validation'"):
        probe.prepare([missing], tok, probe.Config(), data_dir=base.data_dir)
    none = dataclasses.replace(task, reader=lambda row: Example({}, ("x",), ()) if row is None else None)
    with pytest.raises(InputError, match=r"none of its 8 held-out rows .* \(0 are too long\)"):
        probe.prepare([none], tok, probe.Config(), data_dir=base.data_dir)
