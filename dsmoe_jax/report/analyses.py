"""The analyses of a report: laws fitted to its losses, and the best of a sweep.

A new one is a function and a line below.

Every function takes a `Comparison` and the directory of all results, and returns blocks.  Where
runs are missing, or say too little for a law, the block says so.

Shapes: P points, S seeds, R resamples, X places where a curve is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dsmoe_jax.report import (
    compute_analyses,
    gain_analyses,
    granularity_analyses,
    sweep_analyses,
)
from dsmoe_jax.report.blocks import Block
from dsmoe_jax.report.style import styled
from dsmoe_jax.study.results import Comparison

Analysis = Callable[[Comparison, Path], list[Block]]

ANALYSES: dict[str, Analysis] = {
    "granularity_law": granularity_analyses.law,
    "granularity_u_shape": granularity_analyses.u_shape,
    "equal_time": granularity_analyses.equal_time,
    "best_of_lines": sweep_analyses.best_of_lines,
    "turns_of_lines": sweep_analyses.turns_of_lines,
    "compute_law": compute_analyses.law,
    "effective_compute": compute_analyses.effective_compute,
    "kept_shares": gain_analyses.kept_shares,
}


def analysis(name: str) -> Analysis:
    """The analysis with this name.

    Raises:
      ValueError: if there is none.
    """
    if name not in ANALYSES:
        raise ValueError(f"analysis {name!r}: must be one of {', '.join(ANALYSES)}")
    return ANALYSES[name]


def analyse(comparison: Comparison, results: Path) -> list[Block]:
    """Blocks of all analyses of the experiment, in its order.

    Args:
      comparison: to analyse.
      results: the directory that holds NAME-SCALE of all experiments.
    """
    with styled():
        return [
            block
            for name in comparison.experiment.analyses
            for block in analysis(name)(comparison, results)
        ]
