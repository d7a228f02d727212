"""Mixtures made of a trained dense model against mixtures trained from scratch.

    python -m experiments.v1.table1 --scale=demo --arms=dense
    python -m experiments.surgery.upcycling --scale=demo

The start is the Dense of `experiments.v1.table1` of the same scale and seed.  Each FFN is copied 21
times; a quarter of it becomes a shared expert, the other three of each copy are routed: 1 + 63
experts of quarter width, the size of dsmoe_2b, but 1 + 6 for a token, two whole copies.  With
normalised gates and one router row a copy the function is that of the dense model at step 0
(`dsmoe_jax/surgery/upcycling.py`), which the column of the loss before training shows.  "whole
copies" has 16 of them and two for a token, as GShard has; "half drawn anew" is Drop-Upcycling.  The
mixtures from scratch have the same sizes and gates.

All train for a quarter of the dense model's steps on text that it has not seen; "scratch, tokens"
does so on the same text.  "scratch, FLOPs" has as many FLOPs as the dense and the upcycled model
together: about as many steps as the dense one, from the beginning of the text.  A quarter is where
one would upcycle, with FLOPs that are few beside those spent already, and it is cheap: a fresh
mixture of equal FLOPs in all takes four times as long as any other arm.

Every run has the whole schedule of the scale, in its own length: the same peak rate, warm-up for
the same share of the steps, the same decay; moments begin at 0.  The dense model had decayed its
rate to a tenth: it is warmed up again.  Sparse Upcycling (2212.05055) goes on with the rate that
the dense model had at its end, and with its moments where they fit.

There is no paper scale: the standard FFN of 3413 units has no quarters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dsmoe_jax.commands import experiment
from dsmoe_jax.model import size
from dsmoe_jax.study.claims import below
from dsmoe_jax.study.experiment import (
    Arm,
    Equal,
    Experiment,
    FinishedRun,
    same_activated,
    same_total,
)
from experiments.v1 import table1

SHARE = 4  # the dense model has so many times the steps
DENSE = FinishedRun(table1.EXPERIMENT, "Dense")
CUT = {"copies": 21, "parts": 4, "shared": 1, "copies_per_token": 2}
# The mixture that the cut makes, as far as it differs from dsmoe_2b.
CUT_SIZES = {"model.moe.num_experts_per_tok": 6, "model.moe.router.norm_topk_prob": True}
COPIES = {"copies": 16, "copies_per_token": 2}
COPIES_SIZES = {"model.moe.router.norm_topk_prob": True}  # beside gshard_2b


def _schedule(scale: str, steps: int) -> dict[str, Any]:
    """A number of steps, with the scale's share of warm-up."""
    config = DENSE.arm.run_config(scale, seed=0)
    warmup = round(config.optimizer.warmup_steps * steps / config.train.steps)
    return {"train.steps": steps, "optimizer.warmup_steps": max(warmup, 1)}


def _further(scale: str) -> dict[str, Any]:
    """A quarter of the dense model's steps, on the text that comes after its own."""
    before = DENSE.arm.run_config(scale, seed=0).train.steps
    return {**_schedule(scale, before // SHARE), "train.skip_batches": ((1, before),)}


def _all_flops(scale: str) -> dict[str, Any]:
    """Steps of the mixture for the FLOPs of dense training and of a quarter more steps."""
    dense = DENSE.arm.run_config(scale, seed=0)
    mixture = Arm("", "dsmoe_2b", overrides=CUT_SIZES).run_config(scale, seed=0)
    ratio = size.flops_per_sequence(dense) / size.flops_per_sequence(mixture)
    return _schedule(scale, round(dense.train.steps * (ratio + 1 / SHARE)))


def _upcycled(label: str, config: str, sizes: dict[str, Any], **options: Any) -> Arm:
    start = dataclasses.replace(DENSE, operations=(("upcycle", options),))
    return Arm(
        label,
        config,
        overrides=sizes,
        at_scale=_further,
        from_runs={"train.start_from": start},
    )


UPCYCLED = _upcycled("upcycled", "dsmoe_2b", CUT_SIZES, **CUT)
DRAWN = _upcycled("half drawn anew", "dsmoe_2b", CUT_SIZES, **CUT, drop=0.5)
WHOLE = _upcycled("whole copies", "gshard_2b", COPIES_SIZES, **COPIES)
LONGER = Arm("dense, longer", "dense_2b", at_scale=_further, from_runs={"train.start_from": DENSE})
FRESH = Arm("scratch, tokens", "dsmoe_2b", overrides=CUT_SIZES, at_scale=_further)
FRESH_IN_ALL = Arm("scratch, FLOPs", "dsmoe_2b", overrides=CUT_SIZES, at_scale=_all_flops)
CUT_LIKE = tuple(arm.label for arm in (UPCYCLED, DRAWN, FRESH, FRESH_IN_ALL))
SPARSE, DROP = "2212.05055", "2502.19261"

EXPERIMENT = Experiment(
    module="experiments.surgery.upcycling",
    title="Upcycling a dense model",
    source="Sparse Upcycling (2212.05055); fine-grained (2406.06563, 2410.07524); Drop-Upcycling"
    " (2502.19261)",
    summary="A mixture that begins with the FFNs of a trained dense model is cheaper than one from"
    " scratch: better after as many tokens, and better for as many FLOPs, those of the dense model"
    " counted; better too than the dense model trained on. Drop-Upcycling: copies that are partly"
    " drawn anew are better in the long run.",
    arms=(LONGER, UPCYCLED, WHOLE, DRAWN, FRESH, FRESH_IN_ALL),
    equal=(
        *same_total(*CUT_LIKE),
        *same_activated(*CUT_LIKE),
        Equal("training_flops", (UPCYCLED.label, DRAWN.label, FRESH.label), 0.0),
        # Whole steps are 1 % of the run at the smallest scale.
        Equal("total_training_flops", (UPCYCLED.label, FRESH_IN_ALL.label), 0.02),
    ),
    claims=(
        below(UPCYCLED.label, FRESH.label, source=SPARSE),
        below(UPCYCLED.label, FRESH_IN_ALL.label, source=SPARSE),
        below(UPCYCLED.label, LONGER.label, source=SPARSE),
        below(WHOLE.label, LONGER.label, source=SPARSE),
        below(DRAWN.label, UPCYCLED.label, source=DROP),
    ),
    may_differ=(
        "name",
        "model.",
        "train.start_from",
        "train.skip_batches",
        "train.steps",
        "optimizer.warmup_steps",
    ),
    measured_may_differ=("tokens",),
    measures=(
        "validation_loss",
        "validation_loss_before",
        "total",
        "activated",
        "tokens",
        "training_flops",
        "flops_before",
        "total_training_flops",
        "maxvio",
    ),
    # Differences of losses step by step would be of other batches in one arm.
    pictures=("final_loss", "learning_curves", "domains", "maxvio", "maxvio_running"),
    seeds={"smoke": 1, "demo": 2, "gpu": 1, "proxy": 1},
)

if __name__ == "__main__":
    experiment.main(EXPERIMENT)
