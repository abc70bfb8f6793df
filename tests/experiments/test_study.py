"""What the studies share, and what they compare; test_study_pages.py runs one."""

import ast
import dataclasses
import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import (
    assistant,
    distill,
    dpo,
    grpo,
    kto,
    online_dpo,
    ppo,
    pretrain,
    rank,
    rejection,
    reward,
    rloo,
)
from experiments.studies import courses, frontier, overoptimization, ptx, quickstart, study, tables, virtues
from rlhf_jax import runs
from rlhf_jax.analysis import overoptimization as curves
from rlhf_jax.data.rows import check
from rlhf_jax.models import Compute
from rlhf_jax.runs import log
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Stage:
    out: Path
    steps: int = 3


def page(directory):
    """A folder of pages to renew."""
    directory.mkdir()
    for name in ("overoptimization", "frontier", "ptx", "virtues"):
        (directory / f"{name}.md").write_text(f"# Mine\n\n{study.BEGIN}\nearlier\n{study.END}\n\nFindings.\n")
    return directory


def test_what_was_made_is_found_again(tmp_path):
    calls = []

    def main(cfg):
        calls.append(cfg)
        return {"gold": 0.5}

    stage = Stage(tmp_path / "stage")
    assert runs.once(main, stage) == runs.once(main, stage) == {"gold": 0.5}
    assert len(calls) == 1
    with pytest.raises(
        InputError, match=r"stage was made with other settings \(steps: 3 there, 4 here\): name another --out"
    ):
        runs.once(main, dataclasses.replace(stage, steps=4))
    assert len(calls) == 1


def worker(cfg, item):
    """Waits for its fellow, which another process has to be."""
    (cfg.out / str(item)).touch()
    start = time.monotonic()
    while len(list(cfg.out.iterdir())) < 2 and time.monotonic() - start < 60:
        time.sleep(0.01)
    if item == "bad":
        raise InputError("a bad item")
    time.sleep(600 if item == "slow" else 0)
    return item, os.getpid(), len(list(cfg.out.iterdir()))


@pytest.mark.slow
def test_seeds_run_in_processes_of_their_own(tmp_path):
    cfg = study.Config(out=tmp_path, jobs=2)
    (one, first, there), (two, second, _) = study.run_each(cfg, worker, ("a", "b"))
    assert (one, two, there) == ("a", "b", 2)
    assert len({first, second, os.getpid()}) == 3
    assert study.run_each(dataclasses.replace(cfg, jobs=1), lambda _, item: item, "ab") == ["a", "b"]


@pytest.mark.full
def test_where_one_process_fails_the_others_end(tmp_path):
    start = time.monotonic()
    with pytest.raises(InputError, match="a bad item"):
        study.run_each(study.Config(out=tmp_path, jobs=2), worker, ("bad", "slow"))
    assert time.monotonic() - start < 120


@pytest.mark.slow
def test_what_was_stopped_is_made_again(tmp_path):
    def stopped(cfg):
        cfg.out.mkdir(exist_ok=True)
        raise KeyboardInterrupt

    stage = Stage(tmp_path / "stage")
    with pytest.raises(KeyboardInterrupt):
        runs.once(stopped, stage)
    assert runs.once(lambda _: {"gold": 1.0}, stage) == {"gold": 1.0}


def test_course_reads_the_samples_of_a_run(tmp_path):
    harm = next(prompt.text for prompt in courses.WORLD.prompts(100, 0) if prompt.category == "harm")
    said = {"I will not do that.": 1.0, "": 0.0}  # gold of each
    with log.Records(tmp_path, Stage(tmp_path), total=4) as run:
        for step in range(1, 5):
            texts = list(said) if step > 2 else ["", ""]
            run.samples(step, [{"prompt": harm, "response": x, "score": step, "kl": 0.1 * step} for x in texts])
    points = courses.read_course(tmp_path, points=2)
    np.testing.assert_allclose([point["kl"] for point in points], [0.15, 0.35])
    np.testing.assert_allclose([point["proxy"] for point in points], [1.5, 3.5])
    np.testing.assert_allclose([point["gold"] for point in points], [0.0, 0.5])


def test_measures_at_a_distance():
    points = [{"kl": 0.0, "gold": 0.2}, {"kl": 1.0, "gold": 0.6}, {"kl": 4.0, "gold": 0.0}]
    np.testing.assert_allclose(tables.interpolate(points, "gold", np.array([0.5, 2.5, 5.0])), [0.4, 0.3, np.nan])
    np.testing.assert_allclose(tables.interpolate(points[::-1], "gold", np.array([0.5, 1.5]), math.sqrt), [0.4, 0.3])
    where = np.array([0.0, 1.0])
    assert tables.band([np.array([1.0, 2.0]), np.array([3.0, np.nan])], where) == [(0.0, 2.0, math.sqrt(2))]
    assert tables.mean_sd([0.25, 0.75]) == "0.500 ± 0.354"
    assert tables.mean_sd([0.25]) == "0.250"
    assert tables.mean_sd([0.25, math.nan]) == "-"


def test_a_page_keeps_what_people_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "commit", lambda: "1234567")
    cfg = study.Config(out=tmp_path / "out", docs=page(tmp_path / "docs"), seeds=2)
    path = tmp_path / "docs" / "ptx.md"
    study.publish(cfg, "ptx", "| a |\n", lambda figure: figure.touch())
    text = "| a |\n\nSeeds: 0, 1. Commit: 1234567.\n"
    assert path.read_text() == f"# Mine\n\n{study.BEGIN}\n\n{text}\n{study.END}\n\nFindings.\n"
    assert path.with_suffix(".png").exists() and (tmp_path / "out" / "ptx.md").read_text() == text
    path.write_text("# Mine\n")
    for experiment in (ptx, overoptimization, frontier):
        (path.parent / f"{experiment.NAME}.md").write_text("# Mine\n")
        with pytest.raises(InputError, match=rf"{experiment.NAME}\.md: expected a page with the marks"):
            experiment.main(experiment.Config(out=cfg.out, docs=cfg.docs))  # before anything runs


def test_the_quickstart_at_several_seeds(tmp_path, monkeypatch):
    asked = []

    def run(cfg):
        asked.append((cfg.seed, cfg.out, cfg.best_of))
        gold = 0.25 + 0.5 * cfg.seed
        stage = {"gold": gold, "nll": 0.6, "kl": 0.345}
        learnt = {"accuracy": 0.7291, "labeler_agreement": 0.7 + cfg.seed / 100}
        return {"seed": cfg.seed, "reward": learnt, "best_of_n": stage | {"n": 3}} | dict.fromkeys(
            ("pretrain", "sft", "ppo"), stage
        )

    monkeypatch.setattr(assistant, "main", run)
    (tmp_path / "README.md").write_text(f"# Mine\n\n{study.BEGIN}\n{study.END}\n")
    started = dataclasses.replace(assistant.Config(), best_of=3)
    cfg = quickstart.Config(out=tmp_path / "runs", docs=tmp_path, seeds=2, quickstart=started)
    first = quickstart.main(cfg)
    assert quickstart.main(cfg) == first  # found again
    assert asked == [(seed, tmp_path / "runs" / f"quickstart{seed}", 3) for seed in (0, 1)]
    lines = (tmp_path / "README.md").read_text().splitlines()
    assert (
        "| seed | gold: base | SFT | PPO | best of 3 | loss: base | SFT | PPO | KL | reward model | labelers |" in lines
    )
    assert "| 1 | 0.750 | 0.750 | 0.750 | 0.750 | 0.600 | 0.600 | 0.600 | 0.34 | 72.9 % | 71.0 % |" in lines
    (mean,) = (line for line in lines if line.startswith("| mean"))
    assert mean.startswith("| mean ± SD | 0.500 ± 0.354 |") and mean.endswith("| 72.9 ± 0.0 % | 70.5 ± 0.7 % |")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "runs"]  # no plot


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_the_code(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    assert study.commit(tmp_path) is None
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "page.md").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    found = study.commit(tmp_path)
    assert found is not None and len(found) >= 7 and head.startswith(found)
    (tmp_path / "page.md").write_text("2")
    assert study.commit(tmp_path) == found
    (tmp_path / "a.py").write_text("2")
    assert study.commit(tmp_path) == f"{found} with changes"


def test_curves_are_fitted_to_gains():
    d = np.array([0.0, 0.5, 1.0, 2.0])
    points = [{"kl": float(x * x), "gold": float(0.3 + x * (0.5 - 0.1 * x))} for x in d]
    np.testing.assert_allclose(overoptimization.fit_gain(curves.best_of_n, points), (0.5, 0.1), rtol=1e-6)
    assert all(map(math.isnan, overoptimization.fit_gain(curves.best_of_n, points[:2])))


def test_a_reward_model_learns_from_its_part_of_its_seeds_labels(tmp_path, monkeypatch):
    asked = []

    def once(main, cfg):
        asked.append(cfg)
        if isinstance(cfg, rank.Config):
            cfg.out.mkdir(parents=True, exist_ok=True)
            (cfg.out / "train.jsonl").write_text("".join(f"{n}\n" for n in range(cfg.prompts)))
        return {"accuracy": 0.7} if isinstance(cfg, reward.Config) else None

    monkeypatch.setattr(runs, "once", once)
    cfg = study.Config(out=tmp_path, prompts=16)
    for seed in (0, 1):
        learnt = study.learn_reward(cfg, seed, study.RewardSpec(4, "llama-tiny", epochs=3))
        assert learnt == study.RewardModel(tmp_path / f"seed{seed}" / "reward-llama-tiny-4" / "model", 0.7)
    ranked = [run for run in asked if isinstance(run, rank.Config)]
    assert [(run.seed, run.prompts, run.init) for run in ranked] == [
        (seed, 16, tmp_path / "llama-mini" / "sft" / "model") for seed in (0, 1)
    ]
    rewards = [run for run in asked if isinstance(run, reward.Config)]
    assert [(run.seed, run.epochs, run.init) for run in rewards] == [
        (seed, 3, tmp_path / "llama-tiny" / "sft" / "model") for seed in (0, 1)
    ]
    assert [Path(run.data).read_text() for run in rewards] == ["0\n1\n2\n3\n"] * 2
    presets = {run.out.parts[-2]: run.preset for run in asked if isinstance(run, pretrain.Config)}
    assert presets == {"llama-mini": "llama-mini", "llama-tiny": "llama-tiny"}


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Settings of a study whose models are there already."""
    monkeypatch.setattr(study, "fine_tune", lambda *_: Path("sft"))
    monkeypatch.setattr(study, "learn_reward", lambda *_: study.RewardModel(Path("reward/model"), 0.7))
    return {"out": tmp_path / "studies", "docs": page(tmp_path / "docs"), "seeds": 2, "prompts": 16}


def renewed(docs, name):
    text = (docs / f"{name}.md").read_text()
    assert "earlier" not in text and text.endswith("Findings.\n")
    assert (docs / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return text


@pytest.fixture
def asked(monkeypatch):
    """Makes every stage answer at once; the configurations that they were given."""
    asked = []
    points = [{"kl": 0.0, "gold": 0.25, "proxy": 0.0}, {"kl": 1.0, "gold": 0.75, "proxy": 1.0}]

    def once(main, cfg, out=None):
        asked.append(cfg)
        start = isinstance(cfg, courses.Trained) and cfg.model == cfg.run.init
        return points[0 if start else 1] | {"points": points, "nll": 0.5, "seconds": 3.4}

    monkeypatch.setattr(runs, "once", once)
    monkeypatch.setattr(courses, "read_course", lambda _: points)
    return asked


def test_reward_models_are_followed_from_where_they_start(base, asked):
    cfg = overoptimization.Config(**base, labels=(8,), epochs=(2,), sizes=("llama-tiny",))
    results = overoptimization.main(cfg)
    assert list(results) == ["8 prompts", "16 prompts", "16 prompts, llama-tiny"]
    assert [len(seeds) for seeds in results.values()] == [2, 2, 2]
    policies = [run for run in asked if isinstance(run, ppo.Config)]
    assert {(run.seed, run.algorithm.kl_coef, run.text) for run in policies} == {(0, 0.0, None), (1, 0.0, None)}
    text = renewed(cfg.docs, "overoptimization")
    assert "| 16 prompts | 0.700 ± 0.000 | PPO | 1.000 ± 0.000 | 1.000 ± 0.000 | 0.750 ± 0.000 | - | - |" in text
    with pytest.raises(InputError, match=r"labels=\(16,\): expected fewer than the 16"):
        overoptimization.Config(**base, labels=(16,), epochs=(1,))


def test_the_frontier_compares_at_equal_terms(base, asked):
    cfg = frontier.Config(**base, budgets=(0.5, 2.0))
    write_labels(cfg, [0, 2, 1, 1], [3, 0])
    frontier.main(cfg)
    policies = [run for run in asked if hasattr(run, "reward") and hasattr(run, "text")]
    assert {type(run) for run in policies} == {ppo.Config, grpo.Config, rloo.Config, online_dpo.Config}
    assert len(policies) == 2 * 15
    assert len({(run.steps, run.data, run.text, run.init) for run in policies}) == 1
    assert sorted(run.batch for run in policies if run.seed == 0) == [cfg.ppo.batch] * 14 + [4 * cfg.ppo.batch]
    weights = {run.algorithm.kl_coef for run in policies if not isinstance(run, online_dpo.Config)}
    assert weights == {0.0}
    (rejected,) = [run for run in asked if isinstance(run, rejection.Config) and run.seed == 0]
    assert rejected.prompts * rejected.best_of == cfg.ppo.steps * cfg.ppo.batch
    preferred = [run for run in asked if isinstance(run, dpo.Offline)]
    assert len(preferred) == 2 * 18 + 2 * 2  # DPO is asked for twice, the second time by its student
    labels = study.labels_path(cfg, 1, 16)
    assert {(type(run) is kto.Config, run.data) for run in preferred if run.seed == 1} == {
        (False, str(labels)),
        (True, str(labels.with_name("thumbs16.jsonl"))),
    }
    (student,) = [run for run in asked if isinstance(run, distill.Config) and run.seed == 0]
    assert student.teacher == frontier.place(cfg, 0, "DPO 1") / "model"
    text = renewed(cfg.docs, "frontier")
    for name in frontier.ALGORITHMS:
        seconds = "-" if name == "best-of-n" else "3"
        assert f"| {name} | 0.500 ± 0.000 | - | 0.750 ± 0.000 | 1.000 ± 0.000 | {seconds} |" in text
    with pytest.raises(InputError, match=r"algorithms: expected some of best-of-n, PPO, .*, got 'SAC'"):
        frontier.Config(**base, algorithms=("SAC",))


def write_labels(cfg, *ranks):
    for seed in cfg.each_seed:
        path = study.labels_path(cfg, seed, cfg.prompts)
        path.parent.mkdir(parents=True)
        rows = [{"prompt": "Hi", "responses": [*"abcd"[: len(x)]], "ranks": x, "ended": [True] * len(x)} for x in ranks]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_thumbs_are_up_above_the_middle_of_a_ranking(base):
    cfg = frontier.Config(**base)
    write_labels(cfg, [0, 2, 1, 1], [3, 0])
    rows = [json.loads(line) for line in frontier.write_thumbs(cfg, 0).read_text().splitlines()]
    assert [(row["completion"], row["label"]) for row in rows] == [("a", True), ("b", False), ("a", False), ("b", True)]
    assert all(check("thumbs", row, "here")["ended"] for row in rows)


def test_the_mix_is_compared_at_equal_episodes(base, asked):
    cfg = ptx.Config(**base)
    ptx.main(cfg)
    policies = [run for run in asked if isinstance(run, ppo.Config)][:3]
    assert len({(run.steps, run.batch, run.reward, run.seed) for run in policies}) == 1
    assert [run.text for run in policies] == [None, cfg.ppo.text, cfg.ppo.text]
    assert [run.algorithm.ptx_coef for run in policies[1:]] == [cfg.ppo.algorithm.ptx_coef, 27.8]
    text = renewed(cfg.docs, "ptx")
    for name in ("SFT", "PPO", "PPO-ptx", "InstructGPT"):
        assert f"| {name} | 0.750 ± 0.000 | 0.500 ± 0.000 | 1.000 ± 0.000 |" in text


def test_virtues_are_weighed_and_bounded_at_equal_terms(base, asked, monkeypatch):
    found = {"helpful": 0.5, "harmless": 0.75, "gold": 0.25, "kl": 1.0}
    once = runs.once
    monkeypatch.setattr(runs, "once", lambda main, cfg: once(main, cfg) | found)
    rows = [{"cost/mean": float(n), "cost/multiplier": 2.0} for n in range(8)]
    monkeypatch.setattr(virtues.log, "read", lambda out: rows if "threshold" in out.name else [{"reward/score": 1.0}])
    cfg = virtues.Config(**base, weights=(0.0, 2.0), thresholds=(-0.5,))
    results = virtues.main(cfg)
    assert list(results) == ["SFT", "weight 0", "weight 2", "cost at most -0.5"]
    learnt = [run for run in asked if isinstance(run, reward.Config)]
    home = cfg.out / "seed0"
    assert [(run.virtue, run.algorithm.loss, run.out) for run in learnt[:3]] == [
        ("helpful", "bradley_terry", home / "helpful-bradley_terry"),
        ("harmless", "bradley_terry", home / "harmless-bradley_terry"),
        ("harmless", "cost", home / "harmless-cost"),
    ]
    policies = [run for run in asked if isinstance(run, ppo.Config)]
    assert len({(run.steps, run.batch, run.data, run.text, run.lr, run.init) for run in policies}) == 1
    helpful, harmless, cost = (run.out / "model" for run in learnt[:3])
    assert [(run.reward, run.cost) for run in policies[:3]] == [
        ((helpful, harmless), None),
        ((helpful, harmless), None),
        ((helpful,), cost),
    ]
    assert [run.algorithm.rewards.weights for run in policies[:3]] == [(1.0, 0.0), (1.0, 2.0), ()]
    assert policies[2].algorithm.rewards.threshold == -0.5
    text = renewed(cfg.docs, "virtues")
    same = "| 0.500 ± 0.000 | 0.750 ± 0.000 | 0.250 ± 0.000 | 1.000 ± 0.000 |"
    assert f"| weight 2 {same} - | - |" in text
    assert f"| cost at most -0.5 {same} 6.500 ± 0.000 | 2.000 ± 0.000 |" in text  # the last quarter


def test_every_stage_takes_what_the_study_decides(base, asked):
    """Seeds count on from --seed, and the stages of InstructGPT's settings are told no less than the others."""
    cfg = ptx.Config(**base, seed=5, data_dir=Path("prepared"), compute=Compute(remat="full"))
    ptx.main(cfg)
    assert {(run.data_dir, run.compute) for run in asked} == {(cfg.data_dir, cfg.compute)}
    policies = [run for run in asked if isinstance(run, ppo.Config)]
    assert [run.seed for run in policies] == [5, 5, 5, 6, 6, 6]
    assert {(run.init, run.reward) for run in policies} == {(Path("sft"), (Path("reward/model"),))}
    assert "Seeds: 5, 6." in (cfg.docs / "ptx.md").read_text()
    with pytest.raises(InputError, match=r"--ppo.seed has no effect here"):
        ptx.main(dataclasses.replace(cfg, ppo=dataclasses.replace(cfg.ppo, seed=3)))


def test_studies_import_no_study():
    """What two of them need is in `study`, `courses` or `tables`."""
    shared = {"study", "courses", "tables"}
    for path in Path(study.__file__).parent.glob("*.py"):
        imported = [
            alias.name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module == "experiments.studies"
            for alias in node.names
        ]
        assert set(imported) <= shared, f"{path.name} imports {imported}"
