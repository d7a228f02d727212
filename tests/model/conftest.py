"""Fixtures of the tests of models."""

import pytest
from tiny_model import make

from dsmoe_jax.model.transformer import Transformer


@pytest.fixture(scope="package")
def model() -> Transformer:
    """The tiny model; tests must not change it."""
    return make()
