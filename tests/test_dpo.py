import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import dpo
from tests.oracles import Case


def test_by_hand():
    terms = [jnp.array([x]) for x in (-3.5, -4.0, -4.5, -3.0)]  # margin = .5 * ((-3.5 + 4.5) - (-4 + 3)) = 1
    np.testing.assert_allclose(dpo.loss(*terms, beta=0.5), np.log1p(np.exp(-1.0)), rtol=1e-6)
    smoothed = 0.9 * np.log1p(np.exp(-1.0)) + 0.1 * np.log1p(np.exp(1.0))
    np.testing.assert_allclose(dpo.loss(*terms, beta=0.5, label_smoothing=0.1), smoothed, rtol=1e-6)


@pytest.mark.parametrize("smoothing", ["0.0", "0.1"])
def test_oracle(smoothing):
    case = Case(f"dpo_label_smoothing_{smoothing}")
    args = [case[k] for k in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")]
    loss, (chosen, rejected) = jax.value_and_grad(dpo.loss, argnums=(0, 1))(
        *args, case["beta"], case["label_smoothing"]
    )
    case.check(loss=loss, grad_policy_chosen=chosen, grad_policy_rejected=rejected)
