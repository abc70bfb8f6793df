"""The mutants of scripts/mutate.py fit the source as it is. (Running them all takes an hour: that is the script's.)"""

import ast

import pytest

from scripts import mutate


@pytest.mark.parametrize("mutant", mutate.MUTANTS, ids=lambda m: f"{m.module}.{m.function}: {m.old}"[:60])
def test_the_old_text_of_a_mutant_stands_once_in_its_function(mutant):
    source = (mutate.ROOT / "rlhf_jax" / f"{mutant.module}.py").read_text()
    changed = mutate.changed(mutant)
    assert changed != source and ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    other = lambda text: [
        ast.dump(node) for node in ast.parse(text).body if getattr(node, "name", None) != mutant.function
    ]
    assert other(changed) == other(source)  # nothing but the function is changed


def test_a_mutant_that_no_longer_fits_is_refused():
    with pytest.raises(SystemExit, match="the old text stands 0 times"):
        mutate.changed(mutate.Mutant("logprobs", "entropy", "no such text", ""))
    with pytest.raises(SystemExit, match="no function forgotten"):
        mutate.changed(mutate.Mutant("logprobs", "forgotten", "/ temperature", ""))


@pytest.mark.parametrize("module", dict.fromkeys(mutant.module for mutant in mutate.MUTANTS))
def test_each_module_has_tests_that_can_catch_its_mutants(module):
    assert mutate.tests_of(module, mutate.ROOT)
