"""Every scoring function against exact decimals: scores, logarithms, order, gates and gradients.

Shapes: T tokens, E experts, K activated.
"""

import decimal
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.config import RouterConfig
from dsmoe_jax.moe.routers import RouterInputs, scored
from dsmoe_jax.moe.routers.scores import SCORING, log_softplus
from tests.tools.routing import moe_config, route

T, E, K = 4, 6, 3
PRECISE = decimal.Context(prec=130)  # 1 + exp(-250) has 109 digits

# Logits from where every score vanishes in float32 to where sigmoids are 1 and softplus the logit.
LOGITS = st.lists(
    st.lists(st.floats(-250, 250, width=32), min_size=E, max_size=E), min_size=T, max_size=T
)


def exact(name, logits):
    """The scores of one token, in decimals."""
    with decimal.localcontext(PRECISE):
        z = [decimal.Decimal(float(u)) for u in logits]
        if name == "softmax":
            p = [u.exp() for u in z]
            return [u / sum(p) for u in p]
        if name == "sigmoid":
            return [1 / (1 + (-u).exp()) for u in z]
        return [(1 + u.exp()).ln().sqrt() for u in z]


def share(name, logits, ids):
    """The scores of some experts divided by their sum."""
    with decimal.localcontext(PRECISE):
        s = exact(name, logits)
        return [float(s[i] / sum(s[j] for j in ids)) for i in ids]


@functools.partial(jax.jit, static_argnums=0)
def found_scores(name, logits_TE):
    return SCORING[name].scores(logits_TE)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gates_and_gradient(name, norm, logits_TE, ids_TK, dy_TK):
    """The gates of chosen experts, and the gradient of their projection to the logits."""
    config = RouterConfig(scoring_func=name, norm_topk_prob=norm, routed_scaling_factor=1.5)

    def gates(logits_TE):
        return scored.gates(scored.scores(logits_TE, config), ids_TK, config)

    y, pull = jax.vjp(gates, logits_TE)
    return y, pull(dy_TK)[0]


@pytest.mark.parametrize("name", SCORING)
@settings(max_examples=8)
@given(rows=LOGITS)
def test_scores_and_shares_are_exact(name, rows):
    """Shares too where all scores are below the smallest float32."""
    logits = np.array(rows, np.float32)
    found = found_scores(name, jnp.asarray(logits))
    ids = np.argsort(-logits, axis=1, kind="stable")[:, -K:]
    dy = np.ones((T, K), np.float32)
    gates, _ = gates_and_gradient(name, True, jnp.asarray(logits), jnp.asarray(ids), dy)
    for t in range(T):
        s = [float(x) for x in exact(name, logits[t])]
        np.testing.assert_allclose(found.s_TE[t], s, rtol=1e-4, atol=1e-37)
        whole = share(name, logits[t], range(E))
        np.testing.assert_allclose(found.affinity_TE[t], whole, rtol=1e-4, atol=1e-37)
        chosen = 1.5 * np.array(share(name, logits[t], ids[t]))
        np.testing.assert_allclose(gates[t], chosen, rtol=1e-4, atol=1e-37)
    if found.logits_TE is not None:
        np.testing.assert_array_equal(found.logits_TE, logits)


def numpy_gates(name, norm, z, ids):
    """The gates of one token in float64, of logits that saturate nothing there."""
    s = {
        "softmax": lambda: np.exp(z) / np.exp(z).sum(),
        "sigmoid": lambda: 1 / (1 + np.exp(-z)),
        "sqrtsoftplus": lambda: np.sqrt(np.log1p(np.exp(z))),
    }[name]()
    return 1.5 * s[ids] / (s[ids].sum() if norm else 1.0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", SCORING)
@pytest.mark.parametrize("level", [0.0, -20.0, -60.0, 20.0])
def test_gates_and_their_gradients(name, norm, level):
    """By differences in float64."""
    rng = np.random.default_rng(3)
    logits = (level + 2 * rng.normal(size=(T, E))).astype(np.float32)
    ids = np.stack([rng.permutation(E)[:K] for _ in range(T)])
    dy = rng.normal(size=(T, K)).astype(np.float32)
    gates, gradient = gates_and_gradient(name, norm, logits, ids, dy)
    step = 1e-4
    for t in range(T):
        z = logits[t].astype(np.float64)
        value = functools.partial(numpy_gates, name, norm, ids=ids[t])
        np.testing.assert_allclose(gates[t], value(z), rtol=2e-5)
        steps = step * np.eye(E)
        wanted = [(value(z + d) - value(z - d)) @ dy[t] / (2 * step) for d in steps]
        # A sigmoid of 20 is 1 in float32, and its slope 0.
        atol = max(1e-4 * np.abs(wanted).max(), 1e-7 if level > 0 else 0)
        np.testing.assert_allclose(gradient[t], wanted, rtol=2e-3, atol=atol)


def test_no_gradient_is_nan_where_scores_vanish():
    """For padding of any logits, too."""
    logits = jnp.asarray([[-1e30, -3e4, -300.0, 300.0, 3e4, 1e30]] * T)
    ids = jnp.tile(jnp.arange(K), (T, 1))
    for name in SCORING:
        for norm in (False, True):
            gates, gradient = gates_and_gradient(name, norm, logits, ids, jnp.ones((T, K)))
            assert np.isfinite(gates).all()
            assert np.isfinite(gradient).all()
    slope = jax.jit(jax.vmap(jax.grad(log_softplus)))(jnp.asarray([-1e30, -300.0, -8.0, 8.0, 1e30]))
    wanted = 1 / (1 + np.exp(8.0)) / np.log1p(np.exp(-8.0))
    np.testing.assert_allclose(slope[:3], [1, 1, wanted], rtol=1e-5)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("name", ["sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("level", [0.0, -230.0])
def test_groups_by_their_two_best(name, level):
    """The sum of two scores decides, also where both vanish."""
    rng = np.random.default_rng(5)
    logits = (level + 3 * rng.normal(size=(30, 8))).astype(np.float32)
    config = moe_config(k=2, scoring_func=name, n_group=4, topk_group=1, group_score="top2_sum")
    found = route(jnp.asarray(logits), RouterInputs(jnp.zeros(30, jnp.int32)), config)
    for t in range(30):
        s = exact(name, logits[t])
        best = max(range(4), key=lambda g: s[2 * g] + s[2 * g + 1])
        assert set(np.asarray(found.ids_TK[t]) // 2) == {best}
