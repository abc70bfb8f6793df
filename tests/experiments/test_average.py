"""Weight-averaged reward models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments import average, best_of_n
from rlhf_jax import models
from tests.quickstart import paths, refused


def test_an_average_is_a_reward_model(done, tmp_path, capsys):
    quick, _ = done
    judge = models.load_reward(quick.out / "reward" / "model")
    rng = np.random.default_rng(0)
    shifted = jax.tree.map(lambda x: x + jnp.array(rng.normal(0, 0.02, x.shape), x.dtype), judge.params)
    models.save(judge, shifted, tmp_path / "other")
    held_out = str(quick.out / "rank" / "held_out.jsonl")
    both = quick.out / "reward" / "model", tmp_path / "other"
    cfg = average.Config(out=tmp_path / "run", model=both, held_out=held_out, data_dir=quick.out / "data", batch=8)
    found = average.main(dataclasses.replace(cfg, length=64))
    assert [*found] == [*map(str, both), "mean of their scores", "average"] and all(0 < x < 1 for x in found.values())
    mean = jax.tree.map(lambda a, b: (a + b) / 2, judge.params, shifted)
    written = models.load_reward(tmp_path / "run" / "model").params
    np.testing.assert_allclose(written["trunk"]["embedding"], mean["trunk"]["embedding"], atol=1e-7)
    given = dataclasses.replace(quick.evaluate, best_of=2, reward=tmp_path / "run" / "model")
    assert "gold" in best_of_n.main(dataclasses.replace(given, **paths(quick, None, "model", "reference", "out")))
    tuned = quick.out / "sft" / "model"
    said = refused(capsys, average.main, cfg, "--model", both[0], tuned)
    assert "is a reward model and" in said and "average models of one kind" in said
    said = refused(capsys, average.main, cfg, "--model", tuned, tuned)
    assert "expected at least two, each once" in said
    models.save(judge, shifted["trunk"], tmp_path / "language")
    models.save(judge, judge.params["trunk"], tmp_path / "one")
    said = refused(capsys, average.main, cfg, "--model", tmp_path / "language", tmp_path / "one")
    assert "language models give no scores to measure" in said


def test_one_model_is_no_average(capsys):
    assert "name them by --model A B" in refused(capsys, average.main, average.Config(), "--model", "a")


def test_a_missing_model_is_named(capsys, tmp_path):
    flags = "--out", tmp_path / "run", "--model", tmp_path / "a", tmp_path / "b"
    assert f"{tmp_path / 'a'} is not a model directory" in refused(capsys, average.main, average.Config(), *flags)
