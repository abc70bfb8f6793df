"""Run directories: what a run was made with, its records, checkpoints, plots and command line."""

from rlhf_jax.runs.directory import CHECKPOINTS, claim, differences, once, settings, write, write_config, writing
from rlhf_jax.runs.gcs import share

__all__ = ["CHECKPOINTS", "claim", "differences", "once", "settings", "share", "write", "write_config", "writing"]
