"""Run directories: what a run was made with, its records, checkpoints, plots and command line."""

from rlhf_jax.runs.directory import (
    CHECKPOINTS,
    claim,
    differences,
    once,
    read_settings,
    settings,
    write,
    write_config,
    writing,
)
from rlhf_jax.runs.gcs import share
from rlhf_jax.runs.log import Limits
from rlhf_jax.runs.run import SEED, Config, Run, Stage

__all__ = [
    "CHECKPOINTS",
    "SEED",
    "Config",
    "Limits",
    "Run",
    "Stage",
    "claim",
    "differences",
    "once",
    "read_settings",
    "settings",
    "share",
    "write",
    "write_config",
    "writing",
]
