"""Results of a baseline at several sizes, in which the differences of an experiment are counted.

They are read from the directory of the baseline's experiment beside the experiment's own, or else
from the results that come with the repository.

Shapes: P baseline models, A arms, S seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dsmoe_jax.config import Config
from dsmoe_jax.config.files import REPOSITORY
from dsmoe_jax.study.cells import Options, shell_command
from dsmoe_jax.study.claims import LOSS
from dsmoe_jax.study.experiment import Baseline
from dsmoe_jax.study.results import Comparison, Row, config_sha256, load_rows

COMMITTED = REPOSITORY / "experiments" / "results"


class NoBaseline(Exception):
    """There is no baseline to count in; the text says why, and what to do, in a sentence."""


@dataclasses.dataclass(frozen=True)
class BaselineRuns:
    """Finished runs of a baseline.

    Attributes:
      labels: of the arms, by compute.
      compute_P: training FLOPs of each.
      losses: label -> seed -> validation loss.
      reference: training FLOPs of the model in whose compute others are counted.
      path: of the results.
    """

    labels: tuple[str, ...]
    compute_P: np.ndarray
    losses: Mapping[str, Mapping[int, float]]
    reference: float
    path: Path


def compute_of(row: Row, config: Config) -> float | None:
    """Training FLOPs of a run, as the paper counts them; None before it is finished."""
    flops = row["flops_per_sequence"]
    tokens = row["tokens"]
    if flops is None or tokens is None:
        return None
    return flops * tokens / config.data.sequence_length


def find(comparison: Comparison, results: Path) -> BaselineRuns:
    """The runs of the experiment's baseline at the same scale and on the same text.

    Args:
      comparison: whose experiment has a baseline.
      results: the directory that holds NAME-SCALE of all experiments.

    Raises:
      NoBaseline: if there are none, or they are of other settings or text.
      ValueError: if the file is damaged.
    """
    baseline = comparison.experiment.baseline
    if baseline is None:
        raise ValueError(f"{comparison.experiment.name}: baseline=None: this analysis needs one")
    name = f"{baseline.experiment.name}-{comparison.scale}/results.jsonl"
    options = Options(comparison.scale, overrides=comparison.overrides)
    command = shell_command(baseline.experiment, options)
    path = next((root / name for root in (results, COMMITTED) if (root / name).exists()), None)
    if path is None:
        raise NoBaseline(
            f"There are no results of {baseline.line} at several sizes; `{command}` makes them."
        )
    rows = [row for row in load_rows(path) if row.finished]
    found = {arm.label: [row for row in rows if row.arm == arm.label] for arm in baseline.arms}
    missing = [label for label, of_arm in found.items() if not of_arm]
    if missing:
        raise NoBaseline(
            f"{', '.join(missing)} of `{path}` not finished; `{command}` goes on with them."
        )
    _check_same(comparison, baseline, found, path, command)
    return _runs(comparison, baseline, found, path)


def _check_same(
    comparison: Comparison,
    baseline: Baseline,
    found: Mapping[str, list[Row]],
    path: Path,
    command: str,
) -> None:
    """Refuses results of other configs, or of other text."""
    for arm in baseline.arms:
        for row in found[arm.label]:
            config = arm.run_config(comparison.scale, row.seed, comparison.overrides)
            if row.config_sha256 != config_sha256(config):
                raise NoBaseline(
                    f"`{path}` was made with other settings than these runs ({arm.label}, seed"
                    f" {row.seed}); `{command}` with another --results, for all of them, makes"
                    " results that compare."
                )
    texts = {row.data_fingerprint for rows in found.values() for row in rows}
    ours = {row.data_fingerprint for row in comparison.rows if row.finished}
    if len(texts | ours) > 1:
        raise NoBaseline(f"`{path}` is of other text than these runs.")


def _runs(
    comparison: Comparison, baseline: Baseline, found: Mapping[str, list[Row]], path: Path
) -> BaselineRuns:
    compute = {}
    losses: dict[str, dict[int, float]] = {}
    for arm in baseline.arms:
        rows = found[arm.label]
        config = arm.run_config(comparison.scale, 0, comparison.overrides)
        flops = compute_of(rows[0], config)
        assert flops is not None, "the runs are finished"
        compute[arm.label] = flops
        losses[arm.label] = {row.seed: loss for row in rows if (loss := row[LOSS]) is not None}
    labels = tuple(sorted(compute, key=lambda label: compute[label]))
    compute_P = np.array([compute[label] for label in labels])
    return BaselineRuns(labels, compute_P, losses, compute[baseline.reference], path)
