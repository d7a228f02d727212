"""What came out: rows of `results.jsonl` and training histories, read from the workdirs.

Nothing is kept twice: rows are rebuilt from what training wrote, so they cannot disagree with it.
A number that is not there is None, never 0.

Shapes: S logged steps, L MoE layers, E routed experts.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dsmoe_jax.config import Config, replace, tokens_after
from dsmoe_jax.model import size
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.runs.workdir import read_evaluation
from dsmoe_jax.study.spec import Arm, Experiment

RUNNING = "maxvio_running"  # as in metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of an experiment: an arm, a seed, and where it is kept."""

    arm: Arm
    seed: int
    config: Config
    workdir: pathlib.Path

    @property
    def record(self) -> pathlib.Path:
        """The file beside the workdir that says on what the run was made, see `runner.py`."""
        return self.workdir.with_suffix(".json")

    def __str__(self) -> str:
        return f"{self.arm.label}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of `results.jsonl`.

    Attributes:
      arm, seed, config: which run; `config` is the config's name.
      config_sha256: of the whole config, so that a row tells if it is of the config one means.
      total, activated, expert_total, expert_activated, flops_per_sequence: see `accounting`.
      tokens: trained on; `validation_tokens`: judged on.
      validation_loss: nats per token; validation_bits_per_byte: comparable between tokenizers.
      domains: bits per byte on the held-out text of each domain.
      maxvio: (max load - mean load) / mean load over the held-out text, mean over layers.
      maxvio_running: the same of the last 100 training steps or so, at the end of training.
      dead_experts: experts without a token of the held-out text, over all layers.
      seconds: in training steps, without compiling, validating and waiting.
      data_fingerprint: of the corpus.
      machine: on which it was trained.
    """

    arm: str
    seed: int
    config: str
    config_sha256: str
    total: int
    activated: int
    expert_total: int
    expert_activated: int
    flops_per_sequence: float
    tokens: int | None = None
    validation_tokens: int | None = None
    validation_loss: float | None = None
    validation_bits_per_byte: float | None = None
    domains: Mapping[str, float] = dataclasses.field(default_factory=dict)
    maxvio: float | None = None
    maxvio_running: float | None = None
    dead_experts: int | None = None
    seconds: float | None = None
    data_fingerprint: str | None = None
    machine: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the run has been trained to its end and judged."""
        return self.validation_loss is not None


class Loads(NamedTuple):
    """Load at each logged step: shapes S steps, L layers, E experts.

    Attributes:
      tokens_S: trained on so far.
      load_SLE: assignments over the layer's mean, so that 1 is the fair share.
    """

    tokens_S: np.ndarray
    load_SLE: np.ndarray


@dataclasses.dataclass(frozen=True)
class History:
    """What training logged, in order.

    Attributes:
      tokens, loss: trained on so far, and training loss in nats per token, at each logged step.
      validation_tokens, validation_loss: the same for the validations on the way.
      maxvio_SL: of each logged batch; empty without routed experts.
      maxvio_running_SL: the same of the load of the last 100 steps or so.
      load_LE: load of every expert on the held-out text over its layer's mean (1 is balance);
        None without routed experts, or before the run is finished.
      loads: of every expert over training; None without routed experts.
    """

    tokens: np.ndarray
    loss: np.ndarray
    validation_tokens: np.ndarray
    validation_loss: np.ndarray
    maxvio_SL: np.ndarray
    maxvio_running_SL: np.ndarray
    load_LE: np.ndarray | None
    loads: Loads | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that tables and pictures are made of.

    Attributes:
      experiment, scale: what was compared.
      arms: those that were chosen, in order.
      rows: of `results.jsonl`, also of runs that are not finished.
      histories: by label and seed, for runs that have begun.
      command: that makes this report again.
      overrides: config keys that were changed in every arm.
    """

    experiment: Experiment
    scale: str
    arms: tuple[Arm, ...]
    rows: tuple[Row, ...]
    histories: Mapping[tuple[str, int], History]
    command: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def of_arm(self, arm: Arm) -> list[Row]:
        """Finished rows of an arm, by seed."""
        return [row for row in self.rows if row.arm == arm.label and row.finished]

    def histories_of(self, arm: Arm) -> dict[int, History]:
        """Histories of an arm by seed."""
        return {seed: h for (label, seed), h in self.histories.items() if label == arm.label}


def sizes(config: Config) -> dict[str, Any]:
    """`size.account` of a config, worked out once for all seeds."""
    return _account(replace(config, **{"train.seed": 0}))


_account = functools.cache(size.account)


def read_row(cell: Cell) -> Row:
    """The row of a run, as far as it has come."""
    logged = read_rows(cell.workdir)
    row = Row(
        cell.arm.label, cell.seed, cell.config.name, config_sha256(cell.config),
        **sizes(cell.config),
        seconds=_seconds(logged), **_read_json(cell.record),
    )  # fmt: skip
    held_out = _finished_evaluation(cell)
    if held_out is None:
        return row
    maxvio, dead = held_out.get("maxvio"), held_out.get("dead_experts")
    running = logged[-1].get(RUNNING)
    return dataclasses.replace(
        row,
        tokens=tokens_after(cell.config, cell.config.train.steps),
        validation_tokens=held_out["tokens"],
        validation_loss=held_out["loss"],
        validation_bits_per_byte=held_out["bits_per_byte"],
        domains={name: found["bits_per_byte"] for name, found in held_out["domains"].items()},
        maxvio=None if maxvio is None else float(np.mean(maxvio)),
        maxvio_running=None if running is None else float(np.mean(running)),
        dead_experts=None if dead is None else int(np.sum(dead)),
    )


def read_history(cell: Cell) -> History | None:
    """What a run has logged so far; None before its first row."""
    rows = read_rows(cell.workdir)
    if not rows:
        return None
    trained = [row for row in rows if "loss" in row]
    judged = [row for row in trained if "validation_loss" in row]
    routed = [row for row in trained if "maxvio" in row]
    load = (_finished_evaluation(cell) or {}).get("load")
    load_LE = None if load is None else np.asarray(load, np.float64)
    return History(
        tokens=_column(trained, "tokens"),
        loss=_column(trained, "loss"),
        validation_tokens=_column(judged, "tokens"),
        validation_loss=_column(judged, "validation_loss"),
        maxvio_SL=np.array([row["maxvio"] for row in routed]),
        maxvio_running_SL=np.array([row[RUNNING] for row in routed]),
        load_LE=None if load_LE is None else load_LE / load_LE.mean(axis=1, keepdims=True),
        loads=loads_of(trained),
    )


def loads_of(rows: list[dict[str, Any]]) -> Loads | None:
    """From the rows of metrics.jsonl; None without routed experts."""
    rows = [row for row in rows if "load" in row]
    if not rows:
        return None
    load_SLE = np.array([row["load"] for row in rows], np.float64)
    tokens_S = np.array([row["tokens"] for row in rows], np.float64)
    return Loads(tokens_S, load_SLE / load_SLE.mean(axis=2, keepdims=True))


def _finished_evaluation(cell: Cell) -> dict[str, Any] | None:
    evaluation = read_evaluation(cell.workdir)
    done = evaluation is not None and evaluation["step"] == cell.config.train.steps
    return evaluation if done else None


def _seconds(rows: list[dict[str, Any]]) -> float | None:
    """Time in training steps, from the logged speeds; None before the first."""
    found, before = 0.0, 0
    for row in rows:
        if "tokens_per_second" in row:
            found += (row["tokens"] - before) / row["tokens_per_second"]
            before = row["tokens"]
    return found or None


def _column(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([row[key] for row in rows], np.float64)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def config_sha256(config: Config) -> str:
    """Hexadecimal sha256 of a config's JSON."""
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_rows(path: pathlib.Path, rows: list[Row]) -> None:
    """Writes `results.jsonl`, whole or not at all."""
    text = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def load_rows(path: pathlib.Path) -> list[Row]:
    """Reads `results.jsonl`."""
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
