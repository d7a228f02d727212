"""Inputs from a batch, and the shapes that they must have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.model.build import abstract_model, model_shapes
from dsmoe_jax.model.types import ModelInputs
from tests.model.tiny_model import config_of

B, S, LAYERS, K = 2, 5, 3, 4


def batch(**extra):
    arrays = {name: np.arange(B * S).reshape(B, S) + i for i, name in enumerate(NAMES)}
    return {**arrays, "loss_mask_BS": np.ones((B, S), np.float32), **extra}


NAMES = ("tokens_BS", "segment_ids_BS", "positions_BS", "targets_BS")


def test_inputs_of_a_batch():
    rng = jax.random.key(0)
    inputs = ModelInputs.of_batch(batch(), jnp.array([3, 5]), rng)
    assert inputs.rng is rng
    assert inputs.replayed is None
    assert inputs.sequence_ids_B.tolist() == [3, 5]
    for name in NAMES[:3]:
        np.testing.assert_array_equal(getattr(inputs, name), batch()[name])


def test_recorded_routing_of_a_batch_is_replayed():
    ids = np.arange(B * LAYERS * S * K).reshape(B, LAYERS, S, K)
    recorded = {"replayed_ids_BLSK": ids, "replayed_gates_BLSK": ids / 2}
    recorded |= {"replayed_sent_BLSK": ids + 1, "replayed_chosen_BLSK": ids + 2}
    inputs = ModelInputs.of_batch(batch(**recorded))
    np.testing.assert_array_equal(inputs.replayed.ids, ids)
    np.testing.assert_array_equal(inputs.replayed.gates, ids / 2)
    np.testing.assert_array_equal(inputs.replayed.sent, ids + 1)
    np.testing.assert_array_equal(inputs.replayed.chosen, ids + 2)
    inputs.assert_shapes(LAYERS)
    with pytest.raises(AssertionError, match="shape"):
        inputs.assert_shapes(LAYERS + 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens_BS": jnp.zeros((B * S,), jnp.int32)},
        {"segment_ids_BS": jnp.ones((B, S + 1), jnp.int32)},
        {"positions_BS": jnp.zeros((S,), jnp.int32)},
        {"sequence_ids_B": jnp.arange(B + 1)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_parts_of_another_shape_are_refused_when_a_model_is_traced(wrong):
    config = config_of().model
    inputs = ModelInputs(**{"tokens_BS": jnp.zeros((B, S), jnp.int32), **wrong})

    def run(params, other):
        return nnx.merge(abstract_model(config), params, other).forward(inputs).logits_BSV

    with pytest.raises(AssertionError, match=r"shape|rank"):
        jax.eval_shape(run, *model_shapes(config))
