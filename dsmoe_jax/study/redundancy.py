"""The probe of redundancy: how far the routed experts of a model could stand in for each other.

Shapes: L MoE layers, E routed experts, P parts of a layer's experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dsmoe_jax.analysis import leaving_out, pairs, tables
from dsmoe_jax.analysis.leaving_out import LossWithout
from dsmoe_jax.analysis.routed_text import LayerWeights, layer_weights
from dsmoe_jax.config import stage_of
from dsmoe_jax.config.checks import require
from dsmoe_jax.data.pipeline import Batch, validation_batches
from dsmoe_jax.model.build import build_model
from dsmoe_jax.moe import interventions
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.runs.loading import Run
from dsmoe_jax.study.probes import held_out

SIXTEENTHS = 16  # V1 figure 4 masks sixteenths of the experts
SINGLES = 16  # of each layer, which are left out alone
DRAWS = 8  # of a random sixteenth in every layer
CHOICE, JUDGEMENT = 1 / 40, 1 / 5  # shares of the held-out text on which experts are left out


def redundancy(run: Run, intervention: Intervention) -> dict[str, Any]:
    """`probes.held_out`, and below `inside` how much the experts could stand in for each other.

    Rises of the loss, nats per token:
      masked_rise: without the best sixteenth of the experts of each token (V1 figure 4);
      single_rises: without one expert of one layer, for up to `SINGLES` of each layer, (L, P);
      sixteenth_rises: without a sixteenth of one layer's experts, in the order of their load, for
        all sixteenths, (L, P);
      random_rises: without a sixteenth of all layers' experts, drawn at random `DRAWS` times;
      least_rise: without the sixteenth of each layer that is missed least.

    The sixteenth that is missed least is found on a part of the held-out text (`CHOICE`) and judged
    on another one, as are masked and random ones: else chance would choose it.  Shared experts
    count among those of which a sixteenth is taken, as in the paper.

    Likeness of two experts by layer, mean over pairs, of the model and of one before training with
    the same sizes: outputs_alike (cosine for the same token), outputs_cka, weights_aligned; and
    distinct, the share of the experts whose outputs are not as alike as `tables.ALIKE` to any
    other's.

    Args:
      run: a finished run, of a model with routed experts.
      intervention: none; the experts are looked at as they were trained.

    Raises:
      ValueError: for an intervention, or a held-out text of one batch.
    """
    plain = intervention == interventions.NONE
    require(plain, "intervention", intervention, "the redundancy is of the model as it was trained")
    found = held_out(run, intervention)
    found["inside"] = _left_out(run, np.array(found["load"])) | _likeness(run)
    return found


def _left_out(run: Run, load_LE: np.ndarray) -> dict[str, Any]:
    """The rises of the loss of `redundancy`."""
    moe = run.model.config.moe
    choice, judgement = _two_texts(run)
    loss = LossWithout(run.model)
    whole = loss(judgement)
    sixteenths = leaving_out.parts(load_LE, min(SIXTEENTHS, load_LE.shape[1]))
    rises_LP = leaving_out.rises(loss, choice, sixteenths)
    singles_LP = rises_LP  # where a sixteenth is one expert
    if load_LE.shape[1] > SIXTEENTHS:
        singles_LP = leaving_out.rises(loss, choice, leaving_out.sample(load_LE, SINGLES))
    rng = np.random.default_rng(0)
    n_parts = rises_LP.shape[1]
    draws = rng.integers(n_parts, size=(DRAWS, len(load_LE)))

    def rise_without(part_L: Sequence[int]) -> float:
        chosen = [of_layer[part] for of_layer, part in zip(sixteenths, part_L, strict=True)]
        return loss(judgement, leaving_out.mask(chosen, load_LE.shape[1])) - whole

    masked = max((moe.n_routed_experts + moe.n_shared_experts) // SIXTEENTHS, 1)
    masked_loss = LossWithout(run.model, Intervention(mask_best=masked))
    return {
        "masked_rise": masked_loss(judgement) - whole,
        "single_rises": singles_LP.tolist(),
        "sixteenth_rises": rises_LP.tolist(),
        "random_rises": [rise_without(part_L) for part_L in draws],
        "least_rise": rise_without(rises_LP.argmin(axis=1)),
    }


def _two_texts(run: Run) -> tuple[list[Batch], list[Batch]]:
    """The text on which experts are chosen, and the one on which they are judged."""
    train = stage_of(run.config, run.step).config.train
    size = train.global_batch_size // train.accumulation_steps
    whole = -(-run.corpus.num_records("validation") // size)
    n = min(train.eval_batches or whole, whole)
    require(
        n > 1,
        "train.eval_batches",
        n,
        "experts are chosen on one part of the text and judged on another; must be > 1",
    )
    n_choice = max(int(n * CHOICE), 1)
    n_judgement = max(int(n * JUDGEMENT), 1)
    tasks = run.model.config.moe.router.tasks
    batches = validation_batches(run.corpus.directory, size, n_choice + n_judgement, tasks=tasks)
    choice = list(itertools.islice(batches, n_choice))
    return choice, list(batches)


def _likeness(run: Run) -> dict[str, Any]:
    """The likeness of the experts of `redundancy`, of the model and of one before training."""
    seed = run.config.train.seed
    untrained = jax.jit(build_model, static_argnums=0)(run.model.config, jax.random.key(seed))
    found = _likeness_of(layer_weights(run.model, run.corpus))
    before = _likeness_of(layer_weights(untrained, run.corpus))
    return found | {f"{name}_before": values for name, values in before.items()}


def _likeness_of(layers: Sequence[LayerWeights]) -> dict[str, list[float | None]]:
    outputs = [pairs.output_similarity(layer.outputs_ETD) for layer in layers]
    cka = [pairs.centred_kernel_alignment(layer.outputs_ETD) for layer in layers]
    aligned = [pairs.aligned_similarity(*layer.weights[:3]) for layer in layers]
    return {
        "outputs_alike": [pairs.mean_of_pairs(alike_EE) for alike_EE in outputs],
        "outputs_cka": [pairs.mean_of_pairs(alike_EE) for alike_EE in cka],
        "weights_aligned": [pairs.mean_of_pairs(alike_EE) for alike_EE in aligned],
        "distinct": [pairs.distinct(alike_EE, tables.ALIKE) for alike_EE in outputs],
    }
