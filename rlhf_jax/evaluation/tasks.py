"""The answers of a model to tasks, with any number of examples in the prompt.

    results = tasks.evaluate(model, [task], tasks.Config(shots=(0, 4)), layout=layout, data_dir="runs/data")
    results[0].score.value  # of the task's own metric, without examples

Questions with options are answered by the likeliest of these, others in writing; a chain of thought is always written.
Whoever asks again and again, as of a model that is training, keeps an `Evaluation`:

    asked = tasks.Evaluation(model, [task], tasks.Config(by="read"), layout=layout, data_dir="runs/data")
    results = asked(params)
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from rlhf_jax import models
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.tasks import Example, Task
from rlhf_jax.devices import parallel
from rlhf_jax.evaluation import metrics, prompts, writing
from rlhf_jax.evaluation.metrics import Score
from rlhf_jax.evaluation.prompts import Question
from rlhf_jax.rollouts import likelihood
from rlhf_jax.rollouts.likelihood import Likelihood
from rlhf_jax.settings import Count, NonNegative, Seed, Settings, Whole
from rlhf_jax.types import InputError, Params


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """How tasks are put to a model."""

    shots: tuple[Whole, ...] = (0,)  # numbers of examples in the prompt, each an evaluation of its own
    limit: Count | None = 200  # questions of each task, the first held-out ones that fit the context; None: all
    # Rank the options by log-probability, or have the answer written; auto ranks where there are options and no
    # reasoning. read is the cheapest: it ranks options with the EOS after them, and counts an answer without options as
    # right if each of its tokens and its EOS is the likeliest one.
    by: Literal["auto", "rank", "read", "write"] = "auto"
    reasoning: bool = False  # ask for a chain of thought before the answer, and show those of the examples
    chat: bool = True  # put questions as messages, by the tokenizer's chat template; False: as text
    # Number of the template among those of each task; None: each question takes the next of those that ask for the
    # answer.
    template: Whole | None = 0
    length: Count | None = None  # most tokens of a prompt with its answer; None: the model's context
    same_shots: bool = True  # all questions have the same examples; False: each draws its own
    samples: Count = 1  # written answers to a question; several vote, and give pass@k
    temperature: NonNegative = 0.0  # of written answers; 0 takes the likeliest token
    # Most tokens of a written answer; without it 32, or 256 with reasoning, or half of a smaller context.
    max_new_tokens: Count | None = None
    batch: Count = 32  # rows to compute at a time, over all devices
    seed: Seed = 0  # of the examples and of written answers

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples > 1 and not self.temperature:
            raise InputError(f"samples={self.samples} are all the same at temperature 0: raise --temperature")
        if self.reasoning and self.by in ("rank", "read"):
            raise InputError(f"reasoning is written, and has no effect with --by {self.by}: leave out one of them")


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer of the model to one question."""

    row: int  # number in the held-out rows
    shots: int  # examples in front of it
    said: tuple[str, ...]  # the option that was chosen, or what was written, several times perhaps
    right: tuple[str, ...]  # all the answers that are right
    score: float  # by the main metric, the mean of several samples


@dataclasses.dataclass(frozen=True)
class Result:
    """One task at one number of examples."""

    task: str
    cluster: str
    shots: int  # that were asked for
    ranked: bool  # by log-probability; else answers were written
    metric: str  # the main one among the scores
    scores: dict[str, Score]
    figures: dict[str, float]  # without errors: what chance gives, the calibration error, the mean number of examples
    left_out: dict[str, int]  # counts of what was refused, by what it was
    prompts: list[str]  # a few, as the model read them
    answers: list[Answer]  # of each question

    @property
    def score(self) -> Score:
        """The score by the main metric."""
        return self.scores[self.metric]


SHOWN = 2  # prompts of each result that are kept


@dataclasses.dataclass(frozen=True)
class _Put:
    """The questions of one task at one number of examples."""

    task: Task
    shots: int
    by: prompts.By
    questions: list[Question]
    left_out: dict[str, int]


def evaluate(
    model: models.Model,
    tasks: Sequence[Task],
    cfg: Config,
    *,
    layout: parallel.Layout = parallel.PMAP,
    data_dir: str | Path,
) -> list[Result]:
    """The results of each task with each number of examples, in that order; see `Evaluation`."""
    return Evaluation(model, tasks, cfg, layout=layout, data_dir=data_dir)()


class Evaluation:
    """The questions of tasks as a model reads them, and the programs that answer them, to be asked any number of times.

    All questions are computed together, those of like length in a batch. Raises InputError, which names the task,
    before anything is computed: for a task without held-out rows, one without options that is to be ranked, options
    that are the same tokens, and what `prompts.write` says.
    """

    def __init__(
        self,
        model: models.Model,
        tasks: Sequence[Task],
        cfg: Config,
        *,
        layout: parallel.Layout = parallel.PMAP,
        data_dir: str | Path,
    ):
        """`model` may come without parameters, where each call has some."""
        tokenizer = models.tokenizer_of(model)
        self._put = [one for task in tasks for one in _put(task, tokenizer, cfg, model.config.max_length, data_dir)]
        self._shown = [[prompts.shown(tokenizer, some) for some in one.questions[:SHOWN]] for one in self._put]
        self._read = _Read(model, [one for one in self._put if one.by != "write"], cfg, layout)
        self._write = _Write(model, [one for one in self._put if one.by == "write"], cfg, layout)

    @property
    def left_out(self) -> dict[str, int]:
        """How many questions of all tasks were left out, and what else was, by what it was."""
        return dict(sum((Counter(one.left_out) for one in self._put), Counter[str]()))

    def __call__(self, params: Params | None = None) -> list[Result]:
        """The results of each task with each number of examples, in that order.

        `params`, as the layout places them, stand in for those of the model.
        """
        read, written = iter(self._read(params)), iter(self._write(params))
        results = [next(written if one.by == "write" else read) for one in self._put]
        return [dataclasses.replace(one, prompts=some) for one, some in zip(results, self._shown, strict=True)]


def new_tokens(cfg: Config, context: int) -> int:
    """The most tokens of a written answer."""
    return min(cfg.max_new_tokens or (256 if cfg.reasoning else 32), context // 2)


def _put(task: Task, tokenizer: tokenizers.Tokenizer, cfg: Config, context: int, data_dir: str | Path) -> list[_Put]:
    """The questions of a task with each number of examples."""
    rows = _rows(task, task.held_out, "held-out rows", data_dir)
    questions = list(prompts.held_out(task, rows, cfg.limit))
    left_out: dict[str, int] = {}
    has_options = [pair for pair in questions if pair[1].options]
    by = cfg.by
    if by == "auto":
        by = "rank" if has_options and not cfg.reasoning else "write"
    if by == "rank":
        if not has_options:
            raise InputError(f"task {task.name}: its questions have no options to rank: ask with --by write")
        if others := len(questions) - len(has_options):
            left_out["questions left out, without options to rank"] = others
        questions = has_options
    if not questions:
        raise InputError(f"task {task.name}: no usable held-out rows in {task.data}, split {task.held_out!r}: add some")
    pool = _rows(task, task.shots or task.train, "rows for examples", data_dir) if any(cfg.shots) else None
    room = prompts.Room(
        context=min(cfg.length or context, context),
        answer=new_tokens(cfg, context) if by == "write" else 0,
    )
    put = []
    for shots in cfg.shots:
        form = prompts.Form(
            shots=shots,
            reasoning=cfg.reasoning,
            chat=cfg.chat,
            template=cfg.template,
            same_shots=cfg.same_shots,
            seed=cfg.seed,
        )
        rest = itertools.islice(prompts.held_out(task, rows, None), cfg.limit, None)
        spare = (pair for pair in rest if pair[1].options or by != "rank") if cfg.limit else ()
        asked, refused = prompts.write(task, questions, tokenizer, form, room, pool, by, spare)
        if by != "write":
            prompts.check_options(task, rows, asked)
        put.append(_Put(task, shots, by, asked, left_out | refused))
    return put


def _rows(task: Task, split: str, what: str, data_dir: str | Path) -> Rows:
    try:
        return task.rows(split, data_dir=data_dir)
    except InputError as error:
        raise InputError(f"task {task.name}, {what}: {error}") from error


# -- by log-probability ------------------------------------------------------------------------------------------------


class _Read:
    """Questions that are answered by the log-probability of given answers."""

    def __init__(self, model: models.Model, put: Sequence[_Put], cfg: Config, layout: parallel.Layout):
        self._model, self._put, self._layout = model, put, layout
        without = dataclasses.replace(model, params=None)  # which come with each call
        self._reader = likelihood.Reader(without, layout, cfg.batch)
        options = [ids for one in put if one.by == "rank" for question in one.questions for ids in question.options]
        self._alone = {ids.tobytes(): ids for ids in options}  # asked in the empty context too
        nothing = prompts.empty(models.tokenizer_of(model), cfg.chat).tolist() if options else []
        self._requests = [likelihood.Request(nothing, ids.tolist()) for ids in self._alone.values()]
        self._requests += [
            likelihood.Request(question.ids.tolist(), ids.tolist())
            for one in put
            for question in one.questions
            for ids in question.options
        ]

    def __call__(self, params: Params | None) -> list[Result]:
        """The result of each task."""
        if not self._requests:
            return []
        if params is None:
            params = self._layout.frozen(self._model.config.compute.freeze(self._model.params))
        found = self._reader(self._requests, params)
        prior = {ids: one.total for ids, one in zip(self._alone, found, strict=False)}
        rest = iter(found[len(prior) :])
        results = []
        for one in self._put:
            likelihoods = [[next(rest) for _ in question.options] for question in one.questions]
            results.append(_ranked(one, likelihoods, prior) if one.by == "rank" else _answered(one, likelihoods))
        return results


def _ranked(put: _Put, likelihoods: list[list[Likelihood]], prior: dict[bytes, float]) -> Result:
    """The result of one task, from the likelihood of each option and its log-probability in the empty context."""
    right: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_calibrated": []}
    answers, confidence = [], []
    for question, each in zip(put.questions, likelihoods, strict=True):
        options, good = question.example.options, question.example.answers
        total = np.array([one.total for one in each])
        unlikely = np.array([prior[ids.tobytes()] for ids in question.options])
        chosen = metrics.best(total), metrics.best_by_characters(total, options), metrics.best(total - unlikely)
        for values, number in zip(right.values(), chosen, strict=True):
            values.append(float(options[number] in good))
        share = np.exp(total - total.max())
        confidence.append(share.max() / share.sum())
        answers.append(Answer(question.row, question.shots, (options[chosen[0]],), good, right["acc"][-1]))
    agreement = metrics.calibration(np.array(confidence), np.array(right["acc"], bool))
    figures = {"chance": _chance(put), "calibration_error": agreement.expected_error}
    return _result(put, "acc", {name: metrics.score(values) for name, values in right.items()}, figures, answers)


def _answered(put: _Put, likelihoods: list[list[Likelihood]]) -> Result:
    """The result of one task, from the likelihood of each option, or of the right answer where there are none."""
    answers = []
    for question, each in zip(put.questions, likelihoods, strict=True):
        options, good = question.example.options, question.example.answers
        if options:
            said = options[metrics.best([one.total for one in each])]
            answers.append(Answer(question.row, question.shots, (said,), good, float(said in good)))
        else:
            (one,) = each
            answers.append(Answer(question.row, question.shots, good[:1] * one.greedy, good, float(one.greedy)))
    scores = {"acc": metrics.score([one.score for one in answers])}
    return _result(put, "acc", scores, {"chance": _chance(put)}, answers)


def _chance(put: _Put) -> float:
    """The accuracy of a guess among the options; a question without any counts as 0."""
    share = [[option in one.example.answers for option in one.example.options] or [False] for one in put.questions]
    return float(np.mean([np.mean(some) for some in share]))


def _result(
    put: _Put, metric: str, scores: dict[str, Score], figures: dict[str, float], answers: list[Answer]
) -> Result:
    """The result of one task, still without prompts."""
    return Result(
        task=put.task.name,
        cluster=put.task.cluster,
        shots=put.shots,
        ranked=put.by != "write",
        metric=metric,
        scores=scores,
        figures=figures | {"examples": float(np.mean([question.shots for question in put.questions]))},
        left_out=put.left_out,
        prompts=[],
        answers=answers,
    )


# -- written -----------------------------------------------------------------------------------------------------------


class _Write:
    """Questions whose answers are written."""

    def __init__(self, model: models.Model, put: Sequence[_Put], cfg: Config, layout: parallel.Layout):
        self._model, self._put, self._cfg, self._layout = model, put, cfg, layout
        ids = [[question.ids for question in one.questions] for one in put]
        apart = [writing.worth_sharing(model.config, some) > 0 for some in ids]
        form = writing.Config(
            samples=cfg.samples,
            max_new_tokens=new_tokens(cfg, model.config.max_length),
            temperature=cfg.temperature,
            stop="" if cfg.chat else "\n\n",  # an empty line is what stands between examples
            batch=cfg.batch,
            seed=cfg.seed,
        )
        # A task whose examples are worth a program of their own is asked by itself, all others together.
        groups = [[n] for n in range(len(put)) if apart[n]] + [[n for n in range(len(put)) if not apart[n]]]
        self._writers = [
            (numbers, writing.Writer(model, [prompt for n in numbers for prompt in ids[n]], form, layout))
            for numbers in filter(None, groups)
        ]

    def __call__(self, params: Params | None) -> list[Result]:
        """The result of each task."""
        if not self._put:
            return []
        if params is None:
            params = self._layout.state(self._model.params)
        said: dict[int, list[list[str]]] = {}
        for numbers, writer in self._writers:
            found = iter(writer(params))
            said |= {n: [next(found) for _ in self._put[n].questions] for n in numbers}
        return [_written(one, said[n], self._cfg) for n, one in enumerate(self._put)]


def _written(put: _Put, texts: list[list[str]], cfg: Config) -> Result:
    """The result of one task, from the texts that answer each question."""
    sums: dict[str, list[float]] = {}
    votes: list[list[Hashable | None]] = []
    answers = []
    main = main_metric(put.task, cfg.reasoning)
    for question, samples in zip(put.questions, texts, strict=True):
        measured = [measure(put.task, question.example, text, cfg.reasoning) for text in samples]
        for name in measured[0].values:
            sums.setdefault(name, []).append(sum(one.values[name] for one in measured))
        votes.append([one.vote for one in measured])
        mean = sums[main][-1] / len(samples)
        answers.append(Answer(question.row, question.shots, tuple(samples), question.example.answers, mean))
    count = [float(cfg.samples)] * len(texts)
    scores = {name: metrics.score(values, count) for name, values in sums.items()}
    if put.task.metric not in _PARTIAL:
        scores |= _of_samples(put, votes, sums[main], cfg.samples)
    silent = np.mean([vote is None for some in votes for vote in some])
    return _result(put, main, scores, {"no answer found": float(silent)}, answers)


def _of_samples(
    put: _Put, votes: Sequence[Sequence[Hashable | None]], right: Sequence[float], samples: int
) -> dict[str, Score]:
    """The scores of several samples together: that of the majority, and of one that is right among k."""
    if samples == 1:
        return {}
    golds = [[vote_of(put.task, answer) for answer in question.example.answers] for question in put.questions]
    won = [metrics.majority(some, gold, "random") for some, gold in zip(votes, golds, strict=True)]
    scores = {f"majority@{samples}": metrics.score(won)}
    powers = (2**n for n in range(1, samples.bit_length()))
    for k in [*(k for k in powers if k < samples), samples]:
        scores[f"pass@{k}"] = metrics.score([metrics.pass_at(k, samples, round(one)) for one in right])
    return scores


_PARTIAL = ("f1", "rouge", "bleu")  # metrics by which an answer may be right in part


@dataclasses.dataclass(frozen=True)
class Measured:
    """One written answer, measured."""

    values: dict[str, float]
    vote: Hashable | None  # what it says, alike for the same answer; None: nothing was found


def main_metric(task: Task, reasoning: bool) -> str:
    """The name of the measure of written answers that stands for the task."""
    if task.metric in _PARTIAL:
        return task.metric
    if task.metric == "number":
        return "number_flexible"
    return "extracted" if reasoning else "exact"


def measure(task: Task, example: Example, text: str, reasoning: bool) -> Measured:
    """A written answer, measured by all that suits the task.

    `exact` compares the first line as it is, `extracted` what the text says that the answer is, or the option that it
    names last.
    """
    line = text.strip().partition("\n")[0]
    if task.metric == "number":
        strict, flexible = metrics.number(text, "strict"), metrics.number(text, "flexible")
        gold = [metrics.number(answer, "flexible") for answer in example.answers]
        right = {"number_strict": float(strict in gold), "number_flexible": float(flexible in gold)}
        return Measured(right, flexible if strict is None else strict)
    if task.metric == "rouge":
        return Measured({"rouge": metrics.rouge(text, example.answers)}, text or None)
    if task.metric == "bleu":
        return Measured({"bleu": metrics.bleu(text, example.answers)}, text or None)
    found = metrics.stated(text)
    if example.options:
        found = metrics.option(found or text, example.options)
    elif found is None and not reasoning:
        found = line
    answer = found if reasoning else line
    values = {"extracted": metrics.exact(found, example.answers) if found else 0.0}
    values |= {} if reasoning else {"exact": metrics.exact(line, example.answers)}
    values |= {"f1": metrics.f1(answer or "", example.answers)} if task.metric == "f1" else {}
    return Measured(values, vote_of(task, answer) if answer else None)


def vote_of(task: Task, answer: str) -> Hashable:
    """The answer in a form that is the same for equal ones."""
    return metrics.number(answer, "flexible") if task.metric == "number" else metrics.normalize(answer)
