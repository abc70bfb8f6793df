"""The answers of a model to tasks on which nobody trains it, with any number of examples in the prompt.

    results = tasks.evaluate(model, [task], tasks.Config(shots=(0, 4)), layout=layout, data_dir="runs/data")
    results[0].score.value  # of the task's own metric, without examples

Questions with options are answered by the likeliest of these, others in writing; a chain of thought is always written.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from rlhf_jax import models
from rlhf_jax.data import tokenizer as tokenizers
from rlhf_jax.data.builders import Rows
from rlhf_jax.data.tasks import Example, Task
from rlhf_jax.devices import parallel
from rlhf_jax.evaluation import likelihood, metrics, prompts, writing
from rlhf_jax.evaluation.metrics import Score
from rlhf_jax.evaluation.prompts import Question
from rlhf_jax.settings import Count, NonNegative, Seed, Settings, Whole
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """How tasks are put to a model."""

    shots: tuple[Whole, ...] = (0,)  # numbers of examples in the prompt, each an evaluation of its own
    limit: Count | None = 200  # questions of each task, the first held-out ones; None: all
    # Rank the options by log-probability, or have the answer written; auto ranks where there are options and no
    # reasoning.
    by: Literal["auto", "rank", "write"] = "auto"
    reasoning: bool = False  # ask for a chain of thought before the answer, and show those of the examples
    chat: bool = True  # put questions as messages, by the tokenizer's chat template; False: as text
    template: Whole = 0  # number of the template among those of each task
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
        if self.reasoning and self.by == "rank":
            raise InputError("reasoning is written, and has no effect where options are ranked: leave out one of them")


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
    ranked: bool  # options by log-probability; else answers were written
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
    ranked: bool
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
    """The results of each task with each number of examples, in that order.

    All questions are computed together, those of like length in a batch. Raises InputError, which names the task,
    before anything is computed: for a task without held-out rows, one without options that is to be ranked, options
    that are the same tokens, and what `prompts.write` says.
    """
    tokenizer = models.tokenizer_of(model)
    put = [one for task in tasks for one in _put(task, tokenizer, cfg, model.config.max_length, data_dir)]
    rank = [one for one in put if one.ranked]
    write = [one for one in put if not one.ranked]
    ranked = _rank(model, tokenizer, rank, cfg, layout) if rank else []
    written = _write(model, write, cfg, layout) if write else []
    shown = {id(one): [prompts.shown(tokenizer, some) for some in one.questions[:SHOWN]] for one in put}
    results = {id(one): result for one, result in zip((*rank, *write), (*ranked, *written), strict=True)}
    return [dataclasses.replace(results[id(one)], prompts=shown[id(one)]) for one in put]


def new_tokens(cfg: Config, context: int) -> int:
    """The most tokens of a written answer."""
    return min(cfg.max_new_tokens or (256 if cfg.reasoning else 32), context // 2)


def _put(task: Task, tokenizer: tokenizers.Tokenizer, cfg: Config, context: int, data_dir: str | Path) -> list[_Put]:
    """The questions of a task with each number of examples."""
    rows = _rows(task, task.held_out, "held-out rows", data_dir)
    questions = list(prompts.held_out(task, rows, cfg.limit))
    left_out: dict[str, int] = {}
    has_options = [pair for pair in questions if pair[1].options]
    ranked = cfg.by == "rank" or (cfg.by == "auto" and not cfg.reasoning and bool(has_options))
    if ranked:
        if not has_options:
            raise InputError(f"task {task.name}: its questions have no options to rank: ask with --by write")
        if others := len(questions) - len(has_options):
            left_out["questions left out, without options to rank"] = others
        questions = has_options
    if not questions:
        raise InputError(f"task {task.name}: no usable held-out rows in {task.data}, split {task.held_out!r}: add some")
    pool = _rows(task, task.shots or task.train, "rows for examples", data_dir) if any(cfg.shots) else None
    room = prompts.Room(context=context, answer=0 if ranked else new_tokens(cfg, context))
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
        asked, refused = prompts.write(task, questions, tokenizer, form, room, pool, ranked)
        if ranked:
            prompts.check_options(task, rows, asked)
        put.append(_Put(task, shots, ranked, asked, left_out | refused))
    return put


def _rows(task: Task, split: str, what: str, data_dir: str | Path) -> Rows:
    try:
        return task.rows(split, data_dir=data_dir)
    except InputError as error:
        raise InputError(f"task {task.name}, {what}: {error}") from error


# -- ranked ------------------------------------------------------------------------------------------------------------


def _rank(
    model: models.Model, tokenizer: tokenizers.Tokenizer, put: Sequence[_Put], cfg: Config, layout: parallel.Layout
) -> list[Result]:
    """The results of questions whose options are ranked."""
    alone = {ids.tobytes(): ids for one in put for question in one.questions for ids in question.options}
    nothing = prompts.empty(tokenizer, cfg.chat).tolist()
    requests = [likelihood.Request(nothing, ids.tolist()) for ids in alone.values()]
    requests += [
        likelihood.Request(question.ids.tolist(), ids.tolist())
        for one in put
        for question in one.questions
        for ids in question.options
    ]
    found = [one.total for one in likelihood.loglikelihoods(model, requests, layout=layout, batch=cfg.batch)]
    prior = dict(zip(alone, found[: len(alone)], strict=True))
    totals = iter(found[len(alone) :])
    return [
        _ranked(one, [np.array([next(totals) for _ in question.options]) for question in one.questions], prior)
        for one in put
    ]


def _ranked(put: _Put, logp: list[np.ndarray], prior: dict[bytes, float]) -> Result:
    """The result of one task, from the log-probability of each option and that in the empty context."""
    right: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_calibrated": []}
    answers, confidence = [], []
    for question, total in zip(put.questions, logp, strict=True):
        options, good = question.example.options, question.example.answers
        unlikely = np.array([prior[ids.tobytes()] for ids in question.options])
        chosen = metrics.best(total), metrics.best_by_characters(total, options), metrics.best(total - unlikely)
        for values, number in zip(right.values(), chosen, strict=True):
            values.append(float(options[number] in good))
        share = np.exp(total - total.max())
        confidence.append(share.max() / share.sum())
        answers.append(Answer(question.row, question.shots, (options[chosen[0]],), good, right["acc"][-1]))
    chance = [np.mean([option in one.example.answers for option in one.example.options]) for one in put.questions]
    agreement = metrics.calibration(np.array(confidence), np.array(right["acc"], bool))
    return Result(
        task=put.task.name,
        cluster=put.task.cluster,
        shots=put.shots,
        ranked=True,
        metric="acc",
        scores={name: metrics.score(values) for name, values in right.items()},
        figures={"chance": float(np.mean(chance)), "calibration_error": agreement.expected_error} | _shots(put),
        left_out=put.left_out,
        prompts=[],
        answers=answers,
    )


def _shots(put: _Put) -> dict[str, float]:
    return {"examples": float(np.mean([question.shots for question in put.questions]))}


# -- written -----------------------------------------------------------------------------------------------------------


def _write(model: models.Model, put: Sequence[_Put], cfg: Config, layout: parallel.Layout) -> list[Result]:
    """The results of questions whose answers are written."""
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
    said = {n: writing.answers(model, some, form, layout=layout) for n, some in enumerate(ids) if apart[n]}
    if rest := [prompt for n, some in enumerate(ids) if not apart[n] for prompt in some]:
        found = iter(writing.answers(model, rest, form, layout=layout))
        said |= {n: [next(found) for _ in some] for n, some in enumerate(ids) if not apart[n]}
    return [_written(one, said[n], cfg) for n, one in enumerate(put)]


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
    return Result(
        task=put.task.name,
        cluster=put.task.cluster,
        shots=put.shots,
        ranked=False,
        metric=main,
        scores=scores,
        figures={"no answer found": float(silent)} | _shots(put),
        left_out=put.left_out,
        prompts=[],
        answers=answers,
    )


def _of_samples(
    put: _Put, votes: Sequence[Sequence[Hashable | None]], right: Sequence[float], samples: int
) -> dict[str, Score]:
    """The scores of several samples together: that of the majority, and of one that is right among k."""
    if samples == 1:
        return {}
    golds = [[vote_of(put.task, answer) for answer in question.example.answers] for question in put.questions]
    won = [metrics.majority(some, gold, "random") for some, gold in zip(votes, golds, strict=True)]
    scores = {f"majority@{samples}": metrics.score(won)}
    for k in sorted({2**power for power in range(1, samples.bit_length())} & set(range(samples)) | {samples}):
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
