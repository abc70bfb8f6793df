"""Versions of the guidelines."""

from rlhf_jax.people import guidelines
from rlhf_jax.people.store import Store
from tests.people.labelling import person


def test_guidelines_have_versions_that_people_acknowledge(store: Store):
    ann = person(store, "ann")
    assert guidelines.has_acknowledged(store, ann)
    assert guidelines.add(store, "Be kind.") == 1 == guidelines.add(store, "Be kind.\n")
    assert not guidelines.has_acknowledged(store, ann)
    guidelines.acknowledge(store, ann, 1)
    assert guidelines.has_acknowledged(store, ann)
    assert guidelines.add(store, "Be kind and fair.") == 2
    assert not guidelines.has_acknowledged(store, ann)
