"""How far the people of a store agree: the same as the measures say of its labels, and at no cost to those who work."""

import json
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.people import agreement, consensus
from rlhf_jax.people.agreement import Agreement, Estimate, Share, Undefined
from rlhf_jax.people.forms import SCALES
from rlhf_jax.people.items import Item
from rlhf_jax.people.rules import Rules
from rlhf_jax.people.store import Store
from tests.people.labelling import person
from tests.people.large import FULL_SIZE, fill

RULES = Rules(ratings="all", gold_share=0.0, repeat_share=0.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "people.db") as store:
        store.set_rules(RULES)
        yield store


def answer(store: Store, person: int, ranks: tuple[int, ...], ratings: list[dict] | None = None) -> int:
    """Answer the person's next task, with ranks and ratings in the order of the item."""
    task = store.task(person)
    assert task
    shown = [int(response) for response in task.responses]
    given = ratings or [dict.fromkeys(SCALES, 4)] * len(shown)
    said = {"ranks": [ranks[k] for k in shown], "ratings": [given[k] for k in shown], "confirmed": True}
    return store.submit(person, task.id, f"submission-{task.id}", said, 1.0)


def look(store: Store, book: consensus.Book | None = None) -> consensus.Snapshot:
    with store.reader() as db:
        return consensus.look(db, book or consensus.Book(), 1.0)


def test_what_is_shown_is_what_the_measures_say(store: Store):
    """Items of 3 and of 4 responses, three people on each: against the tables of `agreement`, a person and overall."""
    rng = np.random.default_rng(0)
    people = [person(store, name) for name in ("ann", "bob", "cy", "dan")]
    sizes = [3, 4] * 4
    store.add(Item(f"{n}", tuple(map(str, range(size))), overlap=3) for n, size in enumerate(sizes))
    rankings: dict[str, dict[str, list[int]]] = {name: {} for name in ("ann", "bob", "cy", "dan")}
    rated = {scale: np.full((4, sum(sizes)), np.nan) for scale in SCALES}
    for row, who in enumerate(people):
        for _ in range((8, 8, 4, 4)[row]):
            task = store.task(who)
            assert task
            size, at = sizes[task.item - 1], sum(sizes[: task.item - 1])
            ranks = [int(rank) for rank in rng.integers(0, size, size)]
            levels = sorted(set(ranks))
            ranks = [levels.index(rank) for rank in ranks]
            ratings = [{scale: int(rng.integers(1, 8)) for scale in SCALES} for _ in range(size)]
            answer(store, who, tuple(ranks), ratings)
            rankings[list(rankings)[row]][str(task.item)] = ranks
            for scale in SCALES:
                rated[scale][row, at : at + size] = [rating[scale] for rating in ratings]
    found = look(store)
    names, table = agreement.comparisons(rankings)
    assert found.everybody.agreement == agreement.pairwise_agreement(table)
    kappa, pairs = found.everybody.kappa, found.everybody.alpha["pairs"]
    assert isinstance(kappa, Estimate) and kappa.value == pytest.approx(
        agreement.fleiss_kappa(agreement.count_labels(table))
    )
    assert isinstance(pairs, Estimate) and pairs.lower < pairs.value < pairs.upper
    assert pairs.value == pytest.approx(agreement.krippendorff_alpha(table, "nominal"))
    for scale in SCALES:
        alpha = found.everybody.alpha[scale]
        assert isinstance(alpha, Estimate)
        assert alpha.value == pytest.approx(agreement.krippendorff_alpha(rated[scale], "ordinal"))
    assert list(found.people) == names
    for row, name in enumerate(names):
        assert found.people[name].agreement == agreement.pairwise_agreement(table, row)
        alpha = found.people[name].alpha["overall"]
        own = rated["overall"][:, ~np.isnan(rated["overall"][row])]
        assert isinstance(alpha, Estimate) and alpha.value == pytest.approx(
            agreement.krippendorff_alpha(own, "ordinal")
        )
    least = [(int(item), share) for item, share in agreement.least_agreed(rankings)]
    shown = sorted(zip(found.items.tolist(), found.shares.tolist(), strict=True))
    assert [item for item, _ in shown] == [item for item, _ in sorted(least)]
    assert [share for _, share in shown] == pytest.approx([share for _, share in sorted(least)])
    assert list(found.shares) == sorted(found.shares)


def test_without_labels_every_measure_says_why(store: Store):
    ann = person(store, "ann")
    store.add([Item("p", ("0", "1"))])
    for _ in range(2):
        found = look(store)
        measures = found.everybody
        assert isinstance(measures.agreement, Undefined) and measures.agreement.why == "no_overlap"
        assert all(isinstance(alpha, Undefined) for alpha in measures.alpha.values())
        assert isinstance(measures.own, Undefined) and measures.own.why == "no_repeat"
        assert isinstance(measures.gold, Undefined) and measures.gold.why == "no_gold"
        assert list(found.people) == ([] if store.task(ann) else ["ann"]) and not len(found.items)
        if store.task(ann):
            answer(store, ann, (0, 1))  # alone


def test_what_was_withdrawn_or_set_aside_does_not_count(store: Store):
    ann, bob, cy = (person(store, name) for name in ("ann", "bob", "cy"))
    store.add([Item("p", ("0", "1"), overlap=3)])
    book = consensus.Book()
    for who, ranks in ((ann, (0, 1)), (bob, (0, 1)), (cy, (1, 0))):
        answer(store, who, ranks)

    def cases() -> tuple[float, int] | None:
        found = look(store, book).everybody.agreement
        return (found.ties_as_half.value, found.ties_as_half.n) if isinstance(found, Agreement) else None

    assert cases() == (1 / 3, 3)
    store.undo(cy)
    assert cases() == (1.0, 1)
    answer_again = store.task(cy)
    assert answer_again
    store.submit(cy, answer_again.id, "submission-again", {"skip": "unclear"}, 1.0)
    assert cases() == (1.0, 1)
    store.set_aside(bob, "for the test")
    assert cases() is None and "bob" not in look(store, book).people
    store.restore(bob)
    assert cases() == (1.0, 1)


def test_gold_counts_a_tie_as_half_everywhere(store: Store):
    """One definition: in the label, for the threshold, on the page, and in `agreement.gold_accuracy`."""
    store.set_rules(Rules(ratings="none", gold_share=0.0, repeat_share=0.0, gold_least=0.5, gold_count=1))
    ann, bob = person(store, "ann"), person(store, "bob")
    store.add([Item("gold", ("0", "1", "2"), gold=(0, 1, 2))])
    answer(store, ann, (0, 0, 0))  # three ties: 1.5 of 3, which is not below the threshold
    found = look(store).people["ann"].gold
    assert isinstance(found, Share) and (found.value, found.n) == (0.5, 3)
    assert found == agreement.gold_accuracy([(0, 0, 0)], [(0, 1, 2)])
    with store.reader() as db:
        assert db.execute("SELECT aside FROM people WHERE id = ?", (ann,)).fetchone()[0] is None
        assert tuple(db.execute("SELECT agreed, pairs FROM labels").fetchone()) == (1.5, 3)
    answer(store, bob, (1, 0, 0))  # two pairs wrong, and a tie: 0.5 of 3
    with store.reader() as db:
        assert db.execute("SELECT why FROM people WHERE id = ?", (bob,)).fetchone()[0] == "gold 0.17 < 0.50"


def test_a_watch_looks_in_the_background(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(consensus, "_FRESH", 0.0)
    monkeypatch.setattr(consensus, "_REST", 0.0)
    ann, bob = person(store, "ann"), person(store, "bob")
    store.add([Item("p", ("0", "1"), overlap=2)])
    watch = consensus.Watch(store)
    first = watch.latest(60.0)
    assert first and isinstance(first.everybody.agreement, Undefined)
    for who in (ann, bob):
        answer(store, who, (0, 1))
    second = watch.latest(60.0)
    assert second and isinstance(second.everybody.agreement, Agreement) and second.at >= first.at

    real, go_on = consensus.look, threading.Event()

    def held(*args: object) -> consensus.Snapshot:
        assert go_on.wait(60)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(consensus, "look", held)
    assert watch.latest() is second and watch.latest() is second  # nobody waits for it
    go_on.set()
    third = watch.latest(60.0)
    assert third is not second


@pytest.mark.slow
def test_a_look_needs_no_more_memory_for_more_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A look takes some items at a time, and its values are those of the whole table."""
    monkeypatch.setattr(consensus, "_CHUNK", 300)
    monkeypatch.setattr(consensus, "_AT_ONCE", 100)
    sizes, peaks = (2000, 100_000) if FULL_SIZE else (1000, 6000), []
    for labels in sizes:
        fill(tmp_path / f"{labels}.db", labels)
        with Store(tmp_path / f"{labels}.db") as store, store.reader() as db:
            consensus.look(db, consensus.Book(), 1.0)  # fills the caches of `agreement`
            tracemalloc.start()
            book = consensus.Book()
            found = [consensus.look(db, book, 1.0) for _ in range(2)][-1]
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    print(f"{sizes} labels: at most {peaks} bytes")
    assert peaks[1] - peaks[0] < 2**21 * (sizes[1] - sizes[0]) / 100_000
    with Store(tmp_path / f"{sizes[1]}.db") as store, store.reader() as db:
        rows = [(row[0], row[1], json.loads(row[2])) for row in db.execute("SELECT person, item, answer FROM labels")]
        monkeypatch.setattr(consensus, "_CHUNK", 1000)
        assert consensus.look(db, consensus.Book(), 1.0).everybody.alpha == found.everybody.alpha  # the intervals too
    place = tuple(np.array([row[:2] for row in rows]).T - 1)
    table, rated = np.full((8, sizes[1] // 2, 6), np.nan), np.full((8, sizes[1] // 2, 4), np.nan)
    table[place] = agreement.compare(np.array([said["ranks"] for *_, said in rows]))
    rated[place] = [[rating["honest"] for rating in said["ratings"]] for *_, said in rows]
    table, rated = table.reshape(8, -1), rated.reshape(8, -1)
    for row, measures in ((None, found.everybody), (0, found.people["person 0"]), (5, found.people["person 5"])):
        seen = slice(None) if row is None else ~np.isnan(table[row])
        judged = slice(None) if row is None else ~np.isnan(rated[row])
        assert measures.agreement == agreement.pairwise_agreement(table, row)
        counts = agreement.count_labels(table[:, seen])
        for estimate, value in (
            (measures.kappa, agreement.fleiss_kappa(counts)),
            (measures.alpha["pairs"], agreement.krippendorff_alpha(table[:, seen], "nominal")),
            (measures.alpha["honest"], agreement.krippendorff_alpha(rated[:, judged], "ordinal")),
        ):
            assert isinstance(estimate, Estimate) and estimate.value == pytest.approx(value)
            assert estimate.lower < estimate.value < estimate.upper


@pytest.mark.slow
def test_a_large_store_is_measured_beside_the_work(tmp_path: Path):
    """While 100,000 labels are measured, a task and a submission take their usual time; the next look is quicker."""
    path, labels = tmp_path / "large.db", 100_000 if FULL_SIZE else 5000
    fill(path, labels)
    with Store(path) as store:
        store.add(Item(f"more {n}", ("a", "b")) for n in range(500))
        watch = consensus.Watch(store)
        watch.latest()
        taken: list[float] = []
        while watch.latest() is None and len(taken) < 500:
            start = time.perf_counter()
            task = store.task(1)
            assert task
            store.submit(1, task.id, f"submission-new-{task.id}", {"ranks": [0, 1]}, 1.0)
            taken.append(time.perf_counter() - start)
            time.sleep(0.02)
        found = watch.latest(60.0)
        assert found and len(found.items) == labels // 2
        taken = sorted(taken) or [0.0]
        print(f"{labels} labels: measured in {found.took:.2f} s; meanwhile an answer took {1000 * taken[-1]:.0f} ms")
        assert found.took < 30 and taken[len(taken) // 2] < (0.1 if FULL_SIZE else 1)
