"""Tasks phrased as instructions: a source of questions, templates that phrase them, and the measure of an answer."""

from rlhf_jax.data.tasks.task import Example, Metric, Task, Template, in_words, with_reasoning

__all__ = ["Example", "Metric", "Task", "Template", "in_words", "with_reasoning"]
