"""Noise belongs to a sequence of the global batch, however the batch is cut up or spread out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsmoe_jax.moe.types import RouterInputs
from dsmoe_jax.training.start import init_state
from dsmoe_jax.training.step import make_train_step
from tests.tools.tiny import tiny
from tests.tools.trees import REORDERED
from tests.training.test_step import B, S, synthetic_batch

# Without the noise of a router, other tokens change nothing about a token's experts: the loads of
# one step are the same in any number of micro-batches if the noise is.
RANDOM = {
    "jitter": {"router.jitter": 0.9},
    "second": {"router.name": "gshard", "router.options.random_second_expert": True},
    "noisy": {"router.name": "noisy_topk"},
    "drawn": {"router.name": "reinforce"},
    "uniform": {"router.name": "uniform", "num_experts_per_tok": 3, "balance.expert": None,
                "balance.router_z": None},
}  # fmt: skip


def config_of(name, n_micro):
    overrides = {f"model.moe.{key}": value for key, value in RANDOM[name].items()}
    overrides |= {"train.accumulation_steps": n_micro, "model.num_hidden_layers": 1}
    return tiny(**overrides)


@functools.cache
def initial_state(name):
    return init_state(config_of(name, 1))


@functools.cache
def compiled(name, n_micro):
    train_step = make_train_step(config_of(name, n_micro), jnp.ones(512))

    @jax.jit
    def load_and_loss(state, batch):  # no more, so that nothing else is compiled
        _, metrics = train_step(state, batch)
        return metrics.router.load_E, metrics.loss

    return load_and_loss


def first_step(name, n_micro=1, step=0, batch=None):
    state = initial_state(name)._replace(step=jnp.int32(step))
    load, loss = compiled(name, n_micro)(state, batch or synthetic_batch())
    return np.asarray(load), float(loss)


@pytest.mark.parametrize("name", list(RANDOM))
def test_micro_batches_do_not_change_the_noise(name):
    load, loss = first_step(name)
    for n_micro in (2, 4) if name == "noisy" else (4,):
        other, other_loss = first_step(name, n_micro)
        np.testing.assert_array_equal(other, load)
        np.testing.assert_allclose(other_loss, loss, rtol=REORDERED)
    if name != "uniform":
        assert np.abs(first_step(name, step=1)[0] - load).max() > 0, "there is noise"


def test_sequences_draw_different_noise():
    """Equal sequences of a batch do not all take the same experts."""
    batch = jax.tree.map(lambda x: np.tile(x[:1], (B, 1)), synthetic_batch())
    load, _ = first_step("noisy", batch=batch)
    assert (load % B).any(), "loads of equal sequences would be multiples of B"
    assert load.sum() == B * S * 2


@pytest.mark.eight_devices
def test_devices_do_not_change_the_noise():
    @jax.jit
    def draw(tokens, places, key):
        inputs = RouterInputs(tokens.reshape(-1), rng=key, sequence_ids_B=places)
        return inputs.draw(jax.random.normal, 5)

    arrays, key = (jnp.zeros((16, 6), jnp.int32), jnp.arange(16)), jax.random.key(3)
    results = []
    for n in (1, 2, 8):
        mesh = jax.make_mesh((n,), ("data",), (AxisType.Auto,), devices=jax.devices()[:n])
        placed = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))
        results.append(np.asarray(draw(*placed, key)))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    assert len(np.unique(results[0])) == results[0].size, "all different"
