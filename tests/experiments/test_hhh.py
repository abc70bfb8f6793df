"""The comparisons by virtue, run on models of random parameters."""

import json

import pytest

from experiments import hhh
from rlhf_jax import models
from rlhf_jax.models import heads
from rlhf_jax.types import InputError
from tests import tiny
from tests.evaluation.models import model


@pytest.mark.slow
def test_hhh(tmp_path, capsys):
    one = model()
    models.save(one, one.params, tmp_path / "model")
    reward = models.Model(one.config, None, one.tokenizer, heads.score_fn(one.config))
    models.save(reward, tiny.scalar(one.config), tmp_path / "reward")
    found = hhh.main(
        hhh.Config(model=tmp_path / "model", reward=tmp_path / "reward", pairs=2, batch=8, out=tmp_path / "out")
    )
    assert list(found) == ["log-probability", "by token", "by character", "reward"]
    written = json.loads((tmp_path / "out" / "hhh.json").read_text())
    assert list(written["reward"]) == ["helpful", "honest", "harmless", "other", "macro average"]
    assert written["reward"]["macro average"]["pairs"] == 8
    assert written["by token"]["honest"]["score"]["value"] == found["by token"]["honest"].score.value
    assert (tmp_path / "out" / "hhh.png").stat().st_size > 5000
    said = capsys.readouterr().out
    assert "| macro average |" in said and "reward: 8 pairs, 0 ties" in said


def test_nothing_to_evaluate():
    with pytest.raises(InputError, match="name a model by --model, a reward model by --reward, or a judge by"):
        hhh.main(hhh.Config())


def test_pairs_of_rankings_are_comparisons(tmp_path):
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 3)
    cfg = hhh.Config(data=f"hh:{path}", data_dir=tmp_path / "data", pairs=2)
    (subset,) = hhh.comparisons(cfg).items()
    assert subset[0] == cfg.data and [one["responses"] for one in subset[1]] == [["Hello", "No"]] * 2
    path.write_text(json.dumps({"prompt": "Hi", "responses": ["Hello", "No"], "ranks": [0, 0]}) + "\n")
    with pytest.raises(InputError, match="ranked alike, so there is nothing to compare"):
        hhh.comparisons(hhh.Config(data=f"{path}[:1]", data_dir=tmp_path / "data"))
