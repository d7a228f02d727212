"""The tables of a report."""

from __future__ import annotations

import numpy as np

from dsmoe_jax.report.blocks import Table
from dsmoe_jax.report.numbers import NONE, fixed, mean_of, p_value, signed
from dsmoe_jax.study.claims import LOSS
from dsmoe_jax.study.experiment import AnyArm, Equal, Experiment
from dsmoe_jax.study.measures import LOAD, MEASURES, RESULTS
from dsmoe_jax.study.results import Comparison, Row
from dsmoe_jax.study.verdicts import Finding


def shown_measures(experiment: Experiment) -> tuple[str, ...]:
    """The columns of the results table."""
    return experiment.measures or columns_of(RESULTS)


def columns_of(table: str) -> tuple[str, ...]:
    """The measures that are columns of a table, in order."""
    return tuple(name for name, measure in MEASURES.items() if table in measure.columns)


def results_table(comparison: Comparison) -> Table:
    """One row an arm; means over seeds, ± the standard deviation where there are two or more."""
    names = shown_measures(comparison.experiment)
    head = ["", *(MEASURES[name].columns.get(RESULTS, MEASURES[name].title) for name in names)]
    rows = []
    for arm in comparison.arms:
        done = comparison.finished(arm)
        known = [row for row in comparison.rows if row.arm == arm.label]
        cells = [_cell(known if MEASURES[name].from_config else done, name) for name in names]
        rows.append([arm.label, *cells, str(len(done) or NONE)])
    labels = [arm.label for arm in comparison.arms]
    means = ranking(comparison, comparison.experiment.main_measure)
    best = labels.index(next(iter(means))) if len(means) > 1 else None
    return Table([*head, "seeds"], rows, best=best)


def load_table(comparison: Comparison) -> Table | None:
    """Load over training, one row an arm; None without routed experts."""
    names = columns_of(LOAD)
    rows = []
    for arm in comparison.arms:
        begun = [row for row in comparison.rows if row.arm == arm.label]
        cells = [_cell(begun, name) for name in names]
        if set(cells) != {NONE}:
            rows.append([arm.label, *cells])
    return Table(["", *(MEASURES[name].columns[LOAD] for name in names)], rows) if rows else None


def paper_table(comparison: Comparison) -> Table:
    """The paper's losses beside ours, and both as differences to the first arm."""
    base = comparison.arms[0]
    losses = ranking(comparison, LOSS)
    rows = []
    for arm in comparison.arms:
        ours = losses.get(arm.label)
        reference = losses.get(base.label)
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


def claims_table(found: list[Finding]) -> Table:
    """One row a claim."""
    rows = []
    for finding in found:
        claim = finding.claim
        digits = MEASURES[claim.measure].digits
        text = (
            claim.text
            if claim.measure == LOSS
            else f"{MEASURES[claim.measure].title}: {claim.text}"
        )
        source = f" ({claim.source})" if claim.source else ""
        known = finding.half_width is not None
        tail = f" ± {fixed(finding.half_width, digits)}" if known else ""
        ours = signed(finding.ours, digits) + tail
        paper = signed(finding.paper, digits)
        rows.append([text + source, finding.verdict, ours, p_value(finding.p), paper])
    orderings = all(f.claim.is_ordering and f.claim.measure == LOSS for f in found)
    head = "the paper's ordering" if orderings else "the claim"
    return Table([head, "here it", "here: by", "p", "paper: by"], rows, cards=True)


def domains_table(comparison: Comparison) -> Table | None:
    """Bits per byte, one row a domain and one column an arm; None before the first evaluation."""
    done = {arm: comparison.finished(arm) for arm in comparison.arms}
    names = list(dict.fromkeys(n for rows in done.values() for row in rows for n in row.domains))
    if not names:
        return None
    rows = [[name, *(_domain_cell(found, name) for found in done.values())] for name in names]
    return Table(["", *(arm.label for arm in done)], rows)


def equal_table(comparison: Comparison) -> Table:
    """One row a rule about sizes, with the largest difference found."""
    arms = {arm.label: arm for arm in comparison.arms}
    rows = [
        [
            MEASURES[rule.quantity].title,
            ", ".join(rule.arms),
            _largest_difference(comparison, rule, arms),
            f"{100 * rule.tolerance:g} %",
        ]
        for rule in comparison.experiment.equal
    ]
    return Table(["must be equal", "between", "differs by", "allowed"], rows, prose=True)


def ranking(comparison: Comparison, measure: str) -> dict[str, float]:
    """Mean of a measure over the seeds of every arm that has it, the best one first."""
    by_seed = comparison.by_seed(measure)
    means = {label: float(np.mean(list(values.values()))) for label, values in by_seed.items()}
    sign = -1 if MEASURES[measure].lower_is_better is False else 1
    return dict(sorted(means.items(), key=lambda item: sign * item[1]))


def _cell(rows: list[Row], name: str) -> str:
    return mean_of([value for row in rows if (value := row[name]) is not None], MEASURES[name])


def _domain_cell(rows: list[Row], name: str) -> str:
    values = [row.domains[name] for row in rows if name in row.domains]
    return fixed(float(np.mean(values)) if values else None, 3)


def _largest_difference(comparison: Comparison, rule: Equal, arms: dict[str, AnyArm]) -> str:
    """The largest relative difference of an arm to the first one."""
    rows = {row.arm: row for row in comparison.rows}
    values = [
        value
        for label in rule.arms
        if label in arms and (value := rows[label][rule.quantity]) is not None
    ]
    return f"{100 * max(abs(v / values[0] - 1) for v in values):.2g} %" if values else NONE


def _minus(value: float | None, base: float | None) -> str:
    return NONE if value is None or base is None else signed(value - base)
