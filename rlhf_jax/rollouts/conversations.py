"""Conversations that keep their attention cache between turns: a turn reads only the tokens that are new.

    talks = Conversations(model, model.params, sampling.Config(max_new_tokens=256), rows=8)
    talks.ask("anna", prompt, key)  # reads what "anna" has not read yet
    talks.ask("bert", another_prompt, another_key)
    while talks.answering:
        tokens = talks.step()  # one token of each answer, such as {"anna": 17, "bert": 4}

Each conversation has a row of one cache. Its columns hold the tokens that were read, prompts and answers, and a prompt
is read from where it departs from them. There is one program to read a part of a prompt, compiled for each width that
is a power of two, and one to sample the next token of all rows. Both are compiled again when the cache grows, which
doubles its columns, up to the model's context.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Hashable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array

from rlhf_jax import models
from rlhf_jax.devices import parallel
from rlhf_jax.models.cache import Cache
from rlhf_jax.models.transformer import Transformer, bind
from rlhf_jax.rollouts import sampling
from rlhf_jax.types import InputError, Leaf, Params

NARROWEST, WIDEST = 16, 512  # columns in which a prompt is read, unless the cache ends before
SMALLEST = 64  # columns of a cache, unless the model's context is shorter


@dataclasses.dataclass
class _Row:
    """One row of the cache, as the host knows it."""

    read: list[int] = dataclasses.field(default_factory=list)  # the tokens in its first columns
    sampled: int | None = None  # the number of tokens of its answer that `step` has returned; None between answers
    turn: int = 0  # the number of answers that were begun


class Conversations:
    """Up to `rows` conversations with one model, of which any number answer at the same time.

    When there is no row left, a new conversation takes that of the one that was asked the longest time ago: what it has
    read is then read again if it comes back. An answer depends on its own prompt and key alone, and is the one that
    `sampling.generate` gives.
    """

    def __init__(
        self,
        model: sampling.HasConfig,
        params: Params,
        cfg: sampling.Config,
        rows: int = 1,
        layout: parallel.Mesh | None = None,
    ):
        """`params` are on a device, or placed by `layout`, over whose mesh the cache is then sharded too."""
        self._params, self._cfg, self._layout = params, cfg, layout
        self._program = _Program(model.config, dataclasses.replace(cfg, max_new_tokens=1, eos_id=None), layout)
        self._rows = [_Row() for _ in range(rows)]
        self._row_of: dict[Hashable, int] = {}  # of each conversation; the one that was asked last is at the end
        self.prefilled = 0  # tokens of prompts that were read so far
        self._clear()

    def _clear(self) -> None:
        """Forget all conversations."""
        self._row_of.clear()
        self._rows = [_Row() for _ in self._rows]
        state = _State(
            cache=Cache.by_row(self._program.config, len(self._rows), 0),
            token=jnp.zeros(len(self._rows), jnp.int32),
            keys=jax.random.split(jax.random.key(0), len(self._rows)),  # of no answer: `ask` replaces them
        )
        self._state = state if self._layout is None else self._layout.state(state)

    @property
    def answering(self) -> list[Hashable]:
        """The conversations whose answer has not ended."""
        return [name for name, row in self._row_of.items() if self._rows[row].sampled is not None]

    @property
    def columns(self) -> int:
        """The number of tokens that each row has room for at present."""
        return self._state.cache.key.shape[3]

    def ask(self, name: Hashable, prompt: Sequence[int], key: Array) -> None:
        """Begin an answer to this prompt, which is the whole dialogue; an answer that has not ended is given up.

        `key` is that of a row in `sampling.generate`. Raises InputError when the model's context is too short, or when
        all rows are answering others.
        """
        if not prompt:
            raise InputError("the prompt has no tokens: expected at least one")
        end = len(prompt) + self._cfg.max_new_tokens
        sampling.check_length(len(prompt), self._cfg.max_new_tokens, self._program.config.max_length)
        number = self._take_row(name)
        row = self._rows[number]
        # The last token is read again at least: what it yields decides the first token of the answer.
        del row.read[min(_common_prefix(row.read, prompt), len(prompt) - 1) :]
        row.sampled = None
        with self._clear_on_error():
            if end > self.columns:
                size = min(max(_power_of_two(end), SMALLEST), self._program.config.max_length)
                self._state = self._state.replace(cache=_grow(self._program, size, self._state.cache))
            while len(row.read) < len(prompt):
                self._read_part(number, prompt[len(row.read) :], key)
        row.sampled, row.turn = 0, row.turn + 1

    def _take_row(self, name: Hashable) -> int:
        """The number of the row of this conversation, or of one for it."""
        if name in self._row_of:
            number = self._row_of.pop(name)
        elif free := set(range(len(self._rows))) - set(self._row_of.values()):
            number = min(free)
        else:
            idle = [other for other in self._row_of if other not in self.answering]
            if not idle:
                raise InputError(f"all {len(self._rows)} rows are answering: wait until one has, or use more rows")
            number = self._row_of.pop(idle[0])
        self._row_of[name] = number
        return number

    def _read_part(self, number: int, tokens: Sequence[int], key: Array) -> None:
        """Read the first of these tokens into a row, behind what it has read, and sample the one after them."""
        row = self._rows[number]
        width = min(max(_power_of_two(len(tokens)), NARROWEST), WIDEST)
        while len(row.read) + width > self.columns:  # at the end of the context
            width //= 2
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(tokens)] = tokens = tokens[:width]
        part = _Part(
            tokens=padded,
            count=np.int32(len(tokens)),
            row=np.int32(number),
            start=np.int32(len(row.read)),
            key=key,
        )
        self._state = _read(self._program, self._params, self._state, part)
        self.prefilled += len(tokens)
        row.read.extend(tokens)

    def step(self) -> dict[Hashable, int]:
        """The next token of each answer, the one that ends it included.

        The device goes on with the tokens after these before the host has them.
        """
        answering = {name: self._rows[self._row_of[name]] for name in self.answering}
        given = {name: (row.sampled or 0) + 1 for name, row in answering.items()}
        sampled, goes_on = self._state.token, any(n < self._cfg.max_new_tokens for n in given.values())
        if goes_on:
            columns = np.array([len(row.read) for row in self._rows], np.int32)
            numbers = np.array([(row.sampled or 0) + 1 for row in self._rows], np.int32)
            cache = self._state.cache.replace(column=columns)
            with self._clear_on_error():
                token, cache = _next(self._program, self._params, cache, sampled, self._state.keys, numbers)
                self._state = self._state.replace(token=token, cache=cache)
        host = np.asarray(sampled).tolist()
        tokens = {name: host[self._row_of[name]] for name in answering}
        for name, row in answering.items():
            if goes_on:  # with the token of every row, also of one whose answer ends here
                row.read.append(tokens[name])
            ended = tokens[name] in self._cfg.stops or given[name] == self._cfg.max_new_tokens
            row.sampled = None if ended else given[name]
        return tokens

    def stream(self, name: Hashable, prompt: Sequence[int], key: Array) -> Iterator[int]:
        """The tokens that `sampling.generate` samples after one prompt with this key, each as soon as it is there.

        Where others answer at the same time, use `ask` and `step`.
        """
        self.ask(name, prompt, jax.random.fold_in(key, 0))
        row = self._rows[self._row_of[name]]
        turn = row.turn
        try:
            while row.turn == turn and row.sampled is not None:
                yield self.step()[name]
        finally:
            if row.turn == turn:  # else the next turn has begun, and this is closed late
                row.sampled = None

    def stop(self, name: Hashable) -> None:
        """End the answer of a conversation, if it has not ended; what was read is kept for its next turn."""
        if name in self._row_of:
            self._rows[self._row_of[name]].sampled = None

    def forget(self, name: Hashable) -> None:
        """End a conversation, and free its row."""
        if name in self._row_of:
            self.stop(name)
            self._rows[self._row_of.pop(name)] = _Row()

    @contextlib.contextmanager
    def _clear_on_error(self) -> Iterator[None]:
        """Forget everything if the block fails: the cache that it was to update may be gone."""
        try:
            yield
        except BaseException:  # control-C too
            self._clear()
            raise


def _common_prefix(read: Sequence[int], prompt: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    return next((n for n, (a, b) in enumerate(zip(read, prompt, strict=False)) if a != b), min(len(read), len(prompt)))


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


# What is compiled -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Program:
    """What the programs are compiled for."""

    config: models.Config
    cfg: sampling.Config  # how a token is drawn
    layout: parallel.Mesh | None

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        """The context in which a program is traced, for the mesh if there is one."""
        with contextlib.nullcontext() if self.layout is None else self.layout.traced():
            yield

    def append(self, params: Params, tokens: Array, count: Array, cache: Cache) -> tuple[Array, Cache]:
        return bind(Transformer(self.config), Transformer.append)(params, tokens, count, cache)


class _State(struct.PyTreeNode):
    """The device's part of all rows."""

    cache: Cache
    token: Leaf  # [B] int32, the last one sampled, which is not in the cache yet
    keys: Leaf  # [B], of the answers


class _Part(struct.PyTreeNode):
    """A part of one prompt."""

    tokens: Leaf  # [1, T] int32, padded on the right
    count: Leaf  # [] int32, how many are real
    row: Leaf  # [] int32
    start: Leaf  # [] int32, the column of the first one
    key: Leaf  # [] of the answer


def _sharded(cache: Cache) -> Cache:
    """The cache, sharded over a mesh by rows and heads."""
    shard = lambda x: parallel.constrain(x, None, parallel.ROWS, "tensor")
    return cache.replace(key=shard(cache.key), value=shard(cache.value))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _grow(program: _Program, columns: int, cache: Cache) -> Cache:
    """The cache with room for so many columns."""
    with program.traced():
        larger = Cache.by_row(program.config, cache.key.shape[1], columns)
        copy = lambda new, old: jax.lax.dynamic_update_slice(new, old, (0,) * 5)
        return _sharded(larger.replace(key=copy(larger.key, cache.key), value=copy(larger.value, cache.value)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(program: _Program, params: Params, state: _State, part: _Part) -> _State:
    """The state with a part of a prompt in its row, and the token sampled after it."""
    with program.traced():
        cache, row = state.cache, part.row
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1)
        alone = cache.replace(key=take(cache.key), value=take(cache.value), column=part.start[None])
        logits, alone = program.append(params, part.tokens, part.count[None], alone)
        token, _ = sampling.choose(logits, sampling.noise(part.key[None], 0), program.cfg)
        put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, axis=1)
        cache = _sharded(cache.replace(key=put(cache.key, alone.key), value=put(cache.value, alone.value)))
        return _State(cache=cache, token=state.token.at[row].set(token[0]), keys=state.keys.at[row].set(part.key))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _next(
    program: _Program, params: Params, cache: Cache, token: Array, keys: Array, numbers: Array
) -> tuple[Array, Cache]:
    """The token of each row with its number in the answer, and the cache with the one before it."""
    with program.traced():
        logits, cache = program.append(params, token[:, None], jnp.ones_like(token), cache)
        return sampling.choose(logits, sampling.noise(keys, numbers), program.cfg)[0], _sharded(cache)
