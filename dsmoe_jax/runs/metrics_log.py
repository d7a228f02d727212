"""The log of a run: `metrics.jsonl`, and the same numbers for TensorBoard.

A row has the measurements of one step.  A number that does not exist (the entropy of a router
without affinities, the share of an unknown machine's peak) has no key, it is never written as 0;
one that is not finite is null, and `read_rows` gives NaN for it.

    step, tokens                     updates made, tokens seen so far
    loss, total_loss                 nats per token: cross-entropy; sum of all parts of the loss;
                                     of conversations per token of the answers
    bits_per_byte, grad_norm, learning_rate
    tokens_per_second, flops_per_second, flops_utilization    since the last row
    kernels                          {attention, experts, rows: name}, in the first row of a start
                                     and of a stage
    overhead                         share of that time in which the device had nothing to do
    step_seconds                     {p50, p95, p99}: of the last 1000 steps, see training/clock.py
    host_data_seconds, host_work_seconds    [host]: a step, what each process takes for itself, see
                                     training/host_times.py
    domain_tokens, domain_epochs     {domain: number}, with `data.mixture`: tokens read so far,
                                     padding included, and passes over the domain's text
    domain_share                     {domain: number}: of the tokens since the last row
    load                             [layer][expert]: assignments of the step's batch
    maxvio, gini, dead_experts       [layer]: how uneven it is, see summaries.py
    maxvio_running                   [layer]: of the load of the last 100 steps or so, see
                                     training/rows.py
    router_entropy, router_top_gate, router_gate_sum, router_z    [layer], means over tokens
    expert_balance, ...              [layer], terms with a weight, here without it; with one of its
                                     own, `router_z` is the term, over the scope of the term
    mtp_loss, mtp_acceptance         [module]: of multi-token prediction, without the weight; how
                                     often its best token is the model's.  In training its MoE
                                     layers come last wherever this says [layer]
    dropped                          [layer]: assignments; sent = computed + dropped is checked
    dropped_by_expert, dropped_by_device, dropped_by_position, dropped_by_reason
                                     [layer][...]: the same, with `model.moe.drop`
    device_rows, device_megabytes    [layer][device]: rows sent to each of `expert_groups` devices,
                                     a token once, one way (none with one device)
    exchange_rows                    [layer]: on a mesh, see `dispatch.DispatchReport`
    skipped_steps, left_out_batches  so far, with `train.spikes`, see training/spikes.py
    validation_loss, validation_bits_per_byte, validation_tokens
    validation_maxvio, validation_dropped    [layer]
    validation_domains               {domain: {loss, bits_per_byte, tokens, bytes}}

    inside_domain_specialisation, inside_vocabulary_specialisation, inside_experts_per_token,
    inside_committee, inside_committee_overlap, inside_committee_chance_overlap,
    inside_mass_in_every_domain, inside_router_saturation
                                     [layer]: with `train.analyse_every`, see analysis/tables.py

Validation rows come after the training row of their step; `read_rows` joins the two.  A run that
begins with the parameters of another one has a validation row of step 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.runs import json_files
from dsmoe_jax.runs.board import Board
from dsmoe_jax.runs.wandb_board import WandbBoard
from dsmoe_jax.runs.workdir import METRICS, TENSORBOARD
from dsmoe_jax.storage import files
from dsmoe_jax.storage.places import place_of

KERNELS = "kernels"  # the one key whose values are names


class MetricsLog:
    """Appends rows; opening it cuts off rows past the step that the run continues from.

    Args:
      workdir: of the run.
      step: that the run continues from.
      wandb: a project of Weights & Biases that gets the rows too.
    """

    def __init__(self, workdir: Path, step: int, wandb: str | None = None):
        self.path = workdir / METRICS
        self.rows = [row for row in _parse(self.path) if row["step"] <= step]
        _rewrite(self.path, self.rows)
        self._file = files.appending(self.path)
        self._boards: list[Board | WandbBoard] = [Board(workdir / TENSORBOARD, step)]
        if wandb is not None:
            self._boards.append(WandbBoard(workdir, wandb))
        self._failed = False

    def write(self, row: dict[str, Any]) -> None:
        """Adds one row.

        Raises:
          OSError: naming the file, if the disk is full.
        """
        self.rows.append(row)
        self._failed = True  # until all is written
        line = memoryview(_line(row))
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            if error.strerror is None:  # of a bucket, and named
                raise
            raise OSError(f"{self.path}: cannot be written: {error.strerror}") from error
        for board in self._boards:
            board.add(row)
        self._failed = False

    def flush(self) -> None:
        """Makes sure that a kill takes no row; raises like `write`."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes both; raises like `write`, unless it has raised already."""
        self._file.close()
        try:
            for board in self._boards:
                board.close()
        except OSError:
            if not self._failed:
                raise


class NoLog(MetricsLog):
    """The log of a process that is not the first: writes nothing."""

    def __init__(self) -> None:
        self.rows = []

    def write(self, row: dict[str, Any]) -> None:
        """Only remembers the row."""
        self.rows.append(row)

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_rows(workdir: str | Path) -> list[dict[str, Any]]:
    """All rows of a run in order, one a step (training and validation numbers joined).

    Raises:
      ValueError: naming file and line, if one is not a row.
    """
    return joined(_parse(place_of("--workdir", workdir) / METRICS))


def joined(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a step, in order: those of training and of validation put together."""
    by_step: dict[int, dict[str, Any]] = {}
    for row in rows:
        by_step[row["step"]] = by_step.get(row["step"], {}) | row
    return [by_step[step] for step in sorted(by_step)]


def _parse(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line without its newline was cut by a kill and does not count."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        place = f"{path}: line {number} is not a row of metrics"
        row = json_files.parse(line, place, null_is_nan=True)
        for key, value in row.items():
            if not (_are_names(value) if key == KERNELS else _is_numeric(value)):
                raise ValueError(f"{place}: {key}={value!r}")
        if type(row.get("step")) is not int:
            raise ValueError(f"{place}: it has no step")
        rows.append(row)
    return rows


def _is_numeric(value: Any) -> bool:
    """Whether a value of a row is a number, an array, or a section of such."""
    if isinstance(value, dict):
        return all(map(_is_numeric, value.values()))
    try:
        return np.asarray(value).dtype.kind in "if"
    except ValueError:  # lists of several lengths
        return False


def _are_names(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value.values())


def _line(row: dict[str, Any]) -> bytes:
    return (json_files.dumps(row) + "\n").encode()


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    """Makes the file hold exactly these rows, as a whole."""
    content = b"".join(map(_line, rows))
    if not path.exists() or path.read_bytes() != content:
        json_files.write_text(path, content.decode())
