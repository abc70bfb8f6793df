"""The page of a run: its data, and the page itself in a real Chromium, by mouse and by keyboard."""

import base64
import dataclasses
import gzip
import json
import math
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import report as experiment
from rlhf_jax.analysis import report
from rlhf_jax.runs import log
from rlhf_jax.types import InputError

SAID = [" Vera", " is", " a", " doctor", ".", " I", " do", " not", " know", "</script>", "<|endoftext|>"]


def episode(rng: random.Random, step: int, part: str = "trained", number: int = 0) -> dict[str, Any]:
    """A row of `tokens/`, with numbers that are random."""
    tokens = [*rng.choices(SAID[:-1], k=rng.randint(3, 14)), SAID[-1]]
    column = lambda low, high: [rng.uniform(low, high) for _ in tokens]
    best = [rng.sample(SAID, 5) for _ in tokens]
    return {
        "step": step,
        "part": part,
        "prompt": f"What work does number {number} do?",
        "response": "".join(tokens[:-1]),
        "ended": True,
        "tokens": tokens,
        "logp": column(-3, 0),
        "logp_ref": column(-3, 0),
        "logp_after": column(-3, 0),
        "entropy": column(0, 3),
        "reward": column(-1, 1),
        "value": column(-1, 1),
        "advantage": column(-2, 2),
        "best": best,
        "best_logp": [sorted((rng.uniform(-6, 0) for _ in ids), reverse=True) for ids in best],
        "best_ref": best,
        "best_ref_logp": [sorted((rng.uniform(-6, 0) for _ in ids), reverse=True) for ids in best],
        "score": rng.uniform(-1, 2),
        "disagreement": rng.uniform(0, 1),
    }


def metrics(steps: int) -> list[dict[str, Any]]:
    return [{"step": n, "time": 0.0, "reward/score": n / steps, "kl/reference": 0.1 * n} for n in range(1, steps + 1)]


def record(name: str, count: int, seed: int = 0) -> report.Record:
    """A run of which half of `count` episodes answer the same 50 prompts again and again."""
    rng = random.Random(seed)
    rows = [
        episode(rng, 1 + n // 100, ("watched", "trained")[n % 2], n % 100 if n % 2 == 0 else n) for n in range(count)
    ]
    return report.Record(name=name, settings={"lr": "0.1"}, metrics=metrics(60), episodes=rows)


def data_of(page: str) -> dict[str, Any]:
    packed = re.search(r'id="data">([^<]*)<', page)
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def test_the_data_are_those_of_the_run():
    one = record("a", 4)
    data = data_of(report.page([one], {}))
    assert data == report.pack([one], {})
    row, packed = one.episodes[1], data["episodes"][1]
    assert [data["words"][n] for n in packed["tokens"]] == row["tokens"]
    assert data["prompts"][packed["prompt"]] == row["prompt"]
    assert packed["kl"] == pytest.approx(sum(row["logp"]) - sum(row["logp_ref"]), rel=1e-3)
    assert packed["advantage"] == pytest.approx(row["advantage"], rel=1e-3)
    assert [data["words"][n] for n, _ in packed["best"][0]] == row["best"][0]
    assert data["runs"][0]["curves"]["kl/reference"][-1] == 6


def test_curves_are_thinned_by_their_means_and_have_gaps():
    rows = [{"step": n, "time": 0, "a": float(n), **({"b": 1.0} if n > 1000 else {})} for n in range(1, 2001)]
    found = report.curves([*rows, {"step": 2001, "time": 0, "a": math.nan}])
    assert len(found["step"]) <= report.POINTS
    assert found["a"][0] == 3 and found["a"][-1] is None  # the mean of 1 to 5
    assert found["b"][0] is None and found["b"][-2] == 1


def test_tokens_of_later_steps_go_when_a_run_goes_on(tmp_path: Path):
    rng = random.Random(0)
    with log.Records(tmp_path, experiment.Config(), total=3) as run:
        for step in (1, 2, 3):
            run.tokens(step, [{name: x for name, x in episode(rng, step).items() if name != "step"}])
    with log.Records(tmp_path, experiment.Config(), total=3, step=2):
        pass
    assert [row["step"] for row in log.read_tokens(tmp_path)] == [1, 2]
    with log.Records(tmp_path, experiment.Config(), total=3):
        pass
    assert log.read_tokens(tmp_path) == []


def test_old_runs_and_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(InputError, match=r"metrics.jsonl does not exist; is .* the directory of a run\?"):
        experiment.main(experiment.Config(run=tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0.0, "loss/next_token": null}\n')
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "prompt": "a", "response": "b", "score": 1}\n' * 3)
    page = experiment.main(experiment.Config(run=tmp_path, most=2)).read_text()
    assert "2 of 3 answers are on the page, evenly chosen; --most 3 takes all" in capsys.readouterr().out
    assert [row["tokens"] for row in data_of(page)["episodes"]] == [[], []]
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "00000001.parquet").write_text("no")
    with pytest.raises(InputError, match=r"00000001.parquet cannot be read: .*; delete it to do without its episodes"):
        experiment.main(experiment.Config(run=tmp_path))


# In a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")
    from tests.people import browsing

    with browsing.browsing() as found:
        yield found


def opened(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """The page of a file, and the list of what it says on its console or asks of a network."""
    page = browser.new_context(viewport={"width": 1360, "height": 900}, **options).new_page()
    wrong: list[str] = []
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url)
    )
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    return page, wrong


def first_paint(page: Any) -> float:
    """The milliseconds after which the page showed something."""
    return page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")


def check(page: Any) -> None:
    from tests.people.browsing import check_access

    check_access(page)


def test_two_thousand_episodes_without_a_stutter(browser: Any, tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text(report.page([record("a", 2000)], {}))
    assert path.stat().st_size < 5 * 2**20
    page, wrong = opened(browser, path)
    assert first_paint(page) < 1000
    check(page)
    assert "2,000 of 2,000 answers" in page.inner_text("#count")

    list_ = page.locator(".list")
    frames = page.evaluate(
        """() => {
            const list = document.querySelector(".list"), taken = [];
            window.requestAnimationFrame = (draw) => (draw(), null);  // at once, so that it can be timed
            for (let n = 0; n < 20; n++) {
              const before = performance.now();
              list.scrollTop = n * 5400;
              list.dispatchEvent(new Event("scroll"));
              taken.push([performance.now() - before + 0 * list.offsetHeight, list.querySelectorAll(".row").length]);
            }
            return taken;
        }"""
    )
    assert 5 < max(rows for _, rows in frames) < 60  # whatever lies out of sight is not there
    assert sorted(taken for taken, _ in frames)[5] < 16  # within a frame, of 60 a second; the machine may be busy

    page.select_option("[aria-label='Sort by']", "disagreement")
    scores = [float(text) for text in list_.locator(".row b").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    page.fill("[aria-label=Most]", "0.5")
    assert re.match(r"\d+ of 2,000 answers", page.inner_text("#count").replace("1,", "1"))
    assert max(float(text) for text in list_.locator(".row b").all_inner_texts()) <= 0.5
    assert not wrong


def test_by_keyboard_alone(browser: Any, tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text(report.page([record("a", 300)], {}))
    page, wrong = opened(browser, path, color_scheme="dark")
    chosen = lambda: page.inner_text(".row[aria-selected=true]")
    token = lambda: page.inner_text("#worth h2 >> nth=0")
    page.keyboard.press("Home")
    first = chosen()
    page.keyboard.press("j")
    page.keyboard.press("ArrowDown")
    assert chosen() != first
    page.keyboard.press("k")
    page.keyboard.press("ArrowUp")
    assert chosen() == first
    page.keyboard.press("End")
    assert chosen() != first and page.locator(".row[aria-selected=true]").get_attribute("aria-posinset") == "300"

    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    assert token().startswith("Token 1:")
    page.keyboard.press("ArrowRight")
    assert token().startswith("Token 2:")
    for key, name in (("3", "advantage"), ("7", "probability")):
        page.keyboard.press(key)
        assert page.is_checked(f"input[value={name}]")
    page.keyboard.press("/")
    page.keyboard.type("number 7")
    page.keyboard.press("Escape")
    assert all("number 7" in text for text in page.locator(".asked").all_inner_texts())
    page.keyboard.press("t")
    assert page.get_attribute("html", "data-theme") == "light"
    page.keyboard.press("?")
    assert page.is_visible("#help")
    page.keyboard.press("Escape")
    page.focus("[role=tab][aria-selected=true]")
    page.keyboard.press("ArrowRight")
    assert page.locator(".plot").count() == 2
    check(page)
    assert not wrong


def ranked(seed: int) -> report.Record:
    """A reward model's run with rankings of three answers."""
    rng, rows = random.Random(seed), []
    for prompt in range(20):
        for rank in range(3):
            words = [*random.Random(f"{prompt} {rank}").choices(SAID[:-1], k=4 + rank), SAID[-1]]
            row = {"step": 9, "part": "ranked", "prompt": f"p{prompt}", "response": "".join(words), "tokens": words}
            rows.append(
                row | {"ranking": prompt, "rank": rank, "score": rng.uniform(-1, 1) - rank, "value": [0.1] * len(words)}
            )
    curve = [{"step": n, "time": 0, "reward/accuracy": 0.7, "loss/bradley_terry": 0.5} for n in (1, 2)]
    return report.Record(name=f"reward{seed}", settings={}, metrics=curve, episodes=rows)


def test_two_runs_side_by_side_and_two_reward_models(browser: Any, tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text(report.page([record("a", 100), record("b", 100, 1)], {"reward": "a there, b here"}))
    page, none = opened(browser, path)
    page.click("text=Side by side")
    assert "their scores cannot be compared" in page.inner_text("#view")
    path.write_text(report.page([record("a", 100), record("b", 100, 1)], {"lr": "0.1 there, 0.2 here"}))
    page, wrong = opened(browser, path)
    assert page.locator("#course .dot1").count() == page.locator("#course .dot0").count() > 0
    check(page)
    page.click("text=Side by side")
    assert "lr" in page.inner_text(".settings")
    assert "cannot be compared" not in page.inner_text("#view")
    assert page.locator(".other").count()  # the tokens that differ
    check(page)
    page.click(".row >> nth=1")
    page.keyboard.press("Enter")
    assert page.get_attribute("[data-view=answers]", "aria-selected") == "true"

    learnt = dataclasses.replace(ranked(1), settings={"held_out": "none"})
    path.write_text(report.page([ranked(0), learnt], {}))
    page, more = opened(browser, path, color_scheme="dark")
    assert page.inner_text("#tokens")
    page.click("text=Pairs")
    assert "of 60 different pairs" in page.inner_text(".facts")
    assert "reward1 was trained on these pairs" in page.inner_text("#view")
    assert "reward0 was trained" not in page.inner_text("#view")
    page.select_option("[aria-label=Pairs]", "apart")
    for row in page.locator(".row .right").all_inner_texts():
        assert "right" in row and "wrong" in row
    check(page)
    assert not wrong + more + none


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_run_of_ppo(browser: Any, done: tuple[Any, dict], tmp_path: Path, scheme: str):
    run = done[0].out / "ppo"
    path = experiment.main(experiment.Config(run=run, out=tmp_path / "ppo.html"))
    assert path.stat().st_size < 5 * 2**20
    page, wrong = opened(browser, path, color_scheme=scheme)
    assert first_paint(page) < 1000
    assert page.inner_text("#tokens")
    for view in ("Answers", "Curves", "Settings"):
        page.click(f"[role=tab] >> text={view}")
        check(page)
    assert not wrong


def test_pictures_of_the_docs(browser: Any, tmp_path: Path):
    """Of the quickstart: QUICKSTART is its directory."""
    from tests.people.browsing import picture

    quickstart = Path(os.environ.get("QUICKSTART", Path(__file__).parents[2] / "runs" / "quickstart"))
    if not os.environ.get("SCREENSHOTS") or not (quickstart / "ppo" / "tokens").is_dir():
        pytest.skip("needs SCREENSHOTS, the folder for the pictures, and a quickstart that recorded tokens")
    for scheme in ("light", "dark"):
        path = experiment.main(experiment.Config(run=quickstart / "ppo", out=tmp_path / "ppo.html"))
        assert path.stat().st_size < 5 * 2**20
        page, wrong = opened(browser, path, color_scheme=scheme)
        assert first_paint(page) < 1000
        check(page)
        picture(page, f"report-{scheme}")
        page.click("text=Curves")
        check(page)
        picture(page, f"report-curves-{scheme}")
        assert not wrong
    path = experiment.main(experiment.Config(run=quickstart / "reward", out=tmp_path / "reward.html"))
    page, wrong = opened(browser, path)
    page.click("text=Pairs")
    check(page)
    picture(page, "report-pairs")
    if (quickstart / "ppo_free" / "tokens").is_dir():  # made by the command in docs/report.md
        both = experiment.Config(run=quickstart / "ppo", other=quickstart / "ppo_free", out=tmp_path / "two.html")
        page, more = opened(browser, experiment.main(both))
        page.click("text=Side by side")
        check(page)
        picture(page, "report-two")
        wrong += more
    assert not wrong
