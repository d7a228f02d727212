"""What a step costs from 8 to 4,096 chips with each dispatcher: arithmetic, seconds on any machine.

    python -m benchmarks.scale                                # the tables of docs/scale.md
    python -m benchmarks.scale --picture=docs/scale.png       # and its picture

The model, the batch and the planner's formulas are those of the repository, the chips' figures
those of dsmoe_jax/parallel/chips.py.  docs/scale.md says what is assumed.
"""

import argparse
import dataclasses
import importlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import harness
from dsmoe_jax.config import Config, from_config_dict, replace
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.model import size
from dsmoe_jax.parallel import sharding
from dsmoe_jax.planning import planner
from dsmoe_jax.training.step import TrainState, state_shapes

CHIP_COUNTS = tuple(2**n for n in range(3, 13))
DISPATCHES = ("all_to_all", "all_gather", "device-limited")
MODELS = ("dsmoe_16b", "dsmoe_145b")
LIMIT = 3  # M: devices that a token may use (V2 section 2.1.2)


class Cost(NamedTuple):
    """The best mesh of so many chips, and what a chip needs for a step.

    Attributes:
      plan: mesh, memory and traffic, GB.
      compute, exchange, other: seconds of FLOPs, of tokens on their way, of all other traffic.
    """

    plan: planner.Plan
    compute: float
    exchange: float
    other: float

    @property
    def seconds(self) -> float:
        """Of a step in which computation and traffic overlap perfectly."""
        return max(self.compute, self.exchange + self.other)


def hops(n: int, dimensions: int) -> float:
    """Mean links between two of n chips, a power of two, in the most even torus."""
    doublings = math.log2(n)
    sides = [2 ** int((doublings + i) // dimensions) for i in range(dimensions)]
    return sum(sum(min(i, side - i) for i in range(side)) / side for side in sides)


def dispatched(config: Config, name: str, n_devices: int) -> Config:
    """The config with one of `DISPATCHES`, on so many devices of the axis `expert`."""
    if name != "device-limited":
        return replace(config, **{"model.moe.dispatch.name": name})
    moe = config.model.moe
    enough = LIMIT * moe.n_routed_experts // moe.num_experts_per_tok  # M groups hold K experts
    groups = min(n_devices, 2 ** int(math.log2(enough)))
    moe = dataclasses.replace(moe, n_group=groups, topk_group=min(LIMIT, groups))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))


def meshes(config: Config, state: TrainState, chips: int) -> Iterator[dict[str, int]]:
    """Experts split over `expert`, the rest over `fsdp` and as little `tensor` as can be."""
    powers = [2**n for n in range(13)]
    for expert, tensor in itertools.product(powers[1:], powers):
        fsdp, rest = divmod(chips, expert * tensor)
        sizes = {"data": 1, "fsdp": fsdp, "expert": expert, "tensor": tensor}
        if rest or not fsdp or config.train.global_batch_size % (fsdp * expert):
            continue
        try:
            sharding.check(state.params, sizes)
        except ValueError:
            continue
        yield sizes


def costs(config: Config, chip: str, chips: int, name: str) -> list[Cost]:
    """All that fits in the memory of so many chips, the fastest first."""
    state, data = state_shapes(config), CHIPS[chip]
    dimensions = 3 if chip in ("v4", "v5p") else 2
    flops = size.train_flops_per_token(config) * config.tokens_per_step
    found = []
    for sizes in meshes(config, state, chips):
        with_dispatch = dispatched(config, name, sizes["expert"])
        whole = config.train.global_batch_size // (sizes["fsdp"] * sizes["expert"])
        for micro_batch in (n for n in (1, 2, 4) if whole % n == 0):
            plan = planner.estimate(with_dispatch, state, sizes, whole // micro_batch)
            if plan.used > planner.USABLE * data.hbm_gb:
                continue
            tokens = plan.traffic.get("tokens", 0.0)
            # A gathered row is forwarded from neighbour to neighbour; one that is sent to a
            # certain chip takes a link of every chip on its way.
            way = 1.0 if name == "all_gather" else hops(sizes["expert"], dimensions)
            found.append(
                Cost(
                    plan,
                    compute=4 / 3 * flops / chips / data.peak_flops,
                    exchange=way * tokens * 1e9 / data.link_bandwidth,
                    other=(plan.moved - tokens) * 1e9 / data.link_bandwidth,
                )
            )
    return sorted(found, key=lambda c: (c.seconds, c.exchange + c.other))


def load(model: str) -> Config:
    """A model of the paper at its own size and batch."""
    return from_config_dict(importlib.import_module(f"configs.{model}").get_config())


def table(config: Config, chip: str) -> str:
    """One line for each number of chips, as Markdown; a dash where no mesh divides and fits."""
    rows = []
    for chips in CHIP_COUNTS:
        best = {name: (costs(config, chip, chips, name) or [None])[0] for name in DISPATCHES}
        plan = first.plan if (first := best["all_to_all"]) else None
        rows.append(
            {
                "chips": str(chips),
                "compute, s": first and first.compute,
                **{
                    f"{name}: exchange + other traffic, s": c
                    and f"{c.exchange:.2g} + {c.other:.2g}"
                    for name, c in best.items()
                },
                "mesh with all_to_all": plan and planner.shape(plan.sizes),
                "micro-batches": plan and str(plan.accumulation_steps),
                "memory, GB": plan and f"{plan.used:.0f}",
            }
        )
    return harness.table(rows)


def exchange_by_shards(config: Config, chip: str) -> dict[str, list[tuple[int, float]]]:
    """Seconds of exchange over seconds of compute by the size of the axis `expert`."""
    state, data = state_shapes(config), CHIPS[chip]
    per_token = 4 / 3 * size.train_flops_per_token(config) / data.peak_flops
    lines: dict[str, list[tuple[int, float]]] = {name: [] for name in DISPATCHES}
    for name in DISPATCHES:
        p = 2
        while config.model.moe.n_routed_experts % p == 0:
            sizes = {"data": 1, "fsdp": 1, "expert": p, "tensor": 1}
            one = replace(config, **{"train.global_batch_size": p})  # a sequence a chip
            tokens = planner.estimate(dispatched(one, name, p), state, sizes, 1).traffic["tokens"]
            way = 1.0 if name == "all_gather" else hops(p, 3 if chip in ("v4", "v5p") else 2)
            seconds = way * tokens * 1e9 / data.link_bandwidth
            lines[name].append((p, seconds / (per_token * config.data.sequence_length)))
            p *= 2
    return lines


def draw(path: Path, chip: str) -> None:
    """Exchange over compute by the number of expert shards."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(MODELS), figsize=(9, 3.6), layout="constrained", sharey=True)
    for panel, model in zip(axes, MODELS, strict=True):
        for name, points in exchange_by_shards(load(model), chip).items():
            panel.plot(*zip(*points, strict=True), marker="o", label=name)
        panel.axhline(1.0, color="gray", linestyle=":")
        panel.set(xlabel="expert shards", title=f"{model} on {chip}")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
    axes[0].set_ylabel("exchange / compute")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", default="v5p", choices=list(CHIPS))
    parser.add_argument("--picture", type=Path, help="also draw, into this file")
    args = parser.parse_args()
    for model in MODELS:
        print(f"{model} on {args.chip}\n\n{table(load(model), args.chip)}\n")
    if args.picture:
        draw(args.picture, args.chip)


if __name__ == "__main__":
    main()
