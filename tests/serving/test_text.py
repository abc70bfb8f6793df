"""The text of answers, token by token."""

import itertools
import random

import pytest

from rlhf_jax.rollouts.conversations import Token
from rlhf_jax.serving.text import Piece, Text


def told(parts: list[bytes], stop=(), strip=False) -> tuple[list[Piece], Text]:
    """The pieces that come out after each of these tokens, up to the end or a stop."""
    text, pieces = Text(stop, strip), []
    for n, part in enumerate(parts):
        pieces.append(text.add(Token(n), part))
        if text.stopped:
            return pieces, text
    return [*pieces, text.end()], text


def texts(parts: list[bytes], **how) -> list[str]:
    return [piece.text for piece in told(parts, **how)[0]]


def test_characters_come_whole():
    assert texts([b"na\xc3", b"\xafve", b"\xf0\x9f", b"\x98", b"\x80!"]) == [
        "na",
        "ïve",
        "",
        "",
        "\N{GRINNING FACE}!",
        "",
    ]
    assert texts([b"a\xff", b"b\xe2\x82"]) == ["a\N{REPLACEMENT CHARACTER}", "b", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    ("parts", "stop", "expected"),  # without a stop, a last piece for the end
    [
        ([b"one st", b"op two"], ["stop"], ["one ", ""]),
        ([b"one st", b"ep two"], ["stop"], ["one ", "step two", ""]),
        ([b"aab", b"aab", b"aac"], ["aabaac"], ["", "aab", ""]),
        ([b"x\n", b"\nQ"], ["\n\n", "Q"], ["x", ""]),
        ([b"ab"], ["b", "ab"], [""]),  # the first in the text
        ([b"tail s"], ["stop"], ["tail ", "s"]),
        ([b"5 \xe2\x82", b"\xac 6"], ["\N{EURO SIGN}"], ["5 ", ""]),
    ],
)
def test_a_stop_string_is_never_given_out(parts, stop, expected):
    pieces, text = told(parts, stop)
    assert [piece.text for piece in pieces] == expected
    assert text.stopped == (len(pieces) <= len(parts))


def test_white_space_around_an_answer_is_left_out():
    assert texts([b" ", b"\n yes", b" ", b"and", b" no ", b"\n"], strip=True) == ["", "yes", "", " and", " no", "", ""]
    assert texts([b"\n", b"\n", b"x"], strip=True, stop=["\n\n"]) == ["", ""]
    assert texts([b" yes \n", b"\nx"], strip=True, stop=["\n\n"]) == ["yes", ""]


def test_tokens_come_with_the_text_that_they_begin_in():
    pieces, _ = told([b"on", b"e s", b"to", b"re st", b"op", b"!"], stop=["stop"])
    assert [[token.id for token in piece.tokens] for piece in pieces] == [[0], [1], [], [2, 3], []]
    assert [piece.places for piece in pieces] == [(0,), (2,), (), (5, 7), ()]
    pieces, _ = told([b" \xc3", b"\xa9", b"x\xff"])
    assert [[token.id for token in piece.tokens] for piece in pieces] == [[0], [1], [2], []]


def test_any_division_into_tokens_gives_the_same_text():
    rng = random.Random(0)
    whole = "  Grüße, naïve \N{GRINNING FACE}\N{GRINNING FACE} ab aab aaab\n\nEnd \n".encode()
    for _ in range(300):
        cuts = sorted({0, len(whole), *(rng.randrange(len(whole)) for _ in range(rng.randrange(20)))})
        parts = [whole[a:b] for a, b in itertools.pairwise(cuts)]
        stop = rng.choice([[], ["aaab"], ["\n\n", "aab"], ["\N{GRINNING FACE} a"]])
        strip = rng.random() < 0.5
        expected = whole.decode()
        expected = min((expected[: expected.index(one)] for one in stop), key=len, default=expected)
        pieces, _ = told(parts, stop, strip)
        assert "".join(piece.text for piece in pieces) == (expected.strip() if strip else expected)
        ids = [token.id for piece in pieces for token in piece.tokens]
        assert ids == list(range(len(ids))) and (stop or len(ids) == len(parts))
