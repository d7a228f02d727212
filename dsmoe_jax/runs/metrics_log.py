"""The log of a run: `metrics.jsonl`, and the same numbers for TensorBoard.

A row has the measurements of one step.  A number that does not exist (the entropy of a router
without affinities, the share of an unknown machine's peak) has no key, it is never written as 0.

    step, tokens                     updates made, tokens seen so far
    loss, total_loss                 nats per token: cross-entropy; sum of all parts of the loss
    bits_per_byte, grad_norm, learning_rate
    tokens_per_second, flops_per_second, flops_utilization    since the last row
    overhead                         share of that time in which the device had nothing to do
    load                             [layer][expert]: assignments of the step's batch
    maxvio, gini, dead_experts       [layer]: how uneven it is, see summaries.py
    maxvio_running                   [layer]: of the load of the last 100 steps or so, see
                                     training/rows.py
    router_entropy, router_top_gate, router_gate_sum, router_z    [layer], means over tokens
    expert_balance, ...              [layer], terms with a weight, here without it; with one of its
                                     own, `router_z` is the term, over the scope of the term
    dropped                          [layer]: assignments; sent = computed + dropped is checked
    dropped_by_expert, dropped_by_device, dropped_by_position, dropped_by_reason
                                     [layer][...]: the same, with `model.moe.drop`
    device_rows, device_megabytes    [layer][device]: rows sent to each of `expert_groups` devices,
                                     a token once, one way (none with one device)
    exchange_rows, exchange_retries  [layer]: on a mesh, see `dispatch.Exchange`
    validation_loss, validation_bits_per_byte, validation_tokens
    validation_maxvio, validation_dropped    [layer]
    validation_domains               {domain: {loss, bits_per_byte, tokens, bytes}}

Validation rows come after the training row of their step; `read_rows` joins the two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.runs.workdir import METRICS, TENSORBOARD

# Limits of TensorBoard's histogram of load / mean load; its own 1549 cost more than all the rest.
FAIR_SHARES: Any = np.append(np.linspace(0, 8, 33), 1e6)


class MetricsLog:
    """Appends rows; opening it cuts off rows past the step that the run continues from."""

    def __init__(self, workdir: Path, step: int):
        # Here, because only the first process writes, and it imports torch where there is one: 2 s.
        from tensorboardX import SummaryWriter

        self.path = workdir / METRICS
        self.rows = [row for row in _parse(self.path) if row["step"] <= step]
        _rewrite(self.path, self.rows)
        # Unbuffered: a written row is safe from a kill, and a full disk is noticed here.
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
        """Does nothing."""


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
    """Curves for TensorBoard: the numbers, and one for each layer of a list of numbers."""
    found = []
    for key, value in row.items():
        if isinstance(value, (int, float)) and key != "step":
            found.append((key, value))
        elif isinstance(value, list) and all(isinstance(v, (int, float)) for v in value):
            found += [(f"{key}/layer_{i}", v) for i, v in enumerate(value)]
    return found
