"""What share of held-out problems does a model solve? (GSM8K, arXiv:2110.14168)

Data:    as `gsm8k_sft`
Run:     python -m experiments.published.gsm8k_evaluate --model runs/gsm8k_grpo/model --data "gsm8k:PATH[7000:]"
Parent:  evaluate
Result:  the tiny models of `gsm8k_sft`, `gsm8k_grpo` and `gsm8k_ppo`, --max-new-tokens 96, 126 problems: 1, 4 and 2
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from experiments.published import paths
from rlhf_jax import models, runs
from rlhf_jax.data import gsm8k, pipeline, sources
from rlhf_jax.devices import parallel
from rlhf_jax.rollouts import rollout, sampling
from rlhf_jax.runs import cli
from rlhf_jax.settings import Count, NonNegative
from rlhf_jax.types import named_key


@dataclasses.dataclass(frozen=True)
class Config(runs.Stage):
    """Defaults are for two CPU cores."""

    model: Path = Path("runs/gsm8k_sft/model")  # model directory to evaluate
    data: str = "gsm8k:PATH[7000:]"  # problems with their answers
    out: Path | None = None  # type: ignore[assignment]  # file for the result, JSON
    temperature: NonNegative = 0.0  # of the answers; 0 takes the likeliest token
    prompt_length: Count = 208  # tokens; longer problems are refused, and counted
    max_new_tokens: Count = 256  # tokens of an answer
    batch: Count = 64  # answers at once, over all devices


def main(cfg: Config) -> dict:
    """Evaluate, print, and write the result."""
    paths.check_given(cfg, Config(), paths.GSM8K, "data")
    layout = parallel.layout(cfg.devices)
    model = models.load(cfg.model, compute=cfg.compute, place=layout.sharding)
    tokenizer = models.tokenizer_of(model)
    rows = list(sources.rows(cfg.data, "prompts", data_dir=cfg.data_dir))
    score = gsm8k.score_text(rows)
    prompts, counts = pipeline.every_prompt(rows, tokenizer, length=cfg.prompt_length)
    print(f"{cfg.data}: {counts}")
    sampled = rollout.episodes(
        model,
        prompts,
        named_key(cfg.seed, "gsm8k_evaluate"),
        sampling.Config(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, eos_id=models.stop_ids(model)),
        batch=cfg.batch,
        layout=layout,
    )
    texts = rollout.texts(tokenizer, sampled.response_tokens, sampled.response_mask)
    asked = [rows[int(index)] for index in prompts.index]
    right = [score(row["prompt"], text) for row, text in zip(asked, texts, strict=True)]
    result: dict = {
        "accuracy": float(np.mean(right)),
        "problems": len(right),
        "marked": float(np.mean(["####" in text for text in texts])),
        "ended": float(sampled.ended.mean()),
        "answers": [
            {"prompt": row["prompt"][-1]["content"], "response": text, "answer": row["answer"], "right": bool(one)}
            for row, text, one in zip(asked[:20], texts, right, strict=False)
        ],
    }
    solved, marked, ended = (f"{100 * result[name]:.1f} %" for name in ("accuracy", "marked", "ended"))
    print(f"{solved} of {len(right)} problems solved; {marked} of the answers have a ####, {ended} end")
    if cfg.out:
        runs.write(cfg.out, json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    cli.run(main, Config())
