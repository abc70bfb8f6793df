"""Expected values computed elsewhere in float64, for tests that find them beside the repository."""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@functools.cache
def _cases() -> dict:
    files = (SHARED / "oracles" / name for name in ("maths.json", "maths2.json"))
    return {case["name"]: case for path in files for case in json.loads(path.read_text())["cases"]}


class Case:
    """One case: inputs as float32/int32/bool arrays, and a comparison within its stated tolerance."""

    def __init__(self, name: str) -> None:
        if not (SHARED / "oracles" / "maths2.json").exists():
            pytest.skip("needs ../shared/oracles/maths.json and maths2.json")
        self.raw = _cases()[name]

    def __getitem__(self, key: str):
        value = self.raw["inputs"][key]
        if key.endswith("mask"):
            return jnp.array(value, bool)
        array = np.array(value)
        return jnp.array(array, jnp.int32 if array.dtype.kind == "i" else jnp.float32) if array.ndim else value

    def check(self, **actual) -> None:
        """Each keyword against the expected value of that name; `None` entries are undefined and not compared."""
        for key, value in actual.items():
            expected = np.array(self.raw["expected"][key], float)
            defined = ~np.isnan(expected)
            largest = np.max(np.abs(expected[defined]), initial=0.0)
            tolerance = max(1e-5, 20 * self.raw["float32_error"]) * largest + 1e-12
            value = np.asarray(value, float)
            assert value.shape == expected.shape, key
            np.testing.assert_allclose(value[defined], expected[defined], rtol=0, atol=tolerance, err_msg=key)
