"""Conversations that keep their attention cache between turns: a turn reads only the tokens that are new.

    talks = Conversations(model, model.params, sampling.Config(max_new_tokens=256), rows=8)
    talks.ask("anna", prompt, key)  # reads what "anna" has not read yet
    talks.ask("bert", another_prompt, another_key)
    while talks.answering:
        tokens = talks.step()  # one token of each answer, such as {"anna": Token(17), "bert": Token(4)}

Each conversation has a row of one cache. Its columns hold the tokens that were read, prompts and answers, and a prompt
is read from where it departs from them; what another row has read of it is copied. There is one program to read a part
of a prompt, compiled for each width that is a power of two, and one to sample the next token of all rows. Both are
compiled again when the cache grows, which doubles its columns, up to the model's context. They are compiled for one way
to draw tokens, or, where each answer has settings of its own, for any.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Literal, NamedTuple

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
_GREEDY = sampling.Config(max_new_tokens=1, temperature=0.0)  # of a row that does not answer
LIKELIEST = 20  # tokens whose log-probabilities are told beside that of the one that was drawn

Scored = Literal["nothing", "answer", "prompt"]  # the tokens whose log-probabilities are told; prompt: all


class Token(NamedTuple):
    """A token of an answer, or of a prompt that is scored."""

    id: int
    logp: float | None = None  # before temperature and truncation; None if it was not asked for
    likeliest: tuple[tuple[int, float], ...] = ()  # in its place: ids and log-probabilities, the likeliest first


@dataclasses.dataclass
class _Row:
    """One row of the cache, as the host knows it."""

    cfg: sampling.Config  # of its answer
    scored: Scored = "nothing"
    read: list[int] = dataclasses.field(default_factory=list)  # the tokens in its first columns
    asked: int = 0  # number of tokens of its last prompt
    sampled: int | None = None  # the number of tokens of its answer that `step` has returned; None between answers
    turn: int = 0  # the number of answers that were begun


class Conversations:
    """Up to `rows` conversations with one model, of which any number answer at the same time.

    When there is no row left, a new conversation takes that of the one that was asked the longest time ago: what it has
    read is then read again if it comes back. An answer depends on its own prompt, key and settings alone, and is the
    one that `sampling.generate` gives.
    """

    def __init__(
        self,
        model: sampling.HasConfig,
        params: Params,
        cfg: sampling.Config | None,
        rows: int = 1,
        layout: parallel.Mesh | None = None,
    ):
        """`params` are on a device, or placed by `layout`, over whose mesh the cache is then sharded too.

        `cfg` is that of all answers; None: `ask` is told that of each, and whether tokens are scored.
        """
        self._params, self._cfg, self._layout = params, cfg, layout
        drawn = None if cfg is None else dataclasses.replace(cfg, max_new_tokens=1, eos_id=None)
        self._program = _Program(model.config, drawn, layout)
        self._rows = [_Row(_GREEDY) for _ in range(rows)]
        self._row_of: dict[Hashable, int] = {}  # of each conversation; the one that was asked last is at the end
        self.prefilled = 0  # tokens of prompts that were read so far
        self._clear()

    def _clear(self) -> None:
        """Forget all conversations."""
        self._row_of.clear()
        self._rows = [_Row(_GREEDY) for _ in self._rows]
        state = _State(
            cache=Cache.by_row(self._program.config, len(self._rows), 0),
            token=jnp.zeros(len(self._rows), jnp.int32),
            scores=_no_scores(len(self._rows), self._program.config) if self._cfg is None else None,
            keys=jax.random.split(jax.random.key(0), len(self._rows)),  # of no answer: `ask` replaces them
        )
        self._state = state if self._layout is None else self._layout.state(state)
        self._draw: _Draw | None = None

    @property
    def answering(self) -> list[Hashable]:
        """The conversations whose answer has not ended."""
        return [name for name, row in self._row_of.items() if self._rows[row].sampled is not None]

    @property
    def columns(self) -> int:
        """The number of tokens that each row has room for at present."""
        return self._state.cache.key.shape[3]

    @property
    def free(self) -> int:
        """The number of rows that are not answering."""
        return sum(row.sampled is None for row in self._rows)

    def continued(self, prompt: Sequence[int]) -> Hashable | None:
        """The conversation, not answering, whose last prompt this one begins with; of several the one that read most
        of it, and None if there is none."""
        best, longest = None, 0
        for name, number in self._row_of.items():
            row = self._rows[number]
            if row.sampled is None and (common := _common_prefix(row.read, prompt)) >= max(row.asked, longest, 1):
                best, longest = name, common
        return best

    def ask(
        self,
        name: Hashable,
        prompt: Sequence[int],
        key: Array,
        cfg: sampling.Config | None = None,
        scored: Scored = "nothing",
    ) -> list[Token]:
        """Begin an answer to this prompt, which is the whole dialogue; an answer that has not ended is given up.

        `key` is that of a row in `sampling.generate`, `cfg` the settings of this answer, where each has its own. If the
        prompt is `scored`, it is read from its beginning, and returned without its first token; otherwise nothing is.
        Raises InputError when the model's context is too short, or when all rows are answering others.
        """
        if not prompt:
            raise InputError("the prompt has no tokens: expected at least one")
        if self._cfg is not None and (cfg or scored != "nothing"):
            raise ValueError("these conversations have one configuration for all answers, and no scores")
        cfg = cfg or self._cfg
        if cfg is None:
            raise ValueError("in these conversations each answer has settings of its own: give cfg")
        end = len(prompt) + cfg.max_new_tokens
        sampling.check_length(len(prompt), cfg.max_new_tokens, self._program.config.max_length)
        number = self._take_row(name)
        row = self._rows[number]
        row.sampled, row.cfg, row.scored = None, cfg, scored
        told: list[Token] = []
        with self._clear_on_error():
            if end > self.columns:
                size = min(max(_power_of_two(end), SMALLEST), self._program.config.max_length)
                self._state = self._state.replace(cache=_grow(self._program, size, self._state.cache))
            # The last token is read again at least: what it yields decides the first token of the answer.
            last = 0 if scored == "prompt" else len(prompt) - 1
            self._keep_prefix(number, prompt[:last])
            while len(row.read) < len(prompt):
                told += self._read_part(number, prompt[len(row.read) :], key)
        row.sampled, row.turn, row.asked = 0, row.turn + 1, len(prompt)
        if self._cfg is None:
            rows = [_Row(_GREEDY) if row.sampled is None else row for row in self._rows]  # idle ones cost nothing
            self._draw = jax.tree.map(jnp.asarray, _Draw.of(rows))
        return told

    def _keep_prefix(self, number: int, prompt: Sequence[int]) -> None:
        """Keep what this row has read of the prompt, or copy what another has, if that saves the read of a part."""
        row = self._rows[number]
        common = [_common_prefix(other.read, prompt) for other in self._rows]
        source = int(np.argmax(common))
        if common[source] >= common[number] + NARROWEST:
            cache = _copy(self._program, self._state.cache, np.int32(source), np.int32(number))
            self._state = self._state.replace(cache=cache)
            row.read = self._rows[source].read[: common[source]]
        else:
            del row.read[common[number] :]

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

    def _read_part(self, number: int, tokens: Sequence[int], key: Array) -> list[Token]:
        """Read the first of these tokens into a row, behind what it has read, and sample the one after them.

        Where the prompt is scored, the tokens behind each of those that were read, up to the last of the prompt.
        """
        row = self._rows[number]
        width = min(max(_power_of_two(len(tokens)), NARROWEST), WIDEST)
        while len(row.read) + width > self.columns:  # at the end of the context
            width //= 2
        padded, following = np.zeros((1, width), np.int32), np.zeros(width, np.int32)
        behind = tokens[1 : width + 1]
        following[: len(behind)] = behind
        padded[0, : len(tokens)] = tokens = tokens[:width]
        part = _Part(
            tokens=padded,
            following=following if row.scored == "prompt" else None,
            count=np.int32(len(tokens)),
            row=np.int32(number),
            start=np.int32(len(row.read)),
            key=key,
            draw=_Draw.of([row]) if self._cfg is None else None,
        )
        self._state, scores = _read(self._program, self._params, self._state, part)
        self.prefilled += len(tokens)
        row.read.extend(tokens)
        return [] if scores is None else scores.tokens(behind)

    def step(self) -> dict[Hashable, Token]:
        """The next token of each answer, the one that ends it included.

        The device goes on with the tokens after these before the host has them.
        """
        answering = {name: self._rows[self._row_of[name]] for name in self.answering}
        given = {name: (row.sampled or 0) + 1 for name, row in answering.items()}
        sampled, scores = self._state.token, self._state.scores
        goes_on = any(given[name] < row.cfg.max_new_tokens for name, row in answering.items())
        if goes_on:
            some = self._some()
            answers = _Answers(
                token=sampled,
                scores=scores,
                keys=self._state.keys,
                numbers=np.array([(row.sampled or 0) + 1 for row in self._rows], np.int32),
                draw=self._draw,
            )
            cache = self._state.cache.replace(column=np.array([len(row.read) for row in self._rows], np.int32))
            with self._clear_on_error():
                token, new_scores, cache = _next(self._program, self._params, cache, answers, some)
                self._state = self._state.replace(token=token, scores=new_scores, cache=cache)
        host = np.asarray(sampled).tolist()
        if scores is not None and any(row.scored != "nothing" for row in answering.values()):
            all_tokens = scores.tokens(host)
        else:
            all_tokens = [Token(id) for id in host]
        tokens = {name: all_tokens[self._row_of[name]] for name in answering}
        for name, row in answering.items():
            if goes_on:  # with the token of every row, also of one whose answer ends here
                row.read.append(tokens[name].id)
            ended = tokens[name].id in row.cfg.stops or given[name] == row.cfg.max_new_tokens
            row.sampled = None if ended else given[name]
        return tokens

    def _some(self) -> np.ndarray | None:
        """The rows that are computed, where at most a quarter of them answer: as many as a power of two; None is all.

        Copying more out of the cache takes as long as computing all. On a mesh each device has rows of its own.
        """
        count = _power_of_two(len(self._rows) - self.free)
        if self._layout is not None or 4 * count > len(self._rows):
            return None
        order = sorted(range(len(self._rows)), key=lambda number: self._rows[number].sampled is None)
        for number in order[:count]:
            del self._rows[number].read[self.columns - 1 :]  # of one that does not answer: it is written behind that
        return np.array(order[:count], np.int32)

    def stream(self, name: Hashable, prompt: Sequence[int], key: Array) -> Iterator[int]:
        """The tokens that `sampling.generate` samples after one prompt with this key, each as soon as it is there.

        Where others answer at the same time, use `ask` and `step`.
        """
        self.ask(name, prompt, jax.random.fold_in(key, 0))
        row = self._rows[self._row_of[name]]
        turn = row.turn
        try:
            while row.turn == turn and row.sampled is not None:
                yield self.step()[name].id
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
            self._rows[self._row_of.pop(name)] = _Row(_GREEDY)

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
    """The settings that programs are compiled for."""

    config: models.Config
    cfg: sampling.Config | None  # how tokens are drawn; None: as `_Draw` says
    layout: parallel.Mesh | None

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        """The context in which a program is traced, for the mesh if there is one."""
        with contextlib.nullcontext() if self.layout is None else self.layout.traced():
            yield

    def append(self, params: Params, tokens: Array, count: Array, cache: Cache) -> tuple[Array, Cache]:
        return bind(Transformer(self.config), Transformer.append)(params, tokens, count, cache)

    def append_scored(self, params: Params, part: "_Part", cache: Cache) -> tuple[Array, Cache, "_Scores"]:
        """The results of `append`, and the scores of the next tokens; logits exist for a few columns at a time."""
        module = Transformer(self.config)
        hidden, cache = bind(module, Transformer.append_hidden)(params, part.tokens, part.count[None], cache)
        unembed = bind(module, Transformer.unembed)
        read = lambda column: _score(unembed(params, column[0][None, None])[0], column[1][None])
        scores = jax.lax.map(read, (hidden[0], part.following), batch_size=64)
        logits = unembed(params, jax.lax.dynamic_slice_in_dim(hidden, part.count - 1, 1, axis=1))[:, 0]
        return logits, cache, jax.tree.map(lambda x: x[:, 0], scores)


class _Scores(struct.PyTreeNode):
    """Log-probabilities of tokens, before temperature and truncation, and those of the likeliest in their place."""

    logp: Leaf  # [B] float32
    likeliest: Leaf  # [B, n] int32
    likeliest_logp: Leaf  # [B, n] float32

    def tokens(self, ids: Sequence[int]) -> list[Token]:
        """These tokens, the first ones of all, on the host."""
        logp, likeliest, likeliest_logp = (np.asarray(x).tolist() for x in jax.tree.leaves(self))
        rows = zip(ids, logp, likeliest, likeliest_logp, strict=False)
        return [Token(id, own, tuple(zip(others, values, strict=True))) for id, own, others, values in rows]


def _score(logits: Array, token: Array) -> _Scores:
    logp = jax.nn.log_softmax(logits)
    values, likeliest = jax.lax.top_k(logp, min(LIKELIEST, logp.shape[-1]))
    own = jnp.take_along_axis(logp, token[:, None], axis=1)[:, 0]
    return _Scores(logp=own, likeliest=likeliest, likeliest_logp=values)


def _no_scores(rows: int, config: models.Config) -> _Scores:
    shape = rows, min(LIKELIEST, config.vocab_size)
    return _Scores(logp=jnp.zeros(rows), likeliest=jnp.zeros(shape, jnp.int32), likeliest_logp=jnp.zeros(shape))


class _Draw(struct.PyTreeNode):
    """How the next token of each row is drawn, and whether it is scored."""

    rows: sampling.ByRow
    scored: Leaf  # [B] bool

    @classmethod
    def of(cls, rows: Sequence[_Row]) -> "_Draw":
        return cls(sampling.ByRow.of([row.cfg for row in rows]), np.array([row.scored != "nothing" for row in rows]))


def _drawn(
    program: _Program, draw: _Draw | None, logits: Array, keys: Array, numbers: Array | int
) -> tuple[Array, _Scores | None]:
    """The tokens with these numbers in their answers, and their scores, where any row may ask for them."""
    uniform = sampling.noise(keys, numbers)
    if draw is None:
        assert program.cfg is not None
        return sampling.choose(logits, uniform, program.cfg)[0], None
    token = sampling.choose_by_row(logits, uniform, draw.rows)
    score = lambda: _score(logits, token)
    return token, jax.lax.cond(jnp.any(draw.scored), score, lambda: _no_scores(len(token), program.config))


class _State(struct.PyTreeNode):
    """The device's part of all rows."""

    cache: Cache
    token: Leaf  # [B] int32, the last one sampled, which is not in the cache yet
    scores: _Scores | None  # of these
    keys: Leaf  # [B], of the answers


class _Answers(struct.PyTreeNode):
    """The inputs that decide the next token of each row, beside the cache."""

    token: Leaf  # [B] int32, the last one
    scores: _Scores | None  # of these
    keys: Leaf  # [B]
    numbers: Leaf  # [B] int32, of the next token in its answer
    draw: _Draw | None


class _Part(struct.PyTreeNode):
    """A part of one prompt."""

    tokens: Leaf  # [1, T] int32, padded on the right
    following: Leaf  # [T] int32, the token behind each, to be scored; None to score none
    count: Leaf  # [] int32, how many are real
    row: Leaf  # [] int32
    start: Leaf  # [] int32, the column of the first one
    key: Leaf  # [] of the answer
    draw: _Draw | None  # of one row


def _sharded(cache: Cache) -> Cache:
    """The cache, sharded over a mesh by rows and heads."""
    return _map(lambda x: parallel.constrain(x, None, parallel.ROWS, "tensor"), cache)


def _map(change: Callable[..., Array], cache: Cache, *others: Cache) -> Cache:
    """The cache with each array of keys and values, [L, B, ..], changed; with those of others as further arguments."""
    key, value = jax.tree.map(change, *((x.key, x.value) for x in (cache, *others)))
    return cache.replace(key=key, value=value)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _grow(program: _Program, columns: int, cache: Cache) -> Cache:
    """The cache with room for so many columns."""
    with program.traced():
        larger = Cache.by_row(program.config, cache.key.shape[1], columns)
        return _sharded(_map(lambda new, old: jax.lax.dynamic_update_slice(new, old, (0,) * 5), larger, cache))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(program: _Program, params: Params, state: _State, part: _Part) -> tuple[_State, _Scores | None]:
    """The state with a part of a prompt in its row, and the token sampled after it; and the scores of the part."""
    with program.traced():
        cache, row = state.cache, part.row
        alone = _map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1), cache)
        alone = alone.replace(column=part.start[None])
        scores = None
        if part.following is None:
            logits, alone = program.append(params, part.tokens, part.count[None], alone)
        else:
            logits, alone, scores = program.append_scored(params, part, alone)
        token, token_scores = _drawn(program, part.draw, logits, part.key[None], 0)
        put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, axis=1)
        state = _State(
            cache=_sharded(_map(put, cache, alone)),
            token=state.token.at[row].set(token[0]),
            scores=jax.tree.map(lambda x, new: x.at[row].set(new[0]), state.scores, token_scores),
            keys=state.keys.at[row].set(part.key),
        )
        return state, scores


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _copy(program: _Program, cache: Cache, source: Array, target: Array) -> Cache:
    """The cache with the columns of one row in another."""
    with program.traced():

        def copy(x: Array) -> Array:
            row = jax.lax.dynamic_slice_in_dim(x, source, 1, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(x, row, target, axis=1)

        return _sharded(_map(copy, cache))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _next(
    program: _Program, params: Params, cache: Cache, answers: _Answers, some: Array | None
) -> tuple[Array, _Scores | None, Cache]:
    """The next token of each row, or of `some`, its scores, and the cache with the one before it."""
    with program.traced():
        if some is None:
            logits, cache = program.append(params, answers.token[:, None], jnp.ones_like(answers.token), cache)
            token, scores = _drawn(program, answers.draw, logits, answers.keys, answers.numbers)
            return token, scores, _sharded(cache)
        mine = jax.tree.map(lambda x: x[some], answers)
        columns = cache.column[some]
        alone = _map(lambda x: _rows_of(x, some), cache).replace(column=columns)
        logits, alone = program.append(params, mine.token[:, None], jnp.ones_like(mine.token), alone)
        drawn = _drawn(program, mine.draw, logits, mine.keys, mine.numbers)
        put = lambda old, new: old.at[some].set(new)
        token, scores = jax.tree.map(put, (answers.token, answers.scores), drawn)
        return token, scores, _map(lambda x, rows: _put_column(x, rows, some, columns), cache, alone)


def _rows_of(x: Array, some: Array) -> Array:
    """These rows of an array of a cache, each copied as a whole."""
    return jnp.concatenate([jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1) for row in some], axis=1)


def _put_column(x: Array, rows: Array, some: Array, columns: Array) -> Array:
    """An array of a cache in which row some[n] has in column columns[n] what row n of `rows` has there."""
    for n, (row, column) in enumerate(zip(some, columns, strict=True)):
        new = jax.lax.dynamic_slice_in_dim(rows[:, n : n + 1], column, 1, axis=3)
        x = jax.lax.dynamic_update_slice(x, new, (0, row, 0, column, 0))
    return x
