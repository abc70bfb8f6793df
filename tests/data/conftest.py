"""A tokenizer of the words that rows of tests are made of."""

import pytest

from rlhf_jax.data import tokenizer as tokenizer_lib
from tests.data.examples import WORDS


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokenizer_lib.Tokenizer:
    return tokenizer_lib.train([" ".join(WORDS)] * 3, 300, tmp_path_factory.mktemp("tokenizer"))
