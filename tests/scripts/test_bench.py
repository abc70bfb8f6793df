"""Tests of scripts/bench.py: every workload at the smallest sizes, and the table."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from rlhf_jax.types import InputError
from scripts import bench
from scripts.benchmark import parts, profile, sizes, workloads

SIZES = {
    "model": {"vocab": 64, "hidden": 16, "intermediate": 24, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8},
    "sft": {"batch": 8, "target_tokens": 8, "warmup_steps": 1, "timed_steps": 2},
    "decode": {"batch": 8, "prompt": 4, "new": 4, "warmup": 1, "timed": 2},
    "decode_ragged": {"prompts": 16, "prompt": 4, "max_new": 8, "batches": [8, 16], "timed": 2, "eos_fraction": 0.2},
    "decode_long": {"batch": 8, "prompt": 4, "new": 8, "timed": 2},
    "decode_slots": {"prompts": 16, "slots": 1, "prompt": 4, "max_new": 8, "timed": 2, "eos_fraction": 0.2},
    "reward": {"pairs": 8, "length": 6, "warmup_steps": 1, "timed_steps": 2},
    "ppo": {"episodes": 8, "prompt": 4, "new": 4, "epochs": 2, "warmup": 1, "timed": 2},
    "reward_k9": {"prompts": 8, "responses": 4, "length": 6, "warmup_steps": 1, "timed_steps": 2},
    "reward_ragged": {"pairs": 16, "prompt": 3, "max_new": 8, "mean": 4.0, "buckets": 2}
    | {"warmup_steps": 1, "timed_steps": 2},
    "ppo_ragged": {"episodes": 16, "prompt": 4, "new": 8, "epochs": 1, "eos_fraction": 0.2, "buckets": 2}
    | {"warmup": 1, "timed": 2},
    "packing": {"batch": 8, "length": 16, "mean": 5.0, "warmup_steps": 1, "timed_steps": 2},
    "rank_prefix": {"prompts": 8, "responses": 2, "prompt": 8, "new": 4, "timed": 2},
    "reward_prefix": {"prompts": 8, "responses": 2, "prompt": 8, "new": 4, "timed": 2},
    "grpo_prefix": {"prompts": 8, "responses": 2, "prompt": 8, "new": 4, "timed": 2},
    "choice": {"questions": 8, "examples": 2, "question": 4, "options": 3, "option": 2, "batch": 8, "timed": 2},
    "choice_prefix": {"questions": 8, "question": 16, "options": 4, "option": 2, "batch": 8, "timed": 2},
    "text_10gb": {"megabytes": 0.2, "small": 0.1, "length": 64, "batch": 8},
    "learning_rate": 1e-3,
}


MAIN = "sft", "decode", "reward", "ppo", "grpo_prefix", "choice", "text_10gb"  # one of each kind

PLAIN = "choice", "decode_long", "decode_slots"  # in turn with our own plain way, as whatever ends in _prefix


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "workload.json"
    path.write_text(json.dumps(SIZES))
    return bench.with_sizes(bench.Config(workload=path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in MAIN else pytest.mark.full) for name in workloads.WORKLOADS]
)
def test_a_workload_has_rates_a_limit_and_memory(cfg, name):
    result = workloads.measure(cfg, name)
    counted = next(key.removeprefix("median_") for key in result if key.startswith("median_"))
    assert 0 < result[f"median_{counted}"] <= result[f"best_{counted}"]
    assert result["of_limit"] == pytest.approx(result[f"median_{counted}"] / result[f"limit_{counted}"])
    assert result["of_limit"] < 1.5  # or the clock did not wait
    assert result["peak_mib"] > 0 and result["first_s"] > 0
    assert ("times_pairs_one_by_one" in result) == (name == "reward_k9")
    assert ("times_padded" in result) == (name in ("reward_ragged", "ppo_ragged"))
    assert ("times_plain" in result) == (name in PLAIN or name.endswith("_prefix"))
    assert ("update_s" in result) == name.startswith("ppo")
    assert ("above_small_mib" in result) == (name == "text_10gb")


def test_sizes_and_settings_reach_the_model(cfg):
    assert cfg.learning_rate == 1e-3 and cfg.decode_ragged.batches == (8, 16) and cfg.ppo_ragged.eos_fraction == 0.2
    config = parts.architecture(dataclasses.replace(cfg, dtype="bfloat16", remat="full"))
    assert (config.vocab_size, config.d_model, config.n_kv_heads) == (64, 16, 1)
    assert config.compute.dtype == "bfloat16" and config.compute.remat == "full"
    assert parts.architecture(dataclasses.replace(cfg, preset="gpt2")).d_model == 768


def test_packed_documents_have_the_lengths_asked_for():
    segment = parts.random_documents(sizes.Packing(batch=256, length=64, mean=8.0))
    assert segment.shape == (256, 64) and (np.diff(segment, axis=1) >= 0).all() and segment.min() == 1
    assert segment[:, -1].mean() == pytest.approx(1 + 63 / 8, rel=0.05)  # a new one starts at any token in eight


PEER = """
import json, sys
name = sys.argv[sys.argv.index("--only") + 1]
if name == "reward":
    raise SystemExit("no reward here")
fast = {"best_tokens_per_s": 9e9, "tokens_per_s": 2e9}
result = {"tokens_per_s": 1e9, "median_tokens_per_s": 1e8, "compiled": fast, "mean_length": 1e99}
print("chatter")
print(json.dumps({"peer": "other", "versions": {"other": "1"}, "results": {name: result}}))
"""


def test_peers_stand_in_the_table(cfg, tmp_path, monkeypatch, capsys):
    found = {"median_tokens_per_s": 3e9, "best_tokens_per_s": 4e9, "of_limit": 0.5, "peak_mib": 100.0}
    monkeypatch.setattr(bench, "measure_alone", lambda cfg, name: dict(found))
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    cfg = dataclasses.replace(cfg, only="sft,reward,packing", peer=(f"other={sys.executable}:{script}",), rounds=2)
    report = bench.main(cfg)
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == report
    assert report["peer"] == "rlhf_jax" and set(report["results"]) == {"sft", "reward", "packing"}
    assert report["versions"]["other"] == {"other": "1"}
    assert lines[:2] == ["other has no reward: no reward here"] * 2
    rows = {cells[1]: cells for cells in ([cell.strip() for cell in line.split("|")[:-1]] for line in lines[2:])}
    assert rows["workload"][-1] == "x other"
    assert rows["sft"][-1] == "1.50"  # of the median of the variant that is faster
    assert rows["packing"][-1] == ""  # which no peer knows


@pytest.mark.slow
def test_the_scaling_is_drawn(cfg, tmp_path, monkeypatch):
    seen = []

    def found(cfg, name):
        seen.append((name, cfg.sft.batch, cfg.decode.new, cfg.model.vocab, cfg.decode_ragged.eos_fraction))
        return {"median_tokens_per_s": 1e4, "peak_mib": 100.0}

    monkeypatch.setattr(bench, "measure_alone", found)
    scaled = bench.main(dataclasses.replace(cfg, scaling=tmp_path / "scaling.png"))
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert scaled["sft by rows"][-1] == (64, 100.0, 100.0)
    assert len(seen) == sum(len(values) for *_, values in bench.SCALES.values()) and len(set(seen)) > 20
    for one in (("sft", 64, 4, 64, 0.2), ("decode", 8, 512, 64, 0.2), ("sft", 8, 4, 65536, 0.2)):
        assert one in seen


@pytest.mark.slow
def test_a_profile_says_what_products_take(cfg, capsys):
    found = bench.main(dataclasses.replace(cfg, only="sft", profile=True))["sft"]
    assert 0 < found[profile.PRODUCTS] < 1
    assert sum(found.values()) == pytest.approx(1)
    assert f"| sft | {next(iter(found))} " in capsys.readouterr().out


def test_kinds_of_operations():
    names = ["dot.12", "dot_general_add_fusion", "ynn_fusion.3", "add_bitcast_fusion.1", "Thunk::Execute", "while.2"]
    assert [profile.kind(name) for name in names] == [profile.PRODUCTS] * 3 + ["add_bitcast_fusion", None, None]


def test_rounds_are_merged():
    rounds = [{"median_x_per_s": m, "best_x_per_s": b, "peak_mib": p} for m, b, p in ((1, 5, 3), (2, 9, 2), (9, 7, 7))]
    assert bench.merge(rounds) == {"median_x_per_s": 2, "best_x_per_s": 9, "peak_mib": 3}


def test_wrong_input_is_refused(tmp_path):
    with pytest.raises(InputError, match="'decoding' is no workload"):
        bench.Config(only="sft,decoding")
    with pytest.raises(InputError, match="NAME=PYTHON:SCRIPT"):
        bench.Config(peer=("x=python",))
    with pytest.raises(InputError, match="expected a JSON file"):
        bench.with_sizes(bench.Config(workload=tmp_path / "none.json"))
