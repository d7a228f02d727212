"""What a run writes down: `metrics.jsonl`, and the same numbers for TensorBoard.

A row holds what was measured at one step; a number that does not exist (the entropy of a router
without affinities, the share of an unknown machine's peak) has no key, it is never written as 0.

    step, tokens                     updates made, tokens seen so far
    loss, total_loss                 nats per token: cross-entropy; with the weighted balance terms
    bits_per_byte, grad_norm, learning_rate
    tokens_per_second, flops_per_second, flops_utilization    since the last row
    overhead                         share of that time in which the device had nothing to do
    load                             [layer][expert]: assignments of the step's batch
    maxvio, gini, dead_experts       [layer]: how uneven it is, see `load_summary`
    maxvio_running                   [layer]: of the load of the last 100 steps or so, `RunningLoad`
    router_entropy, router_top_gate, router_gate_sum, router_z    [layer], means over tokens
    expert_balance, ...              [layer], terms with a weight, here without it; with one of its
                                     own, `router_z` is the term, over the scope of the term
    dropped                          [layer]: assignments; sent = computed + dropped was checked
    dropped_by_expert, dropped_by_device, dropped_by_position, dropped_by_reason
                                     [layer][...]: the same (without a capacity there are none)
    device_rows, device_megabytes    [layer][device]: what travels to each of `expert_groups`
                                     devices, a token once, one way (none with one device)
    exchange_rows, exchange_retries  [layer]: on a mesh, see `dispatch.Exchange`
    validation_loss, validation_bits_per_byte, validation_tokens
    validation_maxvio, validation_dropped    [layer]
    validation_domains               {domain: {loss, bits_per_byte, tokens, bytes}}

Validation rows come after the training row of their step; `read_rows` joins the two.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.moe.capacity import Ledger
from dsmoe_jax.nn.transformer import compute_dtype
from dsmoe_jax.training.step import StepMetrics
from dsmoe_jax.training.workdir import METRICS, TENSORBOARD

# Limits of TensorBoard's histogram of load / mean load; its own 1549 cost more than all the rest.
FAIR_SHARES: Any = np.append(np.linspace(0, 8, 33), 1e6)
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
        """What of it is logged."""
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
        "bits_per_byte": bits_per_byte(loss * tokens, n_bytes),
        "grad_norm": float(metrics.grad_norm),
        "learning_rate": float(metrics.learning_rate),
    }
    if metrics.router is None:
        return row
    stats = metrics.router
    row |= load_summary(np.asarray(stats.load_E, np.float64))
    row |= {f"router_{name}": _list(sum_L / stats.tokens) for name, sum_L in stats.sums.items()}
    row |= {name: _list(term_L) for name, term_L in metrics.terms.items()}
    row |= drop_summary(stats.ledger, detailed=bool(model.moe.capacity_factor))
    if model.moe.expert_groups > 1:
        bytes_of_row = model.hidden_size * compute_dtype(model).itemsize
        row["device_rows"] = _list(stats.device_rows_D, int)
        row["device_megabytes"] = _list(stats.device_rows_D * (bytes_of_row / 1e6))
    if stats.exchange.rows is not None:
        row["exchange_rows"] = _list(stats.exchange.rows, int)
        row["exchange_retries"] = _list(stats.exchange.retries, int)
    return row


def drop_summary(ledger: Ledger, *, detailed: bool) -> dict[str, Any]:
    """What was dropped by layer, after checking that nothing is missing.

    Raises:
      RuntimeError: naming layer and expert, if sent is not computed + dropped.
    """
    dropped_LE = np.asarray(ledger.dropped_E)
    missing_LE = np.asarray(ledger.sent_E) - np.asarray(ledger.computed_E) - dropped_LE
    for layer, expert in np.argwhere(missing_LE)[:1]:
        counts = ledger.sent_E, ledger.computed_E, ledger.dropped_E
        sent, computed, dropped = (int(count[layer, expert]) for count in counts)
        raise RuntimeError(
            f"layer {layer}, expert {expert}: {sent} assignments sent, {computed} computed and"
            f" {dropped} dropped: the dispatch lost some or computed too many"
        )
    dropped_L = dropped_LE.sum(axis=-1)
    columns = {
        "expert": ledger.dropped_E,
        "device": ledger.dropped_D,
        "position": ledger.dropped_P,
        "reason": ledger.dropped_R,
    }
    for name, column in columns.items():
        if (np.asarray(column).sum(axis=-1) != dropped_L).any():
            raise RuntimeError(f"dropped by {name}: {column.sum(axis=-1)}, in all {dropped_L}")
    row = {"dropped": _list(dropped_L, int)}
    if detailed:
        row |= {f"dropped_by_{name}": _list(column, int) for name, column in columns.items()}
    return row


def _list(array: Any, kind: type = float) -> list[Any]:
    return np.asarray(array).astype(kind).tolist()


def validation_row(step: int, result: dict[str, Any]) -> dict[str, Any]:
    """What `HeldOut.measure` found after a step; of the expert loads only how uneven they are."""
    keys = ("loss", "bits_per_byte", "tokens", "maxvio", "dropped", "domains")
    return {"step": step} | {f"validation_{key}": result[key] for key in keys if key in result}


def load_summary(load_LE: np.ndarray) -> dict[str, Any]:
    """Load of the experts of each layer, how uneven it is, and how many got nothing.

    maxvio = (max load - mean load) / mean load (2408.15664 section 4.1); 0 is perfect balance.
    gini = mean difference of two experts' loads / (2 mean load); 0 is perfect balance, 1 - 1/E one
    expert for everything.
    """
    n = load_LE.shape[1]
    rank_E = 2 * np.arange(1, n + 1) - n - 1
    differences_L = (np.sort(load_LE, axis=1) * rank_E).sum(axis=1)
    return {
        "load": load_LE.astype(np.int64).tolist(),
        "maxvio": maxvio(load_LE),
        "gini": (differences_L / (n * load_LE.sum(axis=1))).tolist(),
        "dead_experts": (load_LE == 0).sum(axis=1).tolist(),
    }


def maxvio(load_LE: np.ndarray) -> list[float]:
    """(max load - mean load) / mean load by layer."""
    mean_L = load_LE.mean(axis=1)
    return ((load_LE.max(axis=1) - mean_L) / mean_L).tolist()


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Bits per UTF-8 byte of a text whose negative log-likelihood is `nats`."""
    return nats / math.log(2) / n_bytes


def first_non_finite(metrics: StepMetrics) -> tuple[str, float] | None:
    """Name and value of the first metric that is not finite: causes before what they spoil."""
    watched = {"loss": metrics.loss, **metrics.terms}
    if metrics.router is not None:
        watched |= {f"router_{name}": sum_L for name, sum_L in metrics.router.sums.items()}
    watched |= {"total_loss": metrics.total_loss, "grad_norm": metrics.grad_norm}
    for name, value in watched.items():
        array = np.asarray(value).reshape(-1)
        if not np.isfinite(array).all():
            return name, float(array[~np.isfinite(array)][0])
    return None


def shown(rows: list[dict[str, Any]]) -> dict[str, str]:
    """What a progress line says besides the loss: the last speed and MaxVio."""
    row = next((r for r in reversed(rows) if "tokens_per_second" in r), {})
    fields = {}
    if "tokens_per_second" in row:
        fields["tokens/s"] = f"{row['tokens_per_second']:,.0f}"
    if "maxvio" in row:
        fields["MaxVio"] = f"{sum(row['maxvio']) / len(row['maxvio']):.2f}"
    return fields


class MetricsLog:
    """Appends rows; opening it cuts off what lies past the step that the run continues from."""

    def __init__(self, workdir: Path, step: int):
        # Here, because only the first process writes, and it imports torch where there is one: 2 s.
        from tensorboardX import SummaryWriter

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
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore - made at run time

        # One event for all: `add_scalar` writes one for each, which takes twenty times as long.
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(row)]
        assert self._board.file_writer is not None
        self._board.file_writer.add_summary(Summary(value=values), row["step"])
        for i, load_E in enumerate(row.get("load", [])):
            fair_shares = np.array(load_E) / np.mean(load_E)
            self._board.add_histogram(f"load/layer_{i}", fair_shares, row["step"], bins=FAIR_SHARES)

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._board.close()


class NoLog(MetricsLog):
    """The log of a process that is not the first: writes nothing."""

    def __init__(self) -> None:
        self.rows = []

    def write(self, row: dict[str, Any]) -> None:
        """Only remembers the row."""
        self.rows.append(row)

    def close(self) -> None:
        """Nothing."""


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
