"""Coordinate check of muP: sizes of activations in the first steps, over widths.

    python -m benchmarks.coordinate_check [--scale=smoke] [--picture=DIR] [--json=FILE]

Models of configs/dsmoe_2b_widths.py make a few steps on one batch, with and without muP.  With a
right parametrisation every activation changes by as much in a wide model as in a narrow one: the
slope of log(change) over log(width) is near 0.  A slope above 0 says that a learning rate that is
right for the narrow model is too large for the wide one; near -1, that a part stops learning.  (The
test is that of 2203.03466, appendix D.1.)

Layers are run here one by one.  Sizes are root mean squares over batch, positions, layers and
channels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter

import configs
from benchmarks import harness
from dsmoe_jax.config import Config, from_config_dict, replace
from dsmoe_jax.data.pipeline import Batch
from dsmoe_jax.model.build import abstract_model
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.moe.types import MoEInputs
from dsmoe_jax.nn.attention import CausalMask
from dsmoe_jax.nn.layers import linear_to_float32
from dsmoe_jax.report.style import AXIS, PALETTE, styled
from dsmoe_jax.report.svg import standalone_svg
from dsmoe_jax.training.start import TrainState, init_state
from dsmoe_jax.training.step import jit_train_step

STEPS = 5
WIDTHS = (50, 100, 200, 400)  # per cent of the scale's own, which is the base of muP
STANDARD, MUP = "standard", "muP"
PARTS = {
    "embedding": "embedding",
    "attention": "attention output",
    "router": "router logits",
    "routed": "routed experts' output",
    "logits": "logits",
}
ONLY_ROUTED = Intervention(shared_experts=False)
Sizes = dict[str, dict[str, list[float]]]  # part -> "size" or "change" -> after 0, 1, ... steps


def activations(model: Transformer, tokens_BS: jax.Array) -> dict[str, jax.Array]:
    """The activations of each of `PARTS`, those inside layers with a leading layer axis.

    Args:
      model: without leading dense layers, with routed and shared experts.
      tokens_BS: whole single-document sequences.
    """
    b, s = tokens_BS.shape
    positions_BS = jnp.broadcast_to(jnp.arange(s), (b, s))
    moe_inputs = MoEInputs(tokens_BS, jnp.ones((b, s), bool))
    graph, params = nnx.split(model.layers)
    x_BSD = model.embedding_VD[...][tokens_BS]
    found: dict[str, Any] = {"attention": [], "router": [], "routed": []}
    embedded_BSD = x_BSD
    for i in range(model.n_scanned):
        block = nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], params))
        y_BSD, _ = block.attention(block.attention_norm(x_BSD), positions_BS, CausalMask())
        x_BSD = x_BSD + y_BSD
        normed_BSD = block.ffn_norm(x_BSD)
        routed_BSD, _ = block.moe(normed_BSD, moe_inputs, ONLY_ROUTED)
        x_BSD = x_BSD + routed_BSD + block.moe.shared(normed_BSD)
        found["attention"].append(y_BSD)
        found["router"].append(jnp.einsum("bsd,ed->bse", normed_BSD, block.moe.router_ED[...]))
        found["routed"].append(routed_BSD)
    logits_BSV = linear_to_float32(model.final_norm(x_BSD), model.head)
    stacked = {name: jnp.stack(layers) for name, layers in found.items()}
    return {"embedding": embedded_BSD, **stacked, "logits": logits_BSV}


def made_up_batch(config: Config) -> Batch:
    """A batch of tokens drawn by Zipf's law, the same for every width."""
    b, s, v = config.train.global_batch_size, config.data.sequence_length, config.model.vocab_size
    share_V = 1 / np.arange(1, v + 1)
    rng = np.random.default_rng(0)
    tokens_BS = rng.choice(v, (b, s + 1), p=share_V / share_V.sum()).astype(np.int32)
    return {
        "tokens_BS": tokens_BS[:, :-1],
        "targets_BS": tokens_BS[:, 1:],
        "segment_ids_BS": np.ones((b, s), np.int32),
        "positions_BS": np.tile(np.arange(s, dtype=np.int32), (b, 1)),
        "loss_mask_BS": np.ones((b, s), np.float32),
    }


def sizes(config: Config, steps: int = STEPS) -> Sizes:
    """Size of each part after 0, 1, ... steps, and of its change since step 0.

    Every step has the config's peak rate and the same batch.
    """
    whole_rate = {"optimizer.warmup_steps": 0, "optimizer.schedule": "constant"}
    config = replace(config, **whole_rate)
    batch = made_up_batch(config)
    graph = abstract_model(config.model)

    @jax.jit
    def look(state: TrainState) -> dict[str, jax.Array]:
        model = nnx.merge(graph, state.params, state.other)
        return activations(model, jnp.asarray(batch["tokens_BS"]))

    state = init_state(config)
    train_step = jit_train_step(config, np.ones(config.model.vocab_size, np.int32))
    first = look(state)
    found: Sizes = {part: {"size": [], "change": []} for part in PARTS}
    for step in range(steps + 1):
        if step:
            state, _ = train_step(state, batch)
        for part, x in look(state).items():
            found[part]["size"].append(_rms(x))
            found[part]["change"].append(_rms(x - first[part]))
    return found


def _rms(x: jax.Array) -> float:
    return float(jnp.sqrt(jnp.square(x).mean()))


def slope(widths: Sequence[float], values: Sequence[float]) -> float:
    """The power of the width that values grow by: least squares of log over log."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def config_of(scale: str, width: int, mup: bool) -> Config:
    """The config of one model: `width` in per cent of the scale's own."""
    arg = f"{scale},width={width},mup={int(mup)}"
    config = from_config_dict(configs.load("dsmoe_2b_widths", arg))
    # The quickest to compile; all backends compute the same.
    return replace(config, **{"model.moe.expert_backend": "loop"})


def measure(scale: str, widths: Sequence[int] = WIDTHS) -> dict[str, dict[int, Sizes]]:
    """Sizes of all models: parametrisation -> hidden size -> `sizes`."""
    found: dict[str, dict[int, Sizes]] = {STANDARD: {}, MUP: {}}
    for name, by_width in found.items():
        for width in widths:
            config = config_of(scale, width, mup=name == MUP)
            d = config.model.hidden_size
            if config.model.mup_base_width == d and d in found[STANDARD]:
                by_width[d] = found[STANDARD][d]  # at the base both are the same model
                continue
            print(f"{name}, hidden size {d}", file=sys.stderr, flush=True)
            by_width[d] = sizes(config)
    return found


def rows(found: Mapping[str, Mapping[int, Sizes]]) -> list[dict[str, str]]:
    """A row a part: slopes over the width at the start and of the change after the last step."""
    table = []
    for part, title in PARTS.items():
        row = {"": title}
        for name, by_width in found.items():
            widths = list(by_width)
            first = [by_width[d][part]["size"][0] for d in widths]
            last = [by_width[d][part]["change"][-1] for d in widths]
            row[f"{name}: size at the start"] = f"{slope(widths, first):+.2f}"
            row[f"{name}: change after {STEPS} steps"] = f"{slope(widths, last):+.2f}"
        table.append(row)
    return table


def draw(found: Mapping[str, Mapping[int, Sizes]], what: str) -> Figure:
    """A row of axes for each parametrisation, a column for each part, a line for each step.

    Args:
      found: of `measure`.
      what: "size", or "change" since the start.
    """
    with styled():
        figure = Figure(figsize=(9.5, 4.2))
        grid = figure.subplots(len(found), len(PARTS), sharex=True, sharey="col", squeeze=False)
        figure.subplots_adjust(0.07, 0.11, 0.99, 0.93, wspace=0.34, hspace=0.12)
        for (name, by_width), line in zip(found.items(), grid, strict=True):
            for part, ax in zip(PARTS, line, strict=True):
                _draw_part(ax, {d: sizes[part][what] for d, sizes in by_width.items()}, what)
            line[0].set_ylabel(f"{name}\n{what}, RMS")
        for title, ax in zip(PARTS.values(), grid[0], strict=True):
            ax.set_title(title)
        figure.supxlabel("hidden size; later steps darker", fontsize=8.5)
    return figure


def _draw_part(ax: Axes, by_width: Mapping[int, list[float]], what: str) -> None:
    widths = list(by_width)
    steps = len(by_width[widths[0]])
    ink = list(PALETTE)[1]
    for step in range(int(what == "change"), steps):
        values = [by_width[d][step] for d in widths]
        ax.plot(widths, values, "o-", ms=2.5, lw=1.1, color=ink, alpha=0.25 + 0.75 * step / steps)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(widths, [str(d) for d in widths])
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="y", which="both", labelsize=7, colors=AXIS)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coordinate_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", default="smoke", help="of the config (default smoke)")
    parser.add_argument("--picture", type=Path, help="directory for size.svg and change.svg")
    parser.add_argument("--json", type=Path, help="write all sizes here")
    args = parser.parse_args(argv)
    # Nearly all of the time would go into compiling programs that run six times.
    jax.config.update("jax_disable_most_optimizations", True)
    found = measure(args.scale)
    print(harness.table(rows(found)))
    harness.write(found, args.json)
    if args.picture is not None:
        args.picture.mkdir(parents=True, exist_ok=True)
        for what in ("size", "change"):
            path = args.picture / f"coordinate_check_{what}.svg"
            path.write_text(standalone_svg(draw(found, what)), encoding="utf-8")


if __name__ == "__main__":
    main()
