"""The table of an arena, as files."""

import json
from pathlib import Path

import pytest

from experiments import arena
from rlhf_jax.people.items import Item
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store
from rlhf_jax.types import InputError
from tests.people.labelling import person


def test_the_table_is_printed_written_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture):
    db = tmp_path / "people.db"
    with Store(db) as store:
        store.set_rules(Rules(gold_share=0.0, repeat_share=0.0))
        ann = person(store, "ann")
        cfg = arena.Config(db=db, out=tmp_path / "out")
        with pytest.raises(InputError, match="expected votes of an arena that count, got none"):
            arena.main(cfg)
        wins = [("ppo", "sft")] * 3 + [("sft", "ppo")] + [("ppo", "base"), ("sft", "base")]
        pairs = [tuple(f"runs/{name}/model" for name in pair) for pair in wins]
        store.add(Item(f"p{n}", ("better", "worse"), "arena", pair, round=int(n == 5)) for n, pair in enumerate(pairs))
        for n in range(len(wins)):
            held = store.task(ann)
            assert held
            verdict = ("first", "second")[held.responses.index("better")]
            store.submit(ann, held.id, f"submission-{n}", {"verdict": verdict}, 1.0)
    found = arena.main(cfg)
    assert json.loads((cfg.out / "arena.json").read_text()) == found
    assert (cfg.out / "arena.png").stat().st_size > 10_000
    assert [one["name"] for one in found["models"]] == ["ppo/model", "sft/model", "base/model"]
    assert found["models"][0]["record"] == {"wins": 4, "losses": 1, "ties": 0, "bad": 0, "battles": 5}
    assert found["models"][0]["win_rate"]["value"] == 0.8 and found["models"][0]["strength"] > 0
    assert (found["models"][2]["strength"], found["models"][2]["why"]) == (None, "lost")
    assert found["between"]["ppo/model"]["sft/model"]["record"]["wins"] == 3
    assert found["votes"] == 6
    said = capsys.readouterr().out
    assert "not finite: it lost every battle" in said and "Votes: 6 · people: 1 · battles: 6" in said
    assert arena.main(arena.Config(db=db, filter="round=1", out=tmp_path / "one"))["votes"] == 1
    with pytest.raises(InputError, match="no such store"):
        arena.main(arena.Config(db=tmp_path / "none.db"))
