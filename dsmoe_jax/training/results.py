"""The result of a run, in memory and in its workdir."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_jax.config import Config
from dsmoe_jax.runs import json_files
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.training.rows import before_training


@dataclass(frozen=True)
class Result:
    """Outcome of a call of `train`.

    Attributes:
      step: updates made.
      metrics: the last row of metrics.jsonl.
      evaluation: held-out results after the last step, see `HeldOut.measure`; of a run that began
        with the parameters of another one also those `before` the first step.
      resumed_from: the checkpoint that this call continued from (None: from the start).
    """

    step: int
    metrics: dict[str, Any]
    evaluation: dict[str, Any]
    resumed_from: int | None


def write_evaluation(
    directory: Path, step: int, result: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Writes the held-out results after the last step, which say that the run is finished.

    Args:
      directory: the workdir.
      step: the last one.
      result: of `HeldOut.measure`.
      rows: of the log.
    """
    path = directory / workdirs.EVALUATION
    json_files.write(path, {"step": step, **result, **before_training(rows)})


def read_finished(directory: Path, config: Config) -> dict[str, Any] | None:
    """The fields of the `Result` of a run that needs no more steps; None if it does.

    Raises:
      ValueError: if a file is damaged, or the log has no rows.
    """
    evaluation = workdirs.read_evaluation(directory, "loss", "bits_per_byte")
    steps = config.train.steps
    if evaluation is None or evaluation["step"] != steps:
        return None
    rows = read_rows(directory)
    if not rows:
        raise ValueError(
            f"{directory / workdirs.METRICS}: has no row, though {workdirs.EVALUATION} says that"
            " the run is finished; bring it back, or remove the latter to evaluate again"
        )
    return {"step": steps, "metrics": rows[-1], "evaluation": evaluation, "resumed_from": steps}
