"""A study makes what is missing, and renews its page."""

import dataclasses

from experiments.studies import overoptimization, study
from tests.quickstart import TINY


def test_a_study_makes_what_is_missing_and_renews_its_page(done, tmp_path, monkeypatch, capsys):
    quick, summary = done
    monkeypatch.setattr(study, "fine_tune", lambda *_: quick.out / "sft" / "model")
    learnt = study.RewardModel(quick.out / "reward" / "model", summary["reward"]["accuracy"])
    monkeypatch.setattr(study, "learn_reward", lambda *_: learnt)
    docs = tmp_path / "overoptimization.md"
    docs.write_text(f"# Mine\n\n{study.BEGIN}\nearlier\n{study.END}\n\nFindings.\n")
    cfg = overoptimization.Config(
        out=tmp_path / "studies",
        docs=tmp_path,
        seeds=1,
        prompts=16,
        ppo=dataclasses.replace(TINY.ppo, samples=16, text=None),
        labels=(),
        epochs=(),
        sizes=(),
        answers=2,
        answered=8,
    )
    results = overoptimization.main(cfg)
    (followed,) = results["16 prompts"]
    alone, best = followed.best_of_n
    assert alone["kl"] == 0 and best["kl"] > 0 and best["proxy"] > alone["proxy"]
    assert len(followed.ppo) == 1 + cfg.ppo.steps
    assert "\n| 16 prompts |" in docs.read_text() and "earlier" not in docs.read_text()
    assert (tmp_path / "overoptimization.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert overoptimization.main(cfg) == results
    assert "step/s" not in capsys.readouterr().err  # everything was found
