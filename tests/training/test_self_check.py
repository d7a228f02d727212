"""The start-up self-check finds what is broken on purpose, and names leg, devices and size.

Shapes: T tokens, R rows that a device receives, N assignments, D hidden, E experts, K activated.
"""

import re
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe import dispatch, experts, reference, room, routers
from dsmoe_jax.moe.layer import RouterVariable
from dsmoe_jax.moe.schedules import Progress
from dsmoe_jax.moe.types import Routing
from dsmoe_jax.parallel import hosts
from dsmoe_jax.training import invariants, router_state, self_check, trainer
from dsmoe_jax.training.devices import open_mesh
from dsmoe_jax.training.loop import train
from dsmoe_jax.training.self_check import comparison, dense_loop, small_layer
from tests.tools.tiny import FOR_EIGHT_DEVICES, tiny

# Small, because what takes time is to compile: two experts on each of four devices.
MESH = {"mesh.data": 2, "mesh.expert": 4}


def check(**changes):
    config = tiny(**{**FOR_EIGHT_DEVICES, **MESH, **changes})
    return self_check.self_check(config, open_mesh(config))


def refused(**changes):
    """The error, which is one line."""
    with pytest.raises(ValueError, match=r"^--self_check: router .*Nothing was written") as caught:
        check(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def devices(leg, error):
    """The devices that an error names for a leg."""
    found = re.search(rf"{leg} is [^;]*? on devices? ([\d, ]+)", error)
    return [int(n) for n in found[1].split(",")] if found else []


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    "changes",
    [
        {"model.moe.router.bias_update_speed": 0.001, "model.compute_dtype": "bfloat16"},
        {"model.moe.dispatch.name": "fixed_slots", "model.moe.drop.capacity_factor": 0.6,
         "model.moe.router.name": "noisy_topk", "mesh.expert": 2, "mesh.tensor": 2},
    ],
)  # fmt: skip
def test_what_is_right_passes(changes):
    line = check(**changes)
    name = changes.get("model.moe.router.name", "topk")
    assert line.startswith(f"self-check: router {name}, dispatcher ")
    assert "agree with the dense loop on each of 8 devices (" in line
    again = jax.jit(lambda: room.room((4,), jnp.float32))()
    assert not np.isnan(again).any(), "the poison stays in the check"


@pytest.mark.eight_devices
def test_gradients_that_are_wrong(monkeypatch, tmp_path):
    """Twice that of one matrix, and none of the router: the loss would look right."""

    @jax.custom_vjp
    def twice(w):
        return w

    twice.defvjp(lambda w: (w, None), lambda _, dw: (2 * dw,))

    def run(rows_ND, sizes_E, weights, *rest):
        weights = weights._replace(down_EDF=twice(weights.down_EDF))
        return experts.loop(rows_ND, sizes_E, weights, *rest)

    on_the_mesh(monkeypatch, lambda r: r._replace(gates_TK=jax.lax.stop_gradient(r.gates_TK)))
    monkeypatch.setitem(experts.BACKENDS, "loop", experts.Backend(run))
    with pytest.raises(ValueError, match=r"^--self_check: ") as caught:
        train(tiny(**FOR_EIGHT_DEVICES, **MESH), tmp_path / "run", progress=False)
    error = str(caught.value)
    assert devices("d-weights of down", error) == devices("router", error) == list(range(8))
    assert not devices("forward", error)
    assert not devices("d-weights of up", error)
    size = float(re.search(r"d-weights of down is off by ([\d.]+)", error)[1])
    assert 1 < size < 5, "an error as large as the gradient itself; of the largest row"
    assert not (tmp_path / "run").exists(), "nothing is written"


def on_the_mesh(monkeypatch, change):
    """The router topk, whose routing is another one where there is a mesh."""
    right = routers.ROUTERS["topk"]

    def route(*args):
        routing = right.route(*args)
        return routing if jax.sharding.get_abstract_mesh().empty else change(routing)

    monkeypatch.setitem(routers.ROUTERS, "topk", right._replace(route=route))


def broken_dispatcher(monkeypatch, change):
    """all_to_all, whose arrived rows are changed."""
    right = dispatch.DISPATCHERS["all_to_all"]

    def changed(*args):
        arrived = right.dispatch(*args)
        return arrived._replace(rows_RD=change(arrived.rows_RD))

    monkeypatch.setitem(dispatch.DISPATCHERS, "all_to_all", right._replace(dispatch=changed))


@pytest.mark.eight_devices
def test_rows_of_one_device_in_another_order(monkeypatch):
    """The gradients of its weights name it: the last of the axis `expert`, in both replicas."""

    def swapped(rows_RD):
        last = jax.lax.axis_index("expert") == 3
        return jnp.where(last, rows_RD.at[:2].set(rows_RD[1::-1]), rows_RD)

    broken_dispatcher(monkeypatch, swapped)
    error = refused()
    assert devices("d-weights of gate", error) == [3, 7], error
    assert devices("forward", error)
    assert "dispatcher all_to_all, experts loop in float32 on data 2 x expert 4" in error


@pytest.mark.eight_devices
def test_rows_that_nobody_has_written(monkeypatch):
    """They hold zeros on this machine, which are no numbers in the check."""

    def stale(rows_RD):
        first = jax.lax.axis_index("expert") == 0
        empty = room.room(rows_RD[:1].shape, rows_RD.dtype)
        return jnp.where(first, rows_RD.at[:1].set(empty), rows_RD)

    broken_dispatcher(monkeypatch, stale)
    error = refused()
    assert "forward is not a number on device" in error
    assert "rows are read that nobody has written" in error
    assert devices("d-weights of up", error) == [0, 4]


@pytest.mark.eight_devices
def test_tokens_that_go_to_other_experts(monkeypatch):
    """Those of half of the devices."""

    def other_experts(routing):
        ids_TK = routing.ids_TK
        half_T1 = (jnp.arange(len(ids_TK)) < len(ids_TK) // 2)[:, None]
        return routing._replace(ids_TK=jnp.where(half_T1, (ids_TK + 1) % 8, ids_TK))

    on_the_mesh(monkeypatch, other_experts)
    error = refused()
    assert devices("router", error) == [0, 1, 2, 3]
    assert "forward" not in error, "what follows from it is not said"


def test_processes_tell_each_other(monkeypatch):
    """All end if one has found something, with the devices of all."""
    monkeypatch.setattr(
        hosts, "gather", lambda mine: [mine, [["forward", [9], float("nan")], ["router", [8], 0.5]]]
    )
    mine = [comparison.Failure("forward", [1, 2], 0.25)]
    with pytest.raises(
        ValueError,
        match=r"x: forward is not a number on devices 1, 2, 9: .*; router is off by 0\.5 on"
        r" device 8; layer 0, expert 5: lost \(error",
    ):
        comparison.refuse(mine, "layer 0, expert 5: lost", "x", 1e-4)
    monkeypatch.setattr(hosts, "gather", lambda mine: [mine, []])
    assert comparison.refuse([], None, "x", 1e-4) is None


def test_the_dense_loop_is_the_reference():
    """Values and gradients, with identity experts and unassigned ones."""
    rng = np.random.default_rng(0)
    t, d, f, e, z, k = 12, 8, 4, 5, 2, 3
    moe = MoEConfig(e, 0, k, f, n_identity_experts=z)
    x_TD, dy_TD = rng.standard_normal((2, t, d), np.float32)
    weights = [
        rng.standard_normal(shape, np.float32) for shape in ((e, f, d), (e, f, d), (e, d, f))
    ]
    routing = Routing(rng.integers(0, e + z + 1, (t, k)), rng.random((t, k), np.float32), None)

    def ours(x_TD, gates_TK, weights):
        chosen = routing._replace(gates_TK=gates_TK)
        return dense_loop.dense_loop(x_TD, chosen, experts.ExpertWeights(*weights), moe)

    def papers(x_TD, gates_TK, weights):
        chosen = routing._replace(gates_TK=gates_TK)
        return reference.moe_layer(x_TD, chosen, weights, n_identity=z)

    @jax.jit
    def both(x_TD, gates_TK, weights, dy_TD):
        results = []
        for layer in (ours, papers):
            y_TD, pull = jax.vjp(layer, x_TD, gates_TK, weights)
            results.append((y_TD, pull(dy_TD)))
        return results

    results = both(x_TD, routing.gates_TK, weights, dy_TD)
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("real", "parts", "small"), [
    (2048, 64, 128), (1408, 1, 128), (853, 1, 213), (1280, 256, 256), (96, 4, 96), (1344, 24, 576),
])  # fmt: skip
def test_small_widths_are_divided_and_keep_their_rest(real, parts, small):
    assert small_layer.small_width(real, parts) == small
    assert small % parts == 0
    assert small % 128 == real % 128


def test_rows_that_get_lost_end_the_step():
    """Two layers of two experts, of which the last computed one row less than was sent."""
    sent_LE = np.float32([[3, 5], [4, 4]])
    computed_LE = np.float32([[3, 4], [4, 3]])
    dropped_LE = np.float32([[0, 1], [0, 0]])
    ledger = SimpleNamespace(sent_E=sent_LE, computed_E=computed_LE, dropped_E=dropped_LE)
    metrics = SimpleNamespace(router=SimpleNamespace(ledger=ledger), biases=None)
    run = SimpleNamespace(saver=SimpleNamespace(stopped="step {}: {}".format))
    lost = r"^step 7: layer 1, expert 1: 4 assignments sent, 3 computed and 0 dropped"
    with (
        mock.patch.object(trainer, "first_non_finite", return_value=None),
        pytest.raises(invariants.Violated, match=lost),
    ):
        trainer.Trainer._require_sound(run, 7, metrics, may_be_non_finite=False)
    ledger.computed_E = sent_LE - dropped_LE
    assert invariants.violation(metrics) is None


def test_a_bias_that_stays():
    """The second of two routers, as where a mapping by name misses it; or both, at speed 0."""
    model = tiny(**{"model.moe.router.bias_update_speed": 0.001}).model
    layer = {"layers": {"moe": {"bias_E": RouterVariable(jnp.zeros((2, 4)))}}}
    before = nnx.State(layer)
    load_LE, progress = jnp.float32([[1, 2, 3, 4], [4, 3, 2, 1]]), Progress(0, 10)
    after = router_state.after_step(before, load_LE, progress, model)
    stays = jax.tree.map(lambda bias_LE: bias_LE.at[1].set(0), after)

    def broken(after, load_LE=load_LE, model=model):
        biases = router_state.count_moved(before, after, load_LE, progress, model)
        return invariants.violation(SimpleNamespace(router=None, biases=biases))

    assert broken(after) is None
    assert broken(stays).startswith("the balance bias of 1 routers moved, and the load of 2 was")
    assert broken(stays, load_LE.at[1].set(2)) is None, "nothing to even out"
    schedule = {"model.moe.router.bias_update_schedule": ((0, 0), (1, 1))}
    at_rest = tiny(**{"model.moe.router.bias_update_speed": 0.001, **schedule}).model
    assert broken(before, model=at_rest) is None
    assert broken(before, model=tiny().model) is None, "no router has a bias"
