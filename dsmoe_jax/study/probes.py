"""Probes: measurements of a finished run's model under an intervention.

A probe is a function from a run and an intervention to what evaluation.json holds; the measures
read that.  `held_out` gives loss and load on the held-out text; a probe that measures something
else is a function like it, and an entry in `measures.MEASURES` that reads its number.
"""

from __future__ import annotations

from typing import Any

from dsmoe_jax.config import stage_of
from dsmoe_jax.evaluation.held_out import evaluate
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
