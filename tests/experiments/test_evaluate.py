"""Evaluation and best-of-n."""

import dataclasses
import json
import math

import pytest

from experiments import (
    best_of_n,
    evaluate,
)
from rlhf_jax import models
from tests import tiny
from tests.quickstart import LENGTHS, paths, refused


def test_best_of_n_is_an_evaluation(done, tmp_path):
    cfg, _ = done
    settings = {"best_of": 3, "prompts": 16, "texts": 60, "batch": 16, **LENGTHS, "out": tmp_path / "result.json"}
    fork = dataclasses.replace(best_of_n.CONFIG, **settings, **paths(cfg, None, "model", "reference", "reward"))
    result = best_of_n.main(dataclasses.replace(fork, out=tmp_path / "result.json"))
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["n"] == 3 and result["kl"] == pytest.approx(math.log(3) - 2 / 3)
    single = best_of_n.main(dataclasses.replace(fork, best_of=1, out=None))
    assert result["reward"] > single["reward"]


def test_evaluation_refuses_models_that_do_not_go_together(done, flags, capsys, tmp_path):
    cfg, _ = done
    init, config = cfg.out / "sft" / "model", dataclasses.replace(tiny.GPT, vocab_size=512)
    tok = models.load(init).tokenizer
    models.save(models.Model(config, {}, tok, lambda: None), tiny.policy(config), tmp_path / "other")
    flags = [*flags, "--model", init]
    said = refused(capsys, evaluate.main, cfg.evaluate, *flags, "--reference", tmp_path / "other")
    assert said.endswith(f"other is not of the architecture of {init}: take the model that it came from")
    said = refused(capsys, evaluate.main, cfg.evaluate, *flags, "--reference", init, "--best-of", 2)
    assert said == "error: best_of=2 needs a reward model to pick by: name one by --reward, or a judge"
