"""The pictures of a report.  A new one is a function and a line in `PLOTS`.

Every function takes a `Comparison` and returns a matplotlib figure, or None where there is nothing
to show.  An experiment may also name a measure as a picture: the dots of its runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from matplotlib.figure import Figure

from dsmoe_jax.report import domain_plots, line_plots, load_plots, loss_plots
from dsmoe_jax.report.style import styled
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.results import Comparison


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture with the title above it and the caption below it."""

    title: str
    caption: str
    draw: Callable[[Comparison], Figure | None]


DOTS = "Each dot is one run (one seed), each stroke the mean of an arm."
PLOTS: dict[str, Plot] = {
    "final_loss": Plot(
        "Where the runs ended",
        DOTS,
        loss_plots.final,
    ),
    "over_x": Plot(
        "Over what the arms vary",
        "Lines join means over seeds, small dots are single runs; a level line is a model to which"
        " nothing was done.",
        line_plots.over_x,
    ),
    "panels_over_x": Plot(
        "Over what the arms vary, by kind",
        "Lines join means over seeds, small dots are single runs; a ring is around the best of each"
        " line. A line may stand in several panels.",
        line_plots.panels_over_x,
    ),
    "learning_curves": Plot(
        "Learning curves",
        "Lines: training loss, a running mean over a twentieth of the logged steps and over seeds."
        " Markers: loss on the held-out text. The axis is cut above.",
        loss_plots.learning_curves,
    ),
    "loss_difference": Plot(
        "The same, as differences",
        "All arms see the same batches in the same order, so subtracting the first arm's loss"
        " removes what easy and hard batches do to all. Below zero is better.",
        loss_plots.loss_difference,
    ),
    "domains": Plot(
        "By domain",
        "Bits per byte on the held-out text of each domain, as differences to the first arm; the"
        " domains it finds easiest are on top.",
        loss_plots.domains,
    ),
    "maxvio": Plot(
        "Load balance over training",
        "MaxVio = (largest load − mean load) / mean load of a layer's experts within a batch; mean"
        " over layers and seeds, smoothed. More experts make a larger MaxVio likelier.",
        load_plots.maxvio,
    ),
    "maxvio_running": Plot(
        "The same over a window",
        "MaxVio of the load of the last 100 steps or so: what one batch happens to want is averaged"
        " out, what stays are experts that all batches prefer.",
        load_plots.maxvio_running,
    ),
    "expert_load": Plot(
        "Who does the work",
        "Load of every routed expert on the held-out text, relative to a perfectly even load (1);"
        " first seed. Orange experts get too much, purple ones too little.",
        load_plots.expert_load,
    ),
    "load_over_training": Plot(
        "Load over training",
        "Of the model with the most experts, first seed. Above, a row a layer: load of every routed"
        " expert relative to an even load, in the logged batches of each stretch of training."
        " Below: MaxVio of single batches, a line a layer, deeper layers darker.",
        load_plots.load_over_training,
    ),
    "domain_load": Plot(
        "Which domain each expert serves",
        "Load of every routed expert on the held-out text of each domain, relative to an even load"
        " of the domain (1), first seed; in the layer with the highest domain specialisation, the"
        " number beside it. Experts stand in the order of the domain that uses each most. Equal"
        " rows are domains that use the same experts.",
        domain_plots.domain_load,
    ),
}


def plot(name: str) -> Plot:
    """The picture with this name; the name of a measure gives the dots of its runs.

    Raises:
      ValueError: if there is no such picture or measure.
    """
    if name in PLOTS:
        return PLOTS[name]
    if name in MEASURES:
        dots = functools.partial(loss_plots.dots, measure=name)
        return Plot(MEASURES[name].title, DOTS, dots)
    raise ValueError(f"picture {name!r}: must be a measure or one of {', '.join(PLOTS)}")


def draw(comparison: Comparison) -> dict[str, Figure]:
    """The experiment's pictures that have something to show, by name."""
    names = comparison.experiment.pictures or tuple(PLOTS)
    with styled():
        figures = {name: plot(name).draw(comparison) for name in names}
    return {name: figure for name, figure in figures.items() if figure is not None}
