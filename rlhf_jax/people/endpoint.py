"""Models behind the OpenAI protocol, as `experiments.serve` and most inference servers speak it.

What comes from there is not trusted: every line is bounded and checked, and whatever goes wrong is a `Failure`, which
names what the page can do about it.
"""

import dataclasses
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx2

LONGEST = 100_000  # characters of an answer, after which it is cut
_LONGEST_LINE = 2**20  # characters
_KEPT = 20.0  # seconds for which the list of models is not asked for again


class Failure(Exception):
    """An answer that did not come, or not whole.

    `code` is "away" (nobody answers), "cut" (the connection broke), "slow" (nothing came for long), "busy" (too many
    requests), "long" (more than the model's context holds), "refused" (another error), "malformed" (not the protocol)
    or "broken" (nobody will answer: what serves the models has failed). The message may name the model.
    """

    def __init__(self, code: str, message: str, status: int = 200):
        super().__init__(message)
        self.code, self.status = code, status  # of HTTP


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question to a model."""

    model: str
    messages: list[dict[str, str]]
    temperature: float = 1.0
    max_tokens: int | None = None  # None: as the endpoint has it
    seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    text: str = ""
    end: str = ""  # the last one says why: "stop" or "length"


class Endpoint:
    """An address at which models answer. Create and use it within one event loop."""

    def __init__(
        self,
        url: str,
        key: str = "",
        connect: float = 5.0,
        patience: float = 180.0,
        gone: Callable[[], str] = lambda: "",
    ):
        """`patience` is the most seconds between two parts of an answer: the first may wait for a compilation.

        `gone` tells in a line why nobody will answer there any more; "" while somebody may.
        """
        self.gone = gone
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key, self._connect, self._patience = key, connect, patience
        self._client: httpx2.AsyncClient | None = None
        self._models: tuple[float, list[str]] = (-1e9, [])

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _http(self) -> "httpx2.AsyncClient":
        if self._client is None:
            import httpx2  # slow to import, and needed where there is an endpoint alone

            timeout = httpx2.Timeout(self._patience, connect=self._connect)
            headers = {"Accept-Encoding": "identity"}  # so that what comes is no larger than what was sent
            headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
            limits = httpx2.Limits(max_connections=None)
            self._client = httpx2.AsyncClient(
                timeout=timeout, headers=headers, limits=limits, trust_env=False, follow_redirects=False
            )
        return self._client

    async def models(self) -> list[str]:
        """The names of the models, in the endpoint's order."""
        if time.monotonic() - self._models[0] > _KEPT:
            import httpx2

            try:
                async with self._http().stream("GET", f"{self.url}/v1/models", timeout=10.0) as response:
                    await _check(response)
                    text = await _text(response)
                names = [one["id"] for one in json.loads(text)["data"]]
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise self._failure(error, begun=False) from error
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise Failure("malformed", "its list of models is not of the protocol") from error
            if not names or not all(isinstance(name, str) and name for name in names):
                raise Failure("malformed", "it names no models")
            self._models = time.monotonic(), names
        return self._models[1]

    async def answer(self, asked: Asked) -> AsyncGenerator[Piece, None]:
        """Yield an answer in pieces as they come; the last one, and no other, has an `end`."""
        import httpx2

        body = {"model": asked.model, "messages": asked.messages, "temperature": asked.temperature, "stream": True}
        body |= {"max_tokens": asked.max_tokens} if asked.max_tokens else {}
        body |= {"seed": asked.seed} if asked.seed is not None else {}
        begun, size = False, 0
        try:
            async with self._http().stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
                await _check(response)
                begun = True
                if "event-stream" not in response.headers.get("content-type", ""):
                    raise Failure("malformed", "it does not stream")
                async for piece in _pieces(_lines(response)):
                    size += len(piece.text)
                    if size > LONGEST:
                        yield Piece(piece.text[: LONGEST - size], "length")
                        return
                    yield piece
                    if piece.end:
                        return
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise self._failure(error, begun) from error
        raise Failure("cut", "the connection ended in the middle of the answer")

    def _failure(self, error: Exception, begun: bool) -> Failure:
        import httpx2

        if why := self.gone():
            return Failure("broken", why)
        if isinstance(error, httpx2.ReadTimeout | httpx2.WriteTimeout | httpx2.PoolTimeout):
            return Failure("slow", "nothing came for too long")
        return Failure("cut" if begun else "away", str(error) or type(error).__name__)


async def _check(response: "httpx2.Response") -> None:
    """Raise the Failure that a status stands for."""
    if response.status_code == 200:
        return
    text = await _text(response)
    message, code = f"status {response.status_code}", None
    try:
        error = json.loads(text)["error"]
        message, code = str(error["message"])[:500], error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    if response.status_code in (429, 503):
        raise Failure("busy", message, response.status_code)
    if code == "context_length_exceeded" or response.status_code == 413:
        raise Failure("long", message, response.status_code)
    raise Failure("refused", message, response.status_code)


async def _text(response: "httpx2.Response") -> str:
    """The body of an answer, up to `_LONGEST_LINE`."""
    text = ""
    async for part in response.aiter_text():
        text += part
        if len(text) > _LONGEST_LINE:
            break
    return text


async def _lines(response: "httpx2.Response") -> AsyncIterator[str]:
    """The lines of a stream of events, none of which may be longer than `_LONGEST_LINE`."""
    rest = ""
    async for text in response.aiter_text():
        *lines, rest = (rest + text).split("\n")
        if len(rest) > _LONGEST_LINE:
            raise Failure("malformed", "a line of it is too long")
        for line in lines:
            yield line.removesuffix("\r")
    yield rest


async def _pieces(lines: AsyncIterator[str]) -> AsyncIterator[Piece]:
    end = ""
    async for line in lines:
        if not line.startswith("data:"):
            continue  # a comment that keeps the connection open, or another field
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            yield Piece(end=end or "stop")
            return
        piece = _piece(data)
        if piece.text:
            yield Piece(piece.text)
        end = piece.end or end
    if end:  # the mark of the end is missing, but the model's own was there
        yield Piece(end=end)


def _piece(data: str) -> Piece:
    try:
        body: Any = json.loads(data)
        if isinstance(body, dict) and "error" in body:
            error = body["error"]
            raise Failure("refused", str(error.get("message", "") if isinstance(error, dict) else error)[:500])
        choices = body["choices"]
        if not choices:  # only the count of tokens
            return Piece()
        text, end = choices[0].get("delta", {}).get("content"), choices[0].get("finish_reason")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise Failure("malformed", "a part of the answer is not of the protocol") from error
    if not isinstance(text, str | None) or not isinstance(end, str | None):
        raise Failure("malformed", "a part of the answer is not text")
    return Piece(text or "", end or "")


def whole(text: str) -> str:
    """A text that came in pieces: pairs of surrogates are joined, and halves alone are replaced."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
