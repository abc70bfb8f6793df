"""A judge: what it is asked and how its replies are read, by hand; over a stub and over our own server."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.data import tokenizer as lib
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import judge, scores
from rlhf_jax.types import InputError, Rollout
from tests import tiny

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 plus 2?"}]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("It is right.\n\nScore: 7\n", 7),
        ("Score: 1", 1),
        ("Score: 3\nScore: 10", 10),
        ("Score: 11", None),
        ("Score: 0", None),
        ("Score: -3", None),
        ("Score: 7.5", None),
        ("Score: 7/10", None),
        ("Score: seven", None),
        ("**Score: 7**", None),
        ("I would say Score: 7", None),
        ("Score: 7\nBut I am not sure.", None),
        ("Score: \N{ARABIC-INDIC DIGIT SEVEN}", None),
        ("7", None),
        ("", None),
        (None, None),
    ],
)
def test_a_score_is_the_last_line_and_nothing_else(reply, score):
    assert judge.read_score(reply, 10) == score


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A is brief.\nVerdict: A", 1),
        ("Verdict: B\n", -1),
        ("Verdict: tie", 0),
        ("Verdict: C", None),
        ("Verdict: A or B", None),
        ("Verdict: A\nVerdict:", None),
        ("A", None),
        (None, None),
    ],
)
def test_a_verdict_is_the_last_line_and_nothing_else(reply, verdict):
    assert judge.read_verdict(reply) == verdict


def test_a_verdict_holds_in_both_orders():
    assert judge.both_orders(1.0, -1.0) == 1 and judge.both_orders(-1.0, 1.0) == -1 and judge.both_orders(0.0, 0.0) == 0
    assert judge.both_orders(1.0, 1.0) == judge.both_orders(-1.0, -1.0) == judge.both_orders(1.0, 0.0) == 0
    assert judge.both_orders(np.nan, 1.0) is None and judge.both_orders(0.0, np.nan) is None


def test_ranks_by_hand():
    # 0 beats 1 and 2; 1 and 2 tie; 3 loses to all.
    assert judge.ranks([[0, 1, 1, 1], [-1, 0, 0, 1], [-1, 0, 0, 1], [-1, -1, -1, 0]]) == [0, 1, 1, 2]
    assert judge.ranks([[0, 1, -1], [-1, 0, 1], [1, -1, 0]]) == [0, 0, 0]  # a circle


def test_a_request_holds_what_is_judged():
    text = judge.score_request("Be kind.", CHAT, "It is 4.", 5)
    assert text.startswith("Be kind.\n\n<dialogue>\nsystem: Be brief.\nuser: 2 plus 2?\n</dialogue>")
    assert "<answer>\nIt is 4.\n</answer>" in text and "from 1 (worst) to 5 (best)" in text
    text = judge.pair_request("Be kind.", "2 plus 2?", "4", "5")
    assert "user: 2 plus 2?" in text and text.index("<answer A>\n4\n") < text.index("<answer B>\n5\n")


def of(*replies, **settings):
    """A judge that gives these replies, and remembers what it was asked."""
    asked = []

    def ask(texts):
        asked.extend(texts)
        return list(replies)[: len(texts)]

    cfg = judge.Config(model=Path("x"), rubric=Path("r"), **settings)
    return judge.Judge(cfg, "Be kind.", judge.Written(ask)), asked


def test_an_answer_without_a_verdict_ends_the_run_or_scores_what_is_set(capsys):
    strict, _ = of("Score: 2", "no idea", None)
    with pytest.raises(InputError) as error:
        strict.scores(["p", CHAT, "q"], ["a", "b", "c"])
    message = str(error.value)
    assert (
        "\n" not in message and "no score for 2 of 3 answers, such as 'b' to '2 plus 2?': it said 'no idea'" in message
    )
    assert "judge.missing" in message
    lenient, _ = of("Score: 2", "no idea", None, missing=-1.5)
    found, absent = lenient.scores(["p", CHAT, "q"], ["a", "b", "c"])
    np.testing.assert_array_equal(found, [2, -1.5, -1.5])
    np.testing.assert_array_equal(absent, [False, True, True])
    assert "the judge gave no score for 2 of 3 answers: they score -1.5" in capsys.readouterr().out


def test_a_ranking_is_of_all_pairs_in_both_orders():
    # Of a, b, a, c: the pairs (0, 1), (1, 0), (0, 3), (3, 0), (1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2) in order.
    order = [(0, 1), (0, 3), (1, 0), (1, 2), (1, 3), (2, 1), (2, 3), (3, 0), (3, 1), (3, 2)]
    better = {"a": 2, "b": 1, "c": 0}
    texts = ["a", "b", "a", "c"]
    said = [f"Verdict: {'A' if better[texts[i]] > better[texts[j]] else 'B'}" for i, j in order]
    who, asked = of(*said)
    (ranking,) = who.rank(["p"], [texts])
    assert ranking == judge.Ranking([0, 1, 0, 2], pairs=5, missing=0, swayed=0) and len(asked) == 10
    said[0] = said[2] = "Verdict: A"  # whichever comes first
    (ranking,) = of(*said)[0].rank(["p"], [texts])
    assert ranking.swayed == 1 and ranking.ranks == [1, 2, 0, 3]
    said[1] = "A"
    (ranking,) = of(*said)[0].rank(["p"], [texts])
    assert ranking == judge.Ranking(None, pairs=5, missing=1, swayed=1)


def weighing(*logp, **settings):
    """A judge whose replies have these log-probabilities, and what it was asked."""
    asked = []

    def weigh(texts, replies):
        asked.append((texts, replies))
        return np.array(logp)

    cfg = judge.Config(model=Path("x"), rubric=Path("r"), replies="weighed", **settings)
    return judge.Judge(cfg, "Be kind.", judge.Weighed(weigh, cfg.length)), asked


def test_a_weighed_score_is_the_mean_by_probability(capsys):
    logp = np.log([[0.1, 0.3, 0.2], [1e-9, 1e-9, 3e-9], [np.nan] * 3])
    who, asked = weighing(*logp, most=3, missing=-1.5)
    found, absent = who.scores(["p"] * 3, ["a", "b", "c"])
    np.testing.assert_allclose(found, [(0.1 + 0.6 + 0.6) / 0.6, (1 + 2 + 9) / 5, -1.5], rtol=1e-6)
    np.testing.assert_array_equal(absent, [False, False, True])
    ((texts, replies),) = asked
    assert texts[1] == judge.score_request("Be kind.", "p", "b", 3) and replies == ["Score: 1", "Score: 2", "Score: 3"]
    with pytest.raises(InputError, match="no score for 1 of 1 answers, such as 'a' to 'p': the request is longer than"):
        weighing([np.nan] * 10)[0].scores(["p"], ["a"])


def test_a_weighed_verdict_is_that_of_both_orders_together():
    assert judge.both_margins(3.0, 1.0) == 1 and judge.both_margins(1.0, 3.0) == -1  # it prefers the first place
    assert judge.both_margins(-0.5, -0.5) == 0 and judge.both_margins(1.0, np.nan) is None
    # Of a, b, c: (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1); the margins of A over B are the differences.
    who, asked = weighing([-1, -3], [-1, -2], [-1, -2], [-2, -1.5], [-1, -1], [-1, -1.25])
    (ranking,) = who.rank(["p"], [["a", "b", "c"]])
    assert asked[0][1] == ["Verdict: A", "Verdict: B"] and "<answer A>\nb\n</answer A>" in asked[0][0][2]
    # a is before b by 2 - 1, whichever comes first is; before c by 1 - 0; b is behind c by -0.5 - 0.25.
    assert ranking == judge.Ranking([0, 2, 1], pairs=3, missing=0, swayed=2)
    (ranking,) = weighing([-1, -2], [np.nan] * 2)[0].rank(["p"], [["a", "b"]])
    assert ranking == judge.Ranking(None, pairs=1, missing=1, swayed=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"most": 5}, "judge.most has no effect without a judge"),
        ({"rubric": Path("r"), "url": "http://x", "replies": "weighed"}, "judge.replies has no effect with judge.url"),
        (
            {"model": Path("m"), "rubric": Path("r"), "replies": "weighed", "temperature": 1.0},
            "judge.temperature has no effect with judge.replies=weighed",
        ),
        ({"url": "http://x", "model": Path("m")}, "judge.model and judge.url: expected one judge"),
        ({"model": Path("m")}, "judge.rubric: expected a text file"),
        ({"rubric": Path("r"), "url": "x:1"}, "judge.url=x:1: expected http"),
        ({"model": Path("m"), "rubric": Path("r"), "timeout": 9.0}, "judge.timeout has no effect without judge.url"),
        (
            {"rubric": Path("r"), "url": "http://x", "length": 9},
            "judge.length has no effect with judge.url",
        ),
    ],
)
def test_settings_without_effect_are_refused(changes, said):
    with pytest.raises(InputError, match=f"^{said}"):
        judge.Config(**changes)


def loaded(cfg):
    return judge.load(cfg, parallel.PMAP, models.Compute(), 0)


def test_a_rubric_that_cannot_be_used_is_named(tmp_path):
    cfg = judge.Config(model=tmp_path, rubric=tmp_path / "none.txt")
    with pytest.raises(InputError, match=r"judge.rubric=.*none.txt cannot be read"):
        loaded(cfg)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"judge.rubric=.*empty.txt is empty"):
        loaded(dataclasses.replace(cfg, rubric=tmp_path / "empty.txt"))
    assert loaded(judge.Config()) is None


# A model behind the OpenAI protocol -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served():
    pytest.importorskip("starlette", reason="needs the extra people: pip install -e .[people]")
    pytest.importorskip("httpx2", reason="needs the extra people: pip install -e .[people]")
    from tests.people import endpoints

    with endpoints.answering() as (stub, url):
        yield stub, url


@pytest.fixture
def stub(served, tmp_path, monkeypatch):
    """A stub whose model finds long answers good, and a judge that asks it."""
    stub, url = served
    stub.reset()
    monkeypatch.setattr(judge, "PAUSE", 0.001)
    (tmp_path / "rubric.txt").write_text("Long answers are good.")
    return stub, judge.Config(name="ada", rubric=tmp_path / "rubric.txt", url=url + "/v1", retries=2)


def test_a_judge_behind_a_url_scores_and_ranks(stub, monkeypatch):
    server, cfg = stub
    server.rule = by_length
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    who = loaded(cfg)
    found, absent = who.scores(["p"] * 3, ["a", "a long one", "ab"])
    np.testing.assert_array_equal(found, [1, 10, 2])
    assert not absent.any() and server.keys == {"Bearer s3cret"}
    assert {one["temperature"] for one in server.asked} == {0.0} and "seed" not in server.asked[0]
    assert [one.ranks for one in who.rank(["p", "q"], [["a", "ccc", "bb"], ["a", "a"]])] == [[2, 0, 1], [0, 0]]


def by_length(text):
    """The reply of a model that finds long answers good."""
    if "<answer>" in text:
        answer = text.partition("<answer>\n")[2].partition("\n</answer>")[0]
        return f"It is long.\nScore: {min(len(answer), 10)}"
    first, second = (text.partition(f"<answer {x}>\n")[2].partition("\n</answer")[0] for x in "AB")
    return "Verdict: " + ("tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B")


@pytest.mark.parametrize(
    ("fault", "said", "requests"),
    [
        ("busy", "slow down, after 3 attempts", 3),
        ("broken", "status 500, after 3 attempts", 3),
        ("cut", "the connection ended in the middle of the answer, after 3 attempts", 3),
        ("no stream", "it does not stream", 1),
        ("malformed", "a part of the answer is not of the protocol", 1),
    ],
)
def test_what_goes_wrong_at_the_endpoint_is_said(stub, fault, said, requests):
    server, cfg = stub
    who = loaded(cfg)
    server.fault, server.text = fault, "two words\nScore: 3"
    with pytest.raises(InputError, match=said) as error:
        who.scores(["p"], ["a"])
    assert str(error.value).startswith(f"judge.url={cfg.url}: ") and len(server.asked) == requests


def test_a_failure_that_passes_is_survived(stub):
    server, cfg = stub
    who = loaded(cfg)
    server.text, server.passing = "Score: 3", ["busy", "broken"]
    assert who.scores(["p"], ["a"])[0] == 3 and len(server.asked) == 3


def test_replies_that_are_cut_or_requests_too_long_are_no_verdict(stub):
    server, cfg = stub
    who = loaded(dataclasses.replace(cfg, missing=0.5))
    server.text = "Score: 3"
    for fault in ("length", "long"):
        server.fault = fault
        score, absent = who.scores(["p"], ["a"])
        assert score == 0.5 and absent


def test_who_does_not_answer_is_named_at_the_start(stub):
    _, cfg = stub
    with pytest.raises(InputError, match=r"judge.name=eve: there is no such model; http.* has ada, bob"):
        loaded(dataclasses.replace(cfg, name="eve"))
    with pytest.raises(InputError, match=r"judge.name: name one; http.* has ada, bob"):
        loaded(dataclasses.replace(cfg, name=None))
    with pytest.raises(InputError, match=r"judge.url=http://127.0.0.1:9: "):
        loaded(dataclasses.replace(cfg, url="http://127.0.0.1:9"))


def test_a_judge_scores_a_rollout(stub, tmp_path):
    server, cfg = stub
    server.rule = lambda text: by_length(text) if "\na\n</answer>" not in text else "no idea"
    tok = lib.train(["a fish and a cat"] * 9, 300, tmp_path)
    answers = ["a", "a fish"] * 8
    ids = [[*tok(text).input_ids, tok.eos_token_id] for text in answers]
    width = max(map(len, ids))
    mask = np.arange(width) < np.array([[len(row)] for row in ids])
    tokens = np.array([row + [tok.pad_token_id] * (width - len(row)) for row in ids], np.int32)
    blank = np.zeros(mask.shape, np.float32)
    sampled = Rollout(
        tokens=tokens,
        mask=mask,
        response_mask=mask,
        logp=blank,
        ended=np.ones(16, bool),
        index=np.arange(16, dtype=np.int32),
    )
    rows = [{"prompt": f"p{n}"} for n in range(16)]
    source = scores.judged(loaded(dataclasses.replace(cfg, missing=-1.0)), rows, tok)
    found = parallel.gather(source(parallel.shard(sampled)))
    np.testing.assert_array_equal(found.score, [-1, 6] * 8)
    np.testing.assert_array_equal(found.unjudged, [True, False] * 8)


# A model directory, and our own server --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model that was never trained."""
    path = tmp_path_factory.mktemp("judge") / "model"
    tok = lib.train([judge.score_request("Be kind.", "p", "a", 10)] * 9, 600, path)
    config = models.gpt(1, 16, 2, vocab_size=600, max_length=128)
    model = models.Model(config, tiny.policy(config), tok, models.bind(models.Transformer(config)))
    models.save(model, model.params, path)
    (path / "rubric.txt").write_text("Be kind.")
    return path


@pytest.mark.slow
def test_a_model_directory_judges(directory, capsys):
    """One that was never trained gives no verdict, which is said; nor does one whose request is too long."""
    cfg = judge.Config(model=directory, rubric=directory / "rubric.txt", max_new_tokens=4, length=100, missing=0.0)
    who = loaded(cfg)
    replies = who.replies.ask([judge.score_request("Be kind.", "p", "a", 10), "x" * 500, "p"])
    assert len(replies) == 3 and replies[1] is None
    assert who.replies.ask(["x" * 500]) == [None]
    _, absent = who.scores(["p"] * 9, ["a"] * 9)
    assert absent.all() and "no score for 9 of 9 answers" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_directory_weighs(directory):
    """What it weighs are the whole replies, each with what ends it, by the model's own log-probabilities."""
    cfg = judge.Config(model=directory, rubric=directory / "rubric.txt", length=100, replies="weighed")
    who = loaded(cfg)
    request, replies = judge.pair_request("", "p", "a", "b")[:60], ["Verdict: A", "Verdict: B"]
    found = who.replies.weigh(["x" * 500, request], replies)
    assert np.isnan(found[0]).all() and found.shape == (2, 2)
    model = models.load(directory)
    start, (ends,) = lib.render(model.tokenizer, [[{"role": "user", "content": request}]], [replies])
    for logp, end in zip(found[1], ends, strict=True):
        tokens = jnp.concatenate([start[0], end])[None]
        said = jax.nn.log_softmax(model.apply(model.params, tokens, jnp.ones(tokens.shape, bool))[0])
        expected = sum(float(said[n - 1, tokens[0, n]]) for n in range(len(start[0]), tokens.shape[1]))
        assert end[-1] == model.tokenizer.eos_token_id and logp == pytest.approx(expected, abs=1e-4)
    scores_found, absent = who.scores(["p"], ["a"])
    assert not absent.any() and 1 < scores_found[0] < 10
    assert who.replies.weigh([], replies).shape == (0, 2) and who.rank(["p"], [["a", "a"]])[0].ranks == [0, 0]


@pytest.mark.slow
def test_our_own_server_judges(directory):
    pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")
    import threading

    import uvicorn

    from rlhf_jax.people import network
    from rlhf_jax.serving import server
    from rlhf_jax.serving.engine import Engine

    engine = Engine(models.load(directory), rows=2)
    engine.start()
    try:
        with network.listening("127.0.0.1", 0) as listener:
            app = server.app({"judge": engine}, server.Options(64, "k3y", network.LOOPBACK))
            running = uvicorn.Server(network.config(app, False, None, None))
            thread = threading.Thread(target=running.run, args=([listener],))
            thread.start()
            try:
                url = network.url("http", "127.0.0.1", listener) + "/v1"
                check_server(judge.Config(rubric=directory / "rubric.txt", url=url, max_new_tokens=4))
            finally:
                running.should_exit = True
                thread.join()
    finally:
        engine.close()


def check_server(cfg):
    """The server is asked with its key, and what it says is read as strictly as anything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "wrong")
        with pytest.raises(InputError, match="is OPENAI_API_KEY set"):
            loaded(cfg)
        patch.setenv("OPENAI_API_KEY", "k3y")
        with pytest.raises(InputError, match="no score for 2 of 2 answers"):
            loaded(cfg).scores(["p"] * 2, ["a", "b"])
        with pytest.raises(InputError, match=r"no such model; .* has judge"):
            loaded(dataclasses.replace(cfg, name="other"))
        replies = loaded(cfg).replies.ask(["hello", "x " * 300])
        assert replies[1] is None  # longer than the context
