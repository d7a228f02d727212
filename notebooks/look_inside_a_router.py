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
# # Look inside a trained router
#
# What did the experts learn?  For every token a router leaves behind which experts it chose and
# with what gates.  That is all one needs to ask whether experts serve domains or single tokens,
# who works with whom, whether a few do most of the work, and when in training it was decided.
#
# We train a small DeepSeekMoE for some seconds, so that there is something to look at, and then ask
# one question a section.  The model is tiny and hardly trained: the notebook shows how to look, not
# what large models do; the end says how to look at a run of your own.  It takes less than a minute.
# [README.md](README.md) says how to open this notebook; every claim ends in an `assert`.
#
# Shapes are suffixes of names: `T` tokens of a text, `L` MoE layers, `E` routed experts, `K`
# activated ones per token, `G` domains.

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
import tempfile

import jax
import matplotlib
import numpy as np
from flax import nnx
from IPython.display import display

from dsmoe_jax.analysis import committee, pairs, specialisation, tables
from dsmoe_jax.analysis.routed_text import layer_weights, route_text
from dsmoe_jax.config import files, from_config_dict, replace
from dsmoe_jax.data.prepare import prepare
from dsmoe_jax.model.build import build_model
from dsmoe_jax.report import analysis_page, explorer
from dsmoe_jax.report.inline import Drawn, Page
from dsmoe_jax.report.style import STYLE
from dsmoe_jax.report.text import to_text
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.training.loop import train

matplotlib.rcParams.update(STYLE)

# %% [markdown]
# ## 0. Something to look at
#
# Two layers, each with 1 shared and 31 routed experts of which a token takes 3 (experts of half
# the standard width: half of the paper's cut, so that the pictures are easier to read).  The text
# is what comes with every Python: its library, its language reference, docstrings, names of
# characters.  We keep checkpoints on the way, for the question when the router settled.

# %%
folder = tempfile.TemporaryDirectory()
corpus = prepare(
    "stdlib", Path(folder.name) / "corpus", vocab_size=1024, sequence_length=64,
    max_bytes_per_domain=250_000,
)  # fmt: skip
config = replace(
    from_config_dict(files.load("configs/dsmoe_2b.py:smoke,split=2")),
    **{
        "model.vocab_size": 1024,
        "data.tokenizer_vocab_size": 1024,
        "data.corpus": str(corpus.directory),
        "train.steps": 60,
        "train.global_batch_size": 8,
        "train.checkpoint_every": 15,
        "train.keep_checkpoints": 4,
        "train.eval_every": 60,
        "train.eval_batches": 20,
        "optimizer.warmup_steps": 10,
    },
)
workdir = Path(folder.name) / "run"
evaluation = train(config, workdir).evaluation
print(f"held-out loss {evaluation['loss']:.2f} nats per token, {np.log(1024):.2f} before training")
assert evaluation["loss"] < np.log(1024) - 1, "it has learned something"

# %% [markdown]
# ## 1. Where did every token go?
#
# **Question: what is there to look at?**
#
# `route_text` runs the model over held-out text and keeps the routing: `ids_LTK`, the experts of
# each token in each layer, and `gates_LTK`, their weights; beside them the tokens, their places
# in the documents and their domains.  All are plain arrays.

# %%
run = load_run(workdir)
text = route_text(run.model, run.corpus, max_tokens=evaluation["tokens"], batch_size=8)
L, T, K = text.ids_LTK.shape
E = text.n_experts
tokenizer = run.corpus.tokenizer
print(f"{T:,} tokens, {L} layers, {K} of {E} experts each; domains: {', '.join(text.domains)}")
for place in range(100, 103):
    token = repr(tokenizer.token(int(text.token_ids_T[place])))
    gates = ", ".join(f"{g:.3f}" for g in text.gates_LTK[-1, place])
    print(f"{token:8} layer {L}: experts {text.ids_LTK[-1, place]}, gates {gates}")

# %% [markdown]
# `tables.compute` makes all tables of the command `python -m dsmoe_jax analyse` from it.  For
# some it wants the weights too, and the routing by earlier checkpoints.

# %%
steps = (15, 30, 45)
earlier = {
    step: route_text(load_run(workdir, step).model, run.corpus, max_tokens=T, batch_size=8).ids_LTK
    for step in steps
}
subject = tables.Subject(text, layer_weights(run.model, run.corpus), earlier)
found = tables.compute(subject)
maps = {picture.name: picture for picture in analysis_page.pictures("run", found)}
print(", ".join(found))

assert found["load"]["load"] == evaluation["load"], "the evaluation has counted the same"
assert np.sum(found["load"]["load"]) == L * T * K

# %% [markdown]
# One thing to compare with is worth having from the start: the same model before training, its
# routers drawn at random.  What it shows already, nobody has learned.

# %%
untrained = nnx.jit(build_model, static_argnums=0)(config.model, jax.random.key(1))
drawn = route_text(untrained, run.corpus, max_tokens=T, batch_size=8)
before = tables.compute(tables.Subject(drawn))

# %% [markdown]
# **Answer:** for every token $K$ numbers of experts and $K$ gates in every layer, and everything
# below is counting.
#
# ## 2. Do experts serve domains?
#
# **Question: does it matter for the choice of experts whether a text is code or prose?**
#
# For each domain (row) and expert (column) the load, relative to an even one.  Orange is too much,
# purple too little; if all rows looked alike, domains would share their experts.

# %%
display(Drawn(maps["run-domains"].figure))
trained_L, untrained_L = (t["domains"]["domain_specialisation"] for t in (found, before))
for layer in range(L):
    print(
        f"layer {layer + 1}: domain specialisation {trained_L[layer]:.3f},"
        f" before training {untrained_L[layer]:.3f}"
    )
    assert trained_L[layer] > untrained_L[layer]
load_GLE = np.array(found["domains"]["load"])
np.testing.assert_array_equal(load_GLE.sum(axis=0), found["load"]["load"])
assert load_GLE.shape == (len(text.domains), L, E)
assert all(0 < value < 1 for value in trained_L + untrained_L)

# %% [markdown]
# The number is 0 if all domains use the same experts, and 1 if every expert serves one domain.
#
# **Answer:** it does.  But look at the numbers before training, too: they are not 0.  Domains have
# different words, and a router that was never trained sends different words to different experts.
# Ask of every number like this what an untrained model has.
#
# ## 3. Do they serve tokens?
#
# **Question: how far does the token alone, without its context, decide the experts?**
#
# For each token id the largest share of its occurrences that one expert is among the chosen for,
# mean over ids.  $K/E$ would be no preference at all, 1 a fixed table.

# %%
trained_L, untrained_L = (t["vocabulary"]["vocabulary_specialisation"] for t in (found, before))
for layer in range(L):
    print(f"layer {layer + 1}: {trained_L[layer]:.2f}, before training {untrained_L[layer]:.2f}")
print(f"no preference: {K / E:.2f}")
assert min(trained_L + untrained_L) > 2 * K / E
assert trained_L[0] > trained_L[-1]

# %% [markdown]
# Here are the five most frequent tokens and where they go in the first layer.  A fixed table would
# have 100 % three times in each line.

# %%
vocabulary = specialisation.by_vocabulary(
    text.ids_LTK, text.token_ids_T, E, min_count=tables.MIN_COUNT
)
for c in np.argsort(-vocabulary.counts_C)[:5]:
    share_E = vocabulary.share_LCE[0, c]
    best = np.argsort(-share_E)[:K]
    shares = ", ".join(f"expert {i:2} {share_E[i]:4.0%}" for i in best)
    token = tokenizer.token(int(vocabulary.token_ids_C[c]))
    print(f"{token!r:8} {vocabulary.counts_C[c]:4} times: {shares}")
    occurs_T = text.token_ids_T == vocabulary.token_ids_C[c]
    assert np.isclose(share_E[best[0]], (text.ids_LTK[0, occurs_T] == best[0]).any(axis=1).mean())
assert np.allclose(vocabulary.share_LCE.sum(axis=2), K), "every occurrence has K experts"

# %% [markdown]
# And the other way round: the strongest uses of one expert of the last layer, the busiest, in their
# context; the token is in brackets.

# %%
busiest = int(np.argmax(found["load"]["load"][-1]))
uses = specialisation.strongest_uses(text.ids_LTK[-1], text.gates_LTK[-1], busiest, 5, apart=10)
print(f"expert {busiest} of layer {L}")
for use in uses:
    left, right = (tokenizer.decode(ids) for ids in text.around(use.place, 6))
    token = tokenizer.token(int(text.token_ids_T[use.place]))
    shown = repr(f"{left}[{token}]{right}")
    print(f"    gate {use.gate:.3f}  {shown}")
assert uses[0].gate == text.gates_LTK[-1][text.ids_LTK[-1] == busiest].max()

# %% [markdown]
# **Answer:** far, and the first layer most of all: it sees little but the token.
#
# ## 4. Who works with whom?
#
# **Question: are some experts chosen together more often than by chance?**
#
# Of the tokens of an expert (row), the share that another one (column) computes too, relative to
# the mean.

# %%
display(Drawn(maps["run-together"].figure))
share_EE = pairs.coactivation(text.ids_LTK[-1], E)
np.fill_diagonal(share_EE, 0)
share_EE[np.array(found["load"]["load"][-1]) < 100] = 0  # a few tokens may be chance
together = np.unravel_index(np.argsort(-share_EE, axis=None)[:3], share_EE.shape)
by_chance = (K - 1) / (E - 1)
print(f"by chance an expert sees {by_chance:.0%} of the tokens of another one")
for i, j in zip(*together, strict=True):
    chosen_T = (text.ids_LTK[-1] == i).any(axis=1)
    both_T = chosen_T & (text.ids_LTK[-1] == j).any(axis=1)
    print(f"expert {j} sees {both_T.sum()} of the {chosen_T.sum()} tokens of expert {i}")
    assert np.isclose(share_EE[i, j], both_T.sum() / chosen_T.sum())
assert share_EE.max() > 3 * by_chance

# %% [markdown]
# **Answer:** yes; they are the experts of the same tokens.  On several devices such a pair is
# best put on one: its tokens then travel once.
#
# ## 5. Do a few do most of the work?
#
# **Question: is there a committee that serves every text?**
#
# A *committee* is the smallest set of experts with half of the sum of all gates.  We take one for
# each domain and ask how much they overlap: 0 not at all, 1 they are the same, and beside it what
# random sets of these sizes would.

# %%
for number, layer in enumerate(found["committees"]["layers"], start=1):
    print(
        f"layer {number}: {len(layer['members'])} of {E} experts have half of the gates; overlap of"
        f" domains {layer['overlap']:.2f}, by chance {layer['chance_overlap']:.2f};"
        f" {len(layer['in_every_domain'])} are in every domain's committee"
    )
mass_E = np.zeros(E)
np.add.at(mass_E, text.ids_LTK[-1], text.gates_LTK[-1])
members = committee.committee(mass_E)
assert members == found["committees"]["layers"][-1]["members"]
assert mass_E[members].sum() >= mass_E.sum() / 2 > mass_E[members[:-1]].sum()

# %% [markdown]
# And how many of its 3 experts does a single token really use?  If one gate had all the weight it
# would be 1, with equal gates 3.

# %%
number_LT = committee.experts_per_token(text.gates_LTK)
print("effective experts per token, by layer:", np.round(number_LT.mean(axis=1), 2))
assert (number_LT >= 1 - 1e-6).all()
assert (number_LT <= K + 1e-6).all()
assert np.allclose(number_LT.mean(axis=1), found["experts_per_token"]["mean"])

# %% [markdown]
# **Answer:** compare the overlap with chance.  Papers disagree on whether such a committee serves
# all domains (2601.03425 finds one, 2604.05267 does not); `experiments/inside/committees.py` asks
# it of models that were trained longer, with several seeds.
#
# ## 6. Are two experts alike?
#
# **Question: do some experts compute the same?**
#
# Every expert is given the same tokens, whichever the router would send, and the outputs are
# compared: a cosine of 1 is the same direction.

# %%
for number, layer in enumerate(found["similarity"]["layers"], start=1):
    doubles = len(layer["alike_in_outputs"])
    print(f"layer {number}: mean cosine {layer['outputs_mean']:.3f}; {doubles} pairs above 0.85")
    assert np.allclose(np.diag(layer["outputs"]), 1, atol=1e-4)
    assert abs(layer["outputs_mean"]) < 0.5

# %% [markdown]
# **Answer:** hardly.  They began as random networks, and after this little training they are about
# as different.
#
# ## 7. When was it decided?
#
# **Question: how early does a router choose as it will at the end?**
#
# The share of a token's experts that an earlier checkpoint chose too (*saturation*, 2409.02060).

# %%
for step, share_L in found["saturation"].items():
    print(f"step {step}: {', '.join(f'{share:.0%}' for share in share_L)}")
for layer in range(L):
    first, *_, last = (share_L[layer] for share_L in found["saturation"].values())
    assert first < last < 1, "the last agrees more than the first"
print(f"by chance {K / E:.0%}")

# %% [markdown]
# **Answer:** here the choice is still moving when training ends, which is no surprise after so few
# steps.
#
# ## 8. See for yourself
#
# The routing explorer: the text coloured by expert.  Move the slider to another layer, point at a
# token for its experts and gates, click an expert for what it serves.  It is one page that loads
# nothing.

# %%
page = explorer.to_html("Routing of a small model", {"small": text}, tokenizer)
display(Page(page, height=720))

# %% [markdown]
# All the numbers by layer:

# %%
print(to_text(analysis_page.by_layer(found)))

# %%
folder.cleanup()

# %% [markdown]
# ## Where to go on
#
# - `python -m dsmoe_jax analyse --workdir=DIR --to=looked` writes all of this for a run, or for
#   several side by side; `docs/looking_inside.md` says what each number means.
# - `dsmoe_jax/analysis/tables.py`: a new table is a function and a line.
# - `eight_devices.py`: what a router's choices cost on many chips.
