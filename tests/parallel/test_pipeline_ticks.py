"""The pipeline against a plain loop over layers and micro-batches: values and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from dsmoe_jax.parallel import pipeline
from dsmoe_jax.parallel.pipeline import Schedule

LAYERS, N, B, D = 8, 8, 4, 6


def layer(x_bD, w_DD, shift_D, of_layer):
    """A layer with a report that depends on the input of the micro-batch and of the layer."""
    y_bD = x_bD + jnp.tanh(x_bD @ w_DD + shift_D)
    return y_bD, {"sum": (y_bD * of_layer).sum(), "rows": y_bD[:, 0]}


def body(x, shift_D, w_lRDD, tick, of_layers):
    @jax.checkpoint
    def one(x, scanned):
        w_RDD, of_layer = scanned
        return layer(x, pipeline.pick(w_RDD, tick), shift_D, of_layer)

    return jax.lax.scan(one, x, (w_lRDD, of_layers))


def loop(n, x, shifts, w, of_layers):
    """The oracle: one micro-batch after the other, one layer after the other."""
    ys, outputs = [], []
    for m in range(n):
        y, of_micro = x[m], []
        for i in range(LAYERS):
            y, out = layer(y, w[i], shifts[m], of_layers[i])
            of_micro.append(out)
        ys.append(y)
        outputs.append(jax.tree.map(lambda *a: jnp.stack(a), *of_micro))
    return jnp.stack(ys), jax.tree.map(lambda *a: jnp.stack(a, axis=1), *outputs)


def value_and_gradients(run, n):
    rng = np.random.default_rng(0)
    x, shifts, w = (
        rng.standard_normal(shape).astype(np.float32) * 0.5
        for shape in ((n, B, D), (n, D), (LAYERS, D, D))
    )
    weight = rng.standard_normal((n, B, D)).astype(np.float32)
    of_layers = np.arange(1.0, LAYERS + 1, dtype=np.float32)

    def loss(x, shifts, w):
        y, out = run(x, shifts, w, of_layers)
        # Every micro-batch and layer counts with another weight: none can stand for another.
        by_place = 1 + jnp.arange(LAYERS * n).reshape(LAYERS, n)
        total = (y * weight).sum() + 0.01 * (out["sum"] * by_place).sum()
        return total + (out["rows"] * by_place[..., None]).sum() * 0.01, (y, out)

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return jax.tree.map(np.asarray, grad(x, shifts, w))


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    ("s", "repeats", "n"),
    [(2, 1, 2), (2, 2, 4), (4, 1, 8), (4, 2, 4), (2, 4, 8), (8, 1, 8), (4, 1, 3)],
)
def test_a_pipeline_is_the_loop(s, repeats, n):
    want = value_and_gradients(lambda *a: loop(n, *a), n)
    mesh = jax.make_mesh((s, 8 // s), ("stage", "data"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        found = value_and_gradients(
            lambda x, shifts, w, of_layers: pipeline.run(
                body, Schedule(n, repeats), x, shifts, w, of_layers, "BD"
            ),
            n,
        )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("s", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("repeats", [2, 3, 4, 6, 9])
def test_moves_bring_every_group_to_its_stage(s, repeats):
    landed = {}
    for move in pipeline.moves(s, repeats):
        assert sorted(to for _, to, _ in move) == list(range(s)), "a permutation"
        for stage, (place, to, repeat) in enumerate(move):
            landed[to, repeat] = stage * repeats + place
    assert landed == {(g % s, g // s): g for g in range(s * repeats)}


def test_the_bubble():
    """Counted in a table of stages and ticks."""
    for s, repeats, n in [(1, 1, 1), (4, 1, 4), (4, 3, 8), (3, 2, 3)]:
        ticks = Schedule(n, repeats).ticks(s)
        table = np.zeros((s, ticks), int)
        for stage in range(s):
            table[stage, stage : stage + repeats * n] = 1
        assert table[:, -1].any()
        assert Schedule(n, repeats).bubble(s) == pytest.approx(1 - table.mean())
