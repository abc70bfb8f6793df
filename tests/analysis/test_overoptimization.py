import numpy as np
import pytest

from rlhf_jax.analysis import overoptimization
from tests.oracles import Case

CURVES = {"gao_bon": overoptimization.best_of_n, "gao_rl": overoptimization.reinforcement}


@pytest.mark.parametrize("name", CURVES)
def test_curve_oracle(name):
    case = Case(name)
    d = np.asarray(case.raw["inputs"]["d"])
    case.check(reward=CURVES[name](d, case["a"], case["b"]))


@pytest.mark.parametrize("name", CURVES)
def test_fit_oracle(name):
    case = Case(f"{name}_fit")
    d, reward = (np.asarray(case.raw["inputs"][key]) for key in ("d", "reward"))
    a, b = overoptimization.fit(CURVES[name], d, reward)
    case.check(a=a, b=b, rss=np.sum((reward - CURVES[name](d, a, b)) ** 2))


def test_points_on_a_curve_give_its_coefficients():
    d = np.array([0.0, 0.5, 1.0, 2.0])
    for curve in CURVES.values():
        np.testing.assert_allclose(overoptimization.fit(curve, d, curve(d, 1.25, 0.5)), (1.25, 0.5), rtol=1e-9)
    with pytest.raises(ValueError, match="two distances"):
        overoptimization.fit(overoptimization.best_of_n, np.array([0.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.0]))
