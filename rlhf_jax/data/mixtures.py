"""Several sources as one: "a.jsonl,hub:OWNER/NAME" has all rows of each, "a.jsonl=0.7,b.parquet=0.3" is a mixture.

The weights are shares of the rows of the mixture, which has as many rows as its sources together. A source with fewer
rows than its share repeats them, each equally often or once more; of one with more rows, some are left out, at random.
How many is printed. The order is random. Both follow from the seed, "a.jsonl=0.7,b.parquet=0.3,seed=1" (0 by default),
and from the numbers of rows alone, so that a mixture is the same whenever it is read again.
"""

import hashlib
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from rlhf_jax.data import builders
from rlhf_jax.data.rows import Row, Rows
from rlhf_jax.types import InputError

# The head of a source that has commas or equality signs of its own: the options of a world, the filter of people.
_OWN = re.compile(r"world:(?:\w+=[^=,\[\]]*,?)*|[^?,]*\b(?:people|hub):[^?,]*\?(?:\w+=[^=&\[\]]*&?)*")
_NUMBER = re.compile(r"[-+]?(?:\d[\d.e+-]*|\.\d[\de+-]*|nan|inf(?:inity)?)", re.IGNORECASE)
_SEED = re.compile(r"seed=(\d+)")


def is_several(spec: str) -> bool:
    """Whether a name is of several sources, or of one with a weight."""
    members = _members(spec)
    return len(members) > 1 or _weighted(members[0])[1] is not None


def rows(spec: str, part: str, read: Callable[[str], Rows], data_dir: Path) -> Rows:
    """The rows of the sources that `spec` names, each read by `read`; of these the slice `part`, unless it is empty."""
    members = _members(spec)
    seed = _SEED.fullmatch(members[-1]) if len(members) > 1 else None
    weighted = [_weighted(member) for member in (members[:-1] if seed else members)]
    weights = [_checked(spec, name, text) for name, text in weighted if text is not None]
    if weights and len(weights) < len(weighted):
        without = next(name for name, text in weighted if text is None)
        raise InputError(f"data {spec!r}: expected a weight, as in {without}=0.5, for each source or for none")
    if seed and not weights:
        raise InputError(f"data {spec!r}: a seed needs weights: give each source one, as in =0.5")
    sources = [read(name) for name, _ in weighted]
    sizes = [len(source) for source in sources]
    chosen = _drawn(sizes, weights, int(seed[1]) if seed else 0) if weights else _all(sizes)
    counts = Counter[str]()
    for source in sources:
        counts.update(source.counts)
    if weights:
        for n, (name, _) in enumerate(weighted):
            rows = chosen[chosen[:, 0] == n, 1]
            print(f"{name}: {len(rows)} rows of the mixture, {len(np.unique(rows))} of its {sizes[n]} rows")
    chosen = _part(chosen, part, spec)
    digest = hashlib.sha256(chosen.tobytes())
    digest.update("\n".join(str(source.folder) for source in sources).encode())
    return Several(sources, chosen, dict(counts), data_dir / "mixtures" / digest.hexdigest()[:24])


class Several(Rows):
    """The rows of several sources: `chosen` [N, 2] has the number of the source, and of the row in it."""

    def __init__(self, sources: Sequence[Rows], chosen: np.ndarray, counts: dict[str, int], folder: Path):
        self._sources, self._chosen, self.counts, self.folder = sources, chosen, counts, folder

    def where(self, index: int) -> str:
        """The place of a row, as an error names it."""
        source, row = self._chosen[index]
        return self._sources[source].where(int(row))

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return next(self.take([index % len(self)]))

    def take(self, indices: Sequence[int]) -> Iterator[Row]:
        """Yield the rows of these numbers, from 0 up, read from one source after another."""
        chosen = self._chosen[np.asarray(indices)]
        found: dict[int, Row] = {}
        for n, source in enumerate(self._sources):
            places = np.flatnonzero(chosen[:, 0] == n)
            found |= dict(zip(places.tolist(), source.take(chosen[places, 1].tolist()), strict=True))
        return map(found.__getitem__, range(len(chosen)))


def _members(spec: str) -> list[str]:
    """The sources that a name is of, with their weights. A file may have commas in its name."""
    whole = re.sub(r"\[[^\[\]]*\]$", "", spec)
    if any("," in name and os.path.exists(builders.file_path(name)) for name in (whole, whole.partition(":")[2])):
        return [spec]
    members: list[str] = []
    for part in spec.split(","):
        before = members[-1] if members else ""
        if before.startswith("world:") and _weighted(before)[1] is None and re.match(r"\w+=", part):
            members[-1] += f",{part}"
        else:
            members.append(part)
    return members


def _weighted(member: str) -> tuple[str, str | None]:
    """A source, and the weight behind it, as it is spelled, if it has one."""
    own = match.end() if (match := _OWN.match(member)) else 0
    name, sign, weight = member[own:].rpartition("=")
    return (member[:own] + name, weight) if sign and _NUMBER.fullmatch(weight) else (member, None)


def _checked(spec: str, name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(f"data {spec!r}, weight of {name}: expected a finite number above 0, got {text}")
    return weight


def _all(sizes: Sequence[int]) -> np.ndarray:
    """Every row of every source, in order."""
    return np.concatenate([np.stack([np.full(size, n), np.arange(size)], axis=1) for n, size in enumerate(sizes)])


def _drawn(sizes: Sequence[int], weights: Sequence[float], seed: int) -> np.ndarray:
    """The order of all rows, drawn at random, in which each source has its share."""
    total, most = sum(sizes), max(weights)
    scaled = [weight / most for weight in weights]  # without overflow
    exact = [weight / math.fsum(scaled) * total for weight in scaled]
    shares = [int(share) for share in exact]
    # What is lost by rounding down goes to those that lost most.
    by_loss = sorted(range(len(shares)), key=lambda n: shares[n] - exact[n])
    for n in itertools.islice(itertools.cycle(by_loss), total - sum(shares)):
        shares[n] += 1
    drawn = []
    for n, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        order = np.random.default_rng([seed, n]).permutation(size)
        drawn.append(np.stack([np.full(share, n), np.resize(order, share)], axis=1))
    return np.random.default_rng([seed, len(sizes)]).permutation(np.concatenate(drawn))


def _part(chosen: np.ndarray, part: str, spec: str) -> np.ndarray:
    """The slice of rows that TFDS's grammar spells, such as "[:90%]"."""
    if not part:
        return chosen
    info = tfds.core.SplitInfo(name="train", shard_lengths=[len(chosen)], num_bytes=0)
    try:
        spans = tfds.core.ReadInstruction.from_spec(f"train{part}").to_absolute({"train": info})
    except (ValueError, AssertionError) as error:
        raise InputError(f"data {spec!r}: no rows in {part}, of {len(chosen)}") from error
    found = np.concatenate([chosen[span.from_ : span.to] for span in spans])
    if not len(found):
        raise InputError(f"data {spec!r}: no rows in {part}, of {len(chosen)}")
    return found
