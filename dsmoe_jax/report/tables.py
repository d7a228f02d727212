"""The tables of a report, and how its numbers are written.

A number that does not exist, or is not there yet, is written as `NONE`.

Shapes: S logged steps, L MoE layers, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from dsmoe_jax.report.blocks import Table
from dsmoe_jax.study import orderings
from dsmoe_jax.study.orderings import Ordering
from dsmoe_jax.study.results import Comparison, History, Row
from dsmoe_jax.study.spec import QUANTITIES, Equal

NONE = "–"
T = TypeVar("T")


def results_table(comparison: Comparison) -> Table:
    """One row an arm; means over seeds, ± the standard deviation where there are two or more."""
    head = [
        "", "validation loss", "bits / byte", "parameters", "activated", "FLOPs / sequence",
        "tokens", "MaxVio", "in training", "dead experts", "seeds",
    ]  # fmt: skip
    rows, losses = [], mean_losses(comparison)
    for arm in comparison.arms:
        known = next((row for row in comparison.rows if row.arm == arm.label), None)
        done = comparison.of_arm(arm)
        rows.append(
            [
                arm.label,
                _mean_of(done, lambda row: row.validation_loss, 3),
                _mean_of(done, lambda row: row.validation_bits_per_byte, 3),
                short(known and known.total),
                short(known and known.activated),
                short(known and known.flops_per_sequence),
                short(done[0].tokens if done else None),
                _mean_of(done, lambda row: row.maxvio, 2, False),
                _mean_of(done, lambda row: row.maxvio_running, 2),
                _dead(done),
                str(len(done) or NONE),
            ]
        )
    labels = [arm.label for arm in comparison.arms]
    best = labels.index(min(losses, key=lambda label: losses[label])) if len(losses) > 1 else None
    return Table(head, rows, best=best)


def paper_table(comparison: Comparison) -> Table:
    """The paper's losses beside ours, and both as differences to the first arm."""
    base, losses = comparison.arms[0], mean_losses(comparison)
    rows = []
    for arm in comparison.arms:
        ours, reference = losses.get(arm.label), losses.get(base.label)
        rows.append(
            [
                arm.label,
                fixed(arm.paper_loss, 3),
                _minus(arm.paper_loss, base.paper_loss) if arm != base else "",
                fixed(ours, 3),
                _minus(ours, reference) if arm != base else "",
            ]
        )
    head = ["", "paper: loss", f"to {base.label}", "here: loss", f"to {base.label}"]
    return Table(head, rows)


def orderings_table(found: list[Ordering]) -> Table:
    """One row a claim."""
    rows = []
    for o in found:
        ours = signed(o.ours) + (f" ± {o.half_width:.3f}" if o.half_width is not None else "")
        rows.append([f"{o.better.label} below {o.worse.label}", o.verdict, ours, signed(o.paper)])
    return Table(["the paper's ordering", "here it", "here: by", "paper: by"], rows)


def balance_table(comparison: Comparison) -> Table | None:
    """Load over training, one row an arm, mean over seeds and ±; None without routed experts."""
    measures: dict[str, tuple[Callable[[History], float], int]] = {
        "MaxVio of a batch: highest": (lambda h: _over_layers(h.maxvio_SL).max(), 1),
        "in the last fifth": (lambda h: _last_fifth(_over_layers(h.maxvio_SL)).mean(), 2),
        "over the window, at the end": (lambda h: h.maxvio_running_SL[-1].mean(), 2),
        "its worst layer": (lambda h: h.maxvio_running_SL[-1].max(), 2),
        "dead experts in a batch: most": (lambda h: _dead_by_step(h).max(), 0),
        "at the end": (lambda h: _dead_by_step(h)[-1], 0),
    }
    rows = []
    for arm in comparison.arms:
        seen = [h for h in comparison.histories_of(arm).values() if h.loads is not None]
        if seen:
            cells = [_mean_of(seen, value, digits) for value, digits in measures.values()]
            rows.append([arm.label, *cells])
    return Table(["", *measures], rows) if rows else None


def domains_table(comparison: Comparison) -> Table | None:
    """Bits per byte, one row a domain and one column an arm; None before anything is judged."""
    done = {arm: comparison.of_arm(arm) for arm in comparison.arms}
    names = list(dict.fromkeys(n for rows in done.values() for row in rows for n in row.domains))
    rows = []
    for name in names:
        means = [_mean_of(d, lambda row: row.domains.get(name), 3, False) for d in done.values()]  # noqa: B023
        rows.append([name, *means])
    return Table(["", *(arm.label for arm in done)], rows) if rows else None


def equal_table(comparison: Comparison) -> Table:
    """One row a rule about sizes, with what was found."""
    sizes = {row.arm: row for row in comparison.rows}

    def spread(rule: Equal) -> str:
        values = [getattr(sizes[label], rule.quantity) for label in rule.arms if label in sizes]
        return f"{100 * max(abs(v / values[0] - 1) for v in values):.2g} %" if values else NONE

    rows = [
        [QUANTITIES[r.quantity], ", ".join(r.arms), spread(r), f"{100 * r.tolerance:g} %"]
        for r in comparison.experiment.equal
    ]
    return Table(["must be equal", "between", "differs by", "allowed"], rows, prose=True)


def mean_losses(comparison: Comparison) -> dict[str, float]:
    """Mean validation loss of every arm with a finished run."""
    losses = orderings.losses_by_seed(comparison)
    return {label: float(np.mean(list(by_seed.values()))) for label, by_seed in losses.items()}


def _over_layers(maxvio_SL: np.ndarray) -> np.ndarray:
    return maxvio_SL.mean(axis=1)


def _last_fifth(values_S: np.ndarray) -> np.ndarray:
    return values_S[-max(len(values_S) // 5, 1) :]


def _dead_by_step(history: History) -> np.ndarray:
    """Experts of all layers that got nothing of a logged batch."""
    assert history.loads is not None
    return (history.loads.load_SLE == 0).sum(axis=(1, 2))


def _mean_of(
    rows: list[T], value: Callable[[T], float | None], digits: int, spread: bool = True
) -> str:
    values = [v for v in map(value, rows) if v is not None]
    mean, deviation = orderings.mean_and_spread(values)
    tail = f" ± {deviation:.{digits}f}" if spread and deviation is not None else ""
    return fixed(mean, digits) + tail


def _dead(rows: list[Row]) -> str:
    values = [row.dead_experts for row in rows if row.dead_experts is not None]
    return f"{np.mean(values):g}" if values else NONE


def fixed(value: float | None, digits: int) -> str:
    """A number with so many decimals."""
    return NONE if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference with its sign and three decimals."""
    return NONE if value is None else f"{value:+.3f}".replace("-", "−")


def _minus(value: float | None, base: float | None) -> str:
    return NONE if value is None or base is None else signed(value - base)


def short(value: float | None) -> str:
    """Three digits and a unit: 5.66M, 2.04G; NONE for None."""
    if value is None:
        return NONE
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """A time for people: 42 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
