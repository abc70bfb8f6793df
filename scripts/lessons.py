"""Measures the curves of the lessons (docs/learn/), and makes their figures and notebooks.

scripts/lessons.py measure [NAME ...]        runs the cells of lessons at four seeds, and draws what came out
scripts/lessons.py draw [NAME ...]           draws the curves that were measured once more
scripts/lessons.py notebooks --out DIR       writes a Jupyter notebook for each lesson
scripts/lessons.py stages --run DIR          draws the four stages of a quickstart run, for the front page
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from experiments.lessons import course, pages

ROOT = Path(__file__).parents[1]
FIGURES = pages.LESSONS / "figures"
YOURS = "yours"  # label of the reader's own run, which the page draws first


def measure(name: str) -> None:
    """Run a lesson's page, and its `run` at each seed; write the records and draw them."""
    start = time.process_time()
    namespace = pages.run(name)
    lesson, once = namespace["lesson"], time.process_time() - start
    seeds = [rounded(namespace["run"](seed=seed)) for seed in course.SEEDS]
    drawn = {label: rounded(records) for label, records in lesson.drawn.items()}
    seconds = time.process_time() - start
    lesson.file.parent.mkdir(exist_ok=True)
    found = {
        "panels": dict(lesson.panels),
        "floors": dict(lesson.floors),
        "x": lesson.x,
        "seeds": seeds,
        "drawn": drawn,
    }
    lesson.file.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    print(f"{name}: {once:.0f} s for the page, {seconds:.0f} s in all (processor time)")
    draw(name)


def rounded(records: course.Records) -> course.Records:
    """The records with five digits that count."""
    return [{key: float(f"{float(value):.5g}") for key, value in row.items()} for row in records]


def draw(name: str) -> None:
    """Draw the records of a lesson: the reader's run, the faults, and what else the page draws."""
    found = json.loads((course.EXPECTED / f"{name}.json").read_text())
    lesson = course.Lesson(name, found["panels"], found["floors"], x=found.get("x", "step"))
    drawn = found["drawn"]
    faults = dict(list(drawn.items())[1:4])
    others = dict(list(drawn.items())[4:])
    FIGURES.mkdir(exist_ok=True)
    for suffix, runs in {"": {"seed 7": drawn[YOURS]}, "-faults": faults, "-more": others}.items():
        if runs:
            course.figure(lesson, runs).savefig(FIGURES / f"{name}{suffix}.png", dpi=140)
    print(summary(found))


def summary(found: dict) -> str:
    """The last value of each measure: mean, lowest and highest of the seeds, and of each run that the page draws."""
    lines = []
    for key in found["panels"]:
        last = np.array([records[-1][key] for records in found["seeds"]])
        others = ", ".join(f"{label} {records[-1][key]:.3g}" for label, records in found["drawn"].items())
        lines.append(f"  {key:<12}{last.mean():.3g} ({last.min():.3g} to {last.max():.3g}); {others}")
    return "\n".join(lines)


def notebooks(out: Path, repository: str | None) -> None:
    """Write the notebooks."""
    out.mkdir(parents=True, exist_ok=True)
    for name in pages.names():
        (out / f"{name}.ipynb").write_text(pages.notebook(name, repository))
        print(out / f"{name}.ipynb")


def stages(run: Path, out: Path) -> None:
    """Draw the four stages of a quickstart run: what each learns from, and what came out."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    found = json.loads((run / "summary.json").read_text())
    accuracy, agreement = found["reward"]["accuracy"], found["reward"]["labeler_agreement"]
    boxes = [
        ("1  Pretrain", "60,000 texts", f"gold {found['pretrain']['gold']:.2f}", found["pretrain"]["gold"]),
        ("2  Fine-tune", "4,000 demonstrations", f"gold {found['sft']['gold']:.2f}", found["sft"]["gold"]),
        ("3  Reward model", "rankings of 4 to 9 answers", f"{100 * accuracy:.0f} % of pairs right", None),
        ("4  PPO", "its own answers, scored", f"gold {found['ppo']['gold']:.2f}", found["ppo"]["gold"]),
    ]
    figure = Figure(figsize=(10, 2.45))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, 10)
    axis.set_ylim(0, 2.45)
    axis.axis("off")
    for n, (title, source, result, gold) in enumerate(boxes):
        x = 0.2 + 2.45 * n
        axis.add_patch(
            FancyBboxPatch((x, 0.45), 2.05, 1.8, boxstyle="round,pad=0,rounding_size=0.12", fc="#f2f6f9", ec="#b9cbd8")
        )
        axis.text(x + 0.15, 1.95, title, fontsize=12, fontweight="bold", color="#1f4f70", va="center")
        axis.text(x + 0.15, 1.58, "learns from", fontsize=8, color="#777777", va="center")
        axis.text(x + 0.15, 1.34, source, fontsize=9.5, color=course.INK, va="center")
        axis.text(x + 0.15, 0.95, result, fontsize=12, color=course.INK, va="center")
        if gold is not None:
            axis.add_patch(
                FancyBboxPatch((x + 0.15, 0.6), 1.75, 0.13, boxstyle="square,pad=0", fc="#dde6ec", ec="none")
            )
            axis.add_patch(
                FancyBboxPatch((x + 0.15, 0.6), 1.75 * gold, 0.13, boxstyle="square,pad=0", fc=course.BAND, ec="none")
            )
        else:
            axis.text(
                x + 0.15,
                0.66,
                f"two labelers agree on {100 * agreement:.0f} %",
                fontsize=8,
                color="#777777",
                va="center",
            )
        if n < 3:
            axis.annotate("", (x + 2.42, 1.35), (x + 2.08, 1.35), arrowprops={"arrowstyle": "-|>", "color": "#888888"})
    note = "gold: the true quality of an answer, 0 to 1, by a rule that no model is trained on"
    axis.text(0.2, 0.18, note, fontsize=8.5, color="#777777", va="center")
    figure.savefig(out, dpi=150)
    print(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("measure", "draw"):
        commands.add_parser(command).add_argument(
            "names", nargs="*", metavar="NAME", help="lessons; all of them if none"
        )
    writing = commands.add_parser("notebooks")
    writing.add_argument("--out", type=Path, required=True, help="folder of the notebooks")
    writing.add_argument("--repository", help="OWNER/NAME on GitHub, from which notebooks install themselves")
    drawing = commands.add_parser("stages")
    drawing.add_argument("--run", type=Path, required=True, help="run directory of a quickstart")
    drawing.add_argument("--out", type=Path, default=ROOT / "docs" / "stages.png", help="the picture")
    given = parser.parse_args(arguments)
    if given.command == "notebooks":
        notebooks(given.out, given.repository)
    elif given.command == "stages":
        stages(given.run, given.out)
    else:
        for name in given.names or pages.names():
            (measure if given.command == "measure" else draw)(name)


if __name__ == "__main__":
    main()
