"""Rates of a step that learns from rollouts: tokens a second, operations a second, share of the devices' peak."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlhf_jax import models
from rlhf_jax.analysis import flops


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a step computes, from which its rates follow."""

    policy: models.Config
    critic: models.Config | None  # of a critic with a trunk of its own
    rewards: tuple[models.Config, ...]
    batch: int  # episodes
    epochs: int  # passes over them
    text_rows: int  # rows of pretraining text that all updates of a step learn from
    text_length: int  # their columns
    peak: float  # operations a second, `flops.peak`

    def __call__(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Tokens a second of each part of a step, tera-operations a second, and their share of the peak.

        From the metrics of the step, by `flops.forward`. "generate" counts new tokens, and computes what reference and
        critic say of them too; "score" counts prompts and responses, "update" both as often as they are learnt from,
        and pretraining text.
        """
        new = metrics["response/tokens"]
        tokens = new + metrics["prompt/tokens"]
        answers = flops.forward(self.policy, self.batch, tokens, new)
        values = self._scalar(self.critic, tokens, new)
        text = flops.forward(self.policy, self.text_rows, self.text_length, max(self.text_length - 1, 0))
        learnt = self.epochs * (answers + values) + text
        rewards = sum(self._scalar(reward, tokens, 1) for reward in self.rewards)
        text_tokens = self.text_rows * self.text_length
        parts = {
            "generate": (self.batch * new, 2 * answers + values),
            "score": (self.batch * tokens, rewards),
            "update": (self.batch * tokens * self.epochs + text_tokens, 3 * learnt),
        }
        rates: dict[str, float] = {}
        for part, (count, operations) in parts.items():
            seconds = max(metrics[f"seconds/{part}"], 1e-9)
            rates[f"tokens_per_s/{part}"] = count / seconds
            rates[f"tflops/{part}"] = operations / seconds / 1e12
            rates[f"mfu/{part}"] = operations / seconds / self.peak
        return rates

    def _scalar(self, config: models.Config | None, tokens: float, read: float | int) -> float:
        """Operations of a scalar model, if there is one, that is read in the last columns."""
        return flops.forward(config, self.batch, tokens, read, logits=False) if config else 0.0
