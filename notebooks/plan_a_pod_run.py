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
# # Plan a pod run
#
# DeepSeekMoE 16B is to be trained on 64 TPUs.  Will it fit, how should it be split over the chips,
# what will a step wait for, and how long will it all take?  None of these questions needs a TPU.
# This notebook answers them by arithmetic, compares the answers with what a compiler says, and ends
# with the line that starts the run.
#
# All of it is bounds from data sheets: nothing here was timed on a pod.  The notebook takes a
# quarter of a minute.  [README.md](README.md) says how to open it; every claim ends in an `assert`.

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
import json
import math

import matplotlib
from IPython.display import display

from dsmoe_jax.config import MeshConfig, files, from_config_dict, overrides, replace
from dsmoe_jax.hardware.chips import CHIPS, TPUS
from dsmoe_jax.model import size
from dsmoe_jax.parallel import sharding
from dsmoe_jax.planning import plan_report, planner
from dsmoe_jax.report import plan_plots
from dsmoe_jax.report.blocks import Table
from dsmoe_jax.report.inline import Drawn
from dsmoe_jax.report.style import STYLE
from dsmoe_jax.report.text import to_text
from dsmoe_jax.training.start import state_shapes

matplotlib.rcParams.update(STYLE)

# %% [markdown]
# ## 1. What has to fit?
#
# **Question: how much memory does training take before it has seen a token?**
#
# In float32 a parameter has 4 bytes, its two Adam moments 8, its gradient 4.  The config is the
# paper's model with the paper's batch.

# %%
config = from_config_dict(files.load("configs/dsmoe_16b.py"))
count = size.count_parameters(config.model)
state = size.state_bytes(count.total)
state_gb = sum(state.values()) / 1e9
parts = ", ".join(f"{name} {n_bytes / 1e9:.0f} GB" for name, n_bytes in state.items())
print(f"{count.total / 1e9:.1f}B parameters: {parts}\n")
rows = []
for name in TPUS:
    hbm_gb = CHIPS[name].hbm_gb
    rows.append([name, f"{hbm_gb} GB", str(math.ceil(state_gb / hbm_gb))])
print(to_text(Table(["chip", "memory", "to hold the state"], rows)))
assert state_gb == 16 * count.total / 1e9
assert 16.3 < count.total / 1e9 < 16.5, "the paper's 16.4B"

# %% [markdown]
# **Answer:** 16 bytes a parameter, 262 GB here.  No chip holds it, a few would.  But a step also
# needs room for activations, and the batch should be done before the money is: so, more chips.
#
# ## 2. How can it be split?
#
# **Question: which dimension of which array lies on which chips?**
#
# The mesh has four axes.  The letters at the end of a parameter's name are its dimensions, and one
# table, `sharding.LOGICAL`, says which axes of the mesh split which letter:

# %%
for name in ("gate_EFD", "down_EDF", "query_NHD", "embedding_VD"):
    letters = name.rpartition("_")[2]
    parts = [
        f"{sharding.LOGICAL[letter].meaning} over {' x '.join(axes) or 'nothing'}"
        for letter, axes in zip(letters, sharding.split(letters), strict=True)
    ]
    print(f"{name:13} {'; '.join(parts)}")
assert sharding.split("EFD") == [("expert",), ("tensor",), ("fsdp",)]

# %% [markdown]
# An axis has its price.  `data` splits nothing but the batch; `fsdp` gathers weights before they
# are used; `expert` sends tokens to their experts and back; `tensor` adds up activations in every
# layer.  Not every mesh of 64 chips is possible, since sizes must be divided evenly:

# %%
shapes = state_shapes(config)
possible = list(planner.meshes(shapes, 64))
print(f"{len(possible)} meshes of 64 chips divide the arrays of the model")
for axis in possible[0]:
    sizes, lengths = planner.possible(config, shapes, axis)
    print(f"{axis:7} can be {[n for n in sizes if n <= 64]}")
assert all(math.prod(sizes.values()) == 64 for sizes in possible)

# %% [markdown]
# **Answer:** the names of the arrays say it.  There is no second table to keep in step with.
#
# ## 3. Which mesh?
#
# **Question: which of them takes the least time, and what if I want another?**
#
# `planner.propose` goes through all of them, each with as few micro-batches as fit.  `describe` is
# what `python -m dsmoe_jax plan` prints.

# %%
plan, plans = planner.propose(config, "v5p", 64)
print(plan_report.describe(config, plan, plans, "v5p"))

# %%
limit = planner.USABLE * CHIPS["v5p"].hbm_gb
assert math.prod(plan.sizes.values()) == 64
assert plan.used <= limit
fitting = [other for other in plans if other.used <= limit]
assert plan.bounds(config, "v5p").serial == min(p.bounds(config, "v5p").serial for p in fitting)

# %% [markdown]
# **Answer:** the planner's, unless you know something that it does not.  The last lines say what
# each other choice would cost: often little.  Below we also look at the mesh that was compiled
# for this model, 8 x 8 with 36 micro-batches.
#
# ## 4. What fills the memory?
#
# **Question: where do the gigabytes of a chip go?**

# %%
of_experts = planner.best_that_fits(config, [p for p in plans if p.sizes["expert"] > 1], "v5p")
of_tensor = planner.best_that_fits(config, [p for p in plans if p.sizes["tensor"] > 1], "v5p")
changes = {"mesh": MeshConfig(fsdp=8, expert=8), "train.accumulation_steps": 36}
compiled_config = replace(config, **changes)
small = planner.examine(compiled_config, "v5p", 64)
shown = {
    f"{planner.shape(p.sizes)}\n{p.accumulation_steps} micro-batches": p
    for p in (plan, of_experts, of_tensor, small)
}
display(Drawn(plan_plots.memory(shown, CHIPS["v5p"].hbm_gb, planner.USABLE)))

# %% [markdown]
# Parameters, moments and gradients are exact.  They are split over all chips but along `data`,
# where each has a copy: with `data` 4 they take four times as much.  Activations are an estimate.
# More micro-batches are smaller ones, which need less room at once, but gather the weights more
# often.

# %%
for p in shown.values():
    all_chips = 64 / p.sizes["data"] * p.memory["parameters"]
    assert 1 <= all_chips / (state["parameters"] / 1e9) < 1.001, "a vector is whole on every chip"
assert small.used < plan.used / 3
assert small.traffic["weights"] > plan.traffic["weights"]

# %% [markdown]
# **Answer:** to activations, not to the state.  How many tokens are on a chip at once decides
# whether a step fits, and `train.accumulation_steps` decides that.
#
# ## 5. What does a step wait for?
#
# **Question: arithmetic, memory or the network?**
#
# A roofline divides the work of a chip by its data sheet: FLOPs by its peak, bytes moved in its
# memory by the memory's speed, bytes received by that of its links.  None of the three can be
# undercut.

# %%
bounds = {name: p.bounds(config, "v5p") for name, p in shown.items()}
display(Drawn(plan_plots.times(bounds)))

# %% [markdown]
# By hand for the first: 6 FLOPs for each activated parameter in a product, and those of
# attention; a third of it again, since the layers are computed once more on the way back
# (`model.remat`).

# %%
tokens = config.train.global_batch_size * config.data.sequence_length / 64
flops = size.train_flops_per_token(config) * tokens
seconds = flops / CHIPS["v5p"].peak_flops
best = bounds[next(iter(bounds))]
assert math.isclose(best.model_compute, seconds)
assert 1.2 < best.compute / seconds <= 4 / 3 + 1e-6
print(f"{tokens:,.0f} tokens: {flops / 1e15:.2f} PFLOP, {seconds:.1f} s of a chip at its peak")
slow, fast = best.mfu
print(f"useful work is at most {fast:.0%} of the peak, {slow:.0%} if the network is waited for")

# %% [markdown]
# The same model on as many other chips:

# %%
others = {}
for chip in TPUS:
    proposed, _ = planner.propose(config, chip, 64)
    others[f"{chip}: {planner.shape(proposed.sizes)}"] = proposed.bounds(config, chip)
display(Drawn(plan_plots.times(others)))
v6e = next(bound for name, bound in others.items() if name.startswith("v6e"))
assert v6e.memory > v6e.compute, "its memory is slow for its arithmetic"
assert best.compute > best.memory

# %% [markdown]
# **Answer:** on v4 and v5p for arithmetic, on v5e and v6e for memory: a chip that multiplies faster
# does not help a program that waits for bytes.
#
# ## 6. How many chips?
#
# **Question: what do more chips buy?**

# %%
rows, hours, serial = [], {}, {}
for chips in (16, 32, 64, 128, 256):
    proposed, _ = planner.propose(config, "v5p", chips)
    serial[chips] = proposed.bounds(config, "v5p").serial
    hours[chips] = config.train.steps * serial[chips] / 3600
    rows.append(
        [
            str(chips),
            planner.shape(proposed.sizes),
            str(proposed.accumulation_steps),
            f"{proposed.used:.0f} GB",
            f"{serial[chips]:.1f} s",
            f"{hours[chips] / 24:,.0f}",
            f"{chips * hours[chips]:,.0f}",
        ]
    )
head = ["chips", "mesh", "micro-batches", "memory", "a step", "days", "chip-hours"]
print(to_text(Table(head, rows)))
assert serial[16] > serial[64] > serial[256]
assert 256 * hours[256] > 16 * hours[16], "the network costs more of a shorter step"

# %% [markdown]
# **Answer:** days, and for a while at almost the same price.  These are the least hours at full
# speed; a real run reaches a part of it, and `--utilisation` of an experiment's `--plan` says
# which.
#
# Too few chips are refused in a sentence, with the numbers of the mesh that came closest:

# %%
try:
    planner.propose(config, "v5e", 8)
except ValueError as error:
    print(error)
    assert "does not fit 8 v5e" in str(error)

# %% [markdown]
# ## 7. What does compiling add?
#
# **Question: is the arithmetic right?**
#
# XLA compiles for a TPU slice without having one:
#
#     python -m dsmoe_jax aot --config=configs/dsmoe_16b.py --topology=v5p:4x4x4
#
# compiles the training step itself (some minutes, and `pip install 'dsmoe_jax[tpu]'`), and reads
# the program: what it allocates, what it moves in memory by part of the model, what chips
# exchange, and whether exchanges have computation beside them.  Results for the paper's models
# are in the repository; here is that of our model beside the planner's figures for the same mesh:

# %%
results = files.REPOSITORY / "benchmarks" / "results" / "slices.jsonl"
compiled = {
    (found["config"], found["topology"]): found
    for found in map(json.loads, results.read_text().splitlines())
}[("dsmoe_16b", "v5p:4x4x4")]
assert {"stage": 1, **compiled["mesh"]} == small.sizes
assert compiled["accumulation_steps"] == small.accumulation_steps
figures = {
    "memory of a chip, GB": (small.used, compiled["used_gb"]),
    "moved in it in a step, TB": (sum(small.hbm.values()) / 1e3, compiled["traffic_gb"] / 1e3),
    "compute, s": (bounds[list(bounds)[-1]].compute, compiled["roofline"]["compute_s"]),
    "HBM, s": (bounds[list(bounds)[-1]].memory, compiled["roofline"]["memory_s"]),
    "network, s": (bounds[list(bounds)[-1]].network, compiled["roofline"]["network_s"]),
}
rows = [
    [name, f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs - 1:+.0%}"]
    for name, (ours, theirs) in figures.items()
]
print(to_text(Table(["", "planner", "compiled", ""], rows)))
for name in ("memory of a chip, GB", "moved in it in a step, TB", "compute, s"):
    ours, theirs = figures[name]
    assert abs(ours / theirs - 1) < 0.2, name

# %% [markdown]
# **Answer:** near enough to choose by, not to rely on.  Memory and traffic are close; the network
# is where the compiler does things that the planner does not know (`docs/scale.md` says which).
# Compile before the chips are paid for: a step that does not fit is then an error with numbers.
#
# ## 8. Start it
#
# **Question: what do I type?**
#
# The command that trains on one core, with the flags of the mesh:

# %%
flags = planner.flags(small)
command = ["python", "-m", "dsmoe_jax", "train", "--config=configs/dsmoe_16b.py", "--workdir=DIR"]
print(" ".join(command), *flags, sep=" \\\n    ")

# %% [markdown]
# Once on each host; `launch/` has the files for TPU VMs, GKE and Slurm, and `docs/pods.md` says
# what happens on several hosts.  DIR must be on a file system that all of them see.  The flags
# are keys of the config, so we can check that they say what was planned:

# %%
again = replace(config, **dict(overrides.parse(flag.removeprefix("--config.")) for flag in flags))
assert again.mesh.sizes(64) == compiled_config.mesh.sizes(64)
assert planner.examine(again, "v5p", 64) == small

# %% [markdown]
# **Answer:** what you typed before, and where the chips are.
#
# ## Where to go on
#
# - `python -m dsmoe_jax plan --help` and `aot --help`; `docs/pods.md`, from one machine to a pod;
#   `docs/scale.md`, what was compiled, and where more chips stop helping.
# - `python -m experiments.v1.table6 --scale=paper --plan --chip=v5p --chips=1024` plans a whole
#   experiment, with the command of each model.
# - `eight_devices.py`: what the axis `expert` does.
