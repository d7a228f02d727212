"""The models that lose experts, and how many of a layer are a share of them.

DeepSeekMoE's shared expert stays, and counts among the experts of which a share is left, as V1's
figure 4 counts: 56 of 64 are 55 of 63 routed ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from dsmoe_jax.study.experiment import Experiment, ProbeArm
from experiments.v1 import fig3, table2

SHARES = (Fraction(7, 8), Fraction(3, 4), Fraction(1, 2))


class Model(NamedTuple):
    """A model of 16 standard FFNs, where it was trained, and its shared and routed experts."""

    experiment: Experiment
    arm: str
    shared: int
    routed: int

    def keep(self, share: Fraction) -> int:
        """Routed experts when a share of all experts is left."""
        left = share * (self.shared + self.routed) - self.shared
        assert left.denominator == 1, "whole experts"
        return int(left)


GSHARD, LARGER, OURS = "GShard", "GShard x1.5", "DeepSeekMoE"
MODELS = {
    GSHARD: Model(fig3.EXPERIMENT, "0 + 16 (2)", 0, 16),
    LARGER: Model(table2.EXPERIMENT, "GShard x1.5", 0, 16),
    OURS: Model(fig3.EXPERIMENT, "1 + 63 (7)", 1, 63),
}


def label(model: str, way: str, share: Fraction) -> str:
    """The label of a model of which a share of the experts is left."""
    return f"{model} {way}, {share}"


def line(model: str, way: str) -> str:
    """The line of a model in the panel of a way."""
    return f"{model}, {way}"


def arms(way: str, probe: Callable[..., dict[str, Any]], by: str) -> list[ProbeArm]:
    """All models with all shares of their experts left.

    Args:
      way: in labels and panels.
      probe: of `study.fewer_experts`.
      by: its way.
    """
    return [
        ProbeArm(
            label(name, way, share),
            model.experiment,
            model.arm,
            x=float(share),
            line=line(name, way),
            probe=functools.partial(probe, by=by, keep=model.keep(share)),
        )
        for name, model in MODELS.items()
        for share in SHARES
    ]


def panels(ways: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """A panel for each way, with a line for each model."""
    return {way: tuple(line(model, way) for model in MODELS) for way in ways}
