import numpy as np
import pytest

from rlhf_jax.analysis import overoptimization
from tests.oracles import cases

CURVES = {"gao_bon": overoptimization.best_of_n, "gao_rl": overoptimization.reinforcement}


@cases(*CURVES)
def test_curve_oracle(case):
    d = np.asarray(case.raw["inputs"]["d"])
    case.check(reward=CURVES[case.name](d, case["a"], case["b"]))


@cases(*[f"{name}_fit" for name in CURVES])
def test_fit_oracle(case):
    curve = CURVES[case.name.removesuffix("_fit")]
    d, reward = (np.asarray(case.raw["inputs"][key]) for key in ("d", "reward"))
    a, b = overoptimization.fit(curve, d, reward)
    case.check(a=a, b=b, rss=np.sum((reward - curve(d, a, b)) ** 2))


def test_points_on_a_curve_give_its_coefficients():
    d = np.array([0.0, 0.5, 1.0, 2.0])
    for curve in CURVES.values():
        np.testing.assert_allclose(overoptimization.fit(curve, d, curve(d, 1.25, 0.5)), (1.25, 0.5), rtol=1e-9)
    with pytest.raises(ValueError, match="two distances"):
        overoptimization.fit(overoptimization.best_of_n, np.array([0.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.0]))
