"""What the studies share, and what they compare; test_experiments.py runs one."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from experiments import dpo, frontier, grpo, overoptimization, ppo, ptx, rloo, study
from rlhf_jax import log
from rlhf_jax import overoptimization as curves
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Stage:
    out: Path
    steps: int = 3


def page(directory):
    """A folder of pages to renew."""
    directory.mkdir()
    for name in ("overoptimization", "frontier", "ptx"):
        (directory / f"{name}.md").write_text(f"# Mine\n\n{study.BEGIN}\nearlier\n{study.END}\n\nFindings.\n")
    return directory


def test_what_was_made_is_found_again(tmp_path):
    calls = []

    def main(cfg):
        calls.append(cfg)
        return {"gold": 0.5}

    stage = Stage(tmp_path / "stage")
    assert study.once(main, stage) == study.once(main, stage) == {"gold": 0.5}
    assert len(calls) == 1
    with pytest.raises(InputError, match=r"stage was made with other settings \(steps\): name another --out"):
        study.once(main, dataclasses.replace(stage, steps=4))
    assert len(calls) == 1


def test_what_was_stopped_is_made_again(tmp_path):
    def stopped(cfg):
        cfg.out.mkdir()
        raise KeyboardInterrupt

    stage = Stage(tmp_path / "stage")
    with pytest.raises(KeyboardInterrupt):
        study.once(stopped, stage)
    assert study.once(lambda _: {"gold": 1.0}, stage) == {"gold": 1.0}


def test_course_reads_the_samples_of_a_run(tmp_path):
    harm = next(prompt.text for prompt in study.WORLD.prompts(100, 0) if prompt.category == "harm")
    said = {"I will not do that.": 1.0, "": 0.0}  # gold of each
    with log.start(tmp_path, Stage(tmp_path), total=4) as run:
        for step in range(1, 5):
            texts = list(said) if step > 2 else ["", ""]
            run.samples(step, [{"prompt": harm, "response": x, "score": step, "kl": 0.1 * step} for x in texts])
    points = study.course(tmp_path, points=2)
    np.testing.assert_allclose([point["kl"] for point in points], [0.15, 0.35])
    np.testing.assert_allclose([point["proxy"] for point in points], [1.5, 3.5])
    np.testing.assert_allclose([point["gold"] for point in points], [0.0, 0.5])


def test_measures_at_a_distance():
    points = [{"kl": 0.0, "gold": 0.2}, {"kl": 1.0, "gold": 0.6}, {"kl": 4.0, "gold": 0.0}]
    np.testing.assert_allclose(study.at(points, "gold", np.array([0.5, 2.5, 5.0])), [0.4, 0.3, np.nan])
    np.testing.assert_allclose(study.at(points, "gold", np.array([0.5, 1.5]), of=math.sqrt), [0.4, 0.3])
    where = np.array([0.0, 1.0])
    assert study.band([np.array([1.0, 2.0]), np.array([3.0, np.nan])], where) == [(0.0, 2.0, 1.0)]
    assert study.mean_sd([0.25, 0.75]) == "0.500 ± 0.250"
    assert study.mean_sd([0.25, math.nan]) == "-"


def test_a_page_keeps_what_people_wrote(tmp_path):
    docs = page(tmp_path / "docs")
    study.renew(docs / "ptx.md", "| a |\n")
    assert (docs / "ptx.md").read_text() == f"# Mine\n\n{study.BEGIN}\n\n| a |\n\n{study.END}\n\nFindings.\n"
    (docs / "ptx.md").write_text("# Mine\n")
    with pytest.raises(InputError, match=r"ptx\.md: expected a page with the marks"):
        study.renew(docs / "ptx.md", "| a |\n")


def test_curves_are_fitted_to_gains():
    d = np.array([0.0, 0.5, 1.0, 2.0])
    points = [{"kl": float(x * x), "gold": float(0.3 + x * (0.5 - 0.1 * x))} for x in d]
    fitted = overoptimization.fitted(curves.best_of_n, points, 0.3)
    np.testing.assert_allclose(fitted, (0.5, 0.1), rtol=1e-6)
    assert all(map(math.isnan, overoptimization.fitted(curves.best_of_n, points[:2], 0.3)))


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Settings of a study whose models are there already."""
    monkeypatch.setattr(study, "tuned", lambda *_: Path("sft"))
    monkeypatch.setattr(study, "judge", lambda *_, **__: {"model": Path("reward/model"), "accuracy": 0.7})
    return {"out": tmp_path / "studies", "docs": page(tmp_path / "docs"), "seeds": 1, "prompts": 16}


def renewed(docs, name):
    text = (docs / f"{name}.md").read_text()
    assert "earlier" not in text and text.endswith("Findings.\n")
    assert (docs / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return text


@pytest.fixture
def asked(monkeypatch):
    """Makes every stage answer at once; the configurations that they were given."""
    asked = []
    points = [{"n": 1, "kl": 0.0, "gold": 0.25, "proxy": 0.0}, {"n": 2, "kl": 1.0, "gold": 0.75, "proxy": 1.0}]

    def once(main, cfg, out=None):
        asked.append(cfg)
        return {"16 prompts": points} | points[1] | {"nll": 0.5}

    monkeypatch.setattr(study, "once", once)
    monkeypatch.setattr(study, "course", lambda _: points)
    return asked


def test_the_frontier_compares_at_equal_terms(base, asked):
    cfg = frontier.Config(**base, labels=(), epochs=(), sizes=(), betas=(0.5, 0.1), budgets=(0.5, 2.0))
    frontier.main(cfg)
    runs = {type(run): run for run in asked if hasattr(run, "text")}
    assert set(runs) == {ppo.Config, grpo.Config, rloo.Config}
    assert len({(run.steps, run.batch, run.data, run.reward, run.text) for run in runs.values()}) == 1
    assert {run.algorithm.kl_coef for run in asked if hasattr(run, "algorithm")} == {0.0}
    assert {run.dpo.beta for run in asked if isinstance(run, dpo.Config)} == {0.5, 0.1}
    text = renewed(cfg.docs, "frontier")
    for name in ("best-of-n", "PPO", "RLOO", "GRPO", "DPO"):
        assert f"| {name} | 0.500 ± 0.000 | - | 0.750 ± 0.000 | 1.000 ± 0.000 |" in text


def test_the_mix_is_compared_at_equal_episodes(base, asked):
    cfg = ptx.Config(**base)
    ptx.main(cfg)
    runs = [run for run in asked if isinstance(run, ppo.Config)]
    assert len({(run.steps, run.batch, run.reward) for run in runs}) == 1
    assert [run.text for run in runs] == [None, cfg.ppo.text, cfg.ppo.text]
    assert [run.ppo.ptx_coef for run in runs[1:]] == [cfg.ppo.ppo.ptx_coef, 27.8]
    text = renewed(cfg.docs, "ptx")
    for name in ("SFT", "PPO", "PPO-ptx", "PPO-ptx, InstructGPT's settings"):
        assert f"| {name} | 0.750 ± 0.000 | 0.500 ± 0.000 | 1.000 ± 0.000 |" in text
