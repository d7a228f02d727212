"""Fixtures of the tests of models."""

import jax
import pytest
from tiny_model import make

from dsmoe_jax.model.transformer import Transformer


@pytest.fixture(scope="package", autouse=True)
def compiling_quickly():
    """A fifth of the time to compile; what is compiled need not be fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="package")
def model(compiling_quickly) -> Transformer:
    """The tiny model; tests must not change it."""
    return make()
