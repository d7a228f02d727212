"""Models of a few layers, compiled quickly; their tensors are read and written in many pieces."""

import pytest

from dsmoe_jax.hf import tensors


@pytest.fixture(autouse=True)
def one_layer_at_a_time(monkeypatch):
    """Compiles a layer once, not as often as there are layers; the numbers are the same."""
    monkeypatch.setattr("dsmoe_jax.model.scanned.UNROLLED_LAYERS", 0)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Tensors of a kilobyte are cut up as those of a released model are."""
    monkeypatch.setattr(tensors, "PIECE_BYTES", 1000)
