"""A judge in the place of reward models and of labelers, over a stub that finds long answers good."""

import dataclasses
import json

import pytest

from experiments import best_of_n, grpo, ppo, rank, rejection
from rlhf_jax.rollouts import judge
from rlhf_jax.runs import log
from tests.quickstart import metrics_of, paths, refused

pytest.importorskip("starlette", reason="needs the extra people: pip install -e .[people]")
pytest.importorskip("httpx2", reason="needs the extra people: pip install -e .[people]")

from tests.people import endpoints
from tests.rollouts.test_judge import by_length


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """The settings of a judge that has no score for answers of an even length."""
    rubric = tmp_path_factory.mktemp("judge") / "rubric.txt"
    rubric.write_text("Long answers are good.")
    with endpoints.answering() as (stub, url):
        stub.rule = lambda text: by_length(text) if ".\n</answer>" not in text else "I cannot say."
        yield judge.Config(model="ada", rubric=rubric, url=url, missing=-2.0, most=9)


def _length(request):
    return len(request.partition("<answer>\n")[2].partition("\n</answer>")[0])


def test_policies_learn_from_a_judge(done, cfg, tmp_path):
    quick, _ = done
    given = paths(quick, tmp_path / "ppo", "init", "reward", "out") | {"text": None, "judge": cfg, "steps": 1}
    ppo.main(dataclasses.replace(quick.ppo, **given | {"reward": (given["reward"],)}))
    (row,) = metrics_of(tmp_path / "ppo")
    scores = [one["score"] for one in log.read(tmp_path / "ppo", "samples.jsonl")]
    assert set(scores) <= {-2.0, *map(float, range(1, 10))} and 0 <= row["reward/unjudged"] <= 1
    small = {name: getattr(quick.ppo, name) for name in ("data", "prompt_length", "max_new_tokens", "batch")}
    default = grpo.Config(warmup=0)
    algorithm = dataclasses.replace(default.algorithm, minibatches=1)
    given = paths(quick, tmp_path / "grpo", "init", "out") | {"text": None, "judge": cfg, "steps": 1}
    grpo.main(dataclasses.replace(default, algorithm=algorithm, **given, **small))
    assert "reward/unjudged" in metrics_of(tmp_path / "grpo")[0]


def test_a_judge_picks_the_best_answer(done, cfg, tmp_path):
    quick, _ = done
    given = paths(quick, None, "model", "reference", "out") | {"best_of": 2, "judge": cfg, "reward": None}
    found = best_of_n.main(dataclasses.replace(quick.evaluate, **given))
    assert -2 <= found["reward"] <= 9 and 0 <= found["unjudged"] <= 1
    config = rejection.Config(
        **paths(quick, tmp_path, "init", "out"),
        data="world:rows=100",
        prompts=16,
        best_of=4,
        batch=64,
        prompt_length=40,
        max_new_tokens=60,
        judge=cfg,
    )
    rejection.pick(config)
    assert log.read(tmp_path, "best.jsonl")


def test_a_judge_ranks(done, cfg, tmp_path, capsys):
    quick, _ = done
    config = dataclasses.replace(quick.rank, **paths(quick, tmp_path, "init", "out"), judge=cfg, prompts=8, held_out=4)
    found = rank.main(config)
    assert found == {"judge_consistency": 1.0}
    rows = log.read(tmp_path, "train.jsonl")
    for row in rows:
        lengths = [len(text) for text in row["responses"]]
        assert row["ranks"] == [sorted(set(lengths), reverse=True).index(length) for length in lengths]
        assert row["labeler"] == "ada" and len(row["ended"]) == len(lengths)
    said = capsys.readouterr().out
    assert f"train prompts: {len(rows)} of 8 ranked; " in said and "100.0 % of the others alike in both orders" in said


@pytest.mark.parametrize(
    ("main", "default", "flags", "said"),
    [
        (ppo.main, ppo.Config(), ["--pessimism", 1, "--reward", "a", "b"], "pessimism and weights have no effect"),
        (grpo.main, grpo.Config(), ["--reward", "a"], "reward and weights have no effect"),
        (rank.main, rank.Config(), ["--people", 3], "people=3 has no effect where a judge ranks"),
        (rank.main, rank.Config(), ["--db", "x.db"], "either people or a judge rank"),
    ],
)
def test_settings_that_do_not_fit_a_judge(cfg, tmp_path, capsys, main, default, flags, said):
    judged = ["--judge.name", "ada", "--judge.url", cfg.url, "--judge.rubric", cfg.rubric, "--out", tmp_path / "run"]
    assert said in refused(capsys, main, default, *judged, *flags)


def test_a_judge_without_a_verdict_ends_the_run(done, cfg, tmp_path, capsys):
    quick, _ = done
    given = paths(quick, tmp_path, "init", "reward", "out") | {"text": None}
    strict = dataclasses.replace(cfg, missing=None, most=2)  # which the stub exceeds
    config = dataclasses.replace(quick.ppo, **given | {"reward": (given["reward"],)}, judge=strict)
    assert "give such answers a score by judge.missing" in refused(capsys, ppo.main, config)
    assert json.loads((tmp_path / "config.json").read_text())["judge"]["name"] == "ada"
