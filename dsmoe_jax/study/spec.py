"""What an experiment is: arms to compare, and what must be equal for the comparison to be fair.

A new experiment is a module with one literal `Experiment` (see `experiments/table1.py`); running,
checking, resuming, tables, pictures and reports are shared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import configs
from dsmoe_jax import config as config_lib
from dsmoe_jax.config import Config

# What `Equal` can compare: keys of `dsmoe_jax.accounting.account`, and how to say them.
QUANTITIES = {
    "total": "total parameters",
    "activated": "activated parameters",
    "expert_total": "expert parameters",
    "expert_activated": "activated expert parameters",
    "flops_per_sequence": "FLOPs per sequence",
}
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Arm:
    """One model of a comparison.

    Attributes:
      label: as in tables and pictures.
      config: name of a file in `configs/`.
      options: of that file, as on the command line: "split=2,shared=1".
      paper_loss: validation loss that the paper prints, in nats per token; None if it prints none.
      overrides: dotted config keys to change, for what no config file says.
    """

    label: str
    config: str
    options: str = ""
    paper_loss: float | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def slug(self) -> str:
        """The arm's directory name: "Hash Layer" -> "hash_layer"."""
        words = "".join(c if c.isalnum() else " " for c in self.label.lower()).split()
        return "_".join(words)

    def run_config(self, scale: str, seed: int, overrides: Mapping[str, Any] = NOTHING) -> Config:
        """The config of one run of this arm.

        Args:
          scale: "smoke", "demo", "proxy" or "paper".
          seed: of everything random; the same seed is the same data in the same order.
          overrides: dotted keys that are changed in every arm.

        Raises:
          ValueError: for an unknown config file, option, scale or key, or an impossible value.
        """
        argument = f"{scale},{self.options}" if self.options else scale
        config = config_lib.from_config_dict(configs.load(self.config, argument))
        return config_lib.replace(config, **{**self.overrides, **overrides, "train.seed": seed})


@dataclasses.dataclass(frozen=True)
class Equal:
    """`quantity` of the arms may differ by at most `tolerance`, relative to the first arm named."""

    quantity: str
    arms: tuple[str, ...]
    tolerance: float


def same_total(*arms: str) -> tuple[Equal, ...]:
    """Experts of the same total size.  Routers may differ: more experts need a larger one."""
    return Equal("total", arms, 0.02), Equal("expert_total", arms, 0.001)


def same_activated(*arms: str) -> tuple[Equal, ...]:
    """The same work per token.  A router is 2 % of the activated parameters of a tiny model."""
    return (
        Equal("activated", arms, 0.04),
        Equal("expert_activated", arms, 0.001),
        Equal("flops_per_sequence", arms, 0.001),
    )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A comparison of models under the same budget, data and random order.

    Attributes:
      name: of the module; results go to `RESULTS/NAME-SCALE`.
      title: heading of the report.
      source: paper and table or figure.
      claim: what the paper says, in a sentence or two.
      arms: in the order in which they are shown; pictures of differences start from the first.
      equal: which sizes must agree, and how closely.
      order: labels from the highest loss to the lowest as the paper claims it, where it prints no
        losses; otherwise the arms' `paper_loss` says it.
      may_differ: config keys (or sections, ending in a dot) in which arms may differ.  Everything
        else - data, order, seed, steps, batch, learning rate, attention - must be the same.
      seeds: how many by default, for each scale.
    """

    name: str
    title: str
    source: str
    claim: str
    arms: tuple[Arm, ...]
    equal: tuple[Equal, ...]
    order: tuple[str, ...] = ()
    may_differ: tuple[str, ...] = ("name", "model.moe.")
    seeds: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"smoke": 1, "demo": 3, "proxy": 1, "paper": 1}
    )

    def __post_init__(self) -> None:
        labels, slugs = [arm.label for arm in self.arms], [arm.slug for arm in self.arms]
        if not labels or len(set(slugs)) < len(slugs):
            raise ValueError(f"{self.name}: arms={labels}: labels must differ in letters or digits")
        for label in (*self.order, *(name for rule in self.equal for name in rule.arms)):
            if label not in labels:
                raise ValueError(f"{self.name}: arm {label!r}: must be one of {labels}")
        for rule in self.equal:
            if rule.quantity not in QUANTITIES:
                raise ValueError(
                    f"{self.name}: quantity {rule.quantity!r}: must be one of {list(QUANTITIES)}"
                )

    def orderings(self) -> list[tuple[Arm, Arm]]:
        """All pairs (worse, better) that the paper claims, worst first."""
        arms = {arm.label: arm for arm in self.arms}
        if self.order:
            ranked = [(-i, arms[label]) for i, label in enumerate(self.order)]
        else:
            ranked = [(a.paper_loss, a) for a in self.arms if a.paper_loss is not None]
        ranked.sort(key=lambda item: -item[0])
        return [
            (worse, better)
            for i, (high, worse) in enumerate(ranked)
            for low, better in ranked[i + 1 :]
            if high > low
        ]
