"""Tülu 3's preference stage (arXiv:2411.15124, section 5): length-normalised DPO at 8B and 70B.

These are configurations, and none was trained here: scripts/tpu_compile.py compiles them for a TPU slice. Each number
is that of the commands which made the published models, in docs/tulu3.md of github.com/allenai/open-instruct. MODELS
names the architecture of Llama 3, whose rotary frequencies Llama 3.1 scales: a directory given by --init has its own.

Data:    hub:allenai/llama-3.1-tulu-3-8b-preference-mixture, and -70b- likewise: {"prompt", "chosen", "rejected"}
Run:     python -m experiments.papers.tulu3 dpo-8b --init allenai/Llama-3.1-Tulu-3-8B-SFT
         python scripts/tpu_compile.py --experiment tulu3:dpo-8b --topology v5p:2x2x4 --devices.fsdp 16
Parent:  dpo
Result:  compiled for TPU slices, not trained: docs/scaling.md
"""

from pathlib import Path

from experiments import dpo
from rlhf_jax import models
from rlhf_jax.algorithms import dpo as dpo_lib
from rlhf_jax.runs import cli

MODELS = {"8b": "llama3-8b", "70b": "llama3-70b"}  # of models.PRESETS
BATCH = 128  # 8 and 64 processes of 1 pair, 16 and 2 micro-batches


def prefer(size: str, lr: float, pairs: int) -> dpo.Config:
    """DPO on a mixture of so many pairs, one epoch."""
    return dpo.Config(
        out=Path("runs/tulu3") / f"dpo-{size}",
        init=Path("llama3"),  # allenai/Llama-3.1-Tulu-3-8B-SFT, and -70B-
        data=f"hub:allenai/llama-3.1-tulu-3-{size}-preference-mixture",
        length=2048,  # max_seq_length
        batch=BATCH,
        epochs=1,  # num_train_epochs
        lr=lr,
        schedule="linear",  # lr_scheduler_type
        warmup=pairs // BATCH // 10,  # warmup_ratio 0.1
        algorithm=dpo_lib.Config(
            beta=5.0,  # dpo_beta
            per_token=True,  # dpo_loss_type dpo_norm
        ),
        compute=models.Compute("bfloat16", remat="full", frozen="bfloat16", chunk=512),
    )


STAGES: dict[str, tuple] = {  # pairs: "over 270k" and "330k", section 5
    "dpo-8b": (dpo.main, prefer("8b", lr=5e-7, pairs=270_000)),
    "dpo-70b": (dpo.main, prefer("70b", lr=2e-7, pairs=330_000)),
}

if __name__ == "__main__":
    cli.run_stage(STAGES)
