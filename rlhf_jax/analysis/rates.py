"""Rates of a step that trains on rollouts: tokens a second, operations a second, model FLOPs utilisation (MFU)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlhf_jax import models
from rlhf_jax.analysis import flops


@dataclasses.dataclass(frozen=True)
class Rates:
    """The sizes of a step, from which its rates follow; calling it computes them from the step's metrics."""

    policy: models.Config
    critic: models.Config | None  # architecture of a separate critic; None: a head on the policy
    rewards: tuple[models.Config, ...]  # architectures of the reward models
    batch: int  # episodes a step
    epochs: int  # passes of training over the episodes
    text_rows: int  # rows of pretraining text in all updates of a step together
    text_length: int  # tokens in a row of pretraining text
    peak: float  # operations a second of the devices, from `flops.peak`
    group: int = 1  # episodes that compute their prompt together
    learnt: float = 1.0  # share of the episodes that the updates read

    def __call__(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The metrics tokens_per_s/, tflops/ and mfu/ of each part of a step: generate, score and update.

        Operations are counted by `flops.forward`. "generate" counts new tokens, and its operations include the
        log-probabilities of the reference and the values; "score" counts tokens of prompts and responses; "update"
        counts these once per epoch, of the episodes that it reads, and pretraining text.
        """
        new = metrics["response/tokens"]
        tokens = new + metrics["prompt/tokens"]
        again = self.batch * (1 - 1 / self.group)  # rows whose prompt is not computed, since that of another row is
        spared = lambda config: flops.forward(config, again, metrics["prompt/tokens"], 0, logits=False)
        policy = flops.forward(self.policy, self.batch, tokens, new) - spared(self.policy)
        values = self._scalar(self.critic, tokens, new)
        text = flops.forward(self.policy, self.text_rows, self.text_length, max(self.text_length - 1, 0))
        passes = self.epochs * self.learnt
        trained = passes * (policy + values) + text
        rewards = sum(self._scalar(reward, tokens, 1) - spared(reward) for reward in self.rewards)
        text_tokens = self.text_rows * self.text_length
        parts = {
            "generate": (self.batch * new, 2 * policy + values),
            "score": (self.batch * tokens, rewards),
            "update": (self.batch * tokens * passes + text_tokens, 3 * trained),
        }
        rates: dict[str, float] = {}
        for part, (count, operations) in parts.items():
            seconds = max(metrics[f"seconds/{part}"], 1e-9)
            rates[f"tokens_per_s/{part}"] = count / seconds
            rates[f"tflops/{part}"] = operations / seconds / 1e12
            rates[f"mfu/{part}"] = operations / seconds / self.peak
        return rates

    def _scalar(self, config: models.Config | None, tokens: float, read: int | float) -> float:
        """The operations of a model with a scalar head that is read in the last `read` columns; 0 without a model."""
        return flops.forward(config, self.batch, tokens, read, logits=False) if config else 0.0
