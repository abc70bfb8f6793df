"""FLAN (arXiv:2109.01652): the paper's configuration of instruction tuning, at its sizes of models.

These are configurations, and none was trained here: scripts/tpu_compile.py compiles them for a TPU slice. What differs
from the paper: its LaMDA-PT was not published, so MODELS names the nearest presets; a batch of 8,192 tokens is four
rows of 2,048, into which questions of up to 1,024 tokens and answers of up to 256 are packed; the templates are this
project's. Numbers are those of section 2.4 ("Training details") unless another place is named.

Data:    the 62 sets by their TFDS names (docs/tasks.md)
Run:     python -m experiments.papers.flan tune-8b --init DIR --held-out entailment
         python scripts/tpu_compile.py --experiment flan:tune-8b --topology v5e:4x4 --devices.fsdp 4 --devices.tensor 4
Parent:  instruct
Result:  the 8B compiled for a TPU slice, none trained: docs/instruct.md
"""

from pathlib import Path

from experiments import instruct
from rlhf_jax import models
from rlhf_jax.data.tasks import mixture
from rlhf_jax.runs import cli

# Figure 7: 422M, 2B, 8B, 68B and 137B. Unseen clusters gain from 68B on, and lose at 8B and below.
MODELS = {
    "422m": "gpt3-350m",
    "2b": "gpt3-2.7b",
    "8b": "llama3-8b",
    "68b": "llama3-70b",
    "137b": "gpt3-175b",
}


def tune(size: str) -> instruct.Config:
    """Instruction tuning; the settings are the same at all sizes."""
    return instruct.Config(
        out=Path("runs/flan") / f"tune-{size}",
        init=Path("lamda"),
        tasks=("flan",),
        held_out=("entailment",),  # 2.2: a model for each cluster that is tested on
        held_out_every=1000,
        mixture=mixture.Config(
            most_rows=30_000,  # examples a set
            ceiling=3_000,  # mixing rate maximum
            templates=10,  # 2.1: ten templates a set
            forms=mixture.Forms(zero_shot=1.0),
            chat=False,
        ),
        prompt_length=1024,
        target_length=256,
        length=2048,  # with `batch`, 8,192 tokens a step
        batch=4,
        steps=30_000,
        optimizer="adafactor",
        lr=3e-5,
        schedule="constant",  # the paper names no decay
        compute=models.Compute("bfloat16", remat="full"),
    )


STAGES: dict[str, tuple] = {f"tune-{size}": (instruct.main, tune(size)) for size in MODELS}

if __name__ == "__main__":
    cli.run_stage(STAGES)
