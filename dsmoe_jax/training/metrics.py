"""What a run writes down: `metrics.jsonl`, and the same numbers for TensorBoard.

A row holds what was measured at one step; a number that does not exist (the entropy of a router
without affinities, the share of an unknown machine's peak) has no key, it is never written as 0.

    step, tokens                     updates made, tokens seen so far
    loss, total_loss                 nats per token: cross-entropy; with the weighted balance terms
    bits_per_byte, grad_norm, learning_rate
    tokens_per_second, flops_per_second, flops_utilization    since the last row
    overhead                         share of that time in which the device had nothing to do
    load                             [layer][expert]: assignments of the step's batch
    maxvio, dead_experts             [layer]
    router_entropy, router_top_gate, router_gate_sum    [layer], means over tokens
    expert_balance, router_z, ...    [layer], unweighted; `router_z` also if its weight is 0
    validation_loss, validation_bits_per_byte, validation_tokens, validation_maxvio [layer],
    validation_domains               {domain: {loss, bits_per_byte, tokens, bytes}}

Validation rows come after the training row of their step; `read_rows` joins the two.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from dsmoe_jax.training.step import StepMetrics
from dsmoe_jax.training.workdir import METRICS, TENSORBOARD


def training_row(metrics: StepMetrics) -> dict[str, Any]:
    """The numbers of one step, fetched from the device."""
    loss, tokens, n_bytes = (float(x) for x in (metrics.loss, metrics.tokens, metrics.bytes))
    row = {
        "loss": loss,
        "total_loss": float(metrics.total_loss),
        "bits_per_byte": bits_per_byte(loss * tokens, n_bytes),
        "grad_norm": float(metrics.grad_norm),
        "learning_rate": float(metrics.learning_rate),
    }
    if metrics.router is None:
        return row
    load_LE = np.asarray(metrics.router.load_E, np.float64)
    row |= load_summary(load_LE)
    for name, sum_L in metrics.router.sums.items():
        row[f"router_{name}"] = np.asarray(sum_L / metrics.router.tokens, np.float64).tolist()
    for name, term_L in metrics.terms.items():
        row[name] = np.asarray(term_L, np.float64).tolist()
    return row


def validation_row(step: int, result: dict[str, Any]) -> dict[str, Any]:
    """What `HeldOut.measure` found after a step; of the expert loads only how uneven they are."""
    keys = ("loss", "bits_per_byte", "tokens", "maxvio", "domains")
    return {"step": step} | {f"validation_{key}": result[key] for key in keys if key in result}


def load_summary(load_LE: np.ndarray) -> dict[str, Any]:
    """Load of the experts of each layer, how uneven it is, and how many got nothing.

    maxvio = (max load - mean load) / mean load (2408.15664 section 4.1); 0 is perfect balance.
    """
    mean_L = load_LE.mean(axis=1)
    return {
        "load": load_LE.astype(np.int64).tolist(),
        "maxvio": ((load_LE.max(axis=1) - mean_L) / mean_L).tolist(),
        "dead_experts": (load_LE == 0).sum(axis=1).tolist(),
    }


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Bits per UTF-8 byte of a text whose negative log-likelihood is `nats`."""
    return nats / math.log(2) / n_bytes


def first_non_finite(metrics: StepMetrics) -> tuple[str, float] | None:
    """Name and value of the first metric that is not finite: causes before what they spoil."""
    watched = {"loss": metrics.loss, **metrics.terms}
    watched |= {"total_loss": metrics.total_loss, "grad_norm": metrics.grad_norm}
    for name, value in watched.items():
        array = np.asarray(value).reshape(-1)
        if not np.isfinite(array).all():
            return name, float(array[~np.isfinite(array)][0])
    return None


class MetricsLog:
    """Appends rows; opening it cuts off what lies past the step that the run continues from."""

    def __init__(self, workdir: Path, step: int):
        self.path = workdir / METRICS
        self.rows = [row for row in _parse(self.path) if row["step"] <= step]
        _rewrite(self.path, self.rows)
        # Unbuffered: what is written is safe from a kill, and a full disk is noticed here.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the log
        self._board = SummaryWriter(str(workdir / TENSORBOARD), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Adds one row.

        Raises:
          OSError: naming the file, if the disk is full.
        """
        self.rows.append(row)
        line = memoryview((json.dumps(row) + "\n").encode())
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(f"{self.path}: cannot be written: {error.strerror}") from error
        for tag, value in _scalars(row):
            self._board.add_scalar(tag, value, row["step"])

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._board.close()


def read_rows(workdir: str | Path) -> list[dict[str, Any]]:
    """All rows of a run in order, one a step (training and validation numbers joined).

    Raises:
      ValueError: naming the line, if one is not a row.
    """
    joined: dict[int, dict[str, Any]] = {}
    for row in _parse(Path(workdir) / METRICS):
        joined[row["step"]] = joined.get(row["step"], {}) | row
    return [joined[step] for step in sorted(joined)]


def _parse(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line without its newline was cut by a kill and does not count."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            assert isinstance(row["step"], int)
        except (ValueError, KeyError, TypeError, AssertionError):
            raise ValueError(f"{path}: line {number} is not a row of metrics") from None
        rows.append(row)
    return rows


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    """Makes the file hold exactly these rows, as a whole."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.exists() and path.read_text() == text:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    """What TensorBoard draws: the numbers, and lists of numbers a layer each."""
    found = []
    for key, value in row.items():
        if isinstance(value, (int, float)) and key != "step":
            found.append((key, value))
        elif isinstance(value, list) and all(isinstance(v, (int, float)) for v in value):
            found += [(f"{key}/layer_{i}", v) for i, v in enumerate(value)]
    return found
