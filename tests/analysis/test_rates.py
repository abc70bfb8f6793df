import pytest

from rlhf_jax.analysis import flops, rates
from tests import tiny


def test_a_prompt_that_answers_share_is_counted_once():
    """Of eight episodes in groups of four, six read no prompt: their answers alone, which attend to it."""
    sizes = {"critic": None, "batch": 8, "epochs": 2, "text_rows": 0, "text_length": 0, "peak": 1.0}
    metrics = {"response/tokens": 5.0, "prompt/tokens": 12.0} | {
        f"seconds/{part}": 1.0 for part in ("generate", "score", "update")
    }
    apart, together = (
        rates.Rates(policy=tiny.LLAMA, rewards=(tiny.GPT,), group=group, **sizes)(metrics) for group in (1, 4)
    )
    saved = {part: apart[f"mfu/{part}"] - together[f"mfu/{part}"] for part in ("generate", "score", "update")}
    llama, gpt = (flops.forward(config, 6, 12, 0, logits=False) for config in (tiny.LLAMA, tiny.GPT))
    assert saved == pytest.approx({"generate": 2 * llama, "score": gpt, "update": 6 * llama})
    assert apart["tokens_per_s/score"] == together["tokens_per_s/score"]
