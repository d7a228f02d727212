"""Every dispatcher, every backend, every mesh of eight devices against the reference on one device:
values and every gradient.

There are too many cases for every day: a part of them in which every pair of values occurs (a
dispatcher with a size of an axis, a backend with a way to make room ...), and every mesh.  All:

    python -m pytest -m "full or not full" tests/moe/test_dispatch_product.py

Shapes: T tokens, D hidden, F expert width, E experts, K activated, P devices of the axis `expert`.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.config import DispatchConfig, MoEConfig
from dsmoe_jax.moe import dispatch, experts, kernels, reference
from dsmoe_jax.moe.routed import routed_experts
from dsmoe_jax.moe.types import Routing

T, D, F, E, K = 48, 8, 8, 8, 3
AXES = ("data", "fsdp", "expert", "tensor")
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) == 8]
ROOM = {  # how a device makes room for what comes
    "worst case": {},
    "chunks": {"chunks": 3},
}


def product():
    """All that is allowed: (dispatcher, backend, room, *mesh)."""
    return [
        (name, backend, room, *mesh)
        for mesh in MESHES
        for name in dispatch.DISPATCHERS
        for backend in experts.BACKENDS
        for room in ROOM
        if dispatch.DISPATCHERS[name].splits_experts or mesh[AXES.index("expert")] == 1
    ]


def covering(cases):
    """Some of the cases: every pair of values that occurs at all occurs there, and every mesh."""
    has = {c: {c[3:], *itertools.combinations(enumerate(c), 2)} for c in cases}
    left, chosen = set().union(*has.values()), []
    while left:
        chosen.append(max(cases, key=lambda c: len(has[c] & left)))
        left -= has[chosen[-1]]
    return chosen


EVERY_DAY = covering(product())
FULL = [
    pytest.param(*case, marks=() if case in EVERY_DAY else pytest.mark.full) for case in product()
]


def routings():
    """ids_TK by name: the shapes that break dispatchers; E is unassigned."""
    rng = np.random.default_rng(0)

    def draw(p):
        return np.stack([rng.choice(E, K, replace=False, p=p) for _ in range(T)])

    return {
        "uniform": draw(None),
        "skewed": draw([0.5, 0.2, 0.1, 0.1, 0.04, 0.03, 0.02, 0.01]),
        "one expert takes all": np.tile([5, E, E], (T, 1)),
        "one device takes all": np.tile([1, 0, 2], (T, 1)),
        "empty experts and devices": np.tile([7, 1, 3], (T, 1)),
        "some unassigned": np.where(rng.random((T, K)) < 0.4, E, draw(None)),
        "all unassigned": np.full((T, K), E),
    }


@functools.cache
def arrays():
    """x_TD, router_ED, gates_TK, weights, and dy_TD, on the host: every mesh gets its own copy."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    weights = experts.ExpertWeights(normal(E, F, D), normal(E, F, D), normal(E, D, F))
    return normal(T, D), normal(E, D), rng.random((T, K), np.float32), weights, normal(T, D)


def with_gradients(routed):
    """`ids_TK -> (y, gradients), aux` of a layer: router, then `routed(x, routing, weights)`.

    The gates are the router's affinities plus a part of their own, whose gradient is theirs.
    """

    def layer(ids, x, router, gates, weights):
        affinity_TE = jax.nn.softmax(x @ router.T)
        chosen_TK = jnp.take_along_axis(affinity_TE, jnp.minimum(ids, E - 1), axis=1)
        gates = jnp.where(ids < E, chosen_TK + gates, 0)
        return routed(x, Routing(ids, gates, None), weights)

    @jax.jit
    def run(ids, x, router, gates, weights, dy):
        apply = functools.partial(layer, ids)
        y, pull, aux = jax.vjp(apply, x, router, gates, weights, has_aux=True)
        names = ("d_x", "d_router", "d_gates", "d_weights")
        return {"y": y, **dict(zip(names, pull(dy), strict=True))}, aux

    return lambda ids: jax.device_get(run(np.asarray(ids, np.int32), *arrays()))


oracle = with_gradients(lambda *args: (reference.moe_layer(*args), None))


def config(name, backend="loop", **settings):
    """A layer with a dispatcher and a backend."""
    return MoEConfig(
        E, 0, K, F, dispatch=DispatchConfig(name=name, **settings), expert_backend=backend
    )


def routed(moe):
    """`(x, routing, weights) -> (y, report)` on the ambient mesh, all rows by JAX."""
    return lambda x, routing, w: routed_experts(x, routing, w, moe, kernels.JAX_ROWS)


def dispatched(name, backend, room):
    """The same by a dispatcher, on the ambient mesh."""
    return with_gradients(routed(config(name, backend, **ROOM[room])))


def compare(ids, found, mesh):
    """With the oracle, and what the dispatch reports with a count in numpy."""
    result, report = found
    wanted, _ = oracle(ids)
    for (path, value), got in zip(
        jax.tree.leaves_with_path(wanted), jax.tree.leaves(result), strict=True
    ):
        key = jax.tree_util.keystr(path)
        np.testing.assert_allclose(got, value, atol=1e-4, rtol=1e-4, err_msg=key)
    np.testing.assert_array_equal(report.computed_E, np.bincount(ids.ravel(), minlength=E + 1)[:E])
    assert report.exchanged_rows == count(ids, mesh)


def count(ids, mesh):
    """Rows that must travel, each once to a device."""
    data, fsdp, n_devices, _ = mesh
    shape = (data * fsdp, n_devices, -1, K)  # shards are data-major
    device = np.where(ids < E, ids // (E // n_devices), n_devices).reshape(shape)
    on_P = device[..., None] == np.arange(n_devices)
    elsewhere = ~np.eye(n_devices, dtype=bool)[None, :, None]
    return (on_P.any(axis=-2) & elsewhere).sum()


def set_mesh(mesh):
    auto = (jax.sharding.AxisType.Auto,) * 4
    return jax.set_mesh(jax.make_mesh(mesh, AXES, axis_types=auto))


@pytest.mark.eight_devices
@pytest.mark.parametrize(("name", "backend", "room", *AXES), FULL)
def test_agrees_with_the_dense_loop(name, backend, room, data, fsdp, expert, tensor):
    mesh = (data, fsdp, expert, tensor)
    run = dispatched(name, backend, room)
    with set_mesh(mesh):
        for ids in routings().values():
            compare(ids, run(ids), mesh)


@st.composite
def any_routing(draw):
    """Each token draws from a few experts, whatever they are, and may have fewer than K."""
    favoured = draw(st.lists(st.integers(0, E - 1), min_size=1, unique=True))
    most, fewer = min(K, len(favoured)), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    ids = np.full((T, K), E)
    for token in range(T):
        n = rng.integers(0, most, endpoint=True) if fewer else most
        ids[token, rng.choice(K, n, replace=False)] = rng.choice(favoured, n, replace=False)
    return ids


@pytest.mark.eight_devices
@pytest.mark.parametrize("name", [n for n, d in dispatch.DISPATCHERS.items() if d.needs_mesh])
def test_any_routing(name):
    mesh = (1, 2, 4, 1)
    run = dispatched(name, "ragged_dot", "chunks")

    @settings(max_examples=25)
    @given(any_routing())
    def check(ids):
        compare(ids, run(ids), mesh)

    with set_mesh(mesh):
        check()


def test_the_cases_of_every_day_have_every_mesh_and_every_pair():
    assert {case[3:] for case in EVERY_DAY} == set(MESHES)

    def pairs(cases):
        return {p for c in cases for p in itertools.combinations(enumerate(c), 2)}

    assert pairs(EVERY_DAY) == pairs(product())
    assert len(MESHES) == 20
    assert len(EVERY_DAY) < len(product()) / 15
