"""Models of a few layers, compiled quickly."""

import pytest

from dsmoe_jax.model import transformer


@pytest.fixture(autouse=True)
def one_layer_at_a_time(monkeypatch):
    """Compiles a layer once, not as often as there are layers; the numbers are the same."""
    monkeypatch.setattr(transformer, "UNROLLED_LAYERS", 0)
