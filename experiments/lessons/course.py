"""The parts of a lesson: the source of a function, and the reader's curves over those that are expected."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

EXPECTED = Path(__file__).parent / "expected"
SEEDS = (0, 1, 2, 3)  # of the expected curves
BAND, LINES = "#2f6f9f", ("#d9822b", "#a5527a", "#4c9a62", "#6b6b6b")
INK = "#333333"

Records = list[dict[str, float]]  # what a run measured: {"step": 10, "loss": 1.2}, ...


def source(function: Callable) -> None:
    """Print the source of a function of the library."""
    print(inspect.getsource(function))


@dataclasses.dataclass
class Lesson:
    """A lesson's curves. `panels` maps what a run measures to the label of its panel."""

    name: str
    panels: Mapping[str, str]
    floors: Mapping[str, float] = dataclasses.field(default_factory=dict)  # values that no run can pass, drawn dashed
    x: str = "step"  # what the "step" of its records counts
    drawn: dict[str, Records] = dataclasses.field(default_factory=dict)  # the curves so far, by their label

    @property
    def file(self) -> Path:
        """The expected curves, which `scripts/lessons.py` measures."""
        return EXPECTED / f"{self.name}.json"

    def expected(self) -> list[Records]:
        """The records of each seed; none before they are measured."""
        return json.loads(self.file.read_text())["seeds"] if self.file.exists() else []

    def draw(self, records: Records, label: str = "yours") -> Any:
        """Draw a run over the band of four seeds; returns the figure."""
        self.drawn[label] = records
        return figure(self, {label: records})


def figure(lesson: Lesson, runs: Mapping[str, Records]) -> Any:
    """A panel a measure: the band and mean of the expected seeds, and these runs over them."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    seeds = lesson.expected()
    columns = 2 if len(lesson.panels) == 4 else len(lesson.panels)
    rows = -(-len(lesson.panels) // columns)
    drawing = Figure(figsize=(3.6 * columns, 2.8 * rows), layout="constrained")
    axes = np.ravel(drawing.subplots(rows, columns))
    for axis, (name, title) in zip(axes, lesson.panels.items(), strict=True):
        if seeds:
            steps = [row["step"] for row in seeds[0]]
            values = np.array([[row[name] for row in records] for records in seeds])
            label = f"expected: {len(seeds)} seeds"
            axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=BAND, alpha=0.22, linewidth=0)
            axis.plot(steps, values.mean(axis=0), color=BAND, linewidth=1.4, label=label)
        for (label, records), color in zip(runs.items(), LINES, strict=False):
            axis.plot(*points(records, name), color=color, linewidth=1.8, label=label)
        if name in lesson.floors:
            axis.axhline(lesson.floors[name], color=INK, linestyle=(0, (2, 2)), linewidth=0.9)
        axis.set_title(title, loc="left", fontsize=10, color=INK)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel(lesson.x, fontsize=9, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#999999")
        axis.tick_params(labelsize=8, colors=INK, length=3, color="#999999")
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.margins(x=0.02)
    handles, labels = axes[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9, labelcolor=INK)
    return drawing


def points(records: Records, name: str) -> tuple[Sequence[float], Sequence[float]]:
    """The steps and values of one measure; a value that is not finite is left out."""
    kept = [row for row in records if np.isfinite(row[name])]
    return [row["step"] for row in kept], [row[name] for row in kept]
