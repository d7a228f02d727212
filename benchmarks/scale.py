"""Time of a step on 8 to 4,096 TPUs with each dispatcher: arithmetic, seconds on any machine.

    python -m benchmarks.scale                                # the tables of docs/scale.md
    python -m benchmarks.scale --picture=docs/scale.png       # and its picture

Models and batches are the configs', memory and traffic the planner's, the chips' figures those of
dsmoe_jax/hardware/chips.py.  The assumptions are in docs/scale.md.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import configs
from benchmarks import harness
from dsmoe_jax.config import Config, from_config_dict, replace
from dsmoe_jax.hardware.chips import CHIPS, TPUS, Chip
from dsmoe_jax.model import size
from dsmoe_jax.parallel import sharding
from dsmoe_jax.planning import planner
from dsmoe_jax.training.start import TrainState, state_shapes

CHIP_COUNTS = tuple(2**n for n in range(3, 13))
DISPATCHES = ("all_to_all", "all_gather", "device-limited")
MODELS = ("dsmoe_16b", "dsmoe_145b")
LIMIT = 3  # M: devices that a token may use (V2 section 2.1.2)
_RECOMPUTED = 4 / 3  # of the FLOPs that MFU counts: a rematerialised layer runs forward twice


class Cost(NamedTuple):
    """A mesh, and the seconds that a chip needs for a step.

    Attributes:
      plan: mesh, memory and traffic, GB.
      compute: seconds of FLOPs.
      exchange: seconds of tokens on their way to experts and back.
      other: seconds of all other traffic.
    """

    plan: planner.Plan
    compute: float
    exchange: float
    other: float

    @property
    def seconds(self) -> float:
        """Seconds of a step in which computation and traffic overlap perfectly."""
        return max(self.compute, self.exchange + self.other)


def hops(n: int, dimensions: int) -> float:
    """Mean number of links between two of n chips, a power of two, in the most even torus."""
    doublings = math.log2(n)
    sides = [2 ** int((doublings + i) // dimensions) for i in range(dimensions)]
    return sum(sum(min(i, side - i) for i in range(side)) / side for side in sides)


def dispatched(config: Config, name: str, n_devices: int) -> Config:
    """The config with one of `DISPATCHES`, for `n_devices` on the axis `expert`."""
    if name != "device-limited":
        return replace(config, **{"model.moe.dispatch.name": name})
    moe = config.model.moe
    most = LIMIT * moe.n_routed_experts // moe.num_experts_per_tok  # else M groups hold too few
    groups = min(n_devices, 2 ** int(math.log2(most)))
    limited = {
        "model.moe.router.n_group": groups,
        "model.moe.router.topk_group": min(LIMIT, groups),
    }
    return replace(config, **limited)


def meshes(config: Config, state: TrainState, chips: int) -> Iterator[dict[str, int]]:
    """Meshes of powers of two with at least two expert shards, without `data`."""
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
    """The meshes of so many chips that fit their memory, the fastest first."""
    state = state_shapes(config)
    limit = planner.USABLE * CHIPS[chip].hbm_gb
    found = []
    for sizes in meshes(config, state, chips):
        with_dispatch = dispatched(config, name, sizes["expert"])
        whole = config.train.global_batch_size // (sizes["fsdp"] * sizes["expert"])
        for micro_batch in (n for n in (1, 2, 4) if whole % n == 0):
            plan = planner.estimate(with_dispatch, state, sizes, whole // micro_batch)
            if plan.used <= limit:
                found.append(cost(config, plan, CHIPS[chip], name))
    return sorted(found, key=lambda c: (c.seconds, c.exchange + c.other))


def cost(config: Config, plan: planner.Plan, chip: Chip, name: str) -> Cost:
    """The seconds of a plan with one of `DISPATCHES`."""
    flops = size.train_flops_per_token(config) * config.tokens_per_step
    chips = math.prod(plan.sizes.values())
    tokens = plan.traffic.get("tokens", 0.0)
    links = links_on_the_way(name, plan.sizes["expert"], chip)
    return Cost(
        plan,
        compute=_RECOMPUTED * flops / chips / chip.peak_flops,
        exchange=links * tokens * 1e9 / chip.link_bandwidth,
        other=(plan.moved - tokens) * 1e9 / chip.link_bandwidth,
    )


def links_on_the_way(name: str, n_devices: int, chip: Chip) -> float:
    """Links that a row takes on its way to each chip that receives it."""
    if name == "all_gather":  # forwarded from neighbour to neighbour
        return 1.0
    assert chip.torus_dimensions is not None, "of a TPU"
    return hops(n_devices, chip.torus_dimensions)


def load(model: str) -> Config:
    """A model of the paper at its own size and batch."""
    return from_config_dict(configs.load(model))


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
    state = state_shapes(config)
    lines: dict[str, list[tuple[int, float]]] = {name: [] for name in DISPATCHES}
    for name in DISPATCHES:
        p = 2
        while config.model.moe.n_routed_experts % p == 0:
            sizes = {"data": 1, "fsdp": 1, "expert": p, "tensor": 1}
            one = replace(config, **{"train.global_batch_size": p})  # a sequence a chip
            plan = planner.estimate(dispatched(one, name, p), state, sizes, 1)
            found = cost(one, plan, CHIPS[chip], name)
            lines[name].append((p, found.exchange / found.compute))
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
    parser.add_argument("--chip", default="v5p", choices=TPUS)
    parser.add_argument("--picture", type=Path, help="also draw, into this file")
    args = parser.parse_args()
    for model in MODELS:
        print(f"{model} on {args.chip}\n\n{table(load(model), args.chip)}\n")
    if args.picture:
        draw(args.picture, args.chip)


if __name__ == "__main__":
    main()
