"""Statistics over seeds: mean and standard deviation, bands of curves, rows of a table."""

from collections.abc import Callable, Sequence

import numpy as np

Point = dict[str, float]  # kl (nats a response), gold (0 to 1), and proxy, the reward model's score, if there is one


def spread(values: Sequence[float] | np.ndarray) -> float:
    """Standard deviation over seeds (with Bessel's correction); 0 for one seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def mean_sd(values: Sequence[float] | np.ndarray, digits: int = 3) -> str:
    """Mean and standard deviation over seeds, for a table; a dash where some seed has no value."""
    if np.any(np.isnan(values)):
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {spread(values):.{digits}f}" if len(values) > 1 else mean


def interpolate(
    points: Sequence[Point], measure: str, where: np.ndarray, distance: Callable[[float], float] = float
) -> np.ndarray:
    """`measure` at these distances, linearly between the points; nan beyond the last one.

    A point's distance is a function of its KL, by default the KL itself.
    """
    ordered = sorted((distance(max(point["kl"], 0.0)), point[measure]) for point in points)
    across, up = np.array(ordered).T
    return np.interp(where, across, up, right=np.nan)


def band(values: Sequence[np.ndarray], where: np.ndarray) -> list[tuple[float, float, float]]:
    """Mean and standard deviation over seeds at each place that every seed has reached."""
    reached = [(float(x), column) for x, column in zip(where, np.transpose(values), strict=True)]
    return [(x, float(column.mean()), spread(column)) for x, column in reached if not np.any(np.isnan(column))]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
