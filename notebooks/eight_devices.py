# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A dispatch over eight devices
#
# On a pod the experts of a layer lie on many chips, and a token's experts are seldom on the chip
# where the token is.  So rows travel: out to the experts, and back with the results.  This notebook
# follows them over eight devices, counts what is sent where, and checks that the layer and all of
# its gradients are those of one device.
#
# The devices are virtual: XLA makes eight of this machine's processor, and the program is the one
# that a pod runs.  There is no network between them, so nothing is timed.  It takes half a minute.
# [README.md](README.md) says how to open this notebook; every claim ends in an `assert`.
#
# Shapes are suffixes of names: `T` tokens, `t` of one device, `D` hidden, `E` routed experts, `e`
# of one device, `K` activated ones per token, `P` devices, `R` rows that a device has room for,
# `F` width of an expert.

# %%
# Where the package is not installed (Colab, say), it comes from the checkout around this notebook.
import subprocess
import sys
from importlib import metadata
from pathlib import Path

if not list(metadata.distributions(name="dsmoe_jax")):
    near = (Path.cwd(), *Path.cwd().parents, *Path.cwd().glob("*/"))
    found = [folder for folder in near if (folder / "dsmoe_jax" / "__init__.py").is_file()]
    assert found, "no checkout of dsmoe_jax here: clone it, and start this notebook in or beside it"
    subprocess.run([sys.executable, "-m", "pip", "install", "-qe", found[0]], check=True)
    sys.path.insert(0, str(found[0]))

# %% [markdown]
# How many devices there are is decided when JAX is first used.  So the next cell comes before
# anything that imports it.

# %%
import os

eight = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {eight}"
os.environ["JAX_PLATFORMS"] = "cpu"

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx
from IPython.display import display

from dsmoe_jax.config import MeshConfig, MoEConfig, files, from_config_dict, replace
from dsmoe_jax.hardware import virtual_devices
from dsmoe_jax.moe import dispatch, kernels, reference, routers
from dsmoe_jax.moe.dispatch import expert_parallel
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.routed import routed_experts
from dsmoe_jax.moe.types import RouterInputs, Routing
from dsmoe_jax.parallel.mesh import make_mesh
from dsmoe_jax.parallel.sharding import spec
from dsmoe_jax.report import exchange_plots
from dsmoe_jax.report.inline import Drawn
from dsmoe_jax.report.style import ARM_COLOURS, STYLE, axes

virtual_devices.allow_waiting()  # else devices may wait for each other's threads for ever
assert jax.device_count() == 8, "JAX was in use before: restart the kernel and run from the top"
matplotlib.rcParams.update(STYLE)

# %% [markdown]
# ## 1. Who has what?
#
# **Question: where do tokens and experts lie before anything moves?**
#
# A mesh gives the devices a shape.  One axis of ours is longer than 1: `expert`.  Like every axis
# of the batch it splits the tokens; and it alone splits the experts.

# %%
P = 8
mesh = make_mesh(MeshConfig(data=1, expert=P))
print(dict(mesh.shape))
for letters in ("TD", "EFD"):
    print(f"{letters:4} is split by {spec(letters)}")

# %% [markdown]
# 64 tokens and 16 experts on 8 devices are 8 tokens and 2 experts each.  The weights are those of a
# freshly drawn layer; every token chooses 3 experts by affinity.

# %%
T, D, E, K, F = 64, 16, 16, 3, 24
t, e = T // P, E // P
moe = MoEConfig(E, 0, K, F, expert_backend="ragged_dot")
layer = MoELayer(moe, hidden_size=D, vocab_size=T, initializer_range=0.3, rngs=nnx.Rngs(0))
router_ED = layer.router_ED[...]
weights = layer.expert_weights()
x_TD = jax.random.normal(jax.random.key(1), (T, D))
routing = reference.route(x_TD, router_ED, K)

home_T = np.arange(T) // t  # the device of each token
device_TK = np.asarray(routing.ids_TK) // e  # the devices of its experts
for token in range(3):
    ids = routing.ids_TK[token].tolist()
    print(f"token {token}, on device 0: experts {ids}, on devices {device_TK[token].tolist()}")

elsewhere = (device_TK != home_T[:, None]).mean()
print(f"\n{elsewhere:.0%} of all choices are on another device than their token")
assert abs(elsewhere - (P - 1) / P) < 0.1, "seven of eight, if all devices are equally likely"

# %% [markdown]
# **Answer:** tokens lie by their place in the batch, and expert $i$ on device $\lfloor i/e
# \rfloor$, here $\lfloor i/2 \rfloor$.  The one has nothing to do with the other, so with $P$
# devices about $(P-1)/P$ of the choices are elsewhere.
#
# ## 2. What is sent where?
#
# **Question: how many rows does each device send to each other one?**
#
# A row is sent to a *device*, not to an expert: a token with two experts on one device travels
# there once, and a label on the row says which experts it is for.  We count with numpy what has
# to be sent:

# %%
on_TP = (device_TK[:, :, None] == np.arange(P)).any(axis=1)  # whether a token is needed on a device
by_hand_PP = on_TP.reshape(P, t, P).sum(axis=1)  # from (first axis) and to
stay = np.trace(by_hand_PP)
print(f"{T * K} choices, {by_hand_PP.sum()} rows, of which {stay} stay where they are")
assert by_hand_PP.sum() < T * K, "some tokens have two experts on one device"

# %% [markdown]
# Now the package.  `expert_parallel.all_to_all` is what each device runs, inside of `shard_map`,
# with its own tokens: it packs their rows, all devices tell each other how many will come, and
# the rows are exchanged.  `combine_all_to_all` is the way home.  To recognise a row, we let it
# hold the number of its token and nothing else; and the experts in between give back what they
# get.

# %%
most = P * t * e  # every token may choose both experts of one device


@jax.jit
@functools.partial(
    jax.shard_map,
    in_specs=(spec("TD"), spec("TK"), spec("TK")),
    out_specs=(spec("TD"), spec("T")),
    check_vma=False,
)
def there_and_back(numbers_tD, ids_tK, gates_tK):
    """The exchange on one device: what comes home, and what it has seen come and go."""
    mine = Routing(ids_tK, gates_tK, None)
    arrived = expert_parallel.all_to_all(numbers_tD, mine, E, most, kernels.JAX_ROWS)
    gates_R1 = arrived.routing.gates_TK.sum(axis=1, keepdims=True)
    home_tD = expert_parallel.combine_all_to_all(
        arrived.rows_RD * gates_R1, arrived.state, kernels.JAX_ROWS
    )
    seen = arrived.rows_RD[:, 0], arrived.routing.ids_TK, arrived.n_rows, arrived.state.sent_PP
    return home_tD, jax.tree.map(lambda x: x[None], seen)


numbers_TD = jnp.arange(1.0, T + 1)[:, None]  # D = 1
with jax.set_mesh(mesh):
    home_TD, seen = jax.device_get(there_and_back(numbers_TD, routing.ids_TK, routing.gates_TK))
number_PR, label_PRK, came_P, sent_PPP = seen

# %%
for sent_PP in sent_PPP:  # every device knows the same matrix
    np.testing.assert_array_equal(sent_PP, by_hand_PP)
np.testing.assert_array_equal(came_P, by_hand_PP.sum(axis=0))
display(Drawn(exchange_plots.rows_sent(sent_PPP[0])))

# %% [markdown]
# In the picture each device sends what stands in its row, and receives what stands in its column;
# the diagonal stays at home, and the sums are at the right and below.  Are they the right rows?
# We ask each device which numbers came, and for which of its experts (label 0 or 1; 2 is no
# choice).

# %%
for device in range(P):
    came = slice(0, came_P[device])
    numbers = number_PR[device, came].astype(int)
    wanted = 1 + np.flatnonzero(on_TP[:, device])
    np.testing.assert_array_equal(np.sort(numbers), wanted)
    choices = (label_PRK[device, came] < e).sum()
    assert choices == (device_TK == device).sum(), "every choice has come, once"
    print(f"device {device}: {came_P[device]} rows for {choices} choices; {numbers[:8]} ...")

# %% [markdown]
# **Answer:** one row for each pair of a token and a device that holds some of its experts.  The
# counts are ours, and so are the rows.
#
# ## 3. What comes home?
#
# **Question: if a token's experts are spread over devices, who adds up their results?**
#
# Each device returns one row for each that came: the sum of its experts' results, weighted by their
# gates.  At home these rows are added.  Our experts gave back their input, so number $n$ must come
# home as $n$ times the sum of its gates, on however many devices its experts were:

# %%
gates_T1 = np.asarray(routing.gates_TK).sum(axis=1, keepdims=True)
np.testing.assert_allclose(home_TD, numbers_TD * gates_T1, rtol=1e-5)
for token in (4, 5):
    devices = np.flatnonzero(on_TP[token]).tolist()
    print(f"number {token + 1} was on devices {devices} and is {home_TD[token, 0]:.3f} at home")

# %% [markdown]
# **Answer:** both.  The device of the experts adds up those it has, the home of the token adds up
# the devices.  Neither needs to know the other's part.
#
# ## 4. Is it the layer of one device?
#
# **Question: do eight devices compute the same, and learn the same?**
#
# `routed_experts` composes dispatch, experts and combine.  Under the mesh it runs on all devices.
# Beside it: one dense loop on one device (`moe/reference.py`), with the same router in front.  We
# compare the output and the gradients of tokens, router and all experts.

# %%
dy_TD = jax.random.normal(jax.random.key(2), (T, D))


def on_one_device(x_TD, routing, weights):
    return reference.moe_layer(x_TD, routing, weights), None


def on_the_mesh(x_TD, routing, weights):
    return routed_experts(x_TD, routing, weights, moe, kernels.JAX_ROWS)


def run(layer, x_TD, router_ED, weights):
    """Output, report and gradients of a layer behind the router."""

    def loss(x_TD, router_ED, weights):
        y_TD, report = layer(x_TD, reference.route(x_TD, router_ED, K), weights)
        return (y_TD * dy_TD).sum(), (y_TD, report)

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x_TD, router_ED, weights)


run = jax.jit(run, static_argnums=0)
wanted, (wanted_TD, _) = run(on_one_device, x_TD, router_ED, weights)
with jax.set_mesh(mesh):
    found, (y_TD, report) = run(on_the_mesh, x_TD, router_ED, weights)

np.testing.assert_allclose(y_TD, wanted_TD, rtol=1e-4, atol=1e-5)
names = ("tokens", "router", "gate_EFD", "up_EFD", "down_EDF")
for name, one, eight in zip(names, jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-5)
    print(f"gradient of {name:9} {one.shape!s:13} largest difference {abs(eight - one).max():.1e}")

# %% [markdown]
# The layer also reports what it did, counted where the experts computed and where rows left:

# %%
np.testing.assert_array_equal(
    report.computed_E, np.bincount(np.asarray(routing.ids_TK).ravel(), minlength=E)
)
assert report.computed_E.sum() == T * K, "no choice is lost, none is computed twice"
assert report.exchanged_rows == by_hand_PP.sum() - np.trace(by_hand_PP)
print(f"{report.computed_E.sum():.0f} choices computed, {report.exchanged_rows:.0f} rows exchanged")

# %% [markdown]
# **Answer:** yes, to the rounding of float32.  A wrong scale of gradients under expert
# parallelism is a well-known fault of large trainers, and a loss curve does not show it; this
# comparison does.
#
# ## 5. What if everyone wants the same expert?
#
# **Question: what does an uneven router cost?**
#
# We make expert 6 a favourite of all tokens.  Nothing is dropped: there is room for the worst case.

# %%
favoured_TE = x_TD @ router_ED.T + 20.0 * (jnp.arange(E) == 6)
skewed = reference.route(favoured_TE, jnp.eye(E), K)
with jax.set_mesh(mesh):
    _, (_, _, came_P, sent_PPP) = jax.device_get(
        there_and_back(numbers_TD, skewed.ids_TK, skewed.gates_TK)
    )
display(Drawn(exchange_plots.rows_sent(sent_PPP[0])))
busiest = came_P.max() / came_P.mean()
print(f"device {came_P.argmax()} receives {busiest:.1f} times the mean, and all others wait for it")
assert came_P.argmax() == 6 // e
assert came_P[6 // e] == T, "all tokens come"
assert came_P.max() <= T, "and no token twice"

# %% [markdown]
# **Answer:** time.  All devices wait for the one of the favourite.  That is why V1 adds a balance
# term over *devices* (eqs. 15-17) when experts are on several of them, and a weaker one over
# experts.
#
# ## 6. How much travels on a real pod?
#
# **Question: does the traffic grow with the number of chips?**
#
# The layer of DeepSeekMoE 16B has 64 experts, of which a token takes 6.  `dispatch.volume` says
# how many rows a chip receives for each token of its own if all choices are equally likely.  V2
# limits each token to the best $M$ of $D$ groups of experts, one on each chip; we draw logits,
# route them by the package's router for every $M$, and count.

# %%
config = from_config_dict(files.load("configs/dsmoe_16b.py"))
logits_TE = jax.random.normal(jax.random.key(3), (8192, 64))
inputs = RouterInputs(token_ids_T=jnp.zeros(len(logits_TE), int))
expected, counted = {}, {}
for m in (1, 2, 3, 4, 6, 8):
    limit = {"model.moe.router.n_group": P, "model.moe.router.topk_group": m}
    limited = replace(config, **limit).model.moe
    router, settings = routers.get_router(limited)
    ids_TK = np.asarray(router.route(logits_TE, inputs, settings).ids_TK)
    on_TP = (ids_TK[:, :, None] // (64 // P) == np.arange(P)).any(axis=1)
    counted[m] = on_TP.sum(axis=1).mean() * (P - 1) / P  # one of P is the token's own
    expected[m] = dispatch.volume(limited, len(logits_TE), P).received / len(logits_TE)
    print(f"at most {m} chips: {expected[m]:.2f} copies expected, {counted[m]:.2f} counted")
    assert counted[m] <= m
    assert counted[m] > 0.98 * expected[m]
assert abs(counted[8] / expected[8] - 1) < 0.02, "without a limit all choices are equally likely"

# %%
gathering = replace(config, **{"model.moe.dispatch.name": "all_gather"})
whole = dispatch.volume(gathering.model.moe, 1, P)
figure, ax = axes(height=2.4)
ax.axhline(whole.received, color=ARM_COLOURS[0], ls=":")
ax.text(8, whole.received - 0.1, "all_gather: every token to every chip", ha="right", va="top")
ax.plot(list(expected), list(expected.values()), color=ARM_COLOURS[1], label="expected")
ax.plot(list(counted), list(counted.values()), "o", color=ARM_COLOURS[4], label="counted")
ax.set(xlabel="chips that a token may use, M", ylabel="copies received, per token", ylim=0)
ax.legend(loc="lower right", frameon=False)
display(Drawn(figure))
assert whole.received == P - 1

# %% [markdown]
# **Answer:** up to a point.  A token is sent to at most $\min(K, M)$ chips, however many there
# are; `all_gather`, which is simpler, sends it to all.  Between the ends more is counted than
# expected: the formula opens $M$ chips at random, the router those with the best experts, which
# it then uses.  `docs/scale.md` has the same arithmetic up to 4,096 chips.
#
# ## Where to go on
#
# - In a run all of this is `--config.mesh.expert=8`; `--config.model.moe.dispatch.name` picks
#   another dispatcher.  `docs/pods.md` says what else changes on a pod.
# - `dsmoe_jax/moe/dispatch/expert_parallel.py` is the exchange; `dsmoe_jax/moe/routed.py` the
#   composition around it.
# - Next: `plan_a_pod_run.py` chooses the mesh.
