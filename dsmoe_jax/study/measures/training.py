"""Measures of a training: how good the model became, and what it cost."""

from __future__ import annotations

from dsmoe_jax.study import readings
from dsmoe_jax.study.measures.measure import RESULTS, Measure, size

TRAINING: dict[str, Measure] = {
    "validation_loss": Measure(
        "validation loss",
        readings.held_out("loss"),
        "nats per token",
        columns={RESULTS: "validation loss"},
        lower_is_better=True,
        note="Loss in nats per token on held-out text.",
    ),
    "validation_loss_before": Measure(
        "validation loss before",
        readings.loss_before,
        "nats per token",
        lower_is_better=True,
        spread=False,
        note="Before: the loss of the parameters that the run began with.",
    ),
    "generalisation_gap": Measure(
        "generalisation gap",
        readings.generalisation_gap,
        "nats per token",
        lower_is_better=True,
        note="Generalisation gap: how far the held-out loss at the end is above the training loss"
        " of the last fifth of the logged steps; overfitting, where text is read again and again.",
    ),
    "validation_bits_per_byte": Measure(  # compares between tokenizers
        "validation bits per byte",
        readings.held_out("bits_per_byte"),
        columns={RESULTS: "bits / byte"},
        lower_is_better=True,
    ),
    "total": size("total", "total parameters", "parameters"),
    "activated": size("activated", "activated parameters", "activated"),
    "expert_total": size("expert_total", "expert parameters"),
    "expert_activated": size("expert_activated", "activated expert parameters"),
    "flops_per_sequence": size(
        "flops_per_sequence",
        "FLOPs per sequence",
        "FLOPs / sequence",
        "FLOPs: training, as the paper counts.",
    ),
    "tokens": Measure(
        "tokens trained on", readings.tokens, columns={RESULTS: "tokens"}, digits=None, spread=False
    ),
    "flops_before": Measure(
        "training FLOPs before",
        readings.flops_before,
        digits=None,
        spread=False,
        from_config=True,
    ),
    "training_flops": Measure(
        "training FLOPs",
        lambda outcome: readings.training_flops(outcome.config),
        digits=None,
        spread=False,
        from_config=True,
    ),
    "total_training_flops": Measure(
        "training FLOPs in all",
        readings.total_training_flops,
        digits=None,
        spread=False,
        from_config=True,
        note="Training FLOPs: as the paper counts; before: of the model that the run begins with,"
        " or learns from; in all: both.",
    ),
    "validation_tokens": Measure("tokens judged on", readings.held_out("tokens"), digits=None),
    "loss_rise": Measure(
        "largest rise of the training loss",
        readings.loss_rise,
        "nats per token",
        lower_is_better=True,
        note="Largest rise of the training loss: how far a logged loss was above the lowest one"
        " before it, at most; it is never 0, since some batches are harder than others.",
    ),
    "teacher_agreement": Measure(
        "agreement with the teacher",
        readings.as_the_teacher,
        "%",
        digits=1,
        note="Agreement with the teacher: the share of tokens of which both find the same next one"
        " best, in training; mean of the last fifth of the logged steps.",
    ),
    # Without compilation, validation and waiting.
    "seconds": Measure("seconds in training steps", readings.seconds, lower_is_better=True),
}
