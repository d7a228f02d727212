"""Experts to devices by recorded loads: an order of each layer's experts that evens devices out.

A mesh gives its P devices (`mesh.expert`) equal parts of the experts in their order.  So an order
of the experts is a placement, and a checkpoint with its experts in that order is placed wherever it
is loaded.  Group-limited routing keeps its groups whole; where devices have a capacity, the experts
of a device stay together.

Every second of the recorded batches decides, by its sum with the others; the rest judges.  Judged
is the mean over batches of how uneven each one is, which can rise where the sum gets more even.

Replicas of busy experts (DeepSeek-V3, 2412.19437 section 3.4) are planned and judged, not made:
the layer holds each expert once.

Shapes: S samples of a load (batches), L MoE layers, E routed experts, P devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsmoe_jax.config import Config
from dsmoe_jax.model import layout
from dsmoe_jax.runs import loads
from dsmoe_jax.surgery import packing, permutation
from dsmoe_jax.surgery.types import Option, Outcome, Subject

OPTIONS = {
    "loads": Option(
        str,
        "Recorded loads: a pass of recorded routing (DIRECTORY/validation-00000400), a"
        " metrics.jsonl, or an evaluation.json.",
        needed=True,
    ),
    "held_out": Option(
        str,
        "Other loads to judge by, in the same forms; by default every second batch of --loads,"
        " which then do not decide.",
    ),
    "last": Option(int, "Take only so many of the last batches or rows of --loads."),
    "devices": Option(int, "Devices over which a mesh splits the experts.", needed=True),
    "nodes": Option(int, "Nodes of equally many devices: they are evened out first.", 1),
    "places": Option(
        int,
        "Also plan so many places for experts on all devices together, with replicas of the"
        " busiest experts.  A plan only: the layer holds each expert once.",
    ),
}


class Halves(NamedTuple):
    """Loads that decide, and loads that judge (None if there are no others), (S, L, E)."""

    decide: np.ndarray
    judge: np.ndarray | None


def place(subject: Subject, options: Mapping[str, Any]) -> Outcome:
    """Orders the experts of every layer by their loads.

    Args:
      subject: the model.
      options: values of `OPTIONS`.

    Raises:
      ValueError: for loads of another model, numbers that do not divide, and models that another
        order would change.
    """
    config = subject.config
    permutation.check(config.model)
    levels = _levels(config, options)
    parts = list(permutation.whole_parts(config.model).values())
    halves = _halves(config, options)
    orders = [packing.arranged(load_E, levels, parts) for load_E in halves.decide.sum(axis=0)]
    given = [np.arange(len(order)) for order in orders]
    report = {
        "orders": [order.tolist() for order in orders],
        "batches": [len(halves.decide), 0 if halves.judge is None else len(halves.judge)],
        "before": _judged(given, levels, halves),
        "after": _judged(orders, levels, halves),
    }
    if options["places"] is not None:
        report["replicas"] = _replicas(halves, levels, options["places"])
    # Of multi-token prediction only training has loads; without them its experts stay.
    n_layers = sum(n for _, n in layout.moe_stacks(config.model))
    orders += [given[0]] * (n_layers - len(orders))
    return Outcome(
        config=permutation.permuted_config(config, orders),
        model=permutation.permuted(config.model, subject.model, orders),
        report=report,
        text=_text(report, levels, options["places"]),
        moments=lambda tree: permutation.permuted(config.model, tree, orders),
        load=lambda load_LE: permutation.permuted_load(load_LE, orders),
    )


def _levels(config: Config, options: Mapping[str, Any]) -> list[int]:
    """Numbers of parts that are evened out: nodes, if there are several, and devices.

    Raises:
      ValueError: with the numbers, if one does not divide what it must.
    """
    e = config.model.moe.n_routed_experts
    nodes, devices, places = options["nodes"], options["devices"], options["places"]
    if devices < 2:
        raise ValueError(f"--devices={devices}: must be at least 2; on one there is no choice")
    if devices > e:
        raise ValueError(f"--devices={devices}: must not exceed the {e} experts of a layer")
    if e % devices:
        raise ValueError(f"--devices={devices}: must divide the {e} experts of a layer")
    if nodes < 1 or devices % nodes:
        raise ValueError(f"--nodes={nodes}: must divide --devices={devices}")
    if places is not None and (places < e or places % devices):
        raise ValueError(
            f"--places={places}: must be a multiple of --devices={devices}, at least the {e}"
            " experts of a layer"
        )
    levels = [nodes, devices] if 1 < nodes < devices else [devices]
    for key, n in permutation.whole_parts(config.model).items():
        for flag, level in (("nodes", nodes), ("devices", devices)):
            if n % level and level % n:
                raise ValueError(
                    f"--{flag}={level}: must divide {key}={n}, whose experts stay together, or be a"
                    " multiple of it"
                )
    return levels


def _halves(config: Config, options: Mapping[str, Any]) -> Halves:
    """The loads that decide and those that judge."""
    load_SLE = loads.read(options["loads"], config, "--loads")
    if options["last"] is not None:
        if not 1 <= options["last"] <= len(load_SLE):
            raise ValueError(f"--last={options['last']}: must be 1 to {len(load_SLE)}")
        load_SLE = load_SLE[-options["last"] :]
    if options["held_out"] is not None:
        judge = loads.read(options["held_out"], config, "--held_out")
        n_layers = min(load_SLE.shape[1], judge.shape[1])
        return Halves(load_SLE[:, :n_layers], judge[:, :n_layers])
    if len(load_SLE) == 1:
        return Halves(load_SLE, None)
    return Halves(load_SLE[::2], load_SLE[1::2])


def _judged(
    orders: Sequence[np.ndarray], levels: Sequence[int], halves: Halves
) -> dict[str, dict[str, Any]]:
    """Imbalance of nodes and devices by layer, on either half; see `packing.imbalance`."""
    names = ["nodes", "devices"][-len(levels) :]
    return {
        name: _by_half([order.reshape(n, -1) for order in orders], halves)
        for name, n in zip(names, levels, strict=True)
    }


def _by_half(by_layer: Sequence[np.ndarray], halves: Halves) -> dict[str, Any]:
    """Imbalance by layer, from the experts of each device, on either half."""
    e = halves.decide.shape[2]
    found: dict[str, Any] = {}
    for name, load_SLE in (("decide", halves.decide), ("judge", halves.judge)):
        found[name] = (
            load_SLE
            if load_SLE is None
            else [
                packing.imbalance(load_SLE[:, layer], packing.shares(experts_PX, e))
                for layer, experts_PX in enumerate(by_layer)
            ]
        )
    return found


def _replicas(halves: Halves, levels: Sequence[int], places: int) -> dict[str, Any]:
    """The experts at every place of every layer, and how even the devices are with them."""
    plan = [packing.replicated(load_E, places, levels) for load_E in halves.decide.sum(axis=0)]
    return {"experts": [x.tolist() for x in plan], "devices": _by_half(plan, halves)}


def _text(report: Mapping[str, Any], levels: Sequence[int], places: int | None) -> str:
    """The imbalance before and after, one line each."""
    decided, judged = report["batches"]
    lines = [
        f"MaxVio over devices, mean over layers, of {decided} batches that decided, and of"
        f" {judged} others"
        if judged
        else f"MaxVio over devices, mean over layers, of {decided} batches that decided; there are"
        " no others to judge by"
    ]
    for when in ("before", "after"):
        for name, found in report[when].items():
            lines.append(f"{when:7} {name:8} {_mean(found['decide'])}  {_mean(found['judge'])}")
    if "replicas" in report:
        found = report["replicas"]["devices"]
        lines.append(
            f"{places} places  {_mean(found['decide'])}  {_mean(found['judge'])}"
            "  (a plan: the layer holds each expert once, so replicas are not made)"
        )
    lines.append(f"use it with --config.mesh.expert={levels[-1]}")
    return "\n".join(lines)


def _mean(by_layer: Sequence[float | None] | None) -> str:
    """Mean over the layers that have a number; "-" without one."""
    known = [x for x in by_layer or () if x is not None]
    return f"{np.mean(known):.3f}" if known else "-"
