"""Other libraries on the same workloads: a script in an environment of its own, which ends with a line of JSON."""

import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_jax.types import InputError

WORKLOADS = "sft", "decode", "decode_ragged", "reward", "ppo", "choice", "choice_prefix"  # that a peer may know


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library to compare with."""

    name: str
    python: str  # the interpreter of its environment
    script: str

    def run(self, workload: str, timeout: float) -> dict[str, Any] | None:
        """The report that the peer prints in the end, or None after printing why there is none."""
        try:
            command = [self.python, self.script, "--only", workload]
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)
            return json.loads(done.stdout.strip().splitlines()[-1])
        except subprocess.TimeoutExpired:
            why = f"no result after {timeout:.0f} s"
        except subprocess.CalledProcessError as error:
            why = (error.stderr.strip().splitlines() or [f"status {error.returncode}"])[-1]
        except (OSError, ValueError, IndexError) as error:
            why = f"no line of JSON: {error}"
        print(f"{self.name} has no {workload}: {why[:200]}")
        return None


def parse(flag: str) -> Peer:
    """The peer that NAME=PYTHON:SCRIPT names; raises InputError if it is not of that form."""
    name, _, command = flag.partition("=")
    python, _, script = command.partition(":")
    if not (name and python and Path(script).is_file()):
        raise InputError(f"peer: expected NAME=PYTHON:SCRIPT with a script that exists, not {flag!r}")
    return Peer(name, python, script)


def medians(result: dict[str, Any], unit: str) -> Iterator[float]:
    """The medians of a result and of the variants within it. A plain key holds a median if no other does."""
    for key, value in result.items():
        if isinstance(value, dict):
            yield from medians(value, unit)
        elif key == f"median_{unit}" or (key == unit and f"median_{unit}" not in result):
            yield value


def best_median(runs: list[dict[str, Any]], unit: str) -> float | None:
    """The best median of a peer's runs of one workload, under any of its variants; None if there are none."""
    return max((rate for run in runs for rate in medians(run, unit)), default=None)
