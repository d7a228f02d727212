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
# # From GShard to DeepSeekMoE, step by step
#
# A conventional mixture of experts, such as [GShard](https://arxiv.org/abs/2006.16668), has a few
# large experts and sends each token to two.  [DeepSeekMoE](https://arxiv.org/abs/2401.06066)
# ("V1") arrives at 63 small ones and a shared one in two steps, and neither costs parameters or
# FLOPs.  We take the steps one at a time.  At each we count what it costs, show that what the
# layer could do before it can still do, and count what is new.  Then come the balance losses that
# keep many experts at work, and what a comparison of trained models says.
#
# The models are the paper's, at the paper's size; they are counted, not trained.  The notebook
# takes a quarter of a minute.  [README.md](README.md) says how to open it; every claim ends in an
# `assert`.
#
# Shapes are suffixes of names: `T` tokens, `D` hidden, `E` routed experts, `K` activated ones per
# token, `F` width of an expert.

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
import math

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx
from IPython.display import display

from dsmoe_jax.config import BalanceTerm, MoEConfig, files, from_config_dict
from dsmoe_jax.model import size
from dsmoe_jax.moe import losses, reference
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.types import Routing
from dsmoe_jax.report import expert_plots, loss_plots, tables
from dsmoe_jax.report.blocks import Table
from dsmoe_jax.report.expert_plots import ExpertsOfToken
from dsmoe_jax.report.inline import Drawn
from dsmoe_jax.report.style import STYLE
from dsmoe_jax.report.text import to_text
from dsmoe_jax.study import verdicts
from dsmoe_jax.study.results import Comparison, load_rows
from experiments.v1 import fig3

matplotlib.rcParams.update(STYLE)

# %% [markdown]
# ## 0. Where we start: a mixture instead of one FFN
#
# **Question: what does a conventional mixture cost, and what does it give?**
#
# The dense model has one feed-forward network (FFN) in each of its 9 layers; the table counts it
# as a shared expert.  GShard has 16 of the same size and uses 2 for a token.  `size.account`
# counts as the paper does; it builds the real module, without allocating its arrays.

# %%
steps = {
    "dense": "configs/dense_2b.py",
    "GShard: 16, two chosen": "configs/gshard_2b.py",
    "cut in two": "configs/dsmoe_2b.py:paper,split=2,shared=0",
    "cut in four": "configs/dsmoe_2b.py:paper,split=4,shared=0",
    "and one shared": "configs/dsmoe_2b.py",
}
configs = {name: from_config_dict(files.load(file)) for name, file in steps.items()}
moes = {name: config.model.moe for name, config in configs.items()}
accounts = {name: size.account(config) for name, config in configs.items()}
rows = []
for (name, account), moe in zip(accounts.items(), moes.values(), strict=True):
    active = moe.num_experts_per_tok if moe.n_routed_experts else 0
    rows.append(
        [
            name,
            f"{moe.n_shared_experts} + {active} of {moe.n_routed_experts}",
            f"{moe.moe_intermediate_size}",
            f"{account['total'] / 1e9:.3f}B",
            f"{account['activated'] / 1e9:.3f}B",
            f"{account['flops_per_sequence'] / 1e12:.2f}T",
        ]
    )
head = ["", "shared + routed", "width", "parameters", "activated", "FLOPs a sequence"]
print(to_text(Table(head, rows)))

# %%
dense, gshard, *cuts, deepseek = accounts.values()
assert 9.9 < gshard["total"] / dense["total"] < 10
assert round(gshard["flops_per_sequence"] / dense["flops_per_sequence"], 1) == 1.5
assert gshard["expert_total"] == 16 * dense["expert_total"]
assert gshard["expert_activated"] == 2 * dense["expert_activated"]

# %% [markdown]
# **Answer:** ten times the parameters for one and a half times the arithmetic.  Look at the last
# four rows: from here on, nothing in the table but the number of experts and their width moves.
#
# ## 1. First step: cut the experts
#
# **Question: what is lost when an expert is cut into pieces?**
#
# Nothing.  The hidden units of an FFN do not know of each other: its output is a sum over them.
# So an expert of width $F$ is the sum of $m$ experts of width $F/m$, which have its units between
# them.  If a token that went to the whole expert goes to all its pieces, with the same gate, the
# layer computes what it did.  We try it: four experts, two chosen, then each cut in $m = 2$.

# %%
T, D, E, K, F, m = 5, 16, 4, 2, 24, 2
wide = MoEConfig(E, 0, K, F)
layer = MoELayer(wide, hidden_size=D, vocab_size=T, initializer_range=0.3, rngs=nnx.Rngs(0))
u_TD = jax.random.normal(jax.random.key(1), (T, D))
routing = reference.route(u_TD, layer.router_ED[...], K)
whole = layer.gate_EFD[...], layer.up_EFD[...], layer.down_EDF[...]

gate_EFD, up_EFD, down_EDF = whole
pieces = (
    gate_EFD.reshape(E * m, F // m, D),
    up_EFD.reshape(E * m, F // m, D),
    down_EDF.reshape(E, D, m, F // m).swapaxes(1, 2).reshape(E * m, D, F // m),
)
ids_TK = (routing.ids_TK[:, :, None] * m + jnp.arange(m)).reshape(T, K * m)
gates_TK = jnp.repeat(routing.gates_TK, m, axis=1)
print(f"token 0: experts {routing.ids_TK[0]} of {E} become {ids_TK[0]} of {E * m}")

before_TD = reference.moe_layer(u_TD, routing, whole)
after_TD = reference.moe_layer(u_TD, Routing(ids_TK, gates_TK, None), pieces)
np.testing.assert_allclose(after_TD, before_TD, rtol=1e-4, atol=1e-5)

# %% [markdown]
# **Answer:** so the conventional layer is one way to use the finer one: the way in which pieces
# of an expert always go together.  The finer layer may also pick them apart.
#
# **Question: how many more ways are there?**
#
# A token uses a *set* of experts.  GShard has $\binom{16}{2}$ of them.  Cut in $m$, there are
# $\binom{16m}{2m}$, at the same parameters and FLOPs:

# %%
sets = {}
for name in ("GShard: 16, two chosen", "cut in two", "cut in four"):
    moe = moes[name]
    sets[name] = math.comb(moe.n_routed_experts, moe.num_experts_per_tok)
    print(f"{name:24} {sets[name]:>15,} sets")
assert list(sets.values()) == [120, 35_960, 4_426_165_368]  # V1 3.1 has the first and the last

for cut in cuts:
    for figure in ("total", "activated", "expert_total", "expert_activated"):
        assert abs(cut[figure] / gshard[figure] - 1) < 0.002, figure
    assert cut["flops_per_sequence"] == gshard["flops_per_sequence"]

# %% [markdown]
# The two parts in a thousand that we allow are of widths that must be whole numbers (a quarter of
# 3413 is 853 here), and of the router, which has a row for every expert.
#
# Are these sets used?  We draw 4,096 tokens and a router, and count the different sets:

# %%
tokens_TD = jax.random.normal(jax.random.key(2), (4096, 64))
used, chosen = {}, {}
for name in sets:
    moe = moes[name]
    router_ED = jax.random.normal(jax.random.key(3), (moe.n_routed_experts, 64)) / 8
    drawn = reference.route(tokens_TD, router_ED, moe.num_experts_per_tok)
    used[name] = len(np.unique(np.sort(drawn.ids_TK, axis=1), axis=0))
    chosen[name] = drawn.ids_TK[0].tolist()
    print(f"{name:24} {used[name]:5,} different sets among 4,096 tokens")
assert used["GShard: 16, two chosen"] <= 120
assert used["cut in four"] > 4000, "nearly every token has its own"

# %% [markdown]
# **Answer:** with 16 experts many tokens have to share a set; with 64 almost none has to.  That
# is V1's argument for finer experts: a token can be given what it needs, and an expert can keep
# to what it knows.  It is an argument about what is *possible*; what training makes of it is
# another question, to which we come at the end.
#
# ## 2. Second step: set one aside
#
# **Question: what is a shared expert, and what does it cost?**
#
# Some knowledge is needed for every token, and would have to be learned by many experts.  V1 sets
# $K_s$ experts aside that every token uses, and the router picks $K - K_s$ of the others.  A shared
# expert is a routed one that everyone chooses with gate 1: the shared expert as expert number $E$.

# %%
deep = MoEConfig(E - 1, 1, K - 1, F)
layer = MoELayer(deep, hidden_size=D, vocab_size=T, initializer_range=0.3, rngs=nnx.Rngs(4))
routed = layer.gate_EFD[...], layer.up_EFD[...], layer.down_EDF[...]
shared = layer.shared.gate_FD[...], layer.shared.up_FD[...], layer.shared.down_DF[...]
routing = reference.route(u_TD, layer.router_ED[...], K - 1)

with_shared_TD = reference.moe_layer(u_TD, routing, routed, shared)
one_more = [jnp.concatenate([r, s[None]]) for r, s in zip(routed, shared, strict=True)]
ids_TK = jnp.concatenate([routing.ids_TK, jnp.full((T, 1), E - 1)], axis=1)
gates_TK = jnp.concatenate([routing.gates_TK, jnp.ones((T, 1))], axis=1)
as_routed_TD = reference.moe_layer(u_TD, Routing(ids_TK, gates_TK, None), one_more)
np.testing.assert_allclose(as_routed_TD, with_shared_TD, rtol=1e-4, atol=1e-5)

# %% [markdown]
# So it costs nothing either, and even saves a row of the router in every layer.  What it takes is
# choice:

# %%
model = configs["and one shared"].model
rows_saved = model.num_hidden_layers * model.hidden_size
assert cuts[-1]["total"] - deepseek["total"] == rows_saved, "a row of the router in each layer"
assert deepseek["expert_total"] == cuts[-1]["expert_total"]
assert deepseek["expert_activated"] == cuts[-1]["expert_activated"]
assert deepseek["flops_per_sequence"] == gshard["flops_per_sequence"]

for n in (0, 1, 2, 4):
    moe = from_config_dict(files.load(f"configs/dsmoe_2b.py:paper,shared={n}")).model.moe
    left = math.comb(moe.n_routed_experts, moe.num_experts_per_tok)
    print(f"{n} shared + {moe.num_experts_per_tok} of {moe.n_routed_experts}: {left:>13,} sets")
    assert left == math.comb(64 - n, 8 - n)

# %% [markdown]
# Here are the four layers with the experts of one token, drawn with the routers of above.  All
# rows are equally long: they have the same parameters.

# %%
name = "and one shared"
moe = moes[name]
router_ED = jax.random.normal(jax.random.key(3), (moe.n_routed_experts, 64)) / 8
drawn = reference.route(tokens_TD, router_ED, moe.num_experts_per_tok)
chosen[name] = drawn.ids_TK[0].tolist()
shown = {name: ExpertsOfToken(moes[name], ids_K) for name, ids_K in chosen.items()}
display(Drawn(expert_plots.of_a_token(shown)))

# %% [markdown]
# **Answer:** an expert that is always on.  It takes choices from the router, of which there are
# plenty, and relieves the routed experts of what all tokens need.
#
# ## 3. Keeping 63 experts at work
#
# **Question: what stops the router from using a few experts only?**
#
# Two losses (V1 eqs.  12-17), both of the form $\sum f P$: $f$ counts how many tokens an expert
# (or a device with some of the experts) got relative to its fair share, $P$ is the mean affinity
# for it.  Each is 1 if all is even.  To see the difference between the two we make routings by
# hand, of 64 tokens that take one of 8 experts, which lie on 4 devices:

# %%
E, T, D = 8, 64, 4
moe = MoEConfig(
    E, 0, 1, F, expert_groups=D, balance={"expert": BalanceTerm(1.0), "device": BalanceTerm(1.0)}
)
by_hand = {
    "even": np.arange(T) % E,
    "one expert of each device": 2 * (np.arange(T) % D),
    "all experts of one device": np.arange(T) % 2,
    "one expert": np.zeros(T, int),
}
wanted = {  # expert, device: 1 over the share of experts, or of devices, that are used
    "even": (1, 1),
    "one expert of each device": (2, 1),
    "all experts of one device": (4, 4),
    "one expert": (8, 4),
}
valid_BS = jnp.ones((1, T), bool)
rows = []
for name, ids_T in by_hand.items():
    affinity_TE = jax.nn.one_hot(ids_T, E)  # as sure as a router can be
    sums = losses.layer_sums(Routing(jnp.asarray(ids_T)[:, None], None, affinity_TE), valid_BS, moe)
    found = [
        float(losses.value(term, sums[term], losses.whole_batch(valid_BS)))
        for term in ("expert", "device")
    ]
    np.testing.assert_allclose(found, wanted[name], rtol=1e-5)
    rows.append([name, *(f"{value:.1f}" for value in found)])
print(to_text(Table(["who works", "expert term", "device term"], rows)))

# %% [markdown]
# In the second row half of the experts are idle while all devices are equally busy.  The expert
# term sees that, the device term does not.  On one device it does not matter for speed, and
# forcing experts to be even may cost quality; over several devices uneven *devices* make everyone
# wait.  The paper's factors say so:

# %%
for name in ("dsmoe_2b", "dsmoe_16b", "dsmoe_145b"):
    config = from_config_dict(files.load(f"configs/{name}.py"))
    factors = {term: found.factor for term, found in config.model.moe.balance.items()}
    print(f"{name:11} {factors}")
assert factors == {"expert": 0.003, "device": 0.05}

# %% [markdown]
# **Answer:** a small price on uneven experts and, where experts are on several devices, a larger
# one on uneven devices.  How the gradient moves the router, `deepseekmoe_in_ten_minutes.py`
# shows; other terms, and V3's way without a loss, are in `docs/routers_and_losses.md`.
#
# ## 4. Does it help?
#
# **Question: is a model better after each step?**
#
# V1's figure 3 says so: each step lowers the loss, at 2B parameters and 100B tokens.  Training
# for some seconds in this notebook could not tell: as we shall see, even a minute a model leaves
# some of the orderings open.  That comparison is in the repository, with several seeds and their
# spread, and its results are read from there.

# %%
results = files.REPOSITORY / "experiments" / "results" / "fig3-demo" / "results.jsonl"
experiment = fig3.EXPERIMENT
comparison = Comparison(experiment, "demo", experiment.arms, tuple(load_rows(results)), {}, "")
assert all(comparison.finished(arm) for arm in comparison.arms)
display(Drawn(loss_plots.final(comparison)))

# %% [markdown]
# Each dot is a run, each stroke the mean of a model; a name reads shared + routed (chosen).  Are
# the differences larger than the noise?

# %%
judged = verdicts.judge(comparison)
print(to_text(tables.claims_table(judged)))
assert len(judged) == math.comb(len(comparison.arms), 2), "every pair of models"
ranking = tables.ranking(comparison, "validation_loss")
assert next(iter(ranking)) == "1 + 63 (7)", "the finest has the lowest mean"
verdict = {finding.claim.text: finding.verdict for finding in judged}
assert verdict["1 + 15 (1) below 0 + 16 (2)"] == verdicts.REVERSED
for finer, coarser in (("1 + 31 (3)", "1 + 15 (1)"), ("1 + 63 (7)", "1 + 31 (3)")):
    assert verdict[f"{finer} below {coarser}"] == verdicts.HOLDS

paper = configs["and one shared"].train
tokens = paper.steps * paper.global_batch_size * 2048
less = tokens / comparison.rows[0]["tokens"]
print(f"the paper's models saw {less:,.0f} times as many tokens")
assert 0.5e5 < less < 2e5

# %% [markdown]
# **Answer:** in part.  A verdict is *holds* or *reversed* if an interval of 95 % excludes no
# difference.  With a shared expert, finer experts are better at both cuts.  A shared expert by
# itself is not better here: beside it a token has only one expert left to choose.  These are
# models of a million parameters and a hundred-thousandth of the paper's tokens.  Orders and signs
# may be compared, not sizes, and what small models do is no proof of what large ones do.
#
#     python -m experiments.v1.fig3 --scale=demo
#
# trains it again, `--scale=proxy` on one GPU; `experiments/results/fig3-demo/report.md` is the
# report.
#
# ## Where to go on
#
# - `deepseekmoe_in_ten_minutes.py`: the layer in code, and one trained.
# - `look_inside_a_router.py`: what experts learn.
# - `python -m dsmoe_jax count` prints all models beside the paper's figures.
