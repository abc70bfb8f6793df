"""Labels in rounds."""

import dataclasses
import json

import pytest

from experiments import (
    dpo,
    evaluate,
    ppo,
    rank,
    reward,
    rounds,
)
from tests.quickstart import paths, refused


@pytest.fixture
def ran(monkeypatch):
    """The stages that were asked to run, which do nothing, with the configuration of each."""
    ran = []

    def stage(name):
        def main(config):
            ran.append((name, config))
            if name == "rank":
                config.out.mkdir(parents=True, exist_ok=True)
                (config.out / "train.jsonl").write_text(f"{config.init} {config.skip}\n")
            if name == "reward" and config.held_out:
                return {"accuracy": 0.75}
            return {"gold": 0.5, "reward": 0.25, "kl": 1.0, "nll": 2.0} if name == "evaluate" else {}

        return main

    for name, module in {"rank": rank, "reward": reward, "ppo": ppo, "dpo": dpo, "evaluate": evaluate}.items():
        monkeypatch.setattr(module, "main", stage(name))
    return ran


def test_rounds_of_labels(done, tmp_path, ran, capsys):
    """What each stage of each round is given, without running them."""
    cfg, _ = done
    tuned = cfg.out / "sft" / "model"
    config = rounds.Config(rounds=2, rank=rank.Config(prompts=8), **paths(cfg, tmp_path, "init", "out"))
    result = rounds.main(config)
    assert json.loads((tmp_path / "rounds.json").read_text()) == result
    assert [len(rows) for rows in result.values()] == [2, 2] and (tmp_path / "rounds.png").is_file()
    first = tmp_path / "online" / "round1" / "ppo" / "model"
    for arm, answering in {"online": first, "offline": tuned}.items():
        assert (tmp_path / arm / "labels.jsonl").read_text() == f"{tuned} 0\n{answering} 8\n"
        here = [(name, config) for name, config in ran if config.out.is_relative_to(tmp_path / arm)]
        assert [name for name, _ in here] == ["rank", "reward", "ppo", "evaluate"] * 2
        learn, improve, judge = (config for _, config in here[5:])
        assert learn.data == str(tmp_path / arm / "labels.jsonl") and learn.init == tuned
        assert improve.init == tmp_path / arm / "round1" / "ppo" / "model" and improve.reference == tuned
        assert improve.reward == (learn.out / "model",) == (judge.reward,)
        assert judge.model == improve.out / "model" and judge.reference == tuned
        assert improve.seed != here[2][1].seed  # no two rollouts share noise
    said = refused(capsys, rounds.main, config, "--ppo.init", "elsewhere")
    assert "--ppo.init has no effect here, where other flags decide it" in said


def test_rounds_of_dpo(done, tmp_path, ran, capsys):
    """DPO from the fine-tuned model on all labels so far, those of its own later answers among them."""
    cfg, _ = done
    tuned = cfg.out / "sft" / "model"
    ranked = rank.Config(prompts=8, max_new_tokens=9)
    config = rounds.Config(
        improve="dpo", rounds=2, rank=ranked, dpo=dpo.Config(lr=0.5), **paths(cfg, tmp_path, "init", "out")
    )
    rounds.main(config)
    here = [(name, config) for name, config in ran if config.out.is_relative_to(tmp_path / "online")]
    assert [name for name, _ in here] == ["rank", "dpo", "evaluate"] * 2
    first, (asked, learn, judge) = here[1][1], (config for _, config in here[3:])
    assert asked.init == first.out / "model" and asked.max_new_tokens == judge.max_new_tokens == 9
    assert first.init == learn.init == tuned and learn.data == str(tmp_path / "online" / "labels.jsonl")
    assert judge.model == learn.out / "model" and judge.reward is None and learn.seed != first.seed
    assert learn.lr == 0.5
    said = refused(capsys, rounds.main, config, "--ppo.steps", 7)
    assert "--ppo has no effect with --improve dpo: leave its flags out" in said
    people = dataclasses.replace(ranked, prompts=16, db=tmp_path / "people.db", data="p.jsonl")
    with_people = dataclasses.replace(config, rank=people, out=tmp_path / "people")
    assert rounds.main(with_people) == {"online": [{}] * 2}  # nothing to measure by
    said = refused(capsys, rounds.main, with_people, "--dpo.batch", 17)
    assert "--rank.prompts gives 16 rankings a round, fewer than a batch of --dpo.batch 17" in said


def test_rounds_with_people(done, tmp_path, ran, capsys):
    """One arm, whose items carry the round; reward models are measured on what people say of held-out prompts."""
    cfg, _ = done
    ranked = rank.Config(prompts=16, held_out=8, db=tmp_path / "people.db")
    config = rounds.Config(rounds=2, rank=ranked, **paths(cfg, tmp_path / "world", "init", "out"))
    measured = {"gold": 0.5, "reward": 0.25, "kl": 1.0, "nll": 2.0, "accuracy": 0.75}
    assert rounds.main(config) == {"online": [measured] * 2}
    assert "accuracy on held-out pairs" in capsys.readouterr().out
    asked = [config for name, config in ran if name == "rank"]
    assert [(one.round, one.skip, one.db) for one in asked] == [(1, 0, ranked.db), (2, 16, ranked.db)]
    learnt = [config for name, config in ran if name == "reward"]
    assert [one.held_out for one in learnt] == [str(one.out / "held_out.jsonl") for one in asked]
    ran.clear()
    own = dataclasses.replace(config, rank=dataclasses.replace(ranked, data="p.jsonl"), out=tmp_path / "own")
    said = refused(capsys, rounds.main, own)
    assert "--rank.data p.jsonl: PPO would train on the world's prompts and text all the same" in said
    own = dataclasses.replace(own, ppo=ppo.Config(data="p.jsonl", text=None))
    assert rounds.main(own) == {"online": [{"accuracy": 0.75}] * 2}
    assert [name for name, _ in ran] == ["rank", "reward", "ppo"] * 2
    assert (own.out / "rounds.png").is_file()
    said = refused(capsys, rounds.main, own, "--rank.round", "7")
    assert "--rank.round has no effect here, where other flags decide it" in said
    for flags in (["--rank.held-out", 7], ["--rank.enough", 0.8, "--rank.prompts", 17]):
        said = refused(capsys, rounds.main, own, *flags)
        assert "14 rankings a round, fewer than a batch of --reward.batch 16" in said
