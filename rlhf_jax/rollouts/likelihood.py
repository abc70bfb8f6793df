"""Log-probabilities of continuations of contexts; what several contexts have in common is read once.

The texts are sorted, and neighbours that begin alike become a tree (`types.Tree`), a row of a batch: the options of a
question share the question, questions share the examples in front of them, and options of one token, whose logits are
all read after the last token of the context, share everything.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from rlhf_jax import models
from rlhf_jax.devices import hosts, parallel, progress
from rlhf_jax.models.transformer import Transformer, bind
from rlhf_jax.rollouts import rollout
from rlhf_jax.types import InputError, Leaf, Params, Tree

COLUMNS = 256  # of a row on which `batch` counts: a batch of wider rows has fewer
WIDEST = 1024  # columns of a tree, unless one text alone has more
LOGITS = 2**26  # float32 numbers that a device holds at a time, 256 MiB
ANY = 2**30  # columns, more than there are


class Request(NamedTuple):
    """A question for the log-probability of a continuation, in token ids."""

    context: Sequence[int]  # at least one token, such as a BOS
    continuation: Sequence[int]  # at least one token


class Likelihood(NamedTuple):
    """The answer to a request."""

    total: float  # sum of the log-probabilities of the continuation's tokens, nats
    greedy: bool  # each of them is the likeliest there


def loglikelihoods(
    model: models.Model, requests: Sequence[Request], *, layout: parallel.Layout = parallel.PMAP, batch: int = 32
) -> list[Likelihood]:
    """The likelihood of each continuation after its context, in the order of the requests; see `Reader`."""
    return Reader(model, layout, batch)(requests)


class Reader:
    """A model, placed and compiled, that answers requests; who asks more than once keeps it.

    `batch` rows are computed at a time over all devices, fewer where they have more than `COLUMNS` columns. Without
    `share` every request is a row of its own, which gives the same answers later.
    """

    def __init__(self, model: models.Model, layout: parallel.Layout, batch: int, share: bool = True):
        self._config, self._layout, self._batch, self._share = model.config, layout, batch, share
        self._params = layout.frozen(model.config.compute.freeze(model.params))
        self._score = layout.step(functools.partial(_score, config=model.config))

    def __call__(self, requests: Sequence[Request], params: Params | None = None) -> list[Likelihood]:
        """The likelihood of each continuation after its context, in the order of the requests.

        `params`, as the layout places them, stand in for those of the model, as while it trains.

        A context beyond the model's length loses its oldest tokens; a warning counts how many do. Raises InputError
        where a context or continuation is empty, or a continuation is longer than the model's length.
        """
        if not requests:
            return []
        texts = _inputs(requests, self._config.max_length)
        rows = list(_trees(texts, [request.continuation for request in requests], self._config, self._share))
        sizes = np.array([len(row.tokens) for row in rows])
        scored = []  # on the devices: the next batch is made while this one is computed
        for numbers, width in rollout.by_width(sizes, ANY, _rows(self._batch, int(sizes.max()))):
            part = hosts.share(_batch([rows[n] for n in numbers], width))
            scored.append((numbers, self._score(self._params if params is None else params, self._layout.rows(part))))
        total, greedy, left = np.zeros(len(requests)), np.ones(len(requests), bool), len(rows)
        for numbers, results in progress.of(scored, "reading"):
            logp, likeliest = self._layout.gather(results)
            for place, n in enumerate(numbers[:left]):  # without those that fill the last batch up
                column, which, request = rows[n].reads.T
                np.add.at(total, request, logp[place, column, which].astype(np.float64))
                np.logical_and.at(greedy, request, likeliest[place, column, which])
            left -= len(numbers)
        return [Likelihood(*pair) for pair in zip(total.tolist(), greedy.tolist(), strict=True)]


@dataclasses.dataclass(frozen=True)
class _Row:
    """One tree, and what is read of it."""

    tokens: np.ndarray  # [T] int32
    reach: np.ndarray  # [T] int32
    columns: np.ndarray  # [N] int32, after which something is read
    targets: list[list[int]]  # [N][..K], the tokens whose log-probabilities are read there
    reads: np.ndarray  # [M, 3]: of each token of a continuation the place in `columns`, that in `targets`, the request


class _Batch(NamedTuple):
    """Rows as arrays."""

    tokens: Leaf  # [B, T] int32
    tree: Tree
    columns: Leaf  # [B, N] int32
    targets: Leaf  # [B, N, K] int32


def _inputs(requests: Sequence[Request], max_length: int) -> list[np.ndarray]:
    """The input of each request: context and continuation but for its last token, cut on the left."""
    texts, cut = [], 0
    for n, (context, continuation) in enumerate(requests):
        if not len(context) or not len(continuation):
            empty = "continuation" if len(context) else "context"
            raise InputError(f"request {n} has an empty {empty}: give it at least one token, such as a BOS")
        if len(continuation) > max_length:
            raise InputError(
                f"the continuation of request {n} has {len(continuation)} tokens, more than the model's context of"
                f" {max_length}: shorten it"
            )
        text = np.concatenate([np.asarray(context, np.int32), np.asarray(continuation[:-1], np.int32)])
        cut += len(text) > max_length
        texts.append(text[-max_length:])
    if cut and hosts.first():
        print(
            f"warning: {cut} of {len(requests)} contexts exceed the model's {max_length} tokens and lose their oldest",
            file=sys.stderr,
        )
    return texts


def _trees(
    texts: Sequence[np.ndarray], continuations: Sequence[Sequence[int]], config: models.Config, share: bool = True
) -> Iterator[_Row]:
    """The texts as trees: one joins the tree of its neighbour in order where that costs less than a row of its own."""
    # An attention score costs about as much as a 4 d_model-th of all else that a token takes.
    cost = lambda columns: columns * (1 + columns / (4 * config.d_model))
    order = sorted(range(len(texts)), key=lambda n: texts[n].astype(">i4").tobytes())
    widest = max(WIDEST, max(map(len, texts)))
    tree = _Growing()
    for n in order:
        text = texts[n]
        added = len(text) - tree.shared(text)
        joined = tree.size + added
        costs_more = joined > widest or cost(joined) - cost(tree.size) > cost(len(text))
        if tree.size and (costs_more or not share):
            yield tree.row()
            tree = _Growing()
        tree.add(text, continuations[n], n)
    yield tree.row()


class _Growing:
    """A tree to which texts are added in their order."""

    def __init__(self) -> None:
        self.size = 0
        self._text = np.zeros(0, np.int32)  # the last one
        self._path = np.zeros(0, np.int64)  # its columns
        self._tokens: list[np.ndarray] = []
        self._ends: list[tuple[np.ndarray, int]] = []  # columns, and where what descends from them ends
        self._targets: dict[int, list[int]] = {}  # of a column
        self._reads: list[tuple[int, int, int]] = []  # column, place in its targets, request

    def shared(self, text: np.ndarray) -> int:
        """How many tokens the text has in common with the start of the last one."""
        length = min(len(text), len(self._text))
        differs = text[:length] != self._text[:length]
        return int(differs.argmax()) if differs.any() else length

    def add(self, text: np.ndarray, continuation: Sequence[int], request: int) -> None:
        """Add a text, at whose end the continuation of a request is read."""
        shared = self.shared(text)
        self._ends.append((self._path[shared:], self.size))
        fresh = text[shared:]
        self._path = np.concatenate([self._path[:shared], np.arange(self.size, self.size + len(fresh))])
        self._tokens.append(fresh)
        self._text, self.size = text, self.size + len(fresh)
        for column, target in zip(self._path[-len(continuation) :].tolist(), continuation, strict=True):
            targets = self._targets.setdefault(column, [])
            if target not in targets:
                targets.append(int(target))
            self._reads.append((column, targets.index(target), request))

    def row(self) -> _Row:
        """The tree as arrays."""
        reach = np.zeros(self.size, np.int32)
        for columns, end in [*self._ends, (self._path, self.size)]:
            reach[columns] = end - columns
        columns = np.array(sorted(self._targets), np.int32)
        reads = np.array(self._reads)
        reads[:, 0] = np.searchsorted(columns, reads[:, 0])
        return _Row(
            tokens=np.concatenate(self._tokens),
            reach=reach,
            columns=columns,
            targets=[self._targets[column] for column in columns.tolist()],
            reads=reads,
        )


def _rows(batch: int, widest: int) -> int:
    """The rows of a batch that has the widest one: a divisor of `batch` which divides over the devices as that does."""
    least = math.gcd(batch, jax.device_count())
    fitting = [
        rows for rows in range(least, batch + 1, least) if batch % rows == 0 and rows * widest <= batch * COLUMNS
    ]
    return max(fitting, default=least)


def _batch(rows: Sequence[_Row], width: int) -> _Batch:
    """Rows as arrays of this width; how many columns are read, and tokens at each, are rounded up to powers of two."""
    power = lambda size: 1 << (size - 1).bit_length()
    count = min(power(max(len(row.columns) for row in rows)), width)
    each = power(max(len(targets) for row in rows for targets in row.targets))
    tokens, reach = (np.zeros((len(rows), width), np.int32) for _ in range(2))
    columns, targets = np.zeros((len(rows), count), np.int32), np.zeros((len(rows), count, each), np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row.tokens)], reach[n, : len(row.tokens)] = row.tokens, row.reach
        columns[n, : len(row.columns)] = row.columns
        for place, ids in enumerate(row.targets):
            targets[n, place, : len(ids)] = ids
    return _Batch(tokens=tokens, tree=Tree(reach=reach), columns=columns, targets=targets)


def _score(
    params: Params, batch: _Batch, *, config: models.Config, axis: str | None = None
) -> tuple[Float[Array, "B N K"], Bool[Array, "B N K"]]:
    """`Transformer.logprobs_at` of a batch, whose logits exist in parts if they are many."""
    chunk = config.compute.chunk or max(1, LOGITS // (batch.tokens.shape[0] * config.vocab_size))
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, chunk=chunk))
    apply = bind(Transformer(config), Transformer.logprobs_at)
    return apply(params, batch.tokens, batch.tree, batch.columns, batch.targets)
