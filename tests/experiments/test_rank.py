"""Answers of a model, ranked by simulated people."""

import dataclasses

from experiments import (
    rank,
)
from rlhf_jax.runs import log
from tests.quickstart import refused


def test_rankings_are_rows_that_the_reward_model_reads(done):
    cfg, _ = done
    rows = log.read(cfg.out / "rank", "train.jsonl")
    assert len(rows) == cfg.rank.prompts
    assert all(4 <= len(row["responses"]) == len(row["ranks"]) <= 9 for row in rows)
    assert len(log.read(cfg.out / "rank", "held_out.jsonl")) == cfg.rank.held_out * cfg.rank.people


def test_the_world_is_a_setting(done, tmp_path):
    cfg, _ = done
    given = {"init": cfg.out / "sft" / "model", "data_dir": cfg.out / "data", "world": 1, "prompts": 8}
    rank.main(dataclasses.replace(cfg.rank, **given, out=tmp_path))
    people = [
        {row["prompt"][0]["content"] for row in log.read(out, "train.jsonl")} for out in (tmp_path, cfg.out / "rank")
    ]
    assert not people[0] <= people[1]


def test_fewer_than_two_answers_cannot_be_ranked(done, flags, capsys):
    cfg, _ = done
    said = refused(capsys, rank.main, cfg.rank, *flags, "--init", cfg.out / "sft" / "model", "--least", 1)
    assert said == "error: least=1, most=9: expected 2 <= least <= most answers to rank"
