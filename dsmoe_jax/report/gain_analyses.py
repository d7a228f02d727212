"""The share that each arm keeps of the gain of one arm over another."""

from __future__ import annotations

from pathlib import Path

from dsmoe_jax.report.blocks import Block, Heading, Table, Text
from dsmoe_jax.report.names import literal
from dsmoe_jax.report.numbers import NONE, fixed, signed
from dsmoe_jax.study import kept_gain, spread
from dsmoe_jax.study.claims import LOSS
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.results import Comparison


def kept_shares(comparison: Comparison, results: Path) -> list[Block]:
    """The share of `Experiment.gain` that each other arm keeps, by held-out loss.

    Args:
      comparison: of an experiment with a gain.
      results: not needed.
    """
    del results
    gain = comparison.experiment.gain
    assert gain is not None, "an experiment with this analysis has one"
    heading = Heading("What is kept of the gain")
    values = comparison.by_seed(LOSS)
    seeds = spread.common_seeds(values)
    others = [label for label in values if label not in gain]
    if not (set(gain) <= values.keys() and others and seeds):
        return [heading, Text("No seed is finished in both ends of the gain and in another arm.")]
    worse, better = ([values[label][seed] for seed in seeds] for label in gain)
    gains = [a - b for a, b in zip(worse, better, strict=True)]
    of_better, of_worse = literal(gain.better), literal(gain.worse)
    if sum(gains) <= 0:
        said = f"There is no gain between {of_better} and {of_worse}, so no share of it either."
        return [heading, Text(said)]
    rows = []
    for label in others:
        kept = [a - values[label][seed] for a, seed in zip(worse, seeds, strict=True)]
        rows.append(_row(label, kept, gains))
    unit = MEASURES[LOSS].unit
    mean = fixed(sum(gains) / len(gains), 3)
    return [
        heading,
        Text(
            f"{of_better} is {mean} {unit} better than {of_worse}. Beside it the part of that by"
            f" which each other arm is better than {of_worse}."
        ),
        Table(["", f"better by, {unit}", "kept of the gain", "95 % interval"], rows),
        Text(
            "The interval is Fieller's: the shares that the seeds do not contradict, both"
            " differences being noisy. There is none with one seed, or where the gain itself may be"
            f" 0. Seeds, which all have: {', '.join(map(str, seeds))}.",
            "note",
        ),
    ]


def _row(label: str, kept_S: list[float], gain_S: list[float]) -> list[str]:
    found = kept_gain.kept(kept_S, gain_S)
    assert found is not None, "there is a gain"
    by = signed(sum(kept_S) / len(kept_S))
    interval = NONE
    if found.interval is not None:
        low, high = (fixed(100 * end, 0).replace("-", "−") for end in found.interval)
        interval = f"{low} to {high} %"
    return [label, by, f"{100 * found.share:.0f} %", interval]
