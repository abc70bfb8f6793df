"""A run as one HTML page that needs no network: its curves, and what every token of its recorded answers was worth.

The page is `page.html` with `page.css`, `page.js` and the data in it. The data are JSON, compressed; `pack` says what
lies where. A token's text, and a prompt, is there once, however often it occurs.
"""

import base64
import dataclasses
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

HERE = Path(__file__).parent
POINTS = 500  # of a curve, at most: beyond, neighbours are averaged
EPISODE = ("score", "kl", "cost", "disagreement", "ranking", "rank")  # numbers of an episode
TOKEN = ("logp", "logp_ref", "logp_after", "entropy", "reward", "value", "advantage")  # numbers of each token
SHOWN = 5  # of the likeliest tokens of policy and reference, beside the one that was sampled


@dataclasses.dataclass(frozen=True)
class Record:
    """The records of a run, as its directory has them."""

    name: str
    settings: Mapping[str, str]  # by their dotted names
    metrics: Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
    episodes: Sequence[Mapping[str, Any]]  # rows of `tokens/`, or of samples.jsonl, which lack the tokens


def page(records: Sequence[Record], differences: Mapping[str, str]) -> str:
    """The page of one run, or of two side by side, whose settings have these `differences`."""
    data = json.dumps(pack(records, differences), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    template = jinja2.Environment(autoescape=True).from_string((HERE / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=" and ".join(record.name for record in records),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        data=base64.b64encode(gzip.compress(data.encode(), mtime=0)).decode(),
    )


def pack(records: Sequence[Record], differences: Mapping[str, str]) -> dict[str, Any]:
    """The data of the page, as JSON: runs, and episodes whose tokens and prompts are numbers in tables."""
    words, prompts = _Table(), _Table()
    episodes = [
        _episode(row, number, words, prompts) for number, record in enumerate(records) for row in record.episodes
    ]
    return {
        "runs": [
            {"name": record.name, "settings": dict(record.settings), "curves": curves(record.metrics)}
            for record in records
        ],
        "differences": dict(differences),
        "words": list(words.numbers),
        "prompts": list(prompts.numbers),
        "episodes": episodes,
    }


def curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[int | float | None]]:
    """Each metric over the steps of `step`; what is absent or not finite is None."""
    names = dict.fromkeys(name for row in metrics for name in row if name != "time")
    size = max(1, -(-len(metrics) // POINTS))
    parts = [metrics[first : first + size] for first in range(0, len(metrics), size)]
    return {name: [_mean([row.get(name) for row in part]) for part in parts] for name in names}


class _Table:
    """Numbers of strings, in the order in which they first occur."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def _episode(row: Mapping[str, Any], run: int, words: _Table, prompts: _Table) -> dict[str, Any]:
    """An episode: its run, step, part, prompt, text, tokens, and numbers of it and of each token."""
    packed: dict[str, Any] = {
        "run": run,
        "step": row["step"],
        "part": row.get("part", "trained"),
        "prompt": prompts(row["prompt"]),
        "text": row["response"],
        "ended": row.get("ended", True),
        "tokens": [words(token) for token in row.get("tokens") or ()],
    }
    packed |= {name: _short(row[name]) for name in EPISODE if row.get(name) is not None}
    if row.get("logp_ref") is not None:
        packed["kl"] = _short(sum(a - b for a, b in zip(row["logp"], row["logp_ref"], strict=True)))
    packed |= {name: [_short(x) for x in row[name]] for name in TOKEN if row.get(name) is not None}
    for name in ("best", "best_ref"):
        if row.get(name) is not None:
            pairs = zip(row[name], row[f"{name}_logp"], strict=True)
            packed[name] = [
                [[words(token), _short(logp)] for token, logp in zip(*pair, strict=True)][:SHOWN] for pair in pairs
            ]
    return packed


def _mean(values: Sequence[int | float | None]) -> int | float | None:
    there = [value for value in values if value is not None and math.isfinite(value)]
    return _short(sum(there) / len(there)) if there else None


def _short(value: int | float) -> int | float | None:
    """A number with as many digits as a page shows; None if it is not finite."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.4g}")
    return int(short) if short == int(short) else short
