"""Probes: measurements of a finished run's model under an intervention.

A probe is a function from a run and an intervention to what evaluation.json holds; the measures
read that.  `held_out` gives loss and load on the held-out text, `inside` also what the experts
serve there, `redundancy.redundancy` how far they could stand in for each other,
`quantised.quantised` what is left of a model whose experts have few bits; a probe that measures
something else is a function like them, and an entry in `measures.MEASURES` that reads its number.
"""

from __future__ import annotations

from typing import Any

from dsmoe_jax.analysis import tables
from dsmoe_jax.analysis.routed_text import layer_weights, route_text
from dsmoe_jax.config import stage_of
from dsmoe_jax.config.checks import require
from dsmoe_jax.evaluation.held_out import evaluate
from dsmoe_jax.moe import interventions
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.runs.loading import Run


def held_out(run: Run, intervention: Intervention) -> dict[str, Any]:
    """Loss and load on the held-out text on which the run itself was evaluated.

    Args:
      run: a finished run.
      intervention: in the model during the evaluation.

    Returns:
      See `HeldOut.measure`.
    """
    train = stage_of(run.config, run.step).config.train
    return evaluate(
        run.model,
        run.corpus,
        batch_size=train.global_batch_size // train.accumulation_steps,
        max_batches=train.eval_batches,
        intervention=intervention,
    )


def inside(run: Run, intervention: Intervention) -> dict[str, Any]:
    """`held_out`, and below `inside` what the experts serve on the same text, by layer.

    Args:
      run: a finished run, of a model with routed experts.
      intervention: none; the experts are looked at as they were trained.

    Raises:
      ValueError: for an intervention.
    """
    plain = intervention == interventions.NONE
    require(plain, "intervention", intervention, "the inside is of the model as it was trained")
    found = held_out(run, intervention)
    train = stage_of(run.config, run.step).config.train
    text = route_text(
        run.model,
        run.corpus,
        max_tokens=found["tokens"],
        batch_size=train.global_batch_size // train.accumulation_steps,
    )
    looked = tables.compute(tables.Subject(text, layer_weights(run.model, run.corpus)))
    found["inside"] = tables.by_layer(looked)
    return found
