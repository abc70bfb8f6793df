"""Answers of a model, ranked by simulated people, or by people on a page."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import (
    rank,
    reward,
)
from rlhf_jax import models, runs
from rlhf_jax.data import tokenizer
from rlhf_jax.devices import preemption
from rlhf_jax.people import asking, guidelines
from rlhf_jax.people.items import Item
from rlhf_jax.people.store import Store
from rlhf_jax.rollouts import rollout
from rlhf_jax.runs import log
from tests import tiny
from tests.people import labelling
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


@pytest.mark.parametrize(
    ("times", "columns", "expected"),
    [
        ([2, 3, 2], 64, [(2, [0, 1, 5, 6]), (3, [2, 3, 4])]),
        ([4, 4], 64, [(4, list(range(8)))]),
        ([4, 6], 20, [(2, list(range(10)))]),  # short prompts: one program
    ],
)
def test_answers_that_are_sampled_together(times, columns, expected):
    cfg = rank.Config(least=min(times), most=max(times))
    assert [(group, rows.tolist()) for group, rows in rank.alike(cfg, times, columns)] == expected


@pytest.mark.slow
def test_a_prompt_is_read_once_for_any_number_of_answers(tmp_path, monkeypatch):
    """Prompts are apart by the number of their answers, which are those that they get together."""
    tokens = tokenizer.train(["Question: hello, you?\nAnswer: naïve, and you?"] * 9, 280, tmp_path)
    config = models.gpt(1, 16, 2, vocab_size=280, max_length=128)
    model = models.Model(config, tiny.policy(config), tokens, models.bind(models.Transformer(config)))
    models.save(model, model.params, tmp_path / "model")
    given = {"init": tmp_path / "model", "data_dir": tmp_path / "data", "prompts": 16, "held_out": 8, "batch": 64}
    cfg = rank.Config(**given, least=2, most=3, prompt_length=100, max_new_tokens=4)
    episodes, found, groups = rollout.episodes, [], []
    monkeypatch.setattr(rollout, "episodes", lambda *x, **y: groups.append(x[3].group) or episodes(*x, **y))
    for share in (False, True):
        compute = dataclasses.replace(cfg.compute, share_prompts=share)
        found.append(rank.sample(dataclasses.replace(cfg, compute=compute)))
    assert groups == [1, 1, 2, 3, 2, 3]
    assert found[0] == found[1]


def test_fewer_than_two_answers_cannot_be_ranked(done, flags, capsys):
    cfg, _ = done
    said = refused(capsys, rank.main, cfg.rank, *flags, "--init", cfg.out / "sft" / "model", "--least", 1)
    assert said == "error: least=1, most=9: expected 2 <= least <= most answers to rank"


# People ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(done, tmp_path, monkeypatch) -> rank.Config:
    """As the quickstart's ranking, by five people."""
    cfg, _ = done
    monkeypatch.setattr(asking, "POLL", 0.02)
    return dataclasses.replace(
        cfg.rank,
        init=cfg.out / "sft" / "model",
        data_dir=cfg.out / "data",
        out=tmp_path / "rank",
        db=tmp_path / "people" / "people.db",
        overlap=5,
        round=3,
    )


@contextlib.contextmanager
def each_look(action: Callable[[], Any]) -> Iterator[None]:
    """Within, something happens before a waiting run looks at its store."""
    standing = asking.Asked.standing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking.Asked, "standing", lambda self: (action(), standing(self))[1])
        yield


def rankings(folder: Path) -> dict[str, list[dict]]:
    """The rankings in a folder, with the name of each labeler, those of the same answers in the order of the names."""
    read = {split: log.read(folder, f"{split}.jsonl") for split in rank.SPLITS}
    named = {split: [row | {"labeler": str(row["labeler"])} for row in rows] for split, rows in read.items()}
    first = {split: {json.dumps(row["responses"]): n for n, row in reversed([*enumerate(rows)])}
             for split, rows in named.items()}  # fmt: skip
    return {split: sorted(rows, key=lambda row: (first[split][json.dumps(row["responses"])], row["labeler"]))
            for split, rows in named.items()}  # fmt: skip


def train(cfg, rows: str, out: Path) -> Path:
    """A reward model from rankings."""
    learnt = dataclasses.replace(cfg.reward, init=cfg.out / "sft" / "model", data_dir=cfg.out / "data")
    reward.main(dataclasses.replace(learnt, data=rows, held_out=None, out=out))
    return out / "model" / "model.safetensors"


def test_people_who_rank_as_simulated_ones_give_the_same_rankings_and_reward_model(done, asked, capsys):
    """Through a run that is preempted while it waits, and a store in which another run asks too."""
    cfg, summary = done
    before = rankings(cfg.out / "rank")
    asked.db.parent.mkdir()
    with Store(asked.db) as store:
        store.add([Item("of another run", ("a", "b"), overlap=1, round=3)])
    elsewhere = {"prompt": "of another run", "responses": ["a", "b"], "ranks": [0, 1], "ratings": [{}, {}]}
    looks = []

    def preempted():
        looks.append(1)
        if len(looks) == 2:
            raise preemption.Preempted

    with each_look(preempted), pytest.raises(preemption.Preempted):
        runs.once(rank.main, asked)
    assert (asked.out / "answers" / "done.json").is_file() and not (asked.out / "train.jsonl").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "episodes", None)  # nothing is sampled again
        patch.setattr(models, "load", None)
        rows = [*before["train"], *before["held_out"], elsewhere | {"labeler": 0}]
        with labelling.working(asked.db, range(5), rows):
            result = runs.once(rank.main, asked)
        assert runs.once(rank.main, asked) == result  # with labels, the store is another file, but the run is done
    assert result["labeler_agreement"] == summary["reward"]["labeler_agreement"]
    said = capsys.readouterr().out
    assert "24 tasks added, 0 were there already; 1 answers to other tasks are wanted there too" in said
    assert "0 tasks added, 24 were there already" in said and f"scripts/people.sh --db {asked.db} --prompts 0" in said
    assert rankings(asked.out) == before
    with Store(asked.db) as store:
        assert guidelines.newest(store) == (1, guidelines.of_world())
    trained = train(cfg, str(asked.out / "train.jsonl"), asked.out / "reward")
    assert trained.read_bytes() == (cfg.out / "reward" / "model" / "model.safetensors").read_bytes()


def test_a_reward_model_from_the_store_is_that_from_the_file(done, tmp_path):
    cfg, _ = done
    rows = log.read(cfg.out / "rank", "train.jsonl")
    db = tmp_path / "people.db"
    with Store(db) as store:
        people = labelling.invite(store, [row["labeler"] for row in rows])
        for row in rows:  # one after the other, so that the labels are in the order of the file
            store.add([Item(row["prompt"], tuple(row["responses"]), ended=tuple(row["ended"]))])
            assert (
                labelling.answer(store, {name: people[name] for name in [str(row["labeler"])]}, labelling.known([row]))
                == 1
            )
    trained = train(cfg, f"people:{db}", tmp_path / "reward")
    assert trained.read_bytes() == (cfg.out / "reward" / "model" / "model.safetensors").read_bytes()


def test_a_run_goes_on_without_the_last_answers(done, asked, tmp_path, capsys):
    """With prompts of a file, which simulated labelers could not judge, one person, and so no agreement."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(12)))
    few = dataclasses.replace(asked, data=str(prompts), prompts=8, skip=4, held_out=4, overlap=2, enough=0.5, round=1)
    people: dict[str, int] = {}

    def answers():
        with Store(asked.db) as store:
            if not people:
                people.update(labelling.invite(store, ["ann"]))
            elif task := store.task(people["ann"]):
                ranks = list(range(len(task.responses)))
                store.submit(people["ann"], task.id, f"submission {task.id}", {"ranks": ranks}, 1.0)

    with each_look(answers):
        assert rank.main(few) == {}
    found = {split: log.read(few.out, f"{split}.jsonl") for split in rank.SPLITS}
    assert {row["prompt"] for row in found["held_out"]} == {f"Say {n}." for n in range(4)}  # each by ann alone
    assert {row["prompt"] for row in found["train"]} <= {f"Say {n}." for n in range(8, 12)} and len(found["train"]) >= 2
    assert "agreement needs two labelers" in capsys.readouterr().out
    with Store(asked.db) as store:
        assert store.task(people["ann"]) is None  # what was not waited for is not asked any more
    short = dataclasses.replace(few, skip=8, out=tmp_path / "more")
    with pytest.raises(rank.InputError, match="has 12 prompts: none is left after 4 held out, 8 used"):
        rank.main(short)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--overlap", 3], "overlap=3 has no effect where simulated labelers rank: name the store of people by --db"),
        (
            ["--data", "a.jsonl"],
            "data=a.jsonl has no effect where simulated labelers rank: name the store of people by --db",
        ),
        (["--db", "a.db", "--people", 6], "people=6 has no effect where people rank: leave it out"),
        (["--db", "a.db", "--most", 27], "most=27: expected at most 26 answers, which a page can show to people"),
    ],
)
def test_settings_of_people_need_people(capsys, flags, message):
    assert refused(capsys, rank.main, rank.Config(), *flags) == f"error: {message}"


def test_other_settings_are_not_gone_on_with(done, asked):
    """A run that waits has sampled its answers, and its store may not change without a word."""

    def interrupt():
        raise KeyboardInterrupt

    with each_look(interrupt):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                rank.main(asked)
            asked = dataclasses.replace(asked, enough=0.9, overlap=2)
    for name, value in {"db": asked.db.with_name("other.db"), "temperature": 0.5}.items():
        with pytest.raises(rank.InputError, match=f"answers was made with other settings .{name}: "):
            rank.main(dataclasses.replace(asked, **{name: value}))
