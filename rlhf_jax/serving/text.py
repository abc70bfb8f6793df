"""The text of an answer while its tokens come: whole characters, and nothing of a string at which it is to stop."""

import codecs
import dataclasses
from collections.abc import Sequence

from rlhf_jax.rollouts.conversations import Token


@dataclasses.dataclass(frozen=True)
class Piece:
    """The next part of a text, and the tokens that begin in it, each with the place in the text where it does."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    places: tuple[int, ...] = ()

    @classmethod
    def joined(cls, pieces: Sequence["Piece"]) -> "Piece":
        tokens = tuple(token for piece in pieces for token in piece.tokens)
        places = tuple(place for piece in pieces for place in piece.places)
        return cls("".join(piece.text for piece in pieces), tokens, places)


class Text:
    """The text of one answer.

    What may be the beginning of a stop string is held back until it is known not to be, and so are the first bytes of a
    character. The text ends before the first stop string, and `stopped` is then true. With `strip`, white space at
    the beginning is left out, and other white space waits for what follows it: none is left at the end.
    """

    def __init__(self, stop: Sequence[str] = (), strip: bool = False):
        self._stop, self._strip = stop, strip
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # the text that was not given out yet
        self._given = 0  # characters that were given out, or left out at the beginning
        self._begun = False
        self._tokens: list[tuple[Token, int]] = []  # those of the text that is held back, and where they begin
        self.stopped = False

    def add(self, token: Token, written: bytes) -> Piece:
        """The text that can be given out after this token, which writes these bytes."""
        self._tokens.append((token, self._given + len(self._held)))
        self._held += self._decoder.decode(written)
        found = [place for place in map(self._held.find, self._stop) if place >= 0]
        if found:
            self.stopped = True
            return self._give(min(found), last=True)
        kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        return self._give(len(self._held) - kept, last=False)

    def end(self) -> Piece:
        """The text that is left, once there are no more tokens."""
        self._held += self._decoder.decode(b"", final=True)
        return self._give(len(self._held), last=True)

    def _give(self, count: int, last: bool) -> Piece:
        """The first characters that are held back; `last` if nothing will follow them."""
        text = self._held[:count]
        if self._strip:
            text = text.rstrip()
        taken = count if last else len(text)
        end = self._given + taken
        ready = self._tokens if last and not self.stopped else [pair for pair in self._tokens if pair[1] < end]
        self._tokens = [] if last else self._tokens[len(ready) :]
        self._held, self._given = self._held[taken:], end
        if self._strip and not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return Piece(text, tuple(token for token, _ in ready), tuple(place for _, place in ready))


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text with which the stop string begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
