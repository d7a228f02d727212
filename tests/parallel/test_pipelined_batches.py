"""How a batch is cut into the micro-batches of a pipeline, and what each of them is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from dsmoe_jax.model import pipelined
from dsmoe_jax.model.block import EveryLayer, OneLayer
from dsmoe_jax.moe.types import RecordedRouting
from dsmoe_jax.nn.attention import CausalMask
from dsmoe_jax.parallel.pipeline import Tick
from dsmoe_jax.parallel.sharding import batch_sharding, constrain
from dsmoe_jax.planning import collectives


def inputs_of_every_layer(ids_BS: jax.Array, sequence_ids_B: jax.Array | None) -> EveryLayer:
    """Inputs in which every token is valid and of one document."""
    segments_BS = jnp.ones_like(ids_BS)
    return EveryLayer(
        token_ids_BS=ids_BS,
        positions_BS=ids_BS,
        mask=CausalMask(segments_BS),
        valid_BS=segments_BS > 0,
        segment_ids_BS=segments_BS,
        sequence_ids_B=sequence_ids_B,
        cache_length=0,
        task_ids_BS=None,
    )


def test_no_token_of_the_bubble_is_valid():
    """Its results are thrown away, but an expert must not compute it nor a chip receive it."""
    every = inputs_of_every_layer(jnp.zeros((2, 3), jnp.int32), None)
    for active in (True, False):
        tick = Tick(jnp.bool_(active), jnp.int32(0), jnp.int32(0))
        assert bool(pipelined.of_tick(every, tick).valid_BS.all()) is active
        assert bool(pipelined.of_tick(every, tick).valid_BS.any()) is active


def test_a_tick_replays_the_routing_of_its_micro_batch():
    """Three micro-batches of two sequences, in the order in which tokens are cut."""
    ids_BS = jnp.arange(6 * 4).reshape(6, 4)
    ids_LBSK = jnp.stack([ids_BS, 100 + ids_BS])[..., None]
    routing = RecordedRouting(*[ids_LBSK + 1000 * i for i in range(4)])
    every = pipelined.cut_inputs(inputs_of_every_layer(ids_BS, None), 3)
    layers = pipelined.cut_layers(OneLayer(replayed=routing), 3)
    sequence_ids_nb = every.sequence_ids_B
    assert sequence_ids_nb is not None
    assert np.array_equal(np.sort(sequence_ids_nb.reshape(-1)), np.arange(6))
    for micro_batch in range(3):
        tick = Tick(jnp.bool_(True), jnp.int32(0), jnp.int32(micro_batch))
        replayed = pipelined.layers_of_tick(layers, tick).replayed
        assert replayed is not None
        tokens_bS = every.token_ids_BS[micro_batch]
        assert np.array_equal(tokens_bS[:, 0] // 4, sequence_ids_nb[micro_batch])
        assert np.array_equal(replayed.ids[..., 0], [tokens_bS, 100 + tokens_bS])
        assert np.array_equal(replayed.chosen, 3000 + replayed.ids)


@pytest.mark.eight_devices
@pytest.mark.parametrize("n", [4, 8])
def test_no_row_leaves_its_device_to_be_in_a_micro_batch(n):
    """And `whole` puts them back; the micro-batches of a stage are split over its devices."""
    mesh = jax.make_mesh((4, 2), ("stage", "data"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        x_BS = jax.device_put(np.arange(16 * 3).reshape(16, 3), batch_sharding(mesh))
        cut = jax.jit(lambda x_BS: constrain(pipelined.cut(x_BS, n), "UBS"))
        back = jax.jit(lambda x_BS: constrain(pipelined.whole(cut(x_BS)), "BS"))
        for function in (cut, back):
            text = function.lower(x_BS).compile().as_text()
            assert text is not None
            assert not collectives.traffic(text)
        assert cut(x_BS).shape == (n, 16 // n, 3)
        assert np.array_equal(back(x_BS), x_BS)
        assert np.array_equal(np.sort(cut(x_BS).reshape(16, 3), axis=0), x_BS)
