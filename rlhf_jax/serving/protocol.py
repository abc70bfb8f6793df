"""The OpenAI protocol as pure functions: a request's JSON to checked settings, and answers to JSON.

Log-probabilities are those of the model's own distribution, before temperature, top_p and top_k.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_jax.rollouts.conversations import Token

Json = dict[str, Any]

# What a model here does without: these change nothing in an answer. Others that are not known are refused.
IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# What would change an answer and is not there: accepted only where it asks for nothing.
NEUTRAL: dict[str, tuple] = {
    "audio": (None,),
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
MOST_ANSWERS = 1024  # of one request
MOST_STOPS = 64
LOWEST = -9999.0  # in the place of minus infinity, which JSON does not have


class Refusal(Exception):
    """A request that is not answered; the message is for whoever sent it."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def json(self) -> Json:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request, checked as far as it can be without the model."""

    model: str
    prompts: list[Any]  # each a text, a list of ids, or a list of messages
    chat: bool
    n: int
    max_tokens: int | None  # None: none was named
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool  # at the end of a stream
    likeliest: int | None  # alternatives that are told beside each token; None: no log-probabilities
    echo: bool = False

    @property
    def param(self) -> str:
        """The parameter that holds the prompts."""
        return "messages" if self.chat else "prompt"


class _Fields:
    """The fields of a request, which are checked as they are read."""

    def __init__(self, body: Any):
        if not isinstance(body, dict):
            raise Refusal('the body is not a JSON object: expected one, such as {"model": ...}')
        self._body, self._known = body, set(IGNORED)

    def take(self, name: str, default: Any, expected: str, check: Callable[[Any], bool]) -> Any:
        """The value of a field; null is the default."""
        self._known.add(name)
        value = self._body.get(name)
        if value is None:
            return default
        if not check(value):
            raise Refusal(f"{name}: expected {expected}", name)
        return value

    def whole(self, name: str, default: Any, least: int, most: int) -> Any:
        expected = f"a whole number from {least} to {most}"
        return self.take(name, default, expected, lambda x: type(x) is int and least <= x <= most)

    def number(self, name: str, default: float, least: float, most: float) -> float:
        check = lambda x: type(x) in (int, float) and least <= x <= most
        return float(self.take(name, default, f"a number from {least:g} to {most:g}", check))

    def flag(self, name: str) -> bool:
        return self.take(name, False, "true or false", lambda x: type(x) is bool)

    def finish(self) -> None:
        """Refuse what was not read."""
        for name, neutral in NEUTRAL.items():
            if name in self._body and not any(_same(self._body[name], value) for value in neutral):
                only = f"; leave it out, or give {_spelled(neutral[1])}" if len(neutral) > 1 else "; leave it out"
                raise Refusal(f"{name} is not supported here{only}", name, code="unsupported_parameter")
        for name in self._body.keys() - self._known - NEUTRAL.keys():
            raise Refusal(f"{name:.100} is no parameter of this route", name[:100], code="unknown_parameter")


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _spelled(value: Any) -> str:
    return {"[]": "an empty list", "{}": "an empty object", "''": "an empty text"}.get(repr(value), repr(value))


def chat(body: Any) -> Asked:
    """A request for /v1/chat/completions; raises Refusal for one that is wrong."""
    fields = _Fields(body)
    messages = fields.take(
        "messages", None, "a list of messages, at least one", lambda x: isinstance(x, list) and x != []
    )
    if messages is None:
        raise Refusal("messages is missing: expected a list of messages", "messages")
    limit = fields.whole("max_tokens", None, 1, 2**31 - 1)
    limit = fields.whole("max_completion_tokens", limit, 1, 2**31 - 1)
    wanted = fields.flag("logprobs")
    likeliest = fields.whole("top_logprobs", None, 0, 20)
    if likeliest is not None and not wanted:
        raise Refusal("top_logprobs needs logprobs: true", "top_logprobs")
    prompt = [_message(message, f"messages[{n}]") for n, message in enumerate(messages)]
    return _asked(fields, [prompt], True, limit, (likeliest or 0) if wanted else None)


def completion(body: Any) -> Asked:
    """A request for /v1/completions; raises Refusal for one that is wrong."""
    fields = _Fields(body)
    limit = fields.whole("max_tokens", 16, 0, 2**31 - 1)
    likeliest = fields.whole("logprobs", None, 0, 5)
    expected = "a text, a list of token ids, or a list of either"
    prompt = fields.take("prompt", None, expected, lambda x: isinstance(x, str | list))
    if prompt is None:
        raise Refusal(f"prompt is missing: expected {expected}", "prompt")
    prompts = [prompt] if isinstance(prompt, str) or (prompt and all(type(x) is int for x in prompt)) else prompt
    good = lambda x: isinstance(x, str) or (isinstance(x, list) and all(type(i) is int for i in x))
    if not prompts or not all(map(good, prompts)):
        raise Refusal(f"prompt: expected {expected}, at least one", "prompt")
    if not all(prompts):
        raise Refusal("prompt: a prompt is empty: expected at least one token", "prompt")
    asked = _asked(fields, prompts, False, limit, likeliest, fields.flag("echo"))
    if limit == 0 and not asked.echo:
        raise Refusal("max_tokens: 0 needs echo: true, or there is nothing to tell", "max_tokens")
    return asked


def _asked(
    fields: _Fields, prompts: list[Any], chat: bool, limit: int | None, likeliest: int | None, echo: bool = False
) -> Asked:
    """The fields that the two routes have in common."""
    stop = fields.take("stop", [], f"a text, or a list of at most {MOST_STOPS} texts", _is_stop)
    model = fields.take("model", None, "a text", lambda x: isinstance(x, str))
    if model is None:
        raise Refusal("model is missing: expected the name of one; GET /v1/models lists them", "model")
    stream = fields.flag("stream")
    options = fields.take("stream_options", None, "an object", lambda x: isinstance(x, dict))
    if options is not None and not stream:
        raise Refusal("stream_options needs stream: true", "stream_options")
    for name in (options or {}).keys() - {"include_usage", "include_obfuscation"}:
        raise Refusal(f"stream_options.{name:.100} is no option", "stream_options")
    usage = (options or {}).get("include_usage") or False
    if not isinstance(usage, bool):
        raise Refusal("stream_options.include_usage: expected true or false", "stream_options")
    asked = Asked(
        model=model,
        prompts=prompts,
        chat=chat,
        n=fields.whole("n", 1, 1, MOST_ANSWERS),
        max_tokens=limit,
        temperature=fields.number("temperature", 1.0, 0.0, 2.0),
        top_k=max(fields.whole("top_k", 0, -1, 2**31 - 1), 0),
        top_p=fields.number("top_p", 1.0, 0.0, 1.0),
        seed=fields.whole("seed", None, -(2**63), 2**63 - 1),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stream=stream,
        usage=usage,
        likeliest=likeliest,
        echo=echo,
    )
    fields.finish()
    if len(prompts) * asked.n > MOST_ANSWERS:
        raise Refusal(f"n: {len(prompts)} prompts x {asked.n}: at most {MOST_ANSWERS} answers to a request", "n")
    return asked


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and len(texts) <= MOST_STOPS and all(isinstance(x, str) and x for x in texts)


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _message(message: Any, where: str) -> Json:
    """A message as chat templates have it."""
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise Refusal(f"{where}.role: expected one of {', '.join(_ROLES)}", f"{where}.role")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise Refusal(f"{where}.{name} is not supported here: leave it out", f"{where}.{name}")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise Refusal(f"{where}.content: models here read text alone: expected parts of type text",
                              f"{where}.content")  # fmt: skip
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Refusal(f"{where}.content: expected a text", f"{where}.content")
    return {"role": _ROLES[message["role"]], "content": content}


# Answers --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Choice:
    """One answer, or the part of it that is told at a time."""

    index: int
    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    places: list[int] = dataclasses.field(default_factory=list)  # in the text, where each token begins
    finish: str | None = None


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens that a request took."""

    prompt: int
    sampled: int
    cached: int  # of the prompt

    def json(self) -> Json:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.sampled,
            "total_tokens": self.prompt + self.sampled,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes the answers to one request as JSON."""

    id: str
    created: int  # seconds since 1970
    asked: Asked
    vocabulary: Sequence[bytes]  # what each token writes

    def whole(self, choices: Sequence[Choice], usage: Usage) -> Json:
        """The answer to a request that does not stream."""
        kind = "chat.completion" if self.asked.chat else "text_completion"
        return self._json(kind, [self._choice(choice) for choice in choices]) | {"usage": usage.json()}

    def begun(self, index: int) -> Json | None:
        """The chunk that begins an answer, which chats have."""
        if not self.asked.chat:
            return None
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunks(self, choice: Choice) -> list[Json]:
        """The chunks of a further part of an answer: what it says, and how it ends."""
        if not self.asked.chat:
            return [self._chunk([self._choice(choice)])]
        found = []
        if choice.text or choice.tokens:
            delta = {"content": choice.text}
            logprobs = self._logprobs(choice)
            found.append({"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": None})
        if choice.finish:
            found.append({"index": choice.index, "delta": {}, "logprobs": None, "finish_reason": choice.finish})
        return [self._chunk([one]) for one in found]

    def used(self, usage: Usage) -> Json:
        """The last chunk of a stream that tells its usage."""
        return self._chunk([]) | {"usage": usage.json()}

    def _json(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model, "choices": choices}

    def _chunk(self, choices: list[Json]) -> Json:
        kind = "chat.completion.chunk" if self.asked.chat else "text_completion"
        return self._json(kind, choices) | ({"usage": None} if self.asked.usage else {})

    def _choice(self, choice: Choice) -> Json:
        said: Json = {"text": choice.text}
        if self.asked.chat:
            said = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return {
            "index": choice.index,
            **said,
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.finish,
        }

    def _logprobs(self, choice: Choice) -> Json | None:
        count = self.asked.likeliest
        if count is None:
            return None
        if self.asked.chat:
            told = [self._told(token, count) for token in choice.tokens]
            return {"content": told, "refusal": None}
        return {
            "tokens": [self._name(token.id) for token in choice.tokens],
            "token_logprobs": [None if token.logp is None else _finite(token.logp) for token in choice.tokens],
            "top_logprobs": [self._by_name(token, count) for token in choice.tokens],
            "text_offset": choice.places,
        }

    def _told(self, token: Token, count: int) -> Json:
        """A token of a chat, and the likeliest in its place."""
        pairs = [(token.id, token.logp or 0.0), *token.likeliest[:count]]
        told = [
            {"token": written.decode(errors="replace"), "bytes": [*written], "logprob": _finite(logp)}
            for written, logp in ((self.vocabulary[i], logp) for i, logp in pairs)
        ]
        return told[0] | {"top_logprobs": told[1:]}

    def _by_name(self, token: Token, count: int) -> Json | None:
        """The likeliest tokens in the place of one, and that one, which is always among them."""
        if token.logp is None:  # the first of a prompt
            return None
        found: Json = {}
        for i, logp in itertools.chain(token.likeliest[:count], [(token.id, token.logp)]):
            name = self._name(i)
            found[name] = max(found.get(name, -math.inf), _finite(logp))
        return found

    def _name(self, i: int) -> str:
        """The text of a token, or its bytes where they are no text."""
        try:
            return self.vocabulary[i].decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.vocabulary[i])


def _finite(logp: float) -> float:
    return max(logp, LOWEST)
