"""Identity experts: what counts them and what does not.

Shapes: B sequences, S their length, T = B*S tokens, D hidden, E routed experts, Z identity experts,
K activated.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import Config, replace
from dsmoe_jax.model import size
from dsmoe_jax.moe import dispatch, losses, reference
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.routers import get_router
from dsmoe_jax.moe.schedules import Progress
from dsmoe_jax.moe.types import MoEInputs, RouterInputs, Routing
from tests.tools.tiny import tiny

B, S, D, E, Z, K = 2, 12, 8, 6, 3, 4
T = B * S


def make_layer(**changed):
    """A layer with identity experts; dotted keys of `model.moe` with "__" for the dots."""
    keys = {
        "n_routed_experts": E, "n_identity_experts": Z, "num_experts_per_tok": K,
        "n_shared_experts": 0, "moe_intermediate_size": 5, "expert_backend": "loop",
    }  # fmt: skip
    keys |= {key.replace("__", "."): value for key, value in changed.items()}
    moe = replace(Config(), **{f"model.moe.{key}": value for key, value in keys.items()}).model.moe
    return MoELayer(moe, hidden_size=D, vocab_size=9, initializer_range=0.4, rngs=nnx.Rngs(0))


def inputs(rng=None, **more):
    """Inputs of all layers here: the last five tokens are padding."""
    valid_BS = (jnp.arange(T) < T - 5).reshape(B, S)
    return MoEInputs(jnp.zeros((B, S), jnp.int32), valid_BS, rng, **more)


X = jax.random.normal(jax.random.key(1), (B, S, D))
TRAINING = jax.random.key(0)


run = nnx.jit(lambda layer, inputs: layer(X, inputs))


def by_reference(layer, recorded):
    """The dense loop of a recorded routing."""
    routing = Routing(recorded.ids.reshape(T, K), recorded.gates.reshape(T, K), None)
    routed = layer.expert_weights()
    y_TD = reference.moe_layer(X.reshape(T, D), routing, routed, n_identity=Z)
    return y_TD.reshape(B, S, D)


DROPS = {
    "nothing": {},
    "position": {"drop__capacity_factor": 0.5},
    "probability": {"drop__capacity_factor": 0.5, "drop__policy": "probability"},
    "device": {"drop__capacity_factor": 0.5, "drop__policy": "device", "expert_groups": 3},
}


@pytest.mark.parametrize("name", DROPS)
def test_nothing_of_them_is_sent_or_dropped(name):
    layer = make_layer(**DROPS[name])
    y, report = run(layer, inputs(TRAINING))
    recorded, logged = report.recorded, report.logged
    np.testing.assert_allclose(y, by_reference(layer, recorded), atol=1e-5)
    np.testing.assert_array_equal(y.reshape(T, D)[T - 5 :], 0)
    ledger = logged.ledger
    np.testing.assert_array_equal(ledger.sent_E, ledger.computed_E + ledger.dropped_E)
    assert (ledger.dropped_E.sum() > 0) == (name != "nothing")
    if "expert_groups" not in DROPS[name]:  # half of the mean load of the routed experts
        capacity = math.ceil(0.5 * (T - 5) * K / (E + Z)) if DROPS[name] else T
        np.testing.assert_array_equal(ledger.computed_E, np.minimum(ledger.sent_E, capacity))
    np.testing.assert_array_equal(logged.load_E, ledger.sent_E)
    count = functools.partial(np.bincount, minlength=E + Z + 1)
    sent, computed = count(recorded.sent.ravel()), count(recorded.ids.ravel())
    np.testing.assert_array_equal(logged.load_of_choices, sent[: E + Z])
    np.testing.assert_array_equal(computed[:E], ledger.computed_E)
    np.testing.assert_array_equal(computed[E : E + Z], logged.identity_Z)
    assert logged.identity_Z.sum() > 0
    assert sent[: E + Z].sum() == K * (T - 5)


def test_a_recorded_routing_with_them_is_replayed():
    layer = make_layer(drop__capacity_factor=0.5)
    y, report = run(layer, inputs(TRAINING))
    again, replayed = run(layer, inputs(replayed=report.recorded))
    np.testing.assert_allclose(again, y, atol=1e-6)
    np.testing.assert_array_equal(replayed.logged.identity_Z, report.logged.identity_Z)


def test_their_bias_stays():
    """The others move towards the mean of all choices."""
    moe = make_layer(router__bias_update_speed=0.5).config
    router, settings = get_router(moe)
    load_LE = jnp.array([[3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 6.0, 0.0, 0.0]])  # mean 2
    after = router.state.after_step(
        {"bias_E": jnp.ones((1, E + Z))}, load_LE, Progress(jnp.int32(0), 10), settings
    )
    np.testing.assert_array_equal(after["bias_E"], [[0.5, 1.5, 1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("name", ["expert", "sequence", "device"])
def test_balance_terms_of_a_uniform_routing_are_one(name):
    n = E + Z
    ids_TK = jnp.stack([(jnp.arange(n) + i) % n for i in range(K)], axis=1)
    routing = Routing(ids_TK, jnp.ones((n, K)), jnp.full((n, n), 1 / n))
    devices = losses.Devices(3, 1, n_identity=Z)
    part = losses.sums(name, routing, jnp.ones((1, n), bool), "sequence", devices)
    value = losses.value(name, part, losses.whole_batch(jnp.ones((1, n), bool)))
    np.testing.assert_allclose(value, 1.0, rtol=1e-6)


def test_masking_the_best_masks_them_too():
    layer = make_layer()
    tokens = RouterInputs(jnp.zeros(T, jnp.int32))
    best, masked = (
        layer.route(X.reshape(T, D), tokens, intervention=Intervention(mask_best=n))[0].ids_TK
        for n in (0, 1)
    )
    np.testing.assert_array_equal(masked[:, : K - 1], best[:, 1:])
    assert (best[:, 0] >= E).any()


def test_what_is_counted_is_the_mean_of_routed_experts():
    changes = {"n_identity_experts": 4, "router.logits_bias": True, "expert.name": "gpt_oss"}
    changes |= {"shared_expert_gate": True, "shared_expert_intermediate_size": 9}
    model = tiny(**{f"model.moe.{key}": value for key, value in changes.items()}).model
    counted = size.count_parameters(model)
    assert counted == size.parameters_by_formula(model)
    expert = 3 * 32 * 16 + 2 * 16 + 32
    shared = 3 * 32 * 9 + 2 * 9 + 32
    assert counted.expert_total == 2 * (4 * expert + shared)
    assert counted.expert_activated == 2 * (2 * 4 / 8 * expert + shared)
    volume = dispatch.volume(model.moe, t=100, p=2)
    assert volume.computed == 100
