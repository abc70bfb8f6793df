"""The loop through the pages: simulated labelers drive them, and training goes on with what they said."""

import dataclasses
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")

from experiments import reward, rounds
from experiments.lessons import language, people
from rlhf_jax.data import sources
from rlhf_jax.data.world import World, labelers
from rlhf_jax.people import asking, forms
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store
from rlhf_jax.types import Rankings
from tests.people import browsing
from tests.people.browsing import Site, shown, stored, until
from tests.people.large import FULL_SIZE


def label(page: Any, ranks: Callable[[list[str]], list[int]]) -> None:
    """Rank the answers on a page by keys; the ratings say the same."""
    before = page.inner_text(".turns")
    done = int(page.inner_text("#pace-done"))
    texts = shown(page)
    places = ranks(texts)
    for rank in places:
        page.keyboard.press(str(max(1, 7 - rank)))
    for rank in places:
        page.keyboard.press(str(rank + 1))
    page.keyboard.press("Enter")
    stored(page, done + 1)
    assert before


def test_simulated_labelers_drive_the_page(done: tuple[Any, dict], site: Site):
    """The export is what they would have written, and the reward model the same as from their file, to the bit."""
    count = 60 if FULL_SIZE else 10
    world = World.generate(0)
    people = labelers.labelers(seed=1)
    rows = list(labelers.rankings(world, count, seed=1, people=people))
    rng = random.Random(0)
    with Store(site.db) as store:
        store.set_rules(Rules(ratings="overall", gold_share=0.0, repeat_share=0.0))
    site.person("somebody else")  # has the task that is there already
    wanted = []
    for row in rows:  # each is ranked by whoever asks first
        rng.shuffle(row["responses"])
        wanted.append({"prompt": row["prompt"], "responses": row["responses"]})
    site.add(*wanted)
    pages = [site.person(f"labeler {person.id}") for person in people]
    sent = 0
    while sent < count:
        for person, page in zip(people, pages, strict=True):
            until(page, "!document.querySelector('#ask').textContent.startsWith('Loading')")
            if sent == count:
                break
            text = page.inner_text(".turns .turn:last-child .text")
            number = int(page.inner_text("#pace-done"))
            label(page, lambda texts, text=text, person=person: person.rank(world, text, texts, 1))  # type: ignore[misc]
            assert int(page.inner_text("#pace-done")) == number + 1
            sent += 1
    exported = site.exported()
    assert len(exported) == count
    for row in exported:
        person = people[int(row["person"].split()[-1])]
        assert row["ranks"] == person.rank(world, row["prompt"][-1]["content"], row["responses"], 1)
    assert {len(row["responses"]) for row in exported} <= set(range(4, 10))
    assert len({row["person"] for row in exported}) == 5
    by_item = sorted(exported, key=lambda row: row["item"])
    assert [{key: row[key] for key in ("prompt", "responses")} for row in by_item] == wanted
    path = site.folder / "labels.jsonl"
    read = [
        list(sources.rows(spec, "rankings", data_dir=site.folder / "data")) for spec in (str(path), f"people:{site.db}")
    ]
    assert read[0] == read[1] and len(read[0]) == count
    assert set(forms.SCALES[:1]) == set(exported[0]["ratings"][0])
    written = site.folder / "written.jsonl"
    with written.open("w") as file:
        for row in exported:
            person = people[int(row["person"].split()[-1])]
            ranks = person.rank(world, row["prompt"][-1]["content"], row["responses"], 1)
            file.write(json.dumps({"prompt": row["prompt"], "responses": row["responses"], "ranks": ranks}) + "\n")
    cfg, _ = done
    learnt = dataclasses.replace(
        cfg.reward, init=cfg.out / "sft" / "model", data_dir=site.folder / "data", held_out=None
    )
    weights = []
    for name, data in {"page": f"people:{site.db}", "file": str(written)}.items():
        reward.main(dataclasses.replace(learnt, data=data, out=site.folder / name))
        weights.append((site.folder / name / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_rounds_through_the_page(done: tuple[Any, dict], site: Site, monkeypatch: pytest.MonkeyPatch):
    """Labels through the page, reward model, PPO, and the next round's answers on the page, which shows them itself."""
    monkeypatch.setattr(asking, "POLL", 0.2)
    cfg, _ = done
    site.person("somebody else")  # has the task that is there already
    config = rounds.Config(
        out=site.folder / "rounds",
        data_dir=cfg.out / "data",
        init=cfg.out / "sft" / "model",
        rounds=2,
        rank=dataclasses.replace(cfg.rank, prompts=8, held_out=2, most=4, overlap=4, db=site.db),
        reward=cfg.reward,
        ppo=cfg.ppo,
        evaluate=cfg.evaluate,
    )
    results: list[dict] = []
    run = threading.Thread(target=lambda: results.append(rounds.main(config)))
    pages = [site.person(f"labeler {n}") for n in range(4)]  # before the run adds guidelines, which come first
    run.start()
    while run.is_alive():
        for page in pages:
            page.wait_for_timeout(50)
            if page.url.endswith("/guidelines"):
                with page.expect_navigation():  # to the task, or to guidelines that the run has added meanwhile
                    page.locator("button.primary").press("Enter")
            if page.locator(".card").count():
                label(page, lambda texts: list(range(len(texts))))
    run.join()
    assert len(results) == 1 and len(results[0]["online"]) == 2
    exported = [row for row in site.exported() if row["round"]]
    assert [row["round"] for row in exported] == [1] * 16 + [2] * 16  # 8, and 2 by four people each
    for row in exported:
        assert row["ranks"] == [row["shown"].index(k) for k in range(len(row["shown"]))]
        answered = config.init if row["round"] == 1 else config.out / "online" / "round1" / "ppo" / "model"
        assert set(row["models"]) == {str(answered)}
    lines = (config.out / "online" / "labels.jsonl").read_text().splitlines()
    known = [(row["prompt"], row["responses"], row["ranks"], row["person"]) for row in exported]
    for line in lines:
        row = json.loads(line)
        assert (row["prompt"], row["responses"], row["ranks"], row["labeler"]) in known
    assert len(lines) == 2 * 8
    until(pages[0], "document.getElementById('ask').textContent.startsWith('Nothing to do')")


def test_the_reader_of_a_lesson_ranks_by_mouse_and_by_keys(
    tmp_path: Path, browser: Any, monkeypatch: pytest.MonkeyPatch
):
    """Whoever follows the lesson opens the page before the first task comes, and leaves it open between the rounds."""
    monkeypatch.setattr(asking, "POLL", 0.05)
    shortest = lambda texts: [sum(len(other.split()) < len(text.split()) for other in texts) for text in texts]
    with browsing.site(tmp_path, browser, Rules()) as site, people.reader(0, site.db) as ask:
        page = site.page(viewport={"width": 1280, "height": 800})
        page.goto(f"{site.server.url}/enter#{site.server.token}")
        page.click(".start")
        until(page, "document.getElementById('ask').textContent.startsWith('Nothing to do')")
        for number in (1, 2):
            texts = language.rivals(2, 4, seed=number)
            found: list[Rankings] = []
            lesson = threading.Thread(target=lambda: found.append(ask(texts, number)), daemon=True)  # noqa: B023
            lesson.start()
            for done in (2 * number - 1, 2 * number):
                until(page, "document.querySelector('.card')")  # the page looks every five seconds
                for n, rank in enumerate(shortest(shown(page))):
                    if number == 1:
                        browsing.drag(page, n, f'.level[data-place="{rank}"]')
                    else:
                        page.keyboard.press(str(rank + 1))
                if number == 1:
                    page.click("#submit")
                else:
                    page.keyboard.press("Enter")
                stored(page, done)
            lesson.join(60)
            levels = [[sorted(set(row)).index(rank) for rank in row] for row in map(shortest, texts)]
            assert found[0].rank.tolist() == levels
