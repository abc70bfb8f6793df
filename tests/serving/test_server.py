"""The routes with a tiny model that was never trained: what is answered, refused and shared, and real clients."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra people: pip install -e .[people]")
pytest.importorskip("httpx2", reason="needs the extra people: pip install -e .[people]")

import uvicorn
from starlette.testclient import TestClient

from rlhf_jax import models
from rlhf_jax.data import tokenizer as lib
from rlhf_jax.people import network
from rlhf_jax.rollouts import sampling
from rlhf_jax.serving import engine as engines
from rlhf_jax.serving import server
from rlhf_jax.serving.engine import Begun, Engine, Failed, Request, Said
from tests import tiny

NAME = "runs/tiny/model"
CONTEXT = 96
HELLO = [{"role": "user", "content": "hello, you?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    path = tmp_path_factory.mktemp("serving") / "model"
    tokenizer = lib.train(["Question: hello, you?\nAnswer: naïve, and you?"] * 9, 280, path)
    config = models.gpt(2, 16, 2, vocab_size=280, max_length=CONTEXT)
    model = models.Model(config, tiny.policy(config), tokenizer, models.bind(models.Transformer(config)))
    models.save(model, model.params, path)
    return model


@pytest.fixture(scope="module")
def engine(model: models.Model) -> Iterator[Engine]:
    engine = Engine(model, rows=4)
    assert [*engine.warm_up(CONTEXT)] == [16, 32, 64]
    engine.start()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: Engine) -> TestClient:
    return TestClient(server.app({NAME: engine}), base_url="http://127.0.0.1:8001")


def post(client: TestClient, route: str, **body: Any) -> Any:
    response = client.post(f"/v1/{route}", json={"model": NAME} | body)
    assert response.status_code == 200, response.text
    return response.json()


def chat(client: TestClient, **body: Any) -> Any:
    return post(client, "chat/completions", **{"messages": HELLO, "seed": 5, "max_tokens": 8} | body)


def complete(client: TestClient, **body: Any) -> Any:
    return post(client, "completions", **{"prompt": "you", "seed": 5, "max_tokens": 8} | body)


def events(client: TestClient, route: str, **body: Any) -> list[Any]:
    """The chunks of a stream, without [DONE]."""
    body = {"model": NAME, "stream": True, "seed": 5, "max_tokens": 8} | body
    with client.stream("POST", f"/v1/{route}", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def ask(engine: Engine, *requests: Request, until: Any = None) -> list[list[Any]]:
    """What the engine tells of each request; `until` ends the waiting before all answers have."""
    told: list[list[Any]] = [[] for _ in requests]
    changed = threading.Condition()

    def deliver(number: int, event: Any) -> None:
        with changed:
            told[number].append(event)
            changed.notify()

    def done() -> bool:
        ends = [sum(isinstance(e, Failed) or bool(getattr(e, "finish", None)) for e in events) for events in told]
        return all(end == request.count for end, request in zip(ends, requests, strict=True))

    for number, request in enumerate(requests):
        engine.submit(request, lambda event, number=number: deliver(number, event))
    with changed:
        assert changed.wait_for(until or done, 60)
    return told


def said(told: list[Any]) -> str:
    return "".join(event.piece.text for event in told if isinstance(event, Said))


# The engine -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_an_answer_is_the_one_that_generate_gives(client: TestClient, model: models.Model, temperature: float):
    prompt = lib.render_prompt(model.tokenizer, HELLO)
    tokens = jnp.array([prompt, prompt])
    cfg = sampling.Config(max_new_tokens=8, temperature=temperature, eos_id=model.tokenizer.eos_token_id)
    sample = sampling.generate(model, model.params, tokens, tokens >= 0, engines.key(5), cfg)
    rows = zip(np.asarray(sample.tokens), np.asarray(sample.mask), strict=True)
    expected = [lib.decode(model.tokenizer, row, mask).strip() for row, mask in rows]
    answer = chat(client, temperature=temperature, n=2)
    assert [choice["message"]["content"] for choice in answer["choices"]] == expected
    assert answer["usage"]["completion_tokens"] == int(sample.mask.sum())
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_a_turn_reads_only_what_is_new(client: TestClient, engine: Engine):
    messages = [{"role": "user", "content": "hello, " * 5 + "one"}]
    first = chat(client, messages=messages)
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    messages += [{"role": "assistant", "content": first["choices"][0]["message"]["content"]}]
    messages += [{"role": "user", "content": "and you?"}]
    before = engine.prefilled
    second = chat(client, messages=messages)["usage"]
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"]
    assert engine.prefilled - before == second["prompt_tokens"] - cached


def test_requests_that_come_together_share_their_steps(engine: Engine):
    requests = [Request(prompts=((9, 8, n),), max_tokens=12, seed=n) for n in range(3)]
    alone = [said(ask(engine, request)[0]) for request in requests]
    before = engine.steps
    together = ask(engine, *requests, Request(prompts=((7, 7, 7),), max_tokens=3, temperature=0.0))
    assert [said(told) for told in together[:3]] == alone
    counts = [told[-1].count for told in together]
    assert engine.steps - before <= max(counts) + 3 < sum(counts)


def test_more_answers_than_rows_wait_in_order(engine: Engine):
    request = Request(prompts=tuple((5, 6, n) for n in range(3)), max_tokens=4, n=3, seed=1)
    (told,) = ask(engine, request)
    assert [event.index for event in told if isinstance(event, Begun)] == list(range(9))
    assert {event.index for event in told if isinstance(event, Said) and event.finish} == set(range(9))


def test_answers_to_one_prompt_share_its_reading(engine: Engine):
    prompt, before = tuple(range(40, 80)), engine.prefilled
    (told,) = ask(engine, Request(prompts=(prompt,), max_tokens=6, n=3, seed=1))
    assert engine.prefilled - before == 40 + 1 + 1
    assert [event.cached for event in told if isinstance(event, Begun)] == [0, 39, 39]
    assert len({said([e for e in told if e.index == n]) for n in range(3)}) == 3  # and are drawn each for itself


def test_a_request_that_is_given_up_frees_its_rows(engine: Engine):
    told: list[Any] = []
    endless = Request(prompts=((9, 9, 9),) * 6, max_tokens=90, seed=3)  # more than there are rows
    ticket = engine.submit(endless, told.append)
    while not told:
        time.sleep(0.001)
    ticket.cancel()
    steps, count = engine.steps, len(told)
    (after,) = ask(engine, Request(prompts=((5, 5),), max_tokens=2, temperature=0.0))
    assert isinstance(after[0], Begun) and engine.steps - steps < 90
    assert len(told) - count <= 8  # of the step that was under way
    assert not engine._running and not engine._waiting


@pytest.mark.slow
def test_what_fails_is_told_and_the_next_request_is_answered(engine: Engine, client: TestClient, monkeypatch, capfd):
    before = chat(client)["choices"]

    def fail(self: Any) -> None:
        self._clear()
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engines.Conversations, "step", fail)
        body = {"model": NAME, "messages": HELLO}
        response = client.post("/v1/chat/completions", json=body)
        assert response.status_code == 500 and "MemoryError" in response.json()["error"]["message"]
        assert response.json()["error"]["type"] == "server_error"
        last = events(client, "chat/completions", messages=HELLO)[-1]
        assert "MemoryError" in last["error"]["message"]
    assert "no memory" in capfd.readouterr().err
    assert chat(client)["choices"] == before


# Routes ---------------------------------------------------------------------------------------------------------------


def test_models_are_listed(client: TestClient):
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == [NAME]
    assert client.get(f"/v1/models/{NAME}").json() == listed["data"][0]
    assert client.get("/health").json() == {"status": "ok"}
    for wrong in (client.get("/v1/models/other"), client.get("/v2"), client.get("/v1/completions")):
        assert wrong.status_code in (404, 405) and wrong.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.slow
def test_a_chat(client: TestClient):
    answer = chat(client, n=2, user="me", store=False)
    assert answer["object"] == "chat.completion" and answer["model"] == NAME and answer["id"].startswith("chatcmpl-")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for choice in answer["choices"]:
        assert choice["message"]["role"] == "assistant" and choice["logprobs"] is None
        assert choice["message"]["content"] == choice["message"]["content"].strip()
        assert choice["finish_reason"] in ("stop", "length")
    assert chat(client, n=2)["choices"] == answer["choices"]  # by its seed
    assert chat(client, n=2, seed=6)["choices"] != answer["choices"]
    assert chat(client, n=2, seed=5 + 2**32)["choices"] != answer["choices"]
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello, "}, {"type": "text", "text": "you?"}]}]
    assert chat(client, n=2, messages=parts)["choices"] == answer["choices"]
    more = chat(client, messages=[{"role": "developer", "content": "Be naïve."}, *HELLO])["usage"]
    assert more["prompt_tokens"] > answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_a_stream_says_the_same(client: TestClient, route: str):
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2} if "chat" in route else {
        "prompt": ["you", "and"], "logprobs": 2, "echo": True}  # fmt: skip
    whole = post(client, route, **body, n=2, seed=5, max_tokens=8)
    chunks = events(client, route, **body, n=2, stream_options={"include_usage": True})
    *chunks, last = chunks
    assert last["choices"] == [] and {**last["usage"], "prompt_tokens_details": 0} == {
        **whole["usage"], "prompt_tokens_details": 0}  # fmt: skip
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        assert mine[-1]["finish_reason"]
        told = [c["logprobs"] for c in mine if c["logprobs"]]
        if "chat" in route:
            assert mine[0]["delta"]["role"] == "assistant"
            assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
            close([x for one in told for x in one["content"]], choice["logprobs"]["content"])
        else:
            assert "".join(c["text"] for c in mine) == choice["text"]
            for name, values in choice["logprobs"].items():
                close([x for one in told for x in one[name]], values)


def close(a: Any, b: Any) -> None:
    """The same but for rounding."""
    if isinstance(a, float):
        assert a == pytest.approx(b, abs=2e-5)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            close(a[name], b[name])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            close(x, y)
    else:
        assert a == b


def test_a_stop_string_ends_an_answer_before_it(client: TestClient):
    whole = complete(client, max_tokens=30, logprobs=0)["choices"][0]
    text = whole["text"]
    middle = text[len(text) // 2 : len(text) // 2 + 3]
    expected = text[: text.index(middle)]
    for chunks in (
        [complete(client, max_tokens=30, stop=middle, logprobs=0)],
        events(client, "completions", prompt="you", max_tokens=30, stop=["never", middle], logprobs=0),
    ):
        choices = [chunk["choices"][0] for chunk in chunks]
        assert "".join(choice["text"] for choice in choices) == expected
        assert choices[-1]["finish_reason"] == "stop"
        offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
        assert offsets == [offset for offset in whole["logprobs"]["text_offset"] if offset < len(expected)]


@pytest.mark.slow
def test_a_prompt_is_echoed_with_log_probabilities(client: TestClient, model: models.Model):
    """What evaluations by log-likelihood ask for: lists of ids, of which nothing or one token is sampled."""
    prompts = [lib.render_prompt(model.tokenizer, text) for text in ("you? naïve", "hello, and you")]
    scored = complete(client, prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0)
    padded = np.array([[*ids, *[0] * (16 - len(ids))] for ids in prompts])
    logits = np.asarray(jax.nn.log_softmax(jax.jit(model.apply)(model.params, padded, padded >= 0)))
    texts = "you? naïve", "hello, and you"
    for text, ids, choice, row in zip(texts, prompts, scored["choices"], logits, strict=True):
        read, expected = choice["logprobs"], row[: len(ids)]
        assert choice["text"].startswith(text)
        assert read["token_logprobs"][0] is None and read["top_logprobs"][0] is None
        own = expected[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(read["token_logprobs"][1 : len(ids)], own, atol=2e-5)
        for logp, tops, likeliest in zip(
            read["token_logprobs"][1:], read["top_logprobs"][1:], expected.max(-1), strict=True
        ):
            assert logp in tops.values() and max(tops.values()) == pytest.approx(likeliest, abs=2e-5)
            assert len(tops) in (1, 2)
        assert read["text_offset"][: len(ids)] == sorted(read["text_offset"][: len(ids)])
        assert len(read["tokens"]) == len(ids) + 1
    only = complete(client, prompt=prompts[0], echo=True, logprobs=1, max_tokens=0)
    assert only["choices"][0]["text"] == "you? naïve" and only["usage"]["completion_tokens"] == 0
    assert len(only["choices"][0]["logprobs"]["tokens"]) == len(prompts[0])
    assert only["choices"][0]["finish_reason"] == "length"
    assert complete(client, echo=True)["choices"][0]["text"] == "you" + complete(client)["choices"][0]["text"]


def test_tokens_of_a_chat_come_with_alternatives(client: TestClient):
    (choice,) = chat(client, logprobs=True, top_logprobs=3, temperature=0)["choices"]
    for token in choice["logprobs"]["content"]:
        assert bytes(token["bytes"]).decode(errors="replace") == token["token"]
        assert len(token["top_logprobs"]) == 3
        assert token["logprob"] == token["top_logprobs"][0]["logprob"]  # greedy
    assert chat(client, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "expected one of system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "expected a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "text alone"),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls", "leave it out"),
        ({"messages": [{"role": "user", "content": "you " * 90}]}, "messages", "the prompt has"),
        ({"max_tokens": 90}, "messages", "but the context of runs/tiny/model has 96"),
        ({"max_tokens": 0}, "max_tokens", "a whole number from 1"),
        ({"max_completion_tokens": True}, "max_completion_tokens", "a whole number"),
        ({"temperature": "hot"}, "temperature", "a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature", "a number from 0 to 2"),
        ({"top_p": 1.5}, "top_p", "a number from 0 to 1"),
        ({"n": 0}, "n", "a whole number from 1 to 1024"),
        ({"seed": 1.5}, "seed", "a whole number"),
        ({"stop": ["a", ""]}, "stop", "a text, or a list of at most 64 texts"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options", "true or false"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"tools": [{"type": "function"}]}, "tools", "leave it out, or give an empty list"),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format is not supported here"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported here; leave it out, or give 0"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported here"),
        ({"prompt": "x"}, "prompt", "no parameter of this route"),
        ({"model": 3}, "model", "expected a text"),
    ],
)  # fmt: skip
def test_a_wrong_chat_is_refused(client: TestClient, body: Any, param: str, message: str):
    body = {"model": NAME, "messages": HELLO} | body
    response = client.post("/v1/chat/completions", content=json.dumps(body))
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and message in error["message"]
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"prompt": ""}, "prompt", "a prompt is empty"),
        ({"prompt": []}, "prompt", "at least one"),
        ({"prompt": ["a", [1]], "n": 600}, "n", "2 prompts x 600: at most 1024"),
        ({"prompt": [1, "a"]}, "prompt", "expected a text, a list of token ids, or a list of either"),
        ({"prompt": [[280]]}, "prompt", "token ids from 0 to 279"),
        ({"prompt": [5] * 96}, "prompt", "the prompt has 96 tokens"),
        ({"max_tokens": 0}, "max_tokens", "0 needs echo"),
        ({"logprobs": 6}, "logprobs", "from 0 to 5"),
        ({"best_of": 2}, "best_of", "not supported here; leave it out, or give 1"),
        ({"suffix": "x"}, "suffix", "not supported here"),
    ],
)  # fmt: skip
def test_a_wrong_completion_is_refused(client: TestClient, body: Any, param: str, message: str):
    response = client.post("/v1/completions", json={"model": NAME, "prompt": "you"} | body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and message in error["message"]


def test_what_is_no_request_is_refused(client: TestClient, engine: Engine):
    for content in (b"{", b"\xff", b"[" * 100_000, b"[]"):
        response = client.post("/v1/completions", content=content)
        assert response.status_code == 400 and "JSON" in response.json()["error"]["message"]
    assert client.post("/v1/completions", content=b" " * (server.LARGEST + 1)).status_code == 413
    unknown = client.post("/v1/completions", json={"model": "gpt-4", "prompt": "you"})
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "model_not_found"
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
    keyed = TestClient(server.app({NAME: engine}, server.Options(api_key="s3cret")), base_url="http://localhost")
    assert keyed.get("/v1/models").status_code == 401 and keyed.get("/health").status_code == 200
    assert keyed.get("/v1/models", headers={"Authorization": "Bearer s3cre"}).status_code == 401
    assert keyed.get("/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200


# Real clients ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def url(engine: Engine) -> Iterator[str]:
    """The base URL of a real server."""
    with network.listening("127.0.0.1", 0) as listener:
        config = uvicorn.Config(server.app({NAME: engine}), log_level="warning", timeout_graceful_shutdown=1)
        http = uvicorn.Server(config)
        thread = threading.Thread(target=http.run, args=([listener],))
        thread.start()
        yield network.url("http", "127.0.0.1", listener) + "/v1"
        http.should_exit = True
        thread.join()


@pytest.mark.slow
def test_the_openai_package(url: str, engine: Engine, client: TestClient):
    openai = pytest.importorskip("openai", reason="needs openai: pip install openai")
    with openai.OpenAI(base_url=url, api_key="none") as remote:
        assert [model.id for model in remote.models.list()] == [NAME]
        asked = {"model": NAME, "messages": HELLO, "seed": 5, "max_tokens": 8}
        answer = remote.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=2)
        whole = chat(client, n=2)["choices"]
        assert [choice.message.content for choice in answer.choices] == [c["message"]["content"] for c in whole]
        assert answer.choices[0].logprobs.content[0].top_logprobs[1].logprob < 0
        stream = remote.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole[0]["message"]["content"]
        assert chunks[-1].usage.completion_tokens == chat(client)["usage"]["completion_tokens"]
        text = remote.completions.create(model=NAME, prompt="you", seed=5, max_tokens=8)
        assert text.choices[0].text == complete(client)["choices"][0]["text"]
        with pytest.raises(openai.NotFoundError, match="there is no model other"):
            remote.completions.create(model="other", prompt="you")
        with pytest.raises(openai.BadRequestError, match="temperature: expected a number") as refused:
            remote.completions.create(model=NAME, prompt="you", temperature=9)
        assert refused.value.param == "temperature"

    async def together() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as remote:
            create = remote.chat.completions.create
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(create(model=NAME, messages=HELLO, seed=n, max_tokens=70)) for n in range(4)]
            return [task.result() for task in tasks]

    before = engine.steps
    answers = asyncio.run(together())
    sampled = [answer.usage.completion_tokens for answer in answers]
    assert max(sampled) <= engine.steps - before < 0.7 * sum(sampled)


def test_a_client_that_goes_away_frees_its_row(url: str, engine: Engine):
    import httpx2

    body = {"model": NAME, "prompt": [[5, 6]] * 400, "max_tokens": 90}
    with httpx2.Client() as http:
        with http.stream("POST", f"{url}/completions", json=body | {"stream": True}) as response:
            next(response.iter_lines())
        with contextlib.suppress(httpx2.ReadTimeout):
            http.post(f"{url}/completions", json=body, timeout=0.1)
    end = time.monotonic() + 5
    while (engine._running or engine._waiting) and time.monotonic() < end:
        time.sleep(0.01)
    assert not engine._running and not engine._waiting


@pytest.mark.slow
def test_lm_eval(url: str, model: models.Model, tmp_path: Path):
    """Its `local-completions`: log-likelihoods are those of the model, and greedy answers end where they are to."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lm-eval[api]")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model.tokenizer.save_pretrained(tmp_path)
    remote = LocalCompletionsAPI(
        base_url=f"{url}/completions",
        model=NAME,
        tokenizer=str(tmp_path),
        tokenizer_backend="huggingface",
        max_length=CONTEXT,
        batch_size=2,
    )
    pairs = [("hello,", " you?"), ("Question: naïve", ", and you"), ("you", " hello, and naïve?")]
    asked = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    for (context, more), (total, greedy) in zip(pairs, remote.loglikelihood(asked), strict=True):
        start = len(model.tokenizer.encode(context))
        ids = model.tokenizer.encode(context + more)
        logp = np.asarray(jax.nn.log_softmax(model.apply(model.params, jnp.array([ids]), jnp.array([ids]) >= 0)[0]))
        own = logp[np.arange(start - 1, len(ids) - 1), ids[start:]]
        assert total == pytest.approx(own.sum(), abs=1e-3)
        assert greedy == all(logp[start - 1 : -1].argmax(-1) == ids[start:])
    rolling = remote.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("hello, and you?",), 0)])
    assert rolling[0] < 0
    until = {"until": ["naïve"], "max_gen_toks": 8, "temperature": 0}
    answers = remote.generate_until([Instance("generate_until", {}, ("hello,", until), 0)])
    assert len(answers) == 1 and isinstance(answers[0], str)
