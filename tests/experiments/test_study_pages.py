"""A study makes what is missing, and renews its page."""

import dataclasses

from experiments.studies import overoptimization, study
from tests.quickstart import TINY


def test_a_study_makes_what_is_missing_and_renews_its_page(done, tmp_path, monkeypatch, capsys):
    quick, summary = done
    monkeypatch.setattr(study, "tuned", lambda *_: quick.out / "sft" / "model")
    judge = {"model": quick.out / "reward" / "model", "accuracy": summary["reward"]["accuracy"]}
    monkeypatch.setattr(study, "judge", lambda *_, **__: judge)
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
    alone, best = results["best_of_n"][0]["16 prompts"]
    assert alone["kl"] == 0 and best["kl"] > 0 and best["proxy"] > alone["proxy"]
    assert len(results["ppo"][0]["16 prompts"]) == 1 + cfg.ppo.steps
    assert "\n| 16 prompts |" in docs.read_text() and "earlier" not in docs.read_text()
    assert (tmp_path / "overoptimization.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert overoptimization.main(cfg) == results
    assert "step/s" not in capsys.readouterr().err  # everything was found
