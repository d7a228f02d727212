"""The rows of metrics.jsonl, from what a step or an evaluation returns.

Shapes: L MoE layers, E routed experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.data.mixture import Mixture
from dsmoe_jax.model.block import compute_dtype
from dsmoe_jax.moe.losses import TERMS
from dsmoe_jax.runs.summaries import as_list, bits_per_byte, drop_summary, load_summary, maxvio
from dsmoe_jax.training.objective import LOSS_PARTS
from dsmoe_jax.training.step import StepMetrics

RUNNING_DECAY = 0.99  # a step's weight in the running load after one more step


class RunningLoad:
    """The load of the last 100 steps or so: each weighs 0.99 of the one after it.

    Attributes:
      load_LE: weighted sum; None before the first step.  Saved with a checkpoint.
    """

    def __init__(self, load_LE: Any = None):
        self.load_LE = None if load_LE is None else np.asarray(load_LE, np.float64)

    def add(self, metrics: StepMetrics) -> None:
        """Counts a step."""
        if metrics.router is not None:
            load_LE = np.asarray(metrics.router.load_E, np.float64)
            before = 0.0 if self.load_LE is None else RUNNING_DECAY * self.load_LE
            self.load_LE = load_LE + before

    def row(self) -> dict[str, Any]:
        """Keys of metrics.jsonl that come of it."""
        return {} if self.load_LE is None else {"maxvio_running": maxvio(self.load_LE)}

    def saved(self) -> list[list[float]] | None:
        """For the checkpoint (JSON)."""
        return None if self.load_LE is None else self.load_LE.tolist()


def training_row(metrics: StepMetrics, model: ModelConfig) -> dict[str, Any]:
    """The numbers of one step, fetched from the device.

    Raises:
      RuntimeError: if assignments are missing: neither computed nor in the drop ledger.
    """
    loss, tokens, n_bytes = (float(x) for x in (metrics.loss, metrics.tokens, metrics.bytes))
    row = {
        "loss": loss,
        "total_loss": float(metrics.total_loss),
        # A batch of nothing but ends of documents has no bytes.
        **({"bits_per_byte": bits_per_byte(loss * tokens, n_bytes)} if n_bytes else {}),
        "grad_norm": float(metrics.grad_norm),
        "learning_rate": float(metrics.learning_rate),
        **_logged_parts(metrics),
        **_ahead(metrics),
        **_agreement(metrics),
    }
    if metrics.router is None:
        return row
    stats = metrics.router
    row |= load_summary(np.asarray(stats.load_E, np.float64))
    row |= {
        f"router_{name}": as_list(sum_L / stats.tokens) for name, sum_L in stats.token_sums.items()
    }
    if stats.identity_Z is not None:
        row["identity_per_token"] = as_list(stats.identity_Z.sum(axis=-1) / stats.tokens)
    row |= {_term_key(name): as_list(term_L) for name, term_L in metrics.terms.items()}
    row |= drop_summary(stats.ledger, detailed=bool(model.moe.drop))
    if model.moe.expert_groups > 1:
        bytes_of_row = model.hidden_size * compute_dtype(model).itemsize
        row["device_rows"] = as_list(stats.device_rows_D, int)
        row["device_megabytes"] = as_list(stats.device_rows_D * (bytes_of_row / 1e6))
    if stats.dispatch.exchanged_rows is not None:
        row["exchange_rows"] = as_list(stats.dispatch.exchanged_rows, int)
    return row


def _term_key(name: str) -> str:
    """The key of a balance term: expert_balance, ...; router_z, which balances nothing."""
    return f"{name}_balance" if TERMS[name].balances else name


def _logged_parts(metrics: StepMetrics) -> dict[str, float]:
    """The parts of the loss that have keys of their own."""
    keys = {name: LOSS_PARTS[name].logged_as for name in metrics.parts}
    return {key: float(metrics.parts[name]) for name, key in keys.items() if key is not None}


def _ahead(metrics: StepMetrics) -> dict[str, list[float]]:
    """Loss and acceptance of each module of multi-token prediction; NaN where it predicts none."""
    if metrics.ahead is None:
        return {}
    nll_K, tokens_K, agreed_K = (np.asarray(sum_K, np.float64) for sum_K in metrics.ahead)
    tokens_K = np.where(tokens_K > 0, tokens_K, np.nan)
    return {"mtp_loss": as_list(nll_K / tokens_K), "mtp_acceptance": as_list(agreed_K / tokens_K)}


def _agreement(metrics: StepMetrics) -> dict[str, float]:
    """The share of the predicted tokens of which student and teacher find the same one best."""
    if metrics.distilled is None:
        return {}
    return {"teacher_agreement": float(metrics.distilled.agreed / metrics.tokens)}


def mixture_row(mixture: Mixture | None, step: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The tokens that were read of each domain, so far and since the last of the rows."""
    if mixture is None:
        return {}
    # Not since this call of `train` began: the rows are those of a run that nothing interrupted.
    last = next((row["step"] for row in reversed(rows) if "domain_tokens" in row), 0)
    return mixture.row(step, last)


def validation_row(step: int, result: dict[str, Any]) -> dict[str, Any]:
    """The results of `HeldOut.measure` after a step; of the loads only how uneven they are."""
    keys = ("loss", "bits_per_byte", "tokens", "maxvio", "dropped", "domains")
    return {"step": step} | {f"validation_{key}": result[key] for key in keys if key in result}


def before_training(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Held-out results before the first step as `before`, if they were measured."""
    keys = ("loss", "bits_per_byte")
    found = [row for row in rows if row["step"] == 0 and "validation_loss" in row]
    return {"before": {key: found[0][f"validation_{key}"] for key in keys}} if found else {}


def steps_of_lowest_loss(rows: list[dict[str, Any]]) -> list[int]:
    """The evaluated steps, that of the lowest held-out loss first; of two as good the later."""
    losses = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    return sorted(losses, key=lambda step: (losses[step], -step))


def first_non_finite(metrics: StepMetrics) -> tuple[str, float] | None:
    """Name and value of the first metric that is not finite: causes before their effects."""
    watched = {"loss": metrics.loss}
    watched |= {_term_key(name): term_L for name, term_L in metrics.terms.items()}
    watched |= _logged_parts(metrics)
    if metrics.ahead is not None:
        watched["mtp_loss"] = metrics.ahead.nll
    if metrics.router is not None:
        watched |= {f"router_{name}": sum_L for name, sum_L in metrics.router.token_sums.items()}
    watched |= {"total_loss": metrics.total_loss, "grad_norm": metrics.grad_norm}
    for name, value in watched.items():
        array = np.asarray(value).reshape(-1)
        if not np.isfinite(array).all():
            return name, float(array[~np.isfinite(array)][0])
    return None


def shown(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Fields of the progress line besides the loss: speed, MaxVio, likeness to a teacher."""
    row = next((r for r in reversed(rows) if "tokens_per_second" in r), {})
    fields = {}
    if "tokens_per_second" in row:
        fields["tokens/s"] = f"{row['tokens_per_second']:,.0f}"
    if "maxvio" in row:
        fields["MaxVio"] = f"{sum(row['maxvio']) / len(row['maxvio']):.2f}"
    if "teacher_agreement" in row:
        fields["distillation"] = f"{row['distillation']:.4f}"
        fields["as the teacher"] = f"{row['teacher_agreement']:.0%}"
    return fields
