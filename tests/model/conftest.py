"""Fixtures of the tests of models."""

import pytest

from dsmoe_jax.model.transformer import Transformer
from tests.model.tiny_model import make


@pytest.fixture(scope="package")
def model() -> Transformer:
    """The tiny model; tests must not change it."""
    return make()
