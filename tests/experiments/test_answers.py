"""Answers of models as tasks for people."""

import collections
import dataclasses
import json
from pathlib import Path

import pytest

from experiments import answers, rank, reward
from rlhf_jax.people import __main__ as command
from rlhf_jax.people import record
from rlhf_jax.people.store import Store
from rlhf_jax.rollouts import rollout
from rlhf_jax.runs import cli
from rlhf_jax.types import InputError


def test_two_models_share_the_answers(done, tmp_path, capsys, monkeypatch):
    cfg, _ = done
    models = (cfg.out / "sft" / "model", cfg.out / "ppo" / "model")
    given = answers.Config(
        db=tmp_path / "people.db",
        model=models,
        data="world:rows=100",
        data_dir=cfg.out / "data",
        prompts=9,
        k=3,
        batch=16,
        max_new_tokens=8,
        overlap=2,
        round=1,
    )
    assert answers.main(given) == {"added": 9, "present": 0}
    assert answers.main(given) == {"added": 0, "present": 9}
    with Store(given.db) as store:  # as the server has it on record, which was ended after four prompts
        number = record.begin(store, command._asked(command.Serve(), models))
        record.note(store, number, 4)
    with monkeypatch.context() as patched:
        sampled, episodes = [], rollout.episodes

        def counted(model, part, *rest, **more):
            sampled.append(len(part.index))
            return episodes(model, part, *rest, **more)

        patched.setattr(rollout, "episodes", counted)
        assert answers.main(dataclasses.replace(given, record=number)) == {"added": 0, "present": 9}
    assert sum(sampled) == 3 * 5  # of the other five
    with Store(given.db) as store:
        assert record.unfinished(store) is None and record.done(store, number) == 9
    assert "answers to 9 of 9 prompts" in capsys.readouterr().out
    with Store(given.db) as store, store.reader() as db:
        found = db.execute("SELECT * FROM items WHERE round = 1").fetchall()
        for item in found:
            names = json.loads(item["models"])
            assert sorted(names) == sorted(map(str, (models[0], models[0], models[1])))
            assert len(json.loads(item["responses"])) == len(json.loads(item["ended"])) == 3
            assert (item["overlap"], item["task"]) == (2, "rank")
        assert len({item["models"] for item in found}) > 1  # in no fixed order


def test_models_of_an_arena_meet_in_pairs(done, tmp_path, capsys, monkeypatch):
    cfg, _ = done
    models = tuple(cfg.out / stage / "model" for stage in ("sft", "ppo", "pretrain"))
    given = answers.Config(
        db=tmp_path / "people.db",
        model=models,
        data="world:rows=100",
        data_dir=cfg.out / "data",
        prompts=9,
        task="arena",
        pairs=2,
        batch=16,
    )
    settings, episodes = [], rollout.episodes

    def noted(*args, **more):
        settings.append(args[3].max_new_tokens)
        return episodes(*args, **more)

    monkeypatch.setattr(rollout, "episodes", noted)
    assert answers.main(given) == {"added": 18, "present": 0}
    assert set(settings) == {16} == {reward.Config.length - rank.Config.prompt_length}  # `reward` keeps them all
    assert " of 18 battles have the same answer" in capsys.readouterr().out
    with Store(given.db) as store, store.reader() as db:
        found = db.execute("SELECT * FROM items").fetchall()
    met = collections.Counter(frozenset(json.loads(item["models"])) for item in found)
    assert list(met.values()) == [6, 6, 6]
    said = collections.defaultdict(set)  # each model answers a prompt once
    for item in found:
        assert item["task"] == "arena"
        for model, text in zip(json.loads(item["models"]), json.loads(item["responses"]), strict=True):
            said[item["prompt"], model].add(text)
    assert len({prompt for prompt, _ in said}) == 9 and {len(texts) for texts in said.values()} == {1}


def test_the_server_starts_this_with_its_own_settings():
    models = (Path("a"), Path("b"), Path("c"))
    served = command.Serve(task="arena", model=models, pairs=3, prompts=7, overlap=2, seed=5, data="world:rows=9")
    started = command._asked(served, models).command(served.db, 3)
    assert started[1:4] == ["-m", "rlhf_jax.people.beside", "experiments.answers"]
    assert cli.parse(answers.Config(), started[4:]) == answers.Config(
        task="arena", model=models, pairs=3, prompts=7, overlap=2, seed=5, data="world:rows=9", record=3
    )
    started = command._asked(command.Serve(task="compare"), models[:1]).command(served.db, 1)
    assert cli.parse(answers.Config(), started[4:]).k == 2
    started = command._asked(command.Serve(task="demonstrate"), ()).command(served.db, 1)
    assert cli.parse(answers.Config(), started[4:]) == answers.Config(task="demonstrate", model=(), record=1)


def test_people_write_the_answers(tmp_path, capsys):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"prompt {n}"}) + "\n" for n in range(5)))
    given = answers.Config(
        db=tmp_path / "people.db", model=(), task="demonstrate", data=str(data), data_dir=tmp_path, prompts=4
    )
    assert answers.main(given) == {"added": 4, "present": 0}
    assert answers.main(given) == {"added": 0, "present": 4}
    with Store(given.db) as store:
        assert [store.pace(1).left, store.one("SELECT DISTINCT responses FROM items")[0]] == [4, "[]"]


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="--model: a task rank needs a model"):
        answers.Config(model=())
    with pytest.raises(InputError, match="k=1: expected at least 2"):
        answers.Config(k=1)
    with pytest.raises(InputError, match="k=4: expected 2 answers to compare"):
        answers.Config(task="compare")
    two = (Path("a"), Path("b"))
    with pytest.raises(InputError, match="arena compares at least two models"):
        answers.Config(task="arena")
    with pytest.raises(InputError, match="--model a: is named twice"):
        answers.Config(task="arena", model=(*two, Path("a")))
    with pytest.raises(InputError, match="pairs=2: expected from 1 to 1, the pairs that 2 models make"):
        answers.Config(task="arena", model=two, pairs=2)
