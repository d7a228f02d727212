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
# # DeepSeekMoE in ten minutes
#
# A mixture-of-experts layer replaces the feed-forward network (FFN) of a Transformer by many of
# them, and sends each token to a few.  [DeepSeekMoE](https://arxiv.org/abs/2401.06066) changes two
# things about it: it cuts the experts finer, and it sets some aside that every token uses.
#
# We write the layer as one loop, take it apart at its three seams (**routing**, **dispatch**,
# **experts**), count what the two changes cost, train a tiny model on text, and look at what its
# experts do.  All code is the package's own; every claim below ends in an `assert`, and the tests
# of the project run this file.  It takes a minute or two on two CPU cores.
#
# [README.md](README.md) says how to open this notebook.
#
# Shapes are suffixes of names: `B` sequences, `S` positions, `T = B*S` tokens, `D` hidden, `E`
# routed experts, `K` activated ones per token, `N = T*K` assignments, `F` width of an expert, `L`
# layers, `V` vocabulary.

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

# %%
import functools
import inspect
import math
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from IPython.display import display
from matplotlib.patches import Rectangle

from dsmoe_jax.analysis import specialisation
from dsmoe_jax.analysis.routed_text import route_text
from dsmoe_jax.config import MoEConfig, files, from_config_dict, replace
from dsmoe_jax.data.prepare import prepare
from dsmoe_jax.evaluation.held_out import evaluate
from dsmoe_jax.model.size import count_parameters
from dsmoe_jax.moe import experts, kernels, losses, reference, routed, routers
from dsmoe_jax.moe.dispatch import DISPATCHERS, local
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.types import MoEInputs, RouterInputs, count_load
from dsmoe_jax.report import expert_plots
from dsmoe_jax.report.expert_plots import ExpertsOfToken
from dsmoe_jax.report.inline import Drawn
from dsmoe_jax.report.style import styled
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.training.loop import train

INK, GREY, BLUE, ORANGE, GREEN = "#202124", "#d5d2cb", "#2e78b5", "#d1440c", "#12a383"
plt.rcParams.update(
    {
        "figure.dpi": 110,
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#73716c",
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
)

# %% [markdown]
# ## 1. The layer as one loop
#
# Each routed expert $i$ has a vector $e_i$.  Its **affinity** to a token $u_t$ is
#
# $$s_{i,t} = \mathrm{Softmax}_i(u_t^\top e_i).$$
#
# The token goes to the $K$ experts of highest affinity, each with the **gate**
#
# $$g_{i,t} = s_{i,t} \text{ if } s_{i,t} \in \mathrm{TopK}(\{s_{j,t}\}, K), \text{ else } 0,$$
#
# and through the **shared experts**, as every token does (V1 eqs. 9-11; "V1" is the paper above):
#
# $$h_t = u_t + \sum_{i=1}^{K_s} \mathrm{FFN}^{shared}_i(u_t)
#             + \sum_{i=1}^{E} g_{i,t} \, \mathrm{FFN}_i(u_t).$$
#
# `dsmoe_jax/moe/reference.py` says the same in code, except for $u_t$, the block's residual
# connection.  Every expert computes every token, and the gate of most is 0:

# %%
for function in (reference.route, reference.ffn, reference.moe_layer):
    print(inspect.getsource(function))

# %% [markdown]
# Six tokens, eight routed experts, two each, and one shared expert.  The weights are those of a
# freshly drawn layer.

# %%
T, D, E, K, F = 6, 16, 8, 2, 24
toy = MoEConfig(
    n_routed_experts=E, n_shared_experts=1, num_experts_per_tok=K, moe_intermediate_size=F
)
layer = MoELayer(toy, hidden_size=D, vocab_size=T, initializer_range=0.3, rngs=nnx.Rngs(0))
router_ED = layer.router_ED[...]
weights = experts.ExpertWeights(layer.gate_EFD[...], layer.up_EFD[...], layer.down_EDF[...])
shared = (layer.shared.gate_FD[...], layer.shared.up_FD[...], layer.shared.down_DF[...])

u_TD = jax.random.normal(jax.random.key(6), (T, D))
routing = reference.route(u_TD, router_ED, K)
h_TD = reference.moe_layer(u_TD, routing, weights, shared)
for name, value in routing._asdict().items():
    if value is not None:  # what only other routers have
        print(f"{name}: {value.dtype} {value.shape}")

s_TE = np.asarray(routing.affinity_TE)
ids_TK = np.asarray(routing.ids_TK)
np.testing.assert_allclose(s_TE.sum(axis=1), 1, rtol=1e-6)
np.testing.assert_array_equal(ids_TK, np.argsort(-s_TE)[:, :K])  # the K best, best first
np.testing.assert_array_equal(routing.gates_TK, np.take_along_axis(s_TE, ids_TK, 1))
assert (routing.gates_TK.sum(axis=1) < 1).all(), "V1 does not renormalise the chosen gates"

# %%
fig, ax = plt.subplots(figsize=(4.6, 2.9))
image = ax.imshow(s_TE, cmap="Blues", vmin=0, vmax=1)
for t in range(T):
    for e in range(E):
        chosen = e in routing.ids_TK[t]
        ax.text(
            e, t, f"{s_TE[t, e]:.2f}", ha="center", va="center", fontsize=7.5,
            color="white" if s_TE[t, e] > 0.55 else INK, weight="bold" if chosen else "normal",
        )  # fmt: skip
        if chosen:
            ax.add_patch(Rectangle((e - 0.47, t - 0.47), 0.94, 0.94, fill=False, ec=ORANGE, lw=1.6))
ax.set(xlabel="expert", ylabel="token", xticks=range(E), yticks=range(T))
ax.set_title("Affinities; framed: the two experts each token goes to")
ax.spines[:].set_visible(False)
ax.tick_params(length=0)
plt.show()

# %% [markdown]
# The loop is right and slow: $E$ experts compute where $K$ are needed.  The package computes the
# same in three steps.  They meet at seams, so that each can be exchanged without the others:
#
# ```
# logits_TE --[router]--> Routing(ids_TK, gates_TK, affinity_TE, logits_TE)
# x_TD, Routing --[dispatch]--> rows by expert, group sizes, what combine needs
# rows, group sizes --[experts]--> rows --[combine]--> y_TD
# ```
#
# ## 2. Routing, and why a router needs a nudge
#
# A router is a pure function from logits $u_t^\top e_i$ to a `Routing`.  Routers stand in the table
# `ROUTERS`; a config names one, the default is the paper's.

# %%
router, settings = routers.get_router(toy)


def route(logits_TE):
    """The routing of some logits; this router looks at nothing else."""
    inputs = RouterInputs(token_ids_T=jnp.zeros(len(logits_TE), int))
    return router.route(logits_TE, inputs, settings)


again = route(u_TD @ router_ED.T)
np.testing.assert_array_equal(again.ids_TK, routing.ids_TK)
np.testing.assert_allclose(again.gates_TK, routing.gates_TK, rtol=1e-6)
print(sorted(routers.ROUTERS))

# %% [markdown]
# Nothing in this keeps all tokens from choosing the same experts, which then learn everything while
# the others learn nothing.  So a small term is added to the loss (V1 eqs. 12-14):
#
# $$\mathcal{L} = \alpha \sum_{i=1}^{E} f_i P_i, \qquad
# f_i = \frac{E}{K T} \sum_t \mathbb{1}[t \text{ selects } i], \qquad
# P_i = \frac{1}{T} \sum_t s_{i,t}.$$
#
# $f_i$ is the load of expert $i$ relative to its fair share, and only counts: the gradient flows
# through $P_i$.  Perfect balance gives 1 (times $\alpha$).  The more the same experts are both
# chosen and preferred, the larger it gets, up to $E/K$.

# %%
many = 4096
noise_TE = jax.random.normal(jax.random.key(1), (many, E))
favour_E = jnp.linspace(1.0, -1.0, E)  # the first experts are better liked by every token
cases = {"no favourites": noise_TE, "favourites": noise_TE + favour_E}
cases["collapsed"] = 0.1 * noise_TE + 40 * favour_E


@functools.partial(jax.value_and_grad, has_aux=True)
def balance(logits_TE):
    """The unweighted balance term over all tokens as one sequence, and the load of each expert."""
    routing = route(logits_TE)
    valid_BS = jnp.ones((1, len(logits_TE)), bool)
    sums = losses.layer_sums(routing, valid_BS, toy)
    term = losses.value("expert", sums["expert"], losses.whole_batch(valid_BS))
    return term, count_load(routing.ids_TK, E)


fig, axes = plt.subplots(1, 3, figsize=(7.2, 2.1), sharey=True)
terms, slopes = {}, {}
for ax, (name, case_TE) in zip(axes, cases.items(), strict=True):
    (terms[name], load_E), slopes[name] = jax.jit(balance)(case_TE)
    assert load_E.sum() == many * K
    ax.bar(range(E), load_E / load_E.mean(), color=BLUE)
    ax.axhline(1, color=INK, lw=0.8, ls=":")
    ax.set(title=f"{name}: $\\sum f_i P_i$ = {terms[name]:.2f}", xlabel="expert", xticks=range(E))
axes[0].set_ylabel("load / fair share")
plt.show()

assert abs(terms["no favourites"] - 1) < 0.01
assert terms["no favourites"] < terms["favourites"] < terms["collapsed"] <= E / K + 1e-4

# Descending on the term lowers the logits of crowded experts and raises those of idle ones.
slope_E = slopes["favourites"].sum(axis=0)
assert slope_E[0] > 0 > slope_E[-1]

# %% [markdown]
# ## 3. Dispatch: sort by expert
#
# An expert wants its tokens in one block, to multiply them by its matrices at once.  So: write down
# the $N = TK$ assignments (token, expert), sort them by expert, gather the rows.  The rows of
# expert 0 come first, then those of expert 1, and so on, and the group sizes say how many each has.
# Nothing is padded and no token is dropped.
#
# `local.dispatch` does this, `local.combine` brings the results back.  (With experts on several
# devices a dispatcher first sends each token's row to the devices of its experts.)  Neither knows
# how experts are chosen or how they compute.  To watch them we give each of the six tokens a row
# that holds its number:

# %%
numbers_TD = jnp.arange(T, dtype=jnp.float32)[:, None]  # D = 1
there = local.dispatch(numbers_TD, routing, E, kernels.JAX_ROWS)
token_of_row_N = np.asarray(there.rows_ND[:, 0], int)
start = 0
for e, size in enumerate(there.group_sizes_e):
    print(f"expert {e}: tokens {token_of_row_N[start : start + size].tolist()}")
    start += size
assert start == T * K

# Experts that change nothing: each token gets its own row back, times the sum of its gates.
y_TD = local.combine(there.rows_ND, there.state, kernels.JAX_ROWS)
np.testing.assert_allclose(y_TD, numbers_TD * routing.gates_TK.sum(axis=1)[:, None], rtol=1e-6)

# %%
token_N = np.repeat(np.arange(T), K)
expert_N = ids_TK.reshape(-1)
order_N = np.argsort(expert_N, kind="stable")
np.testing.assert_array_equal(token_of_row_N, token_N[order_N])

fig, ax = plt.subplots(figsize=(6.4, 2.0))
colour = plt.get_cmap("Set2")
for n in range(T * K):
    place = int(np.flatnonzero(order_N == n)[0])
    for x, y in ((n, 1.0), (place, 0.0)):
        ax.add_patch(Rectangle((x, y), 0.92, 0.32, color=colour(expert_N[n])))
        ax.text(x + 0.46, y + 0.15, f"{token_N[n]}", ha="center", va="center")
    ax.plot([n + 0.46, place + 0.46], [0.98, 0.34], color=colour(expert_N[n]), lw=1.3)
for e in np.unique(expert_N):
    middle = np.flatnonzero(expert_N[order_N] == e).mean() + 0.46
    ax.text(middle, -0.17, f"expert {e}", ha="center", fontsize=7.5)
ax.text(-0.2, 1.16, "by token", ha="right", va="center")
ax.text(-0.2, 0.16, "by expert", ha="right", va="center")
ax.set(xlim=(-1.8, T * K), ylim=(-0.3, 1.4))
ax.axis("off")
ax.set_title("The 12 assignments before and after the sort (numbers: tokens, colours: experts)")
plt.show()

# %% [markdown]
# ## 4. Experts: a grouped matrix product
#
# Each expert is a small SwiGLU network, $\mathrm{FFN}_i(x) = W^{down}_i(\mathrm{silu}(W^{gate}_i x)
# \odot W^{up}_i x)$.  A grouped matrix product multiplies every block of rows by its own expert's
# matrices, for the work of the assignments alone.  There are several, one for each kind of device;
# all compute the same.

# %%
there = local.dispatch(u_TD, routing, E, kernels.JAX_ROWS)
backend = experts.BACKENDS["blocked"]
out_ND = jax.jit(backend.run)(there.rows_ND, there.group_sizes_e, weights)

by_hand = [
    reference.ffn(there.rows_ND[n : n + 1], *(matrix[e] for matrix in weights[:3]))
    for n, e in enumerate(expert_N[order_N])
]
np.testing.assert_allclose(out_ND, jnp.concatenate(by_hand), rtol=1e-4, atol=1e-5)

# %% [markdown]
# Combine: each token picks up its $K$ results, multiplies them by its gates and adds them.  With
# the shared expert this is the layer, and equal to the loop of part 1:

# %%
y_TD = local.combine(out_ND, there.state, kernels.JAX_ROWS)
np.testing.assert_allclose(y_TD + reference.ffn(u_TD, *shared), h_TD, rtol=1e-4, atol=1e-5)

# %% [markdown]
# `routed.on_one_device` is these three calls.  The layer of the package is the router in
# front of it, the shared experts beside it, and a report of what happened:

# %%
parts = routed.Parts(DISPATCHERS["local"], backend, kernels.JAX_ROWS)
tokens = routed.Tokens(u_TD, routing.ids_TK, routing.gates_TK)
composed_TD, computed_E = routed.on_one_device(parts, weights, tokens)
np.testing.assert_allclose(composed_TD, y_TD, rtol=1e-5, atol=1e-6)
np.testing.assert_array_equal(computed_E, there.group_sizes_e)

inputs = MoEInputs(token_ids_BS=jnp.zeros((1, T), int), valid_BS=jnp.ones((1, T), bool))
got_BSD, report = nnx.jit(lambda layer, u_BSD, inputs: layer(u_BSD, inputs))(
    layer, u_TD[None], inputs
)
np.testing.assert_allclose(got_BSD[0], h_TD, rtol=1e-4, atol=1e-5)
np.testing.assert_array_equal(report.recorded.ids[0], routing.ids_TK)
assert report.logged.load_E.sum() == T * K

# %% [markdown]
# ## 5. The idea: finer experts, and some of them shared
#
# A conventional MoE (GShard) has 16 experts as large as a standard FFN and activates 2.
# DeepSeekMoE cuts each expert into $m = 4$ and activates $4 \times 2 = 8$ of the 64 quarters; one
# of them is set aside as shared, so the router picks 7 of 63.  Parameters and FLOPs stay as they
# were.  What grows is the number of ways to combine experts for a token:

# %%
combinations = {"gshard_2b": math.comb(16, 2), "dsmoe_2b": math.comb(63, 7)}
assert combinations == {"gshard_2b": 120, "dsmoe_2b": 553_270_671}

print(f"{'':10} {'total':>8} {'activated':>10} {'experts':>9} {'activated':>10} {'sets':>13}")
counts = {}
for name, sets in combinations.items():
    counts[name] = count_parameters(from_config_dict(files.load(f"configs/{name}.py")).model)
    count = counts[name]
    print(
        f"{name:10} {count.total / 1e9:7.3f}B {count.activated / 1e9:9.3f}B"
        f" {count.expert_total / 1e9:8.3f}B {count.expert_activated / 1e9:9.3f}B {sets:13,}"
    )
for figure in ("total", "activated", "expert_total", "expert_activated"):
    ours, theirs = (getattr(counts[name], figure) for name in ("dsmoe_2b", "gshard_2b"))
    assert abs(ours / theirs - 1) < 0.002, figure

# %%
shown = {}
for name, sets in combinations.items():
    moe = from_config_dict(files.load(f"configs/{name}.py")).model.moe
    logits_1E = jax.random.normal(jax.random.key(5), (1, moe.n_routed_experts))
    ids_K = reference.route(logits_1E, jnp.eye(moe.n_routed_experts), moe.num_experts_per_tok)
    title = f"{name}: {moe.n_shared_experts} shared + {moe.num_experts_per_tok} of"
    shown[f"{title} {moe.n_routed_experts}, {sets:,} sets"] = ExpertsOfToken(moe, ids_K.ids_TK[0])
with styled():  # as the package's own pictures are
    figure = expert_plots.of_a_token(shown)
display(Drawn(figure))

# %% [markdown]
# ## 6. Train one
#
# The same model at smoke scale: two layers, 1 shared + 63 routed experts in each, 7 activated,
# hidden size 48.  It reads the text that comes with every Python: its library, its documentation,
# the names of the Unicode characters.  100 steps are a matter of seconds, once they are compiled.
# The config is the file `configs/dsmoe_2b.py`; we change a few of its keys.

# %%
folder = tempfile.TemporaryDirectory()
corpus = prepare(
    "stdlib", Path(folder.name) / "corpus", vocab_size=1024, sequence_length=64,
    max_bytes_per_domain=400_000,
)  # fmt: skip
config = replace(
    from_config_dict(files.load("configs/dsmoe_2b.py:smoke")),
    **{
        "model.vocab_size": 1024,
        "data.tokenizer_vocab_size": 1024,
        "data.corpus": str(corpus.directory),
        "train.steps": 100,
        "train.global_batch_size": 16,
        "train.checkpoint_every": 1000,
        "train.eval_every": 25,
        "train.eval_batches": 10,
        "optimizer.warmup_steps": 10,
    },
)
workdir = Path(folder.name) / "run"
result = train(config, workdir)
print(f"held-out loss {result.evaluation['loss']:.3f} nats per token")

# %%
rows = read_rows(workdir)
validation = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
assert abs(rows[0]["loss"] - math.log(config.model.vocab_size)) < 0.1, "knows nothing at first"
assert result.evaluation["loss"] < rows[0]["loss"] - 1.5, "and then learns"

fig, ax = plt.subplots(figsize=(5.2, 2.6))
ax.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=BLUE, lw=1)
ax.plot(*zip(*validation, strict=True), "o", color=ORANGE, ms=4.5)
ax.axhline(math.log(config.model.vocab_size), color=INK, lw=0.8, ls=":")
ax.text(config.train.steps, math.log(config.model.vocab_size), "$\\ln V$", ha="right", va="bottom")
ax.text(18, rows[17]["loss"] + 0.25, "training batches", color=BLUE)
ax.text(validation[1][0], validation[1][1] - 0.35, "held-out text", color=ORANGE, ha="right")
ax.set(xlabel="step", ylabel="nats per token", title="Loss")
plt.show()

# %% [markdown]
# And the balance?  Every training step reports the load of each expert in each layer; so does the
# evaluation, here on held-out text.  The usual measure of the worst case is
# MaxVio = (largest load - mean) / mean; 0 is perfect.

# %%
load_LE = np.array(result.evaluation["load"])
L, E = load_LE.shape
assert load_LE.shape == (config.model.num_hidden_layers, 63)
relative_LE = load_LE / load_LE.mean(axis=1, keepdims=True)
np.testing.assert_allclose(relative_LE.max(axis=1) - 1, result.evaluation["maxvio"])

fig, axes = plt.subplots(1, L, figsize=(7.2, 2.5), sharey=True)
for i, ax in enumerate(axes):
    ax.bar(range(E), np.sort(relative_LE[i])[::-1], color=BLUE, width=0.85)
    ax.axhline(1, color=INK, lw=0.8, ls=":")
    ax.set(xlabel="experts, busiest first", xticks=[])
    ax.set_title(f"Layer {i + 1}: MaxVio {result.evaluation['maxvio'][i]:.2f}")
axes[0].set_ylabel("load / fair share")
plt.show()
assert (load_LE > 0).all(), "no expert is dead"

# %% [markdown]
# ## 7. What do experts like?
#
# To see which tokens go where we need the routing of every layer.  The layers report it, and
# `route_text` keeps it for a whole text, here the held-out one.

# %%
run = load_run(workdir)
tokens = result.evaluation["tokens"]
text = route_text(run.model, run.corpus, max_tokens=tokens, batch_size=16)
load_VLE = specialisation.load_by_group(text.ids_LTK, text.token_ids_T, corpus.vocab_size, E)
count_LEV = load_VLE.transpose(1, 2, 0)  # how often expert e of layer l was chosen for token v
np.testing.assert_array_equal(count_LEV.sum(axis=2), load_LE)  # as the evaluation has counted
np.testing.assert_array_equal(*count_LEV.sum(axis=1))  # each layer sees the same tokens, K times

# %% [markdown]
# Of the experts of the last layer that are not nearly idle, here are the three choosiest: those
# whose five most frequent tokens make up the largest part of their load.  Beside each token its
# part of the expert's load, and its part of the text.

# %%
share_EV = count_LEV[-1] / count_LEV[-1].sum(axis=1, keepdims=True)
share_V = count_LEV[-1].sum(axis=0) / count_LEV[-1].sum()
favourite_E5 = np.argsort(-share_EV, axis=1)[:, :5]
choosy_E = np.take_along_axis(share_EV, favourite_E5, axis=1).sum(axis=1)
busy_E = count_LEV[-1].sum(axis=1) > count_LEV[-1].sum() / E / 2  # half a fair share or more
for e in np.argsort(-choosy_E * busy_E)[:3]:
    of_text = share_V[favourite_E5[e]].sum()
    print(f"expert {e}: {choosy_E[e]:.0%} of its load are five tokens ({of_text:.0%} of the text)")
    for v in favourite_E5[e]:
        token = repr(corpus.tokenizer.token(v))
        print(f"    {token:14} {share_EV[e, v]:6.1%}   of the text {share_V[v]:6.1%}")
    assert choosy_E[e] > 2 * of_text

# %% [markdown]
# ## 8. Take experts away
#
# Do the routed experts know different things, and does the shared one know what they do not?  Two
# experiments of the paper (V1 section 4.5), on our model.  An `Intervention` changes how trained
# layers are used:
#
# - **Mask the best.**  For every token, the quarter of the experts with the highest affinities is
#   forbidden, and the 7 best of the rest do the work, with the gates that their affinities give
#   them.  If experts were interchangeable, the loss would hardly rise.
# - **No shared expert.**  It is left out and an eighth routed expert is activated instead: the
#   compute is the same.

# %%
interventions = {
    "as trained": Intervention(),
    "16 best of 63 masked": Intervention(mask_best=16),
    "no shared, 8 routed": Intervention(shared_experts=False, num_experts_per_tok=8),
}
found = {}
for name, change in interventions.items():
    held_out = evaluate(run.model, run.corpus, batch_size=16, max_batches=10, intervention=change)
    found[name] = held_out["loss"]
whole = found["as trained"]
assert abs(whole - result.evaluation["loss"]) < 1e-4, "it is the model as it was trained"

fig, ax = plt.subplots(figsize=(5.6, 1.6))
names = list(found)[::-1]
colours = [GREY, BLUE, ORANGE][::-1]
bars = ax.barh(names, [found[name] - whole for name in names], color=colours, height=0.62)
for name, bar in zip(names, bars, strict=True):
    label = f" {found[name]:.3f}"
    ax.text(bar.get_width(), bar.get_y() + bar.get_height() / 2, label, va="center")
ax.set(xlabel="rise of the held-out loss, nats per token (numbers: the loss itself)")
ax.set_title("What the model loses")
ax.margins(x=0.15)
ax.tick_params(axis="y", length=0)
plt.show()

assert found["16 best of 63 masked"] > whole
assert found["no shared, 8 routed"] > whole + 0.05

# %% [markdown]
# Both hurt.  That a routed expert cannot stand in for the shared one is what the paper found, too
# (its loss goes from 1.808 to 2.414).  Do not read more into it: this is a model of two layers
# after a few seconds of training, whose routed experts have hardly begun to differ; one seed, and
# no rival beside it.  `make demo` trains the rivals.

# %%
folder.cleanup()

# %% [markdown]
# ## Where to go on
#
# - `from_gshard_to_deepseekmoe.py` takes part 5 in steps, `look_inside_a_router.py` goes on with
#   part 7, `eight_devices.py` has the dispatch between devices, `plan_a_pod_run.py` a large run.
# - `dsmoe_jax/moe/`: the parts of this notebook, with all routers, losses and dispatchers; start
#   with `reference.py`, then `routed.py` and `layer.py`.
# - `configs/`: the models of the paper from 2B to 145B, each a few lines.
#   `python -m dsmoe_jax count --config=configs/dsmoe_16b.py` counts them.
# - `python -m dsmoe_jax generate --workdir=DIR --prompt="def "` lets a trained model write.
# - `make demo`: DeepSeekMoE against Dense, Hash, Switch and GShard on real text.
