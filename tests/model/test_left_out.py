"""Experts left out of single layers of a model; tests/moe/test_interventions.py has the layer.

Shapes: L MoE layers, E routed experts, B sequences, S their length, K activated experts.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import MeshConfig
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.parallel.mesh import make_mesh
from tests.model.tiny_model import V, make

L, E = 2, 8
TOKENS = jax.random.randint(jax.random.key(5), (8, 12), 0, V)
SECOND_LAYER = np.arange(E) == np.array([[-1], [3]])


@pytest.mark.eight_devices
def test_each_layer_leaves_out_its_own_on_a_mesh_as_on_one_device():
    model = make(**{"model.moe.n_routed_experts": E, "model.moe.dispatch.name": "auto"})
    graph, state = jax.device_get(nnx.split(model))

    def score(left_out_LE):
        inputs = ModelInputs(TOKENS, left_out_LE=left_out_LE)
        found = nnx.merge(graph, state).score(inputs, jnp.roll(TOKENS, -1, axis=1))
        return found.nll_BS, found.report.recorded.ids

    found = []
    for mesh in (None, make_mesh(MeshConfig(data=1, fsdp=2, expert=4), jax.devices()[:8])):
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            jitted = jax.jit(score)
            masks = np.zeros((L, E), bool), SECOND_LAYER
            found.append([jax.device_get(jitted(left_out_LE)) for left_out_LE in masks])
    (plain_BS, ids_LBSK), (nll_BS, left_LBSK) = found[0]
    assert (ids_LBSK[1] == 3).any()
    np.testing.assert_array_equal(left_LBSK[0], ids_LBSK[0])
    assert not (left_LBSK[1] == 3).any()
    assert (nll_BS != plain_BS).any()
    for one, eight in zip(*found, strict=True):
        np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
        np.testing.assert_array_equal(eight[1], one[1])


def test_masks_of_other_layers_are_refused():
    with pytest.raises(AssertionError, match="shape"):
        ModelInputs(TOKENS, left_out_LE=SECOND_LAYER[:1]).assert_shapes(L)
