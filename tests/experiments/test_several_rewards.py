"""Several rewards: models of one virtue each, a cost model, and policies that learn from them together."""

import dataclasses
import math

import pytest

from experiments import grpo, ppo, reward, rloo
from rlhf_jax import models
from rlhf_jax.algorithms import reward as reward_lib
from rlhf_jax.algorithms import rewards as rewards_lib
from rlhf_jax.devices import preemption
from rlhf_jax.runs import checkpoint, cli, log
from rlhf_jax.types import InputError
from tests.quickstart import metrics_of, paths, refused
from tests.runs.test_resume import ask_to_end, same_outcome, status_of

BOTH = rewards_lib.Config(weights=(1.0, 0.5), threshold=-0.1, multiplier=0.7)


@pytest.fixture(scope="module")
def cost(done, tmp_path_factory):
    """A cost model, learnt from the quickstart's ratings."""
    quick, _ = done
    out = tmp_path_factory.mktemp("cost")
    ranked = quick.out / "rank"
    config = dataclasses.replace(
        quick.reward,
        out=out,
        init=quick.out / "sft" / "model",
        data=str(ranked / "train.jsonl"),
        held_out=str(ranked / "held_out.jsonl"),
        data_dir=quick.out / "data",
        virtue="harmless",
        algorithm=reward_lib.Config(loss="cost"),
    )
    assert 0 <= reward.main(config)["accuracy"] <= 1
    return out / "model"


def test_a_cost_model_keeps_its_zero(cost):
    """A reward model's scores are normalised after training; the bias of a cost model's head is what it learnt."""
    rows = metrics_of(cost.parent)
    assert {"loss/cost", "cost/sign_accuracy"} <= rows[0].keys()
    assert abs(float(models.load_reward(cost).params["bias"])) < 0.01  # two steps from 0


def test_costs_need_ratings(done, capsys):
    quick, _ = done
    flags = ["--algorithm.loss", "cost"]
    assert "add --virtue harmless" in refused(capsys, reward.main, quick.reward, *flags)
    assert "normalize_first has no effect on a cost model" in refused(
        capsys, reward.main, quick.reward, *flags, "--virtue", "harmless", "--normalize-first"
    )


def test_ratings_rank_as_the_labelers_say(done):
    quick, _ = done
    row = log.read(quick.out / "rank", "train.jsonl")[0]
    assert len(row["ratings"]) == len(row["responses"])
    assert all(set(one) == {"helpful", "honest", "harmless"} for one in row["ratings"])
    assert all(1 <= rating <= 7 for one in row["ratings"] for rating in one.values())


def several(quick, cost, out, config, **changes):
    """The configuration of a policy of two reward models (one twice) and a cost model."""
    judge = quick.out / "reward" / "model"
    given = paths(quick, out, "init", "out") | {"text": None, "reward": (judge, judge), "cost": cost}
    algorithm = dataclasses.replace(config.algorithm, rewards=BOTH)
    return dataclasses.replace(config, **given, algorithm=algorithm, **changes)


def test_ppo_goes_on_with_its_multiplier_and_moments(done, cost, tmp_path, monkeypatch, capsys):
    quick, _ = done
    alone = several(quick, cost, tmp_path / "alone", quick.ppo)
    state = ppo.main(alone)
    first, last = metrics_of(alone.out)
    costs = [row["cost"] for row in log.read(alone.out, "samples.jsonl")]
    assert len(set(costs)) > 1
    assert first["cost/multiplier"] == pytest.approx(0.7)
    moved = 0.7 * math.exp(0.1 * 0.7 * (first["cost/mean"] + 0.1))
    assert last["cost/multiplier"] == pytest.approx(moved, rel=1e-4) and abs(moved - 0.7) > 1e-3
    assert {"reward/score_0", "reward/running_std_1", "reward/before_cost"} <= first.keys()
    assert state.opt_state["rewards"].moments.count == 2 * alone.batch
    ask_to_end(monkeypatch)
    run = dataclasses.replace(alone, out=tmp_path / "run")
    assert status_of(ppo.main, run) == preemption.EXIT
    other = dataclasses.replace(BOTH, multiplier=2.0)
    changed = dataclasses.replace(run, algorithm=dataclasses.replace(run.algorithm, rewards=other))
    with pytest.raises(InputError, match=r"multiplier"):
        ppo.main(changed)
    cli.run(ppo.main, run, [])
    same_outcome(run.out, alone.out)


def test_a_changed_multiplier_goes_on_from_there(done, cost, tmp_path, monkeypatch):
    quick, _ = done
    run = several(quick, cost, tmp_path, quick.ppo)
    ask_to_end(monkeypatch)
    assert status_of(ppo.main, run) == preemption.EXIT
    other = dataclasses.replace(run.algorithm, rewards=dataclasses.replace(BOTH, multiplier=2.0))
    ppo.main(dataclasses.replace(run, algorithm=other, saves=checkpoint.Config(resume="changed")))
    assert metrics_of(run.out)[-1]["cost/multiplier"] == 2.0


def test_other_rewards_cannot_go_on(done, cost, tmp_path, monkeypatch):
    """A state without a multiplier is none of a run with a constraint, which says so."""
    quick, _ = done
    run = several(quick, cost, tmp_path, quick.ppo)
    plain = dataclasses.replace(run, cost=None, algorithm=quick.ppo.algorithm)
    ask_to_end(monkeypatch)
    assert status_of(ppo.main, plain) == preemption.EXIT
    with pytest.raises(InputError) as error:
        ppo.main(dataclasses.replace(run, saves=checkpoint.Config(resume="changed")))
    assert "\n" not in str(error.value) and "rewards" in str(error.value)


@pytest.mark.parametrize(
    "experiment", [pytest.param(grpo, id="grpo"), pytest.param(rloo, id="rloo", marks=pytest.mark.full)]
)
def test_groups_learn_from_several_rewards(done, cost, tmp_path, experiment):
    quick, _ = done
    small = {name: getattr(quick.ppo, name) for name in ("data", "prompt_length", "max_new_tokens", "batch")}
    default = experiment.Config(steps=1, warmup=0)
    one_update = dataclasses.replace(default, algorithm=dataclasses.replace(default.algorithm, minibatches=1))
    run = several(quick, cost, tmp_path, one_update, **small)
    experiment.main(run)
    (row,) = metrics_of(tmp_path)
    assert row["cost/multiplier"] == pytest.approx(0.7) and "reward/score_1" in row


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--algorithm.rewards.weights", "1", "2"], "expected a weight for each of the 1 models of --reward"),
        (["--cost", "x"], "the cost model has no effect without a threshold"),
        (["--algorithm.rewards.threshold", "0"], "name one by --cost"),
    ],
)
def test_rewards_that_do_not_fit_are_refused(done, capsys, flags, said):
    quick, _ = done
    assert said in refused(capsys, ppo.main, quick.ppo, *flags)
