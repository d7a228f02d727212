"""The place of every layer in a model's state, and the scans that run them.

Dense layers before the first MoE layer are `leading`, modules of their own.  The others come in
groups: an MoE layer and the dense ones up to the next.  Groups alike that follow each other are one
run: a stack of MoE layers, `layers`, one of dense layers, `between`, and one scan.  So the size of
a program grows with the number of runs, not with depth.  A model has one run, and a second one if
the last group is shorter; only `mlp_only_layers` can make it more.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from dsmoe_jax.config import ModelConfig

Path = tuple[str | int, ...]


class Run(NamedTuple):
    """Groups of layers alike.

    Attributes:
      groups: their number, and so that of the MoE layers.
      dense: dense layers of each, behind its MoE layer.
    """

    groups: int
    dense: int


class Place(NamedTuple):
    """The place of a layer in a model's state.

    Attributes:
      path: of its module, ("leading", 0), or of the stack that it is in, ("layers",).
      index: in the stack; None for a module of its own.
    """

    path: Path
    index: int | None


def n_leading(config: ModelConfig) -> int:
    """Dense layers before the first MoE layer."""
    return config.moe_layers[0]


def runs(config: ModelConfig) -> tuple[Run, ...]:
    """The runs of a model, in order."""
    ends = (*config.moe_layers[1:], config.num_hidden_layers)
    dense = [end - layer - 1 for layer, end in zip(config.moe_layers, ends, strict=True)]
    return tuple(Run(len(list(alike)), n) for n, alike in itertools.groupby(dense))


def path_of_run(number: int) -> Path:
    """Path of the module whose `layers` and `between` are those of a run; () is the model."""
    # The first run has no module of its own, so that all models without dense layers between have
    # the same form.
    return ("further", number - 1) if number else ()


def moe_stacks(config: ModelConfig) -> list[tuple[Path, int]]:
    """Path of each stack of MoE layers in a model's state, and its layers, in the order of reports.

    Behind those of the runs come the blocks of multi-token prediction.
    """
    stacks = [((*path_of_run(i), "layers"), run.groups) for i, run in enumerate(runs(config))]
    return [*stacks, (("mtp", "block"), config.mtp_depth)] if config.mtp_depth else stacks


def places(config: ModelConfig) -> list[Place]:
    """The places of all layers, in order."""
    found = [Place(("leading", layer), None) for layer in range(n_leading(config))]
    for number, run in enumerate(runs(config)):
        at = path_of_run(number)
        for group in range(run.groups):
            found.append(Place((*at, "layers"), group))
            first = group * run.dense
            found += [Place((*at, "between"), first + i) for i in range(run.dense)]
    return found


def keys_of(path: tuple) -> tuple[Any, ...]:
    """The path of an array of a state as `jax.tree` gives it, without what is no key."""
    return tuple(key.key for key in path if hasattr(key, "key"))
