"""A measure: one number of a run, and how it is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from dsmoe_jax.study.readings import Outcome, sizes

# The tables of a report that have a column for each of their measures.
RESULTS, LOAD = "results", "load"


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number of a run.

    Attributes:
      title: for running text.
      read: returns the number; None where it does not exist or is not known yet.
      unit: of the number; "" where it has none.
      columns: table that has it as a column -> its heading there.
      digits: decimals; None is three digits and a unit, such as 5.66M.
      lower_is_better: None where neither is better.
      spread: whether tables show the standard deviation over seeds.
      from_config: whether it follows from the config alone and is known before training.
      note: a sentence below the results table.
    """

    title: str
    read: Callable[[Outcome], float | None]
    unit: str = ""
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    digits: int | None = 3
    lower_is_better: bool | None = None
    spread: bool = True
    from_config: bool = False
    note: str = ""

    @property
    def label(self) -> str:
        """Title and unit, for an axis."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    @property
    def better(self) -> str:
        """The better direction, in words; "" where neither is."""
        words = {True: "lower is better", False: "higher is better", None: ""}
        return words[self.lower_is_better]


def size(key: str, title: str, heading: str = "", note: str = "") -> Measure:
    """A measure that follows from the config: one of `sizes`."""
    return Measure(
        title,
        lambda outcome: sizes(outcome.measured)[key],
        columns={RESULTS: heading} if heading else {},
        digits=None,
        spread=False,
        from_config=True,
        note=note,
    )
