"""Sentences of a report: the findings, and the notes below its tables."""

from __future__ import annotations

from dsmoe_jax.report import tables
from dsmoe_jax.report.names import literal
from dsmoe_jax.report.numbers import NONE, fixed
from dsmoe_jax.study import spread, verdicts
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.results import Comparison, Row
from dsmoe_jax.study.spread import CONFIDENCE
from dsmoe_jax.study.verdicts import HOLDS, MISSING, REVERSED, UNDECIDED, Finding

LOAD_NOTE = (
    "MaxVio = (largest load − mean load) / mean load of a layer's experts, mean over layers, in the"
    " logged batches and over a window of the last 100 steps or so; dead experts are those of all"
    " layers that a batch gave no token. Means over seeds."
)


def findings(comparison: Comparison) -> list[str]:
    """The result in a few sentences."""
    sentences = []
    found = verdicts.judge(comparison)
    best = _best(comparison)
    if best is not None:
        sentences.append(best)
    if found:
        sentences.append(_count(found))
    failed = [f"{_run(row)}: {literal(row.failed or '')}" for row in comparison.failed]
    if failed:
        sentences.append(f"Failed, so not in these numbers: {'; '.join(failed)}.")
    missing = [_run(row) for row in comparison.rows if not row.finished and not row.failed]
    if missing:
        sentences.append(f"Not finished, so not in these numbers: {', '.join(missing)}.")
    return sentences


def _run(row: Row) -> str:
    return f"{literal(row.arm)} (seed {row.seed})"


def _best(comparison: Comparison) -> str | None:
    """Sentence about the best arm and its margin; None with fewer than two arms."""
    name = comparison.experiment.main_measure
    measure = MEASURES[name]
    ranked = list(tables.ranking(comparison, name).items())
    if len(ranked) < 2:
        return None
    (best, value), (second, next_value) = ranked[:2]
    highest = measure.lower_is_better is False
    word, side = ("highest", "above") if highest else ("lowest", "below")
    margin = abs(next_value - value)
    unit = f" {measure.unit}" if measure.unit else ""
    sentence = (
        f"**{literal(best)}** has the {word} {measure.title}: {fixed(value, measure.digits)}{unit},"
        f" {fixed(margin, measure.digits)} {side} {literal(second)}"
    )
    half_width = spread.difference_half_width(comparison.by_seed(name))
    if half_width is None:
        return sentence + ". With a single seed nothing is known about its reliability."
    clear = "more" if margin > half_width else "less"
    known = fixed(half_width, measure.digits)
    return sentence + f" – {clear} than the ± {known} to which differences are known here."


def _count(found: list[Finding]) -> str:
    """Sentence about the number of claims that hold."""
    counts = {v: sum(f.verdict == v for f in found) for v in (HOLDS, REVERSED, UNDECIDED, MISSING)}
    said = {
        HOLDS: "hold" if counts[HOLDS] != 1 else "holds",
        REVERSED: "came out reversed",
        UNDECIDED: "cannot be decided from this many runs",
        MISSING: "cannot be judged yet, for want of finished runs",
    }
    parts = [f"{counts[v]} {said[v]}" for v in said if counts[v]]
    listing = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    orderings = all(finding.claim.is_ordering for finding in found)
    noun, of = ("ordering", " of two models") if orderings else ("claim", "")
    plural = f"{noun}s" if len(found) != 1 else noun
    known = any(finding.half_width is not None for finding in found)
    caution = "" if known else ", going by the bare signs of single differences"
    return f"Of the paper's {len(found)} {plural}{of}, {listing} at this scale{caution}."


def results_note(comparison: Comparison) -> str:
    """Note below the results table: the meaning of its columns."""
    several = any(len(comparison.finished(arm)) > 1 for arm in comparison.arms)
    names = tables.shown_measures(comparison.experiment)
    notes = [MEASURES[name].note for name in names if MEASURES[name].note]
    return " ".join(
        [
            "Means over seeds" + ("; ± is the standard deviation over them." if several else "."),
            *notes,
            f"{NONE} means that a number does not exist (a dense model has no router) or is not"
            " there yet.",
        ]
    )


def claims_note(comparison: Comparison, found: list[Finding]) -> str:
    """Note below the claims: how the verdicts were reached."""
    tail = " Losses of other data, vocabularies and sizes do not compare; orders and signs do."
    seeds = spread.common_seeds(comparison.by_seed(comparison.experiment.main_measure))
    if not any(finding.half_width is not None for finding in found):
        return (
            "One seed: the verdict is the bare sign of one difference. How far another seed would"
            " move it is not known; run with --seeds=2 or more to learn it." + tail
        )
    note = (
        f"Differences in the unit of the measure (loss: nats per token), mean over the {len(seeds)}"
        f" seeds that all arms have, ± half a {CONFIDENCE:.0%} interval: the noise left after each"
        " arm's and each seed's mean, Student's t. A claim holds, or is reversed, when the interval"
        " excludes 0; each is judged by itself. p is two-sided, of a true difference of 0."
    )
    if not all(finding.claim.is_ordering for finding in found):
        note += (
            " Differences of differences, ratios, bounds and claims about one model under several"
            " interventions are taken seed by seed: ± is that of the mean of as many values."
        )
    return note + tail
