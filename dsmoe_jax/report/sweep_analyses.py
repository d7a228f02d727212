"""Sweeps: the setting that each model likes, and the one that is best for all.

The arms of a sweep have a `line` (the model) and an `x` (the setting).
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from dsmoe_jax.report.blocks import Block, Heading, Table, Text
from dsmoe_jax.report.names import literal
from dsmoe_jax.report.numbers import NONE, fixed, mean_of
from dsmoe_jax.study.experiment import Arm
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.results import Comparison


def best_of_lines(comparison: Comparison, results: Path) -> list[Block]:
    """The best setting for all models, by the mean over them, and each model at its own best.

    Args:
      comparison: of a sweep.
      results: not needed.
    """
    del results
    name = comparison.experiment.main_measure
    means, lines = _means(comparison), _lines(comparison)
    sums = _sums(lines, means)
    if len(sums) < 2:
        return []
    common = min(sums, key=lambda x: sums[x])
    rows = [_row(comparison, line, common, means) for line in lines.values()]
    head = ["", "best at", "its loss", f"at {_words(comparison, common)}", "difference"]
    return [
        Heading("What each model likes"),
        Text(
            f"Of the settings that every model has finished, **{_words(comparison, common)}** has"
            f" the lowest mean over the models: {fixed(sums[common] / len(lines), 3)}"
            f" {MEASURES[name].unit}. Beside it, each model at its own best, which flatters all of"
            " them: the lowest of several noisy means is below its true value."
        ),
        Table(head, rows),
        *_at_the_edge(comparison, lines, means),
    ]


def turns_of_lines(comparison: Comparison, results: Path) -> list[Block]:
    """The pairs of models whose order is another at the end of a sweep than at its beginning.

    Args:
      comparison: of a sweep.
      results: not needed.
    """
    del results
    name = comparison.experiment.main_measure
    means, lines = _means(comparison), _lines(comparison)
    xs = sorted(_sums(lines, means))
    if len(xs) < 2:
        return []
    pairs = list(itertools.combinations(lines, 2))
    rows = []
    for a, b in pairs:
        gap_X = [means[lines[a][x].label] - means[lines[b][x].label] for x in xs]
        if gap_X[0] * gap_X[-1] >= 0:
            continue
        first, last = (a, b) if gap_X[0] < 0 else (b, a)
        turns = [i for i in range(1, len(xs)) if gap_X[i - 1] * gap_X[i] < 0]
        between = "; ".join(f"×{xs[i - 1]:g} and ×{xs[i]:g}" for i in turns)
        rows.append([first, last, fixed(abs(gap_X[0]), 3), fixed(abs(gap_X[-1]), 3), between])
    few = min(map(len, comparison.by_seed(name).values()))
    seeds = "one seed" if few == 1 else f"{few} seeds or more"
    said = f"{len(rows)} of the {len(pairs)} pairs of models are in another order at"
    said += (
        f" {_words(comparison, xs[-1])} than at {_words(comparison, xs[0])}; means over {seeds},"
    )
    said += f" {MEASURES[name].unit}, and no test of whether a difference is more than noise."
    head = ["ahead at first", "ahead at last", "at first by", "at last by", "turns between"]
    return [Heading("Where the order turns"), Text(said), *([Table(head, rows)] if rows else [])]


def _means(comparison: Comparison) -> dict[str, float]:
    """The mean over seeds of every finished arm."""
    values = comparison.by_seed(comparison.experiment.main_measure)
    return {label: float(np.mean(list(seeds.values()))) for label, seeds in values.items()}


def _lines(comparison: Comparison) -> dict[str, dict[float, Arm]]:
    """The arms by model and setting."""
    lines: dict[str, dict[float, Arm]] = {}
    for arm in comparison.arms:
        if isinstance(arm, Arm) and arm.x is not None:
            lines.setdefault(arm.line, {})[arm.x] = arm
    return lines


def _sums(lines: dict[str, dict[float, Arm]], means: dict[str, float]) -> dict[float, float]:
    """Sum over the models, for each setting that every model has finished."""
    found = {}
    for x in _settings(lines):
        losses = [_mean(line, x, means) for line in lines.values()]
        known = [loss for loss in losses if loss is not None]
        if len(known) == len(losses):
            found[x] = sum(known)
    return found


def _settings(lines: dict[str, dict[float, Arm]]) -> set[float]:
    return {x for line in lines.values() for x in line}


def _mean(line: dict[float, Arm], x: float, means: dict[str, float]) -> float | None:
    return means.get(line[x].label) if x in line else None


def _best(line: dict[float, Arm], means: dict[str, float]) -> float | None:
    """The setting with the lowest mean; None before a run is finished."""
    found = [x for x, arm in line.items() if arm.label in means]
    return min(found, key=lambda x: means[line[x].label]) if found else None


def _row(
    comparison: Comparison, line: dict[float, Arm], common: float, means: dict[str, float]
) -> list[str]:
    measure = comparison.experiment.main_measure
    best = _best(line, means)
    assert best is not None, "the common setting is finished for every model"
    values = comparison.by_seed(measure)
    return [
        line[best].line,
        _words(comparison, best),
        *(mean_of(list(values[line[x].label].values()), MEASURES[measure]) for x in (best, common)),
        fixed(means[line[common].label] - means[line[best].label], 3) if best != common else NONE,
    ]


def _words(comparison: Comparison, x: float) -> str:
    """A setting: the multiple, and the value that it is at this scale."""
    arm = next(arm for arm in comparison.arms if arm.x == x)
    if not isinstance(arm, Arm) or not arm.multiples:
        return f"{x:g}"
    values = arm.changed_values(comparison.scale, comparison.overrides)
    return f"×{x:g} (" + ", ".join(f"{k.rpartition('.')[2]} {v:g}" for k, v in values.items()) + ")"


def _at_the_edge(
    comparison: Comparison, lines: dict[str, dict[float, Arm]], means: dict[str, float]
) -> list[Block]:
    """A warning where a model's best setting is the first or the last of the sweep."""
    edges = (min(_settings(lines)), max(_settings(lines)))
    names = [name for name, line in lines.items() if _best(line, means) in edges]
    if not names:
        return []
    listing = ", ".join(map(literal, names))
    return [Text(f"At the edge of the sweep, so perhaps better beyond it: {listing}.", "note")]
