"""The answers of models to question sets, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsmoe_jax.report.blocks import Table
from dsmoe_jax.report.numbers import NONE, fixed
from dsmoe_jax.report.text import to_text

# Heading -> key of a number with an interval, and what it is multiplied by.
_COLUMNS = {
    "accuracy %": ("accuracy", 100),
    "per character %": ("accuracy_per_character", 100),
    "per byte %": ("accuracy_per_byte", 100),
    "PMI %": ("accuracy_pmi", 100),
    "greedy %": ("greedy", 100),
    "bits/byte": ("bits_per_byte", 1),
}
_DIGITS = {1: 3, 100: 1}
_NOTE = "±: half of the 95 % interval (shares: Wilson; bits per byte: bootstrap over the questions)"


def downstream_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each question set and run; a column only where a set has its number.

    Args:
      runs: `{"tasks": {SET: numbers}}` of each run, by its name; see `downstream.summary`.
    """
    names = list(next(iter(runs.values()))["tasks"])
    found = [(task, run, runs[run]["tasks"][task]) for task in names for run in runs]
    several = len(runs) > 1
    shown = {
        heading: column
        for heading, column in _COLUMNS.items()
        if any(numbers[column[0]] is not None for _, _, numbers in found)
    }
    rows = []
    for task, run, numbers in found:
        chance = numbers["chance"]
        cells = [task, *([run] if several else []), str(numbers["shots"])]
        cells += [f"{numbers['questions']:,}", NONE if chance is None else fixed(100 * chance, 1)]
        rows.append(cells + [_cell(numbers[key], factor) for key, factor in shown.values()])
    head = ["task", *(["run"] if several else []), "shots", "questions", "chance %", *shown]
    return Table(head, rows)


def downstream_text(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The table for a terminal, and which questions were not read to their beginning."""
    lines = [to_text(downstream_table(runs)), _NOTE]
    for run, found in runs.items():
        cut = {task: numbers["cut"] for task, numbers in found["tasks"].items() if numbers["cut"]}
        if cut:
            counts = ", ".join(f"{n:,} of {task}" for task, n in cut.items())
            lines.append(
                f"{run} reads {found['max_length']} tokens at once: of longer questions only the"
                f" end ({counts})"
            )
    return "\n".join(lines)


def _cell(number: Mapping[str, float | None] | None, factor: int) -> str:
    """A number and half of its interval."""
    if number is None or number["value"] is None:
        return NONE
    digits = _DIGITS[factor]
    value = fixed(factor * number["value"], digits)
    low, high = number["low"], number["high"]
    if low is None or high is None:
        return value
    return f"{value} ±{fixed(factor * (high - low) / 2, digits)}"
