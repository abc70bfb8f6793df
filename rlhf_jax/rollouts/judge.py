"""A judge: a language model that reads answers by a rubric, and says how good one is, or which of two is better.

It is a model directory or, with a URL, a model behind the OpenAI protocol. Each of its replies must end with a line of
one form, "Score: 7" or "Verdict: A". A reply that ends otherwise, or was cut, holds no verdict: it is counted, and is
never taken for one. A pair is judged in both orders, because judges prefer one place (arXiv:2306.05685); two verdicts
that contradict each other are a tie.

A model directory need not write: its replies can be weighed. The possible verdicts are then read as replies, and their
log-probabilities tell what it would say, which gives a verdict on everything, also by a model too small to write one.
"""

import asyncio
import dataclasses
import itertools
import math
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np

from rlhf_jax import models
from rlhf_jax.data import pipeline
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.data.rows import short
from rlhf_jax.data.tokenizer import Prompt, prompt_text
from rlhf_jax.devices import parallel
from rlhf_jax.people.endpoint import Asked, Endpoint, Failure, whole
from rlhf_jax.rollouts import likelihood, rollout, sampling
from rlhf_jax.settings import Count, NonNegative, Positive, Range, Settings, Unbounded, Whole
from rlhf_jax.types import InputError, named_key

Ask = Callable[[Sequence[str]], list[str | None]]  # requests -> replies, None for one that was cut or too long
# (requests, K replies) -> the log-probability of each reply to each request, in nats [B, K]; nan where one is too long
Weigh = Callable[[Sequence[str], Sequence[str]], np.ndarray]

PAUSE = 1.0  # seconds before the second attempt of a request; twice as long before each further one
_LOCAL, _REMOTE = ("length", "replies"), ("name", "key_variable", "timeout", "retries")  # settings of one kind of judge
_WRITTEN = "temperature", "max_new_tokens"  # settings of replies that are written
_REPLY = 16  # tokens, at least as many as any verdict has


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """A judge, and how it is asked."""

    model: Path | None = None  # model directory of a judge; None: nobody judges, unless there is a url
    url: str | None = None  # base URL of a judge behind the OpenAI protocol, such as http://127.0.0.1:8001/v1
    name: str | None = None  # with url: name of the model there; None: the only one that it serves
    rubric: Path | None = None  # text file that says what a good answer is
    key_variable: str = "OPENAI_API_KEY"  # with url: environment variable that holds the key, if one is needed
    most: Annotated[int, Range(least=2, most=1000)] = 10  # scores are whole numbers from 1 to this
    # Score of an answer on which the judge gives no verdict; None: the first such answer ends the run.
    missing: Annotated[float, Unbounded("scores have either sign")] | None = None
    # written: the last line of what it writes is its verdict. weighed, of a model directory: it writes nothing; the
    # probabilities of the verdicts give the mean score (arXiv:2303.16634), and the better of two by both orders' sum.
    replies: Literal["written", "weighed"] = "written"
    temperature: NonNegative = 0.0  # sampling temperature of its replies; 0 is greedy
    max_new_tokens: Count = 256  # most tokens of a reply
    length: Count = 1024  # of a model directory: most tokens of a request; a longer one gets no verdict
    batch: Count = 8  # requests at a time
    timeout: Positive = 60.0  # with url: seconds to wait for a sign of life
    retries: Whole = 4  # with url: further attempts after a failure that may pass, 1, 2, 4, ... seconds later

    def __post_init__(self) -> None:
        super().__post_init__()
        default = {field.name: field.default for field in dataclasses.fields(Config)}
        changed = [name for name in default if getattr(self, name) != default[name]]
        if not self.given and changed:
            raise InputError(f"judge.{changed[0]} has no effect without a judge: name one by judge.model or judge.url")
        if not self.given:
            return
        if self.model is not None and self.url is not None:
            raise InputError("judge.model and judge.url: expected one judge; leave out one of them")
        if self.rubric is None:
            raise InputError("judge.rubric: expected a text file that says what a good answer is")
        if self.url is not None and not re.match(r"https?://\w", self.url):
            raise InputError(f"judge.url={self.url}: expected http://... or https://...")
        for name in _REMOTE if self.url is None else _LOCAL:
            if name in changed:
                raise InputError(f"judge.{name} has no effect {'without' if self.url is None else 'with'} judge.url")
        for name in _WRITTEN if self.replies == "weighed" else ():
            if name in changed:
                raise InputError(f"judge.{name} has no effect with judge.replies=weighed: nothing is written")

    @property
    def given(self) -> bool:
        """Whether there is a judge."""
        return self.model is not None or self.url is not None

    def __str__(self) -> str:
        return str(self.model or self.name or self.url)


# What is asked, and how replies are read ------------------------------------------------------------------------------

_SCORE = re.compile(r"Score: ([0-9]{1,4})")
_VERDICT = re.compile(r"Verdict: (A|B|tie)")
_SIGNS = {"A": 1, "B": -1, "tie": 0}


def _dialogue(prompt: Prompt) -> str:
    turns = [f"user: {prompt}"] if isinstance(prompt, str) else [f"{one['role']}: {one['content']}" for one in prompt]
    return "\n".join(["<dialogue>", *turns, "</dialogue>"])


def score_request(rubric: str, prompt: Prompt, response: str, most: int) -> str:
    """The text by which a judge is asked for the score of one response."""
    task = (
        "Judge the answer by these criteria alone. End with one line that says Score: N, where N is a whole number from"
        f" 1 (worst) to {most} (best)."
    )
    return f"{rubric}\n\n{_dialogue(prompt)}\n\n<answer>\n{response}\n</answer>\n\n{task}"


def pair_request(rubric: str, prompt: Prompt, first: str, second: str) -> str:
    """The text by which a judge is asked which of two responses is better."""
    task = (
        "Compare the two answers by these criteria alone; their order means nothing. End with one line that says"
        " Verdict: A, Verdict: B or Verdict: tie."
    )
    answers = f"<answer A>\n{first}\n</answer A>\n\n<answer B>\n{second}\n</answer B>"
    return f"{rubric}\n\n{_dialogue(prompt)}\n\n{answers}\n\n{task}"


def _last_line(reply: str | None) -> str:
    return "" if reply is None else reply.strip().rpartition("\n")[2].strip()


def read_score(reply: str | None, most: int) -> int | None:
    """The score with which a reply ends, from 1 to `most`; None where it does not end so."""
    match = _SCORE.fullmatch(_last_line(reply))
    return int(match[1]) if match and 1 <= int(match[1]) <= most else None


def read_verdict(reply: str | None) -> int | None:
    """The verdict with which a reply ends: 1 for A, -1 for B, 0 for a tie; None where it does not end so."""
    match = _VERDICT.fullmatch(_last_line(reply))
    return _SIGNS[match[1]] if match else None


def both_orders(forward: float, swapped: float) -> int | None:
    """The verdict on a pair from those on it and on the pair the other way round: a tie where they contradict.

    1 says that the first is better. None where either is nan.
    """
    if np.isnan(forward) or np.isnan(swapped):
        return None
    return int(forward) if forward == -swapped else 0


def mean_score(logp: np.ndarray) -> np.ndarray:
    """The mean of the scores 1 to K, each weighed by its probability among them (G-Eval, arXiv:2303.16634). [B].

    `logp` [B, K] are their log-probabilities as replies.
    """
    share = np.exp(logp - logp.max(axis=1, keepdims=True))
    return share @ np.arange(1, logp.shape[1] + 1) / share.sum(axis=1)


def both_margins(forward: float, swapped: float) -> int | None:
    """The verdict on a pair from the margins of A over B, in nats, on it and on the pair the other way round.

    1 says that the first is better: what the place alone is worth cancels. None where either is nan.
    """
    margin = forward - swapped
    return None if np.isnan(margin) else int(np.sign(margin))


def ranks(verdicts: Sequence[Sequence[int]]) -> list[int]:
    """The rank of each response, 0 is best, by the number of pairs that it wins less those that it loses.

    `verdicts[i][j]` is 1 where response i is better than j, -1 where it is worse, 0 for a tie. Equal numbers tie.
    """
    won = [sum(row) for row in verdicts]
    order = sorted(set(won), reverse=True)
    return [order.index(count) for count in won]


# The judge ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The ranking of the responses to one prompt, and how it came about."""

    ranks: list[int] | None  # None where the judge gave no verdict on one of the pairs
    pairs: int  # pairs of different responses
    missing: int  # pairs without a verdict
    swayed: int  # pairs on which the verdict was another in the other order


@dataclasses.dataclass(frozen=True)
class Written:
    """Replies that a model writes: the verdict is their last line."""

    ask: Ask
    both = staticmethod(both_orders)  # the verdict on a pair, from those in both orders

    def scores(self, requests: Sequence[str], most: int) -> tuple[np.ndarray, list[str]]:
        """The score in the reply to each request, nan where there is none, and why there would be none. [B] each."""
        replies = self.ask(requests)
        found = np.array([read_score(reply, most) for reply in replies], float)  # nan for None
        return found, [
            ("it did not finish, or the request was too long" if reply is None else f"it said {short(reply)}")
            + f"; expected a last line such as 'Score: {most}'"
            for reply in replies
        ]

    def verdicts(self, requests: Sequence[str]) -> list[float]:
        """The verdict in the reply to each request: 1 for A, -1 for B, 0 for a tie; nan where there is none."""
        found = [read_verdict(reply) for reply in self.ask(requests)]
        return [math.nan if verdict is None else float(verdict) for verdict in found]


@dataclasses.dataclass(frozen=True)
class Weighed:
    """Replies that a model might write, weighed by their probabilities."""

    weigh: Weigh
    length: int  # most tokens of a request
    both = staticmethod(both_margins)  # the verdict on a pair, from the margins in both orders

    def scores(self, requests: Sequence[str], most: int) -> tuple[np.ndarray, list[str]]:
        """The mean score for each request, nan where there is none, and why there would be none. [B] each."""
        found = mean_score(self.weigh(requests, [f"Score: {n}" for n in range(1, most + 1)]))
        return found, [f"the request is longer than judge.length={self.length}"] * len(requests)

    def verdicts(self, requests: Sequence[str]) -> list[float]:
        """How much likelier A is than B for each request, in nats; nan where there is no verdict."""
        logp = self.weigh(requests, ["Verdict: A", "Verdict: B"])
        return (logp[:, 0] - logp[:, 1]).tolist()


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge that can be asked."""

    cfg: Config
    rubric: str
    replies: Written | Weighed

    def scores(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The score of each response, and whether the judge gave none, so that it is `Config.missing`. [B] each.

        Raises InputError for the first that has none, unless `missing` is set.
        """
        pairs = [*zip(prompts, responses, strict=True)]
        requests = [score_request(self.rubric, *pair, self.cfg.most) for pair in pairs]
        found, reasons = self.replies.scores(requests, self.cfg.most)
        absent = np.isnan(found)
        if absent.any():
            self._tell(absent, reasons, pairs)
        return np.array([self.cfg.missing if np.isnan(score) else score for score in found], np.float32), absent

    def _tell(self, absent: np.ndarray, reasons: Sequence[str], pairs: Sequence[tuple[Prompt, str]]) -> None:
        count = f"the judge gave no score for {int(absent.sum())} of {len(absent)} answers"
        if self.cfg.missing is None:
            first = int(np.argmax(absent))
            prompt, response = pairs[first]
            raise InputError(
                f"{count}, such as {short(response)} to {short(prompt_text(prompt))}: {reasons[first]}; give such"
                " answers a score by judge.missing"
            )
        print(f"{count}: they score {self.cfg.missing:g}", flush=True)

    def rank(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[Ranking]:
        """The ranking of the responses to each prompt, from all pairs of them in both orders. Equal texts tie."""
        requests: dict[tuple[int, int, int], str] = {}
        for n, (prompt, texts) in enumerate(zip(prompts, responses, strict=True)):
            for i, j in itertools.permutations(range(len(texts)), 2):
                if texts[i] != texts[j]:
                    requests[n, i, j] = pair_request(self.rubric, prompt, texts[i], texts[j])
        said = dict(zip(requests, self.replies.verdicts([*requests.values()]), strict=True))
        return [_ranking(len(texts), n, said, self.replies.both) for n, texts in enumerate(responses)]


def _ranking(
    count: int, n: int, said: Mapping[tuple[int, int, int], float], both: Callable[[float, float], int | None]
) -> Ranking:
    """The ranking of prompt `n`'s responses from what was said of its pairs in each order, which `both` joins."""
    verdicts = [[0] * count for _ in range(count)]
    pairs = missing = swayed = 0
    for i, j in itertools.combinations(range(count), 2):
        if (n, i, j) in said:
            forward, swapped = said[n, i, j], said[n, j, i]
            verdict = both(forward, swapped)
            pairs += 1
            missing += verdict is None
            swayed += verdict is not None and bool(np.sign(forward) != -np.sign(swapped))
            verdicts[i][j], verdicts[j][i] = verdict or 0, -(verdict or 0)
    return Ranking(None if missing else ranks(verdicts), pairs, missing, swayed)


def load(cfg: Config, layout: parallel.Layout, compute: models.Compute, seed: int) -> Judge | None:
    """The judge of these settings, None where they name none. Raises InputError where it cannot be used."""
    if cfg.rubric is None:
        return None
    try:
        rubric = cfg.rubric.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise InputError(f"judge.rubric={cfg.rubric} cannot be read: {error}") from error
    if not rubric:
        raise InputError(f"judge.rubric={cfg.rubric} is empty: expected a text that says what a good answer is")
    if cfg.replies == "weighed":
        return Judge(cfg, rubric, Weighed(_weigher(cfg, layout, compute), cfg.length))
    return Judge(cfg, rubric, Written(_local(cfg, layout, compute, seed) if cfg.url is None else _remote(cfg)))


def _local(cfg: Config, layout: parallel.Layout, compute: models.Compute, seed: int) -> Ask:
    """Ask a model of a directory. All processes must ask the same."""
    assert cfg.model is not None
    model = models.load(cfg.model, compute=compute, place=layout.sharding)
    tokenizer = models.tokenizer_of(model)
    models.check_length(model.config, cfg.length + cfg.max_new_tokens, "request_and_reply")
    sampled = sampling.Config(
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        eos_id=models.stop_ids(model),
    )
    collect = rollout.collector(model.config, layout, sampled)
    params = {"policy": layout.frozen(compute.freeze(model.params))}
    key, asked = layout.state(named_key(seed, "judge")), itertools.count()

    def ask(texts: Sequence[str]) -> list[str | None]:
        replies: list[str | None] = [None] * len(texts)
        try:
            rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
            prompts, _ = pipeline.every_prompt(rows, tokenizer, length=cfg.length)
        except InputError:  # they are all too long
            return replies
        parts = []
        for _, part in rollout.chunks(prompts, cfg.batch):
            first = layout.state(np.uint32(next(asked) * cfg.batch))
            parts.append(layout.gather(collect(params, layout.rows(part), key, first)))
        episodes = jax.tree.map(lambda *xs: np.concatenate(xs)[: len(prompts.index)], *parts)
        said = rollout.texts(tokenizer, episodes.response_tokens, episodes.response_mask)
        for index, text, ended in zip(prompts.index, said, episodes.ended, strict=True):
            replies[int(index)] = text if ended else None
        return replies

    return ask


def _weigher(cfg: Config, layout: parallel.Layout, compute: models.Compute) -> Weigh:
    """Weigh the replies of a model of a directory. All processes must ask the same."""
    assert cfg.model is not None
    model = models.load(cfg.model, compute=compute, place=layout.sharding)
    tokenizer = models.tokenizer_of(model)
    models.check_length(model.config, cfg.length + _REPLY, "request_and_reply")
    reader = likelihood.Reader(model, layout, cfg.batch)

    def weigh(texts: Sequence[str], replies: Sequence[str]) -> np.ndarray:
        prompts = [[{"role": "user", "content": text}] for text in texts]
        asked, told = tokenizer_lib.render(tokenizer, prompts, [replies] * len(texts))
        short = [n for n, ids in enumerate(asked) if len(ids) <= cfg.length]
        found = reader([likelihood.Request(asked[n].tolist(), ids.tolist()) for n in short for ids in told[n]])
        logp = np.full((len(texts), len(replies)), np.nan)
        logp[short] = np.reshape([one.total for one in found], (len(short), len(replies)))
        return logp

    return weigh


def _remote(cfg: Config) -> Ask:
    """Ask a model behind the OpenAI protocol, `batch` requests at a time."""
    try:
        import httpx2  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"judge.url needs the extra people: pip install -e .[people] ({error})") from error
    if jax.process_count() > 1:
        raise InputError(f"judge.url={cfg.url}: a judge behind a URL is asked by runs of one process alone")
    key = os.environ.get(cfg.key_variable, "")

    name = asyncio.run(_model(cfg, key))

    async def every(texts: Sequence[str]) -> list[str | None]:
        endpoint, free = _endpoint(cfg, key), asyncio.Semaphore(cfg.batch)

        async def one(text: str) -> str | None:
            async with free:
                return await _reply(endpoint, cfg, name, text)

        try:
            return await asyncio.gather(*map(one, texts))
        finally:
            await endpoint.close()

    return lambda texts: asyncio.run(every(texts))


def _endpoint(cfg: Config, key: str) -> Endpoint:
    assert cfg.url is not None
    return Endpoint(cfg.url, key, patience=cfg.timeout)


async def _model(cfg: Config, key: str) -> str:
    """The name of the model that is asked. Raises InputError where nobody answers, or no such model is served."""
    endpoint = _endpoint(cfg, key)
    try:
        names = await endpoint.models()
    except Failure as failure:
        if cfg.name is not None and failure.code in ("refused", "malformed"):
            return cfg.name  # it does not list its models: the first request will tell
        raise InputError(f"judge.url={cfg.url}: {failure}{_hint(cfg, failure)}") from failure
    finally:
        await endpoint.close()
    if cfg.name in names or (cfg.name is None and len(names) == 1):
        return cfg.name or names[0]
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    what = "judge.name: name one" if cfg.name is None else f"judge.name={cfg.name}: there is no such model"
    raise InputError(f"{what}; {cfg.url} has {listed}")


def _hint(cfg: Config, failure: Failure) -> str:
    return f"; is {cfg.key_variable} set?" if failure.status in (401, 403) else ""


async def _reply(endpoint: Endpoint, cfg: Config, name: str, text: str) -> str | None:
    """The reply to one request, None where it was cut or the request is too long; tried again where that may help."""
    asked = Asked(
        model=name,
        messages=[{"role": "user", "content": text}],
        temperature=cfg.temperature,
        max_tokens=cfg.max_new_tokens,
        seed=zlib.crc32(text.encode(errors="surrogatepass")) if cfg.temperature else None,
    )
    for attempt in range(cfg.retries + 1):
        if attempt:
            await asyncio.sleep(PAUSE * min(2.0 ** (attempt - 1), 30.0))
        try:
            pieces = [piece async for piece in endpoint.answer(asked)]
        except Failure as failure:
            if failure.code == "long":
                return None
            if failure.code in ("away", "cut", "slow", "busy") or failure.status >= 500:
                last = failure
                continue
            raise InputError(f"judge.url={cfg.url}: {failure}{_hint(cfg, failure)}") from failure
        return whole("".join(piece.text for piece in pieces)) if pieces and pieces[-1].end == "stop" else None
    raise InputError(f"judge.url={cfg.url}: {last}, after {cfg.retries + 1} attempts") from last
