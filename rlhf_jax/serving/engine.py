"""One model that answers any number of requests, as many at a time as it has rows.

A thread of its own drives the device. Between two steps it takes in what was asked meanwhile, so requests that arrive
together are answered in one batch; those for which there is no row wait in order. An answer takes the row of the
conversation that its prompt continues, and reads only what is new to it; otherwise a free one, or the one that was used
the longest time ago, and copies what any other row has read of the same prompt.
"""

import collections
import contextlib
import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Literal

import jax

from rlhf_jax import models
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import sampling
from rlhf_jax.rollouts.conversations import Conversations, Scored, Token
from rlhf_jax.serving.text import Piece, Text
from rlhf_jax.settings import SEEDS
from rlhf_jax.types import named_key

Finish = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A request to a model: `n` answers to each prompt."""

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int  # of an answer; with 0 prompts are only read
    n: int = 1
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0  # answer i is row i of `sampling.generate` with `key(seed)`
    stop: tuple[str, ...] = ()
    scored: Scored = "nothing"
    strip: bool = False  # leave out white space around an answer
    stream: bool = True  # tell an answer part by part; False: as a whole

    @property
    def count(self) -> int:
        """The number of answers; those to one prompt follow each other."""
        return len(self.prompts) * self.n


def key(seed: int) -> jax.Array:
    """The key of a request with this seed, any whole number of up to 64 bits."""
    low, high = seed % SEEDS, seed // SEEDS % SEEDS
    return named_key(low, f"serving/{high}" if high else "serving")


@dataclasses.dataclass(frozen=True)
class Begun:
    """An answer has begun: its prompt is read."""

    index: int  # of the answer
    cached: int  # tokens of the prompt that were not read again
    prompt: tuple[Token, ...] = ()  # the tokens of a scored prompt, from its second on


@dataclasses.dataclass(frozen=True)
class Said:
    """The next part of an answer."""

    index: int
    piece: Piece
    count: int  # tokens that were sampled so far
    finish: Finish | None = None  # why the answer ends with this part


@dataclasses.dataclass(frozen=True)
class Failed:
    """A request that will not be answered any further."""

    error: Exception


Event = Begun | Said | Failed
Deliver = Callable[[Event], None]


class Ticket:
    """A request that was handed in."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        """Give up what is not answered yet, and free the rows; nothing may be delivered any more."""
        self.cancelled = True


@dataclasses.dataclass
class _Answer:
    index: int
    prompt: Sequence[int]
    request: Request
    deliver: Deliver
    ticket: Ticket
    text: Text
    count: int = 0  # tokens that were sampled
    untold: list[Piece] = dataclasses.field(default_factory=list)  # what was said since it was last told


class Engine:
    """Answers requests with one model, in a thread that runs from `start` to `close`."""

    def __init__(self, model: models.Model, rows: int, layout: parallel.Mesh | None = None):
        """`model` has its parameters on a device, or placed by `layout`."""
        self.tokenizer = models.tokenizer_of(model)
        self.context = model.config.max_length
        self.vocabulary = tokenizers.token_bytes(self.tokenizer)  # what each token writes
        self.vocabulary += [b""] * (model.config.vocab_size - len(self.vocabulary))
        added = self.tokenizer.added_tokens_decoder.items()
        self.special = {i for i, token in added if token.special}  # which write nothing in an answer
        self.steps = 0  # of all rows together, so far
        self._stops = models.stop_ids(model)
        self._talks = Conversations(model, model.params, None, rows, layout)
        self._inbox: queue.SimpleQueue[_Answer | None] = queue.SimpleQueue()
        self._waiting: collections.deque[_Answer] = collections.deque()
        self._running: dict[Hashable, _Answer] = {}
        self._rendering = threading.Lock()  # a tokenizer is not made for several threads
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._started = False

    @property
    def prefilled(self) -> int:
        """The number of tokens of prompts that were read so far."""
        return self._talks.prefilled

    def render(self, prompt: tokenizers.Prompt) -> tuple[int, ...]:
        """The tokens of a prompt; for any thread. Raises InputError for one that the chat template refuses."""
        with self._rendering:
            return tuple(tokenizers.render_prompt(self.tokenizer, prompt))

    def warm_up(self, columns: int) -> Iterator[int]:
        """Compile the programs for so many columns of cache, as far as the context goes; yields the widths in which
        prompts are read as each is ready. Before `start`."""
        columns, rows = min(columns, self.context), range(self._talks.free)
        for width in itertools.takewhile(lambda width: width < columns, (2**n for n in range(4, 10))):
            self._talks.ask(0, [0] * width, key(0), sampling.Config(max_new_tokens=columns - width))
            yield width
        prompt = [0] * min(40, columns // 2)
        for row in rows:  # the steps of any number of answers, and that a row copies what another one has read
            self._talks.ask(row, prompt, key(0), sampling.Config(max_new_tokens=columns - len(prompt)))
            if (row + 1).bit_count() == 1 or row == rows[-1]:
                self._talks.step()
        for row in rows:
            self._talks.forget(row)
        self._talks.prefilled = 0

    def start(self) -> None:
        """Begin to answer."""
        self._started = True
        self._thread.start()

    def close(self) -> None:
        """End; what is not answered yet fails."""
        self._inbox.put(None)
        if self._started:
            self._thread.join()

    def submit(self, request: Request, deliver: Deliver) -> Ticket:
        """Hand in a request, from any thread; `deliver` is called in the engine's own, and must not wait."""
        ticket = Ticket()
        for index in range(request.count):
            prompt = request.prompts[index // request.n]
            text = Text(request.stop, request.strip)
            self._inbox.put(_Answer(index, prompt, request, deliver, ticket, text))
        return ticket

    # in the thread

    def _run(self) -> None:
        while self._take_in():
            try:
                self._begin()
                self._step()
            except Exception as error:  # the next request may fare better
                self._fail([*self._running], error)
        for answer in (*self._running.values(), *self._waiting):
            _deliver(answer, Failed(RuntimeError("the server is closing")))

    def _take_in(self) -> bool:
        """Take in what was asked meanwhile, and wait if there is nothing to do; False at the end."""
        idle = not self._waiting and not self._running
        while True:
            try:
                answer = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if answer is None:
                return False
            self._waiting.append(answer)
            idle = False

    def _begin(self) -> None:
        """Begin as many of the answers that wait as there are rows."""
        for name in [name for name, answer in self._running.items() if answer.ticket.cancelled]:
            self._end(name)
        while self._waiting and self._talks.free:
            answer = self._waiting.popleft()
            if not answer.ticket.cancelled:
                with self._failing(answer):
                    self._ask(answer)

    def _ask(self, answer: _Answer) -> None:
        request, before = answer.request, self._talks.prefilled
        cfg = sampling.Config(
            max_new_tokens=max(request.max_tokens, 1),
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            eos_id=self._stops,
        )
        name = self._talks.continued(answer.prompt)
        name = object() if name is None else name
        row_key = jax.random.fold_in(key(request.seed), answer.index)
        prompt = self._talks.ask(name, answer.prompt, row_key, cfg, request.scored)
        self._running[name] = answer
        cached = len(answer.prompt) - (self._talks.prefilled - before)
        _deliver(answer, Begun(answer.index, cached, tuple(prompt)))
        if not request.max_tokens:
            _deliver(answer, Said(answer.index, Piece(), 0, "length"))
            self._end(name)

    def _step(self) -> None:
        """Sample a token of each answer that runs, and deliver it."""
        if not self._running:
            return
        tokens = self._talks.step()
        self.steps += 1
        for name, token in tokens.items():
            answer = self._running[name]
            finish = self._say(answer, token)
            if finish:
                self._end(name)
            if finish or (answer.request.stream and answer.untold[-1].text):
                _deliver(answer, Said(answer.index, Piece.joined(answer.untold), answer.count, finish))
                answer.untold = []

    def _say(self, answer: _Answer, token: Token) -> Finish | None:
        """Add a token to an answer; why it ends with this one, if it does."""
        answer.count += 1
        if token.id in self._stops:
            answer.untold.append(answer.text.end())
            return "stop"
        written = b"" if token.id in self.special else self.vocabulary[token.id]
        answer.untold.append(answer.text.add(token, written))
        if answer.text.stopped:
            return "stop"
        if answer.count < answer.request.max_tokens:
            return None
        answer.untold.append(answer.text.end())
        return "length"

    def _end(self, name: Hashable) -> None:
        """Free the row of an answer; what it has read is kept for the next turn."""
        self._talks.stop(name)
        del self._running[name]

    @contextlib.contextmanager
    def _failing(self, answer: _Answer) -> Iterator[None]:
        """Deliver what goes wrong, also to the other answers if the conversations were forgotten."""
        try:
            yield
        except Exception as error:
            _deliver(answer, Failed(error))
            self._fail([*self._running.keys() - set(self._talks.answering)], error)

    def _fail(self, names: Sequence[Hashable], error: Exception) -> None:
        """End these answers, which are lost."""
        for name in names:
            answer = self._running[name]
            self._end(name)
            _deliver(answer, Failed(error))


def _deliver(answer: _Answer, event: Event) -> None:
    """Hand an event over, unless nobody waits for it any more."""
    if answer.ticket.cancelled:
        return
    try:
        answer.deliver(event)
    except RuntimeError:  # whoever asked has ended
        answer.ticket.cancel()
