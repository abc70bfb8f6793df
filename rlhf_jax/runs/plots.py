"""Figures, as PNG files: curves over a run's steps, stages of the recipe side by side, and models in an arena."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.devices import hosts
from rlhf_jax.runs import log

COLUMNS = 3  # panels in a row, at most
COLORS = ("#2f6f9f", "#d9822b", "#4c9a62", "#a5527a", "#6b6b6b")
BAR = "#8fa9bd"
INK = "#333333"

Panels = Mapping[str, Mapping[str, float]]


# The panels of a run that optimises scores of rollouts, as `curves` takes them.
ROLLOUTS = {
    "score": ["reward/score"],
    "KL to the reference (nats a response)": ["kl/reference"],
    "cost, and its multiplier": ["cost/mean", "cost/multiplier"],
    "entropy (nats a token)": ["policy/entropy"],
    "length (tokens)": ["response/tokens"],
    "pretraining loss (nats)": ["loss/ptx"],
    "seconds": ["seconds/generate", "seconds/score", "seconds/update", "seconds/host"],
}


def curves(directory: Path, panels: Mapping[str, Sequence[str]] | None = None) -> Path:
    """Draw the metrics of the run in `directory` over its steps, into `curves.png` there.

    `panels` maps the label of a panel, with its unit ("KL to the reference (nats)"), to the metrics drawn in it; by
    default a panel shows all metrics of one prefix. Metrics that the run does not have are left out. Where a curve has
    more than a hundred points, a running mean lies over it.
    """
    if not hosts.first():
        return directory / "curves.png"
    rows = log.read(directory)
    have = dict.fromkeys(name for row in rows for name in row if name not in ("step", "time"))
    if panels is None:
        prefixes = dict.fromkeys(name.split("/")[0] for name in have)
        panels = {prefix: [name for name in have if name.split("/")[0] == prefix] for prefix in prefixes}
    drawn = {label: [name for name in names if name in have] for label, names in panels.items()}
    drawn = {label: names for label, names in drawn.items() if names}
    figure, axes = _grid(len(drawn))
    for axis, (label, names) in zip(axes, drawn.items(), strict=True):
        for name, color in zip(names, _cycle(len(names)), strict=True):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            step, value = np.array(points, dtype=float).reshape(-1, 2).T
            smooth = len(points) > 100
            marker = "o" if len(points) <= 20 else None
            own = name.partition("/")[2] or name
            axis.plot(step, value, color=color, alpha=0.25 if smooth else 1, marker=marker, markersize=3, linewidth=1.2)
            if smooth:
                axis.plot(*_running_mean(step, value), color=color, linewidth=1.6)
            axis.plot([], [], color=color, label=own)  # the legend shows the opaque colour
        axis.set_title(label, loc="left", fontsize=10, color=INK)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.margins(x=0.02)
        axis.locator_params(axis="x", integer=True)
        if len(names) > 1:
            axis.legend(framealpha=0.8, edgecolor="none", fontsize=8, labelcolor=INK)
    for axis in axes[-_columns(len(axes)) :]:
        axis.set_xlabel("step", fontsize=9, color=INK)
    return _save(figure, directory / "curves.png")


def stages(path: Path, panels: Panels, spread: Panels | None = None) -> Path:
    """Draw a bar a stage in a panel a measure, and write the figure to `path`.

    `panels` maps the label of a measure, with its unit, to its value at each stage:
    `{"gold score (0 to 1)": {"base": 0.21, "SFT": 0.48, "PPO": 0.71}}`. The last stage is set off by its colour.
    `spread`, of the same form, is drawn as a whisker of as much above the bar's end and below it.
    """
    figure, axes = _grid(len(panels))
    for axis, (label, values) in zip(axes, panels.items(), strict=True):
        colors = [BAR] * (len(values) - 1) + [COLORS[0]]
        whiskers = [spread[label][name] for name in values] if spread else None
        heights = [value if abs(value) >= 5e-5 else 0.0 for value in values.values()]  # a KL to itself is only rounding
        bars = axis.bar(list(values), heights, yerr=whiskers, ecolor=INK, color=colors, width=0.62)
        axis.bar_label(bars, fmt="{:.3g}", padding=2, fontsize=9, color=INK)
        axis.set_title(label, loc="left", fontsize=10, color=INK)
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.margins(y=0.15)
        axis.spines["left"].set_visible(False)
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(left=False, labelleft=False, bottom=False)
    return _save(figure, path)


def lines(path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, ...]]]], x: str) -> Path:
    """Draw series of points (x, y), or (x, y, spread), in a panel a measure, and write the figure to `path`.

    `panels` maps the label of a measure, with its unit, to the points of each series by its name; `x` is the label of
    what they share: `{"gold (0 to 1)": {"PPO": [(0.1, 0.5), (0.4, 0.8)]}}` over "KL (nats)". A spread is drawn as a
    band of as much above the line and below it. Panels with the series of the first have no legend of their own.
    """
    figure, axes = _grid(len(panels))
    for axis, (label, series) in zip(axes, panels.items(), strict=True):
        whole = True
        for n, ((name, points), color) in enumerate(zip(series.items(), _cycle(len(series)), strict=True)):
            across, up, *spread = np.array(sorted(points), float).reshape(len(points), -1).T
            again = n // len(COLORS)  # times that the colour was there before
            style, marker = ("-", "--", ":")[again % 3], ("o", "s", "^")[again % 3]
            axis.plot(across, up, style, color=color, marker=marker, markersize=3.5, linewidth=1.4, label=name)
            whole = whole and bool(np.all(across == across.round()))
            for one in spread:
                axis.fill_between(across, up - one, up + one, color=color, alpha=0.15, linewidth=0)
        if whole:  # counts, of which there are no halves
            axis.locator_params(axis="x", integer=True)
        axis.set_title(label, loc="left", fontsize=10, color=INK)
        axis.set_xlabel(x, fontsize=9, color=INK)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        if len(series) > 1 and (axis is axes[0] or list(series) != list(next(iter(panels.values())))):
            if len(series) <= len(COLORS):
                axis.legend(frameon=False, fontsize=8, labelcolor=INK)
            else:  # there is no room for them among the lines
                axis.legend(frameon=False, fontsize=7, labelcolor=INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))
                figure.set_size_inches(5.2 * _columns(len(panels)), figure.get_figheight())
    return _save(figure, path)


def intervals(
    path: Path, points: Mapping[str, Mapping[str, tuple[float, float, float]]], x: str, chance: float
) -> Path:
    """Draw values with their intervals, (value, low, high), and write the figure to `path`.

    `points` maps the name of a series to its values by label; each label is a row, the first on top, and `x` is what
    is measured. A line marks the value of `chance`.
    """
    figure, (axis,) = _grid(1)
    figure.set_size_inches(5.4, 3.2)
    labels = list(next(iter(points.values())))
    for n, ((name, values), color) in enumerate(zip(points.items(), _cycle(len(points)), strict=True)):
        rows = [row + 0.6 * ((n + 0.5) / len(points) - 0.5) for row in range(len(labels))]
        value, low, high = np.array([values[label] for label in labels]).T
        spread = np.maximum([value - low, high - value], 0.0)
        axis.errorbar(
            value, rows, xerr=spread, fmt="o", color=color, markersize=4, capsize=2, linewidth=1.2, label=name
        )
    axis.axvline(chance, color="#cccccc", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_title(x, loc="left", fontsize=10, color=INK)
    axis.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    if len(points) > 1:
        axis.legend(frameon=False, fontsize=8, labelcolor=INK)
    return _save(figure, path)


def arena(
    path: Path,
    strengths: Mapping[str, tuple[float, float] | None],
    rates: Mapping[str, Mapping[str, float]],
    x: str = "",
) -> Path:
    """Draw the strengths of models and the win rate of each against each other, and write the figure to `path`.

    `strengths` maps a model to its strength and the half width of its interval, or to None where it has none that is
    finite; the first is drawn on top. `rates` maps a row's model to its win rates, 0 to 1, against those that it met.
    `x` is written below the strengths.
    """
    names = list(strengths)
    figure, (left, right) = _grid(2)
    side = max(2.6, 0.42 * len(names) + 1.4)
    figure.set_size_inches(4.2 + side + 1.2, side)
    for row, name in enumerate(names):
        found = strengths[name]
        if found is None:
            axes_and_rows = left.get_yaxis_transform()
            left.text(0.5, row, "not finite", transform=axes_and_rows, ha="center", va="center", fontsize=8, color=INK)
        else:
            left.errorbar(
                found[0], row, xerr=found[1], fmt="o", color=COLORS[0], markersize=4.5, capsize=3, linewidth=1.4
            )
    left.axvline(0, color="#cccccc", linewidth=0.8, zorder=0)
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.margins(x=0.1)
    left.locator_params(axis="x", nbins=6)
    left.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    left.set_title("strength (log scale, 95 %)", loc="left", fontsize=10, color=INK)
    left.set_xlabel(x, fontsize=9, color=INK)
    share = np.array([[rates.get(name, {}).get(other, np.nan) for other in names] for name in names]) * 100
    right.imshow(np.ma.masked_invalid(share), cmap="RdBu", vmin=0, vmax=100, aspect="equal", alpha=0.75)
    for (row, column), value in np.ndenumerate(share):
        if np.isfinite(value):
            color = "white" if abs(value - 50) > 38 else INK
            right.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=9, color=color)
    right.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    right.set_yticks(range(len(names)), names)
    right.spines[["left", "bottom"]].set_visible(False)
    right.tick_params(length=0)
    right.set_title("win rate of row against column (%)", loc="left", fontsize=10, color=INK)
    return _save(figure, path)


def _grid(count: int):
    """A figure and its `count` axes, row by row."""
    from matplotlib.figure import Figure  # a third of a second, before a step, of runs that draw at their end
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = _columns(count)
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#999999")
        axis.tick_params(labelsize=8, colors=INK, length=3, color="#999999")
    return figure, axes


def _columns(count: int) -> int:
    return 2 if count == 4 else max(1, min(COLUMNS, count))


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _running_mean(step: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over windows of a twentieth of the curve, at the middles of the windows."""
    width = len(value) // 20
    kernel = np.full(width, 1 / width)
    return np.convolve(step, kernel, mode="valid"), np.convolve(value, kernel, mode="valid")


def _save(figure: Any, path: Path) -> Path:
    if hosts.first():
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return path
