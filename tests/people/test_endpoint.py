"""Answers of models behind the OpenAI protocol: whole ones, and each way in which they break."""

import asyncio
import contextlib

import pytest

pytest.importorskip("httpx2", reason="needs the extra people: pip install -e .[people]")
pytest.importorskip("uvicorn", reason="needs the extra people: pip install -e .[people]")

from rlhf_jax.people import endpoint
from rlhf_jax.people.endpoint import Asked, Endpoint, Failure, Piece
from tests.people.endpoints import Stub


def heard(url: str, key: str = "", patience: float = 5.0) -> list[Piece]:
    async def all_of() -> list[Piece]:
        models = Endpoint(url, key, patience=patience)
        try:
            (name, *_) = await models.models()
            asked = Asked(name, [{"role": "user", "content": "one two"}], 0.5, 9, 3)
            async with contextlib.aclosing(models.answer(asked)) as pieces:
                return [piece async for piece in pieces]
        finally:
            await models.close()

    return asyncio.run(all_of())


def test_an_answer_comes_in_pieces(stub: Stub, served: tuple[Stub, str]):
    pieces = heard(served[1] + "/v1/", key="secret")
    assert "".join(piece.text for piece in pieces) == "ada heard: one two" and len(pieces) == 5
    assert [piece.end for piece in pieces] == ["", "", "", "", "stop"]
    (asked,) = stub.asked
    assert asked == {
        "model": "ada",
        "messages": [{"role": "user", "content": "one two"}],
        "temperature": 0.5,
        "max_tokens": 9,
        "seed": 3,
        "stream": True,
    }
    assert stub.keys == {"Bearer secret"}
    stub.fault = "length"
    assert heard(served[1])[-1].end == "length"
    stub.fault = "no mark"
    assert heard(served[1])[-1].end == "stop"


@pytest.mark.parametrize(
    "fault, code, message",
    [
        ("no models", "malformed", "names no models"),
        ("busy", "busy", "slow down"),
        ("long", "long", "400 tokens of 256"),
        ("broken", "refused", "status 500"),
        ("no stream", "malformed", "does not stream"),
        ("cut", "cut", "in the middle"),
        ("silent", "slow", "too long"),
        ("malformed", "malformed", "not of the protocol"),
        ("error", "refused", "out of memory"),
        ("number", "malformed", "not text"),
        ("endless line", "malformed", "too long"),
    ],
)
def test_whatever_breaks_is_named(stub: Stub, served: tuple[Stub, str], fault: str, code: str, message: str):
    stub.fault = fault
    with pytest.raises(Failure, match=message) as failed:
        heard(served[1], patience=0.2)
    assert failed.value.code == code


def test_nobody_there():
    for url in ("http://127.0.0.1:9", "http://[", "nonsense"):
        with pytest.raises(Failure) as failed:
            heard(url)
        assert failed.value.code == "away"


def test_an_answer_without_end_is_cut(stub: Stub, served: tuple[Stub, str]):
    stub.text = "x" * (endpoint.LONGEST + 5) + " more"
    pieces = heard(served[1])
    assert len(pieces) == 1 and pieces[0] == Piece("x" * endpoint.LONGEST, "length")


def test_halves_of_surrogate_pairs_are_joined():
    assert endpoint.whole("a\ud83d" + "\ude00b\ud83d") == "a\U0001f600b\ufffd"
