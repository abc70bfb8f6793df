"""Mixtures of tasks that are phrased as instructions, as FLAN has them (arXiv:2109.01652), in packed batches.

A mixture is a sequence of draws without end. Draw k is a pure function of the seed and k: a task, one of its rows, a
template, a form, and the rows that stand before it as examples. Tasks come in proportion to their rows, where no task
counts with more than `ceiling` of them (examples-proportional mixing, arXiv:1910.10683); they are dealt out evenly, so
that of any 1,024 draws each task has its share. A task goes through its rows in another order each time.

Nothing of it is made in advance, and no row stays in memory: rows are read by their number, and tokenised and packed
while the step runs. So the place in a stream is the number of the next draw.

A row is put in one of four forms (FLAN v2, arXiv:2301.13688): as a question alone or behind a few others with their
answers, either with the answer alone or with the reasoning that leads to it. The loss is on what answers the last
question.
"""

import bisect
import collections
import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from rlhf_jax.data import pipeline
from rlhf_jax.data import tokenizer as tokenizer_lib
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.tasks import shots as shots_lib
from rlhf_jax.data.tasks.task import Example, Task, Template, in_words, with_reasoning
from rlhf_jax.data.tokenizer import Prompt, Tokenizer
from rlhf_jax.settings import Count, NonNegative, Settings
from rlhf_jax.types import InputError, Tokens

EVEN = 1024  # draws among which each task has its share, to within one
BLOCK = EVEN * EVEN  # draws after which all have exactly theirs
CHUNK = 64  # draws that are tokenised together
FRUITLESS = 4096  # draws in a row without a usable one, after which there is no hope
LOOK = 256  # rows of a task among which one has to be usable


@dataclasses.dataclass(frozen=True)
class Forms(Settings):
    """How often a row is put in each form, in any unit. A form with reasoning goes without where a row has none."""

    zero_shot: NonNegative = 1.0  # the question alone
    few_shot: NonNegative = 0.0  # behind examples of its task, in the same template
    reasoning: NonNegative = 0.0  # the question alone; the answer comes after its rationale
    few_shot_reasoning: NonNegative = 0.0  # behind examples that reason too

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self.weights):
            raise InputError("forms: all weights are 0, so there is nothing to learn; give one of them a weight")

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights in the order of the fields."""
        return self.zero_shot, self.few_shot, self.reasoning, self.few_shot_reasoning


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """How tasks are mixed and phrased; the defaults are FLAN's."""

    most_rows: Count = 30_000  # rows of a task that are used, chosen by seed
    ceiling: Count = 3_000  # rows with which a task counts at most where shares are given out
    templates: Count = 10  # templates of a task that are used, the first ones
    forms: Forms = Forms()
    shots: Count = 4  # most examples before a question in the forms that have some; at least one
    chat: bool = True  # put questions and answers as turns of the chat template; otherwise as plain text


# Which clusters keep away from which ----------------------------------------------------------------------------------

# Clusters of which neither is learnt from where the other is held out, because their tasks resemble each other (FLAN,
# section 2.2).
ALIKE: tuple[tuple[str, str], ...] = (
    ("paraphrase", "entailment"),
    ("reading", "reading_commonsense"),
    ("commonsense", "reading_commonsense"),
)


@dataclasses.dataclass(frozen=True)
class Split:
    """Tasks to learn from, tasks to be tested on, and those that are neither, because they resemble the latter."""

    train: tuple[Task, ...]
    held_out: tuple[Task, ...]
    left_out: tuple[Task, ...]
    templates: int = 0  # taken from tasks to learn from, because the others have them too


def leave_out(tasks: Sequence[Task], held_out: Sequence[str]) -> Split:
    """The tasks without the clusters that are held out, the clusters like these (ALIKE), and tasks of the same data.

    What is left loses the templates that held-out tasks have too, unless these are fields without a word. Raises
    InputError for a cluster that none of the tasks is of, and if no task is left to learn from.
    """
    names = {task.cluster for task in tasks}
    if unknown := [name for name in held_out if name not in names]:
        raise InputError(f"held out: no task is of cluster {unknown[0]!r}; there are {', '.join(sorted(names))}")
    held = tuple(task for task in tasks if task.cluster in held_out)
    alike = {other for pair in ALIKE for one, other in (pair, pair[::-1]) if one in held_out}
    sources = {_source(task) for task in held}
    wordings = {template.prompt for task in held for template in task.templates if _has_words(template)}
    train, left_out, taken = list[Task](), list[Task](), 0
    for task in tasks:
        if task in held:
            continue
        templates = tuple(template for template in task.templates if template.prompt not in wordings)
        if task.cluster in alike or _source(task) in sources or not templates:
            left_out.append(task)
        else:
            train.append(dataclasses.replace(task, templates=templates))
            taken += len(task.templates) - len(templates)
    if not train:
        raise InputError(f"held out: without {', '.join(held_out)} and what is like them no task is left to learn from")
    return Split(tuple(train), held, tuple(left_out), taken)


def _has_words(template: Template) -> bool:
    """Whether the template says something of its own, beside the fields."""
    return bool(re.sub(r"\{\w+\}", "", template.prompt).strip())


def _source(task: Task) -> str:
    """The data of a task, whichever part of it."""
    return task.data.partition("[")[0]


# Draws ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Draw:
    """A question of a mixture, and how it is put."""

    task: int
    row: int
    template: int
    reasoning: bool  # the answer comes after its rationale, where there is one
    shots: int  # examples before the question
    others: tuple[int, ...]  # rows of which the first that are usable are the examples


def shares(sizes: Sequence[int], cfg: Config = Config()) -> np.ndarray:
    """The share of each task in the draws, by its number of rows. [tasks], of sum 1."""
    rates = np.minimum(np.array(sizes, float), min(cfg.ceiling, cfg.most_rows))
    return rates / rates.sum()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The draws of a mixture of tasks that have so many rows."""

    tasks: tuple[Task, ...]
    sizes: tuple[int, ...]
    cfg: Config
    seed: int

    def draw(self, k: int) -> Draw:
        """The k-th draw, from 0."""
        number, nth = self._turn(k)
        task, size = self.tasks[number], self.sizes[number]
        used = min(size, self.cfg.most_rows)
        rng = np.random.default_rng((self.seed, k))
        form = int(np.searchsorted(self._forms, rng.random(), side="right"))
        few, reasoning = form % 2 == 1, form >= 2
        templates = task.templates[: self.cfg.templates]
        # The rationale leads to the answer, and so to nothing else that a template may ask for.
        fitting = [n for n, template in enumerate(templates) if not (reasoning and template.turned)]
        template = int(rng.choice(fitting or len(templates)))
        pass_, place = divmod(nth, used)
        place = int(_order(used, self.seed, _code(task), pass_)[place])
        count = min(int(rng.integers(1, self.cfg.shots + 1)), used - 1) if few else 0
        others = rng.choice(used - 1, min(4 * count, used - 1), replace=False) if count else np.zeros(0, int)
        chosen = _chosen(size, used, self.seed, _code(task))
        rows = [int(chosen[n]) for n in (place, *(others + (others >= place)))]
        return Draw(number, rows[0], template, reasoning, count, tuple(rows[1:]))

    def _turn(self, k: int) -> tuple[int, int]:
        """The task of the k-th draw, and the draw's number among those of the task: 0, 1, ..., nearly in their order.

        A block has a ticket for each draw, which the tasks share out. Its tickets are dealt in hands of EVEN that lie
        evenly over all of them, as do those of hands that follow each other; tickets within a hand come in an order of
        chance.
        """
        block, within = divmod(k, BLOCK)
        turn, place = divmod(within, EVEN)
        before = _dealt(self._edges, self.seed, block)
        ticket = int(_hands(self.seed, block)[turn] + EVEN * _order(EVEN, self.seed, block, turn)[place])
        task = bisect.bisect_right(self._edges, ticket) - 1
        start, end = self._edges[task : task + 2]
        in_hand = (ticket - start) // EVEN
        return task, block * (end - start) + int(before[turn, task]) + in_hand

    @functools.cached_property
    def _edges(self) -> tuple[int, ...]:
        """Where the tickets of each task begin, and where the last ones end."""
        ends = np.round(np.cumsum(shares(self.sizes, self.cfg)) * BLOCK).astype(int)
        return (0, *ends.tolist())

    @functools.cached_property
    def _forms(self) -> np.ndarray:
        """The cumulative shares of all forms but the last."""
        weights = np.array(self.cfg.forms.weights)
        return (np.cumsum(weights) / weights.sum())[:-1]


@functools.lru_cache(maxsize=2)
def _hands(seed: int, block: int) -> np.ndarray:
    """The first ticket of each hand of a block: van der Corput's sequence, from a start of chance. [EVEN]."""
    bits = EVEN.bit_length() - 1
    turned = [int(f"{turn:0{bits}b}"[::-1], 2) for turn in range(EVEN)]
    return np.array(turned) ^ np.random.default_rng((seed, block)).integers(EVEN)


@functools.lru_cache(maxsize=2)
def _dealt(edges: tuple[int, ...], seed: int, block: int) -> np.ndarray:
    """How many tickets of each task were in the hands of a block before each of them. [EVEN, tasks]."""
    first = _hands(seed, block)
    below = -(-(np.array(edges) - first[:, None]) // EVEN)  # tickets of a hand that lie below each edge
    held = np.diff(below, axis=1)
    return np.cumsum(held, axis=0) - held


@functools.lru_cache(maxsize=512)
def _order(size: int, *seed: int) -> np.ndarray:
    """The numbers below `size` in an order of chance."""
    return np.random.default_rng(seed).permutation(size).astype(np.int32)


@functools.lru_cache(maxsize=512)
def _chosen(size: int, used: int, *seed: int) -> np.ndarray:
    """The numbers below `size` that are used, each once."""
    if used == size:
        return np.arange(size, dtype=np.int32)
    return np.random.default_rng(seed).choice(size, used, replace=False).astype(np.int32)


def _code(task: Task) -> int:
    """A number for a task, so that its rows come in the same order whatever else there is."""
    return zlib.crc32(task.name.encode())


# Words ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Words:
    """A question in words, behind others with their answers."""

    pairs: tuple[tuple[str, str], ...]
    prompt: str
    target: str
    reasoning: bool

    def rendered(self, chat: bool) -> tuple[Prompt, str]:
        """The prompt and the response, for the tokenizer."""
        if chat:
            return shots_lib.messages(self.pairs, self.prompt), self.target
        return shots_lib.text(self.pairs, self.prompt), shots_lib.answered(self.prompt, self.target)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A plan, and the rows of its tasks, which are read where it asks for them."""

    plan: Plan
    rows: tuple[Rows, ...]

    def words(self, draw: Draw) -> Words | None:
        """A draw in words; None if its row is of no use."""
        task = self.plan.tasks[draw.task]
        template, where = task.templates[draw.template], _where(task, draw.template)
        example = self._example(draw.task, draw.row)
        if example is None:
            return None
        reasons = draw.reasoning and bool(example.rationale) and not template.turned
        pairs: list[tuple[str, str]] = []
        for other in draw.others:
            shown = self._example(draw.task, other) if len(pairs) < draw.shots else None
            if shown and (shown.rationale or not reasons):
                pairs.append(_phrase(shown, task, template, reasons, where))
        return Words(tuple(pairs), *_phrase(example, task, template, reasons, where), reasons)

    def _example(self, task: int, row: int) -> Example | None:
        return self.plan.tasks[task].read(self.rows[task][row])

    def __str__(self) -> str:
        cfg, plan = self.plan.cfg, self.plan
        clusters = collections.Counter(task.cluster for task in plan.tasks)
        used = sum(min(size, cfg.most_rows) for size in plan.sizes)
        cut = sum(size > cfg.most_rows for size in plan.sizes)
        return (
            f"{len(plan.tasks)} tasks of {len(clusters)} clusters ({', '.join(clusters)}), {used} rows"
            + f" ({cut} tasks with only {cfg.most_rows} of their rows)" * bool(cut)
        )


def _phrase(example: Example, task: Task, template: Template, reasons: bool, where: str) -> tuple[str, str]:
    return with_reasoning(example, template, task.hint, where) if reasons else in_words(example, template, where)


def _where(task: Task, template: int) -> str:
    return f"task {task.name}, template {template}"


def open_mixture(tasks: Sequence[Task], cfg: Config, *, seed: int, data_dir: str | Path) -> Mixture:
    """The mixture of the training rows of tasks.

    Raises InputError for a task of which no row is usable, and for a template that cannot be filled in.
    """
    rows = tuple(task.rows(task.train, data_dir=data_dir) for task in tasks)
    for task, its_rows in zip(tasks, rows, strict=True):
        check_templates(task, its_rows)
    return Mixture(Plan(tuple(tasks), tuple(map(len, rows)), cfg, seed), rows)


def check_templates(task: Task, rows: Rows) -> None:
    """Raise InputError if none of the first rows is usable, or if a template cannot be filled in with the first one."""
    first = (task.read(rows[n]) for n in range(min(LOOK, len(rows))))
    example = next(filter(None, first), None)
    if example is None:
        raise InputError(
            f"task {task.name}: none of the first {min(LOOK, len(rows))} rows of {task.data} can be used; leave the"
            " task out, or correct its reader"
        )
    if not task.templates:
        raise InputError(f"task {task.name}: no template; give it at least one")
    for n, template in enumerate(task.templates):
        in_words(example, template, _where(task, n))


# Batches --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of batches, in tokens but for `batch`."""

    length: int  # of a row
    batch: int  # rows, over all processes
    prompt: int | None = None  # most of a prompt; None: as many as fit into a row
    target: int | None = None  # most of an answer with its EOS; None: as many as fit into a row


@dataclasses.dataclass
class Counts:
    """The fate of the draws up to some place of a stream. Printed, it is one line."""

    learnt: int = 0
    unusable: int = 0  # rows that the reader of their task has no use for
    too_long: int = 0
    few_shot: int = 0  # learnt ones with examples before them
    shortened: int = 0  # learnt ones with fewer examples than were drawn, since no more would fit
    reasoning: int = 0  # learnt ones with a rationale
    control_tokens: int = 0  # learnt ones that spell control tokens, which are read as such

    def __str__(self) -> str:
        learnt = [f"{self.few_shot} behind examples", f"{self.reasoning} with reasoning"]
        if self.shortened:
            learnt.append(f"{self.shortened} behind fewer examples than drawn, to fit")
        spelling = f"; {self.control_tokens} spell control tokens, which are read as such" * bool(self.control_tokens)
        return (
            f"{self.learnt} rows learnt ({', '.join(learnt)}), {self.unusable + self.too_long} skipped"
            f" ({self.unusable} unusable, {self.too_long} too long){spelling}"
        )


@dataclasses.dataclass(frozen=True)
class Stream:
    """Packed batches of a mixture, without end. `iter` starts it anew, with get_state and set_state for checkpoints.

    Consecutive draws fill the rows of a batch, each in the first that has room, until one has room nowhere: it begins
    the next batch. Who shares a batch depends on the lengths of all, so every process makes whole batches, of which it
    takes its share by `hosts.share`.
    """

    mixture: Mixture
    tokenizer: Tokenizer
    sizes: Sizes

    def __post_init__(self) -> None:
        cfg = self.mixture.plan.cfg
        rows = sum(min(size, cfg.most_rows) for size in self.mixture.plan.sizes)
        if rows < self.sizes.batch:
            raise InputError(
                f"mixture: {rows} rows are fewer than a batch of {self.sizes.batch}: use a smaller batch, or more tasks"
            )

    def __iter__(self) -> Iterator[Tokens]:
        # One thread prepares the next batches while the step runs.
        return grain.experimental.ThreadPrefetchDatasetIterator(Packing(self), 2)


@dataclasses.dataclass(frozen=True)
class _Rendered:
    """The tokens of a draw."""

    words: Words
    shots: int  # that were drawn
    prompt: np.ndarray
    target: np.ndarray
    spells: bool  # control tokens

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


class Packing:
    """The batches of a stream, one after another, at a place that can be saved: the iterator without its thread."""

    def __init__(self, stream: Stream):
        self._stream, self._next, self._counts = stream, 0, Counts()
        self._chunk = functools.lru_cache(maxsize=2)(self._render_chunk)

    def __iter__(self) -> "Packing":
        return self

    def __next__(self) -> Tokens:
        sizes = self._stream.sizes
        rows: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(sizes.batch)]
        free = [sizes.length] * sizes.batch
        fruitless = 0
        while fruitless < FRUITLESS:
            one = self._chunk(self._next // CHUNK)[self._next % CHUNK]
            if isinstance(one, _Rendered):
                row = next((n for n, left in enumerate(free) if left >= len(one)), None)
                if row is None:
                    pad = tokenizer_lib.pad_id(self._stream.tokenizer)
                    return pipeline.lay_out(rows, sizes.length, pad)
                ids = np.append(one.prompt, one.target)
                rows[row].append((ids, np.arange(len(ids)) >= len(one.prompt)))
                free[row] -= len(one)
                fruitless = 0
            else:
                fruitless += 1
            self._count(one)
            self._next += 1
        raise InputError(
            f"mixture: {fruitless} rows in a row cannot be used with length={sizes.length}; use longer rows, or other"
            f" tasks; {self._counts}"
        )

    def get_state(self) -> dict[str, int]:
        """The number of the next draw, and the counts of those before it."""
        return {"next": self._next} | dataclasses.asdict(self._counts)

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from where a state was taken."""
        self._next = state["next"]
        self._counts = Counts(*(state[field.name] for field in dataclasses.fields(Counts)))

    def _count(self, one: "_Rendered | str") -> None:
        found = self._counts
        if isinstance(one, str):
            setattr(found, one, getattr(found, one) + 1)
            return
        found.learnt += 1
        found.few_shot += bool(one.words.pairs)
        found.shortened += len(one.words.pairs) < one.shots
        found.reasoning += one.words.reasoning
        found.control_tokens += one.spells

    def _render_chunk(self, number: int) -> list["_Rendered | str"]:
        """The tokens of the draws of a chunk, or the field of `Counts` that says why there are none."""
        mixture, tokenizer = self._stream.mixture, self._stream.tokenizer
        draws = [mixture.plan.draw(k) for k in range(number * CHUNK, (number + 1) * CHUNK)]
        found: list[_Rendered | str] = ["unusable"] * CHUNK
        waiting = {n: words for n, draw in enumerate(draws) if (words := mixture.words(draw))}
        drawn = {n: len(words.pairs) for n, words in waiting.items()}
        while waiting:
            texts = [words.rendered(mixture.plan.cfg.chat) for words in waiting.values()]
            prompts, targets = tokenizer_lib.render(
                tokenizer, [prompt for prompt, _ in texts], [[target] for _, target in texts]
            )
            spelled = tokenizer_lib.spells_control_tokens(
                tokenizer, [f"{w.prompt}{w.target}" for w in waiting.values()]
            )
            longer: dict[int, Words] = {}
            for (n, words), prompt, (target,), spells in zip(waiting.items(), prompts, targets, spelled, strict=True):
                if self._fits(len(prompt), len(target)):
                    found[n] = _Rendered(words, drawn[n], prompt, target, spells)
                elif words.pairs:
                    longer[n] = dataclasses.replace(words, pairs=words.pairs[:-1])
                else:
                    found[n] = "too_long"
            waiting = longer
        return found

    def _fits(self, prompt: int, target: int) -> bool:
        sizes = self._stream.sizes
        within = prompt <= (sizes.prompt or math.inf) and target <= (sizes.target or math.inf)
        return within and prompt + target <= sizes.length


def counts(batches: Any) -> Counts:
    """The fate of the draws of a stream's iterator so far."""
    state = batches.get_state()
    return Counts(*(state[field.name] for field in dataclasses.fields(Counts)))
