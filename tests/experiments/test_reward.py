"""The reward model."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from experiments import (
    reward,
)
from rlhf_jax import models
from rlhf_jax.algorithms import optim
from rlhf_jax.algorithms import reward as reward_lib
from rlhf_jax.analysis import calibration
from rlhf_jax.data import pipeline, sources
from rlhf_jax.models import heads, lora
from rlhf_jax.runs import checkpoint, log
from tests.quickstart import ADAPTERS, check_adapted, paths, refused


def test_the_reward_model_shows_how_it_orders(done):
    cfg, _ = done
    rows = log.read(cfg.out / "reward", "samples.jsonl")
    ranked = log.read(cfg.out / "rank", "held_out.jsonl")[:4]
    assert [row["response"] for row in rows] == [text for row in ranked for text in row["responses"]]
    assert [row["rank"] for row in rows] == [rank for row in ranked for rank in row["ranks"]]
    assert len({row["score"] for row in rows}) > 1
    calibration = json.loads((cfg.out / "reward" / "calibration.json").read_text())
    assert 0 <= calibration["expected_calibration_error"] <= 1 and calibration["pairs"] > 0
    assert all(sum(one["pairs"] for one in bins) == calibration["pairs"] for bins in list(calibration.values())[4:])
    every = sum(
        len(row["ranks"]) * (len(row["ranks"]) - 1) // 2 for row in log.read(cfg.out / "rank", "held_out.jsonl")
    )
    assert calibration["pairs"] + calibration["ties"] == every
    assert (cfg.out / "reward" / "calibration.png").is_file()


def test_the_record_tells_accuracy_by_margin_and_by_length(tmp_path):
    pairs = calibration.Pairs(margin=np.array([2.0, -1.0]), longer=np.array([-3, 4]))
    assert reward.record(tmp_path, pairs, ties=0) == 0.5
    by = list(json.loads((tmp_path / "calibration.json").read_text()).items())[-2:]
    assert by == [
        ("accuracy by margin of scores", [{"at": 1, "accuracy": 0, "pairs": 1}, {"at": 2, "accuracy": 1, "pairs": 1}]),
        (
            "accuracy by extra tokens of the preferred",
            [{"at": -3, "accuracy": 1, "pairs": 1}, {"at": 4, "accuracy": 0, "pairs": 1}],
        ),
    ]


def test_scores_of_the_training_answers_are_normalized(done):
    cfg, _ = done
    judge = models.load_reward(cfg.out / "reward" / "model")
    rows = sources.rows(str(cfg.out / "rank" / "train.jsonl"), "rankings", data_dir=cfg.out / "data")
    (batch,) = pipeline.rankings(rows, tokenizer=judge.tokenizer, length=64, batch=16, seed=0, epochs=1)
    score_fn = heads.score_fn(judge.config)
    score = jax.jit(functools.partial(reward_lib.scores, score_fn=score_fn))(judge.params, batch)
    said = np.asarray(score)[batch.rank >= 0]
    np.testing.assert_allclose((said.mean(), said.std()), (0, 1), atol=1e-3)


def test_a_reward_model_by_adapters(done, tmp_path):
    cfg, _ = done
    ranked = {"data": str(cfg.out / "rank" / "train.jsonl"), "held_out": str(cfg.out / "rank" / "held_out.jsonl")}
    result = reward.main(
        dataclasses.replace(
            cfg.reward, **paths(cfg, tmp_path, "init", "out"), **ranked, lora=ADAPTERS, saves=checkpoint.Config(every=1)
        )
    )
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2]
    params = models.load_reward(tmp_path / "model").params
    trained, _ = lora.split(params, ADAPTERS, jax.random.key(0))
    like = jax.eval_shape(lambda: optim.init(trained, optim.adamw(optim.cosine(1.0, 2)), jax.random.key(0)))
    state, _ = checkpoint.restore(tmp_path / "checkpoints", like)
    check_adapted(cfg, params["trunk"], state.params["trunk"])
    assert not np.allclose(state.params["kernel"], params["kernel"]) and 0 <= result["accuracy"] <= 1


def test_rankings_without_an_order(done, flags, tmp_path, capsys):
    cfg, _ = done
    path = tmp_path / "ties.jsonl"
    path.write_text((json.dumps({"prompt": "p", "responses": ["a", "b"], "ranks": [0, 0]}) + "\n") * 8)
    given = [*flags, "--init", cfg.out / "sft" / "model", "--data", path, "--held-out", path]
    assert "rankings: no row has two responses of different rank" in refused(capsys, reward.main, cfg.reward, *given)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "p", "responses": ["a"], "ranks": [0]},
            "field responses: expected a list of at least 2, got ['a']",
        ),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [0]}, "field ranks: expected 2 integers from 0 up"),
        ({"prompt": 3, "responses": ["a", "b"], "ranks": [0, 1]}, "field prompt: expected text or a list of messages"),
    ],
)
def test_a_malformed_row(done, flags, tmp_path, capsys, row, message):
    cfg, _ = done
    path = tmp_path / "rankings.jsonl"
    good = {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    said = refused(capsys, reward.main, cfg.reward, *flags, "--init", cfg.out / "sft" / "model", "--data", path)
    assert f"{path}, line 2, {message}" in said
