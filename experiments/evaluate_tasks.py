"""What does a model answer to the questions of tasks, with examples in the prompt and without?

A task is a name, or a file: JSON Lines of {"question", "options", "answer", "rationale"} (options and rationale where
there are any), or cot:PATH.tsv, bbh:PATH.json, gsm8k:PATH, sst:PATH.csv (docs/evaluation.md). The run directory gets
results.json, answers.jsonl, the prompts as the model read them (prompts.txt), and shots.png, accuracy against examples.

Run:     python -m experiments.evaluate_tasks --model DIR --task questions.jsonl --shots 0 1 4 --out runs/evaluation
Parent:  evaluate
Result:  the table of docs/evaluation.md
"""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax import models, runs
from rlhf_jax.data import sources
from rlhf_jax.data.tasks import catalog
from rlhf_jax.devices import hosts, parallel
from rlhf_jax.evaluation import prompts, tasks, text
from rlhf_jax.runs import cli, plots
from rlhf_jax.settings import Count
from rlhf_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Config(runs.Stage, tasks.Config):
    """The settings of the experiment; the defaults suit a small model on two CPU cores."""

    model: Path = Path("runs/sft/model")  # model directory
    task: tuple[str, ...] = ()  # files of questions, and tasks, clusters or collections by name, such as world
    text: str | None = None  # documents whose perplexity and bits a byte are measured: any source of text
    texts: Count = 200  # number of documents, at most
    out: Path = Path("runs/evaluation")  # run directory, for all results
    # Put questions as messages or as text; by default as messages where the model has a chat template of its own.
    chat: bool | None = None  # type: ignore[assignment]


def main(cfg: Config) -> list[tasks.Result]:
    """Evaluate, print a table, and write the results."""
    if not cfg.task and cfg.text is None:
        raise InputError("nothing to evaluate: name tasks or files of questions by --task, or documents by --text")
    found = catalog.select(cfg.task) if cfg.task else ()
    layout = parallel.layout(cfg.devices)
    model = models.load(cfg.model, compute=cfg.compute, place=layout.sharding)
    if cfg.chat is None:
        cfg = dataclasses.replace(cfg, chat=prompts.has_template(models.tokenizer_of(model)))
    results = tasks.evaluate(model, found, cfg, layout=layout, data_dir=cfg.data_dir) if found else []
    predicted = None
    if cfg.text is not None:
        rows = sources.rows(cfg.text, "text", data_dir=cfg.data_dir)
        some = [row["text"] for row in itertools.islice(rows, cfg.texts)]
        predicted = text.evaluate(model, some, layout=layout, batch=cfg.batch)
    if hosts.first() and results:
        print(table(results))
    if hosts.first() and predicted:
        print(
            f"{cfg.text}: {predicted.bits_per_byte} bits a byte, perplexity {predicted.perplexity:.3f} a token,"
            f" {predicted.byte_perplexity:.3f} a byte, over {predicted.tokens} tokens"
        )
    _write(cfg, results, predicted)
    return results


def table(results: Sequence[tasks.Result]) -> str:
    """The results as a table in Markdown, with all scores and their intervals, and what was left out below it."""
    lines = ["| task | shots | questions | scores, 95 % intervals |", "|---|---|---|---|"]
    notes = []
    for result in results:
        scores = [f"{name} {score}" for name, score in result.scores.items()]
        figures = [f"{name} {value:.3g}" for name, value in result.figures.items() if name != "examples"]
        said = "; ".join([*scores, *figures])
        lines.append(f"| {result.task} | {result.shots} | {len(result.answers)} | {said} |")
        notes += [f"{result.task}, {result.shots} shots: {count} {what}" for what, count in result.left_out.items()]
    return "\n".join([*lines, *notes])


def _write(cfg: Config, results: Sequence[tasks.Result], predicted: text.Result | None) -> None:
    """Write all files of the run directory."""
    whole = [dataclasses.asdict(result) for result in results]
    rows = [{"task": result["task"]} | answer for result in whole for answer in result.pop("answers")]
    shown = [
        f"==== {result['task']}, {result['shots']} shots, prompt {n} ====\n{prompt}\n"
        for result in whole
        for n, prompt in enumerate(result.pop("prompts"), start=1)
    ]
    runs.write_config(cfg.out, cfg)
    for one, result in zip(whole, results, strict=True):
        one["questions"] = len(result.answers)
    written = {"model": str(cfg.model), "results": whole, "text": predicted and dataclasses.asdict(predicted)}
    runs.write(cfg.out / "results.json", json.dumps(written, indent=2) + "\n")
    if results:
        runs.write(cfg.out / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        runs.write(cfg.out / "prompts.txt", "\n".join(shown))
        plots.lines(cfg.out / "shots.png", _panels(results), "examples in the prompt")


def _panels(results: Sequence[tasks.Result]) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """The scores of each task against examples, as `plots.lines` takes them; a band is two standard errors wide."""
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for result in results:
        series = panels.setdefault(result.task, {})
        for name, score in result.scores.items():
            series.setdefault(name, []).append((float(result.shots), score.value, score.error))
        if "chance" in result.figures:
            series.setdefault("chance", []).append((float(result.shots), result.figures["chance"], 0.0))
    return panels


if __name__ == "__main__":
    cli.run(main, Config())
