"""Results of an experiment: rows of `results.jsonl`, read from the workdirs.

Rows are rebuilt each time from the files of training, so they cannot disagree with them.  A missing
number is None, never 0.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from dsmoe_jax.config import Config, trees
from dsmoe_jax.runs import json_files
from dsmoe_jax.runs.metrics_log import read_rows
from dsmoe_jax.runs.workdir import read_evaluation
from dsmoe_jax.study.cells import Cell
from dsmoe_jax.study.experiment import AnyArm, Experiment
from dsmoe_jax.study.histories import History
from dsmoe_jax.study.measures import MEASURES
from dsmoe_jax.study.readings import Outcome


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of `results.jsonl`, where the measures stand beside the other keys.

    Attributes:
      arm, seed: of the run.
      config: its name.
      config_sha256: of the whole config, which its name alone does not identify.
      measures: by name, see `measures.MEASURES`; an old row lacks newer measures.
      domains: bits per byte on the held-out text of each domain.
      data_fingerprint: of the corpus.
      machine: on which it was trained.
      failed: the error that ended the run; None if there was none.
    """

    arm: str
    seed: int
    config: str
    config_sha256: str
    measures: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    domains: Mapping[str, float] = dataclasses.field(default_factory=dict)
    data_fingerprint: str | None = None
    machine: str | None = None
    failed: str | None = None

    def __getitem__(self, measure: str) -> float | None:
        return self.measures.get(measure)

    @property
    def finished(self) -> bool:
        """Whether the run has been trained to its end and evaluated."""
        return self["tokens"] is not None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything that tables and pictures show.

    Attributes:
      experiment, scale: of the comparison.
      arms: those that were chosen, in order.
      rows: of `results.jsonl`, also of runs that are not finished.
      histories: by label and seed, for runs that have begun.
      command: that makes this report again.
      overrides: config keys that were changed in every arm.
    """

    experiment: Experiment
    scale: str
    arms: tuple[AnyArm, ...]
    rows: tuple[Row, ...]
    histories: Mapping[tuple[str, int], History]
    command: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def failed(self) -> list[Row]:
        """Rows of the runs that ended with an error."""
        return [row for row in self.rows if row.failed is not None]

    def finished(self, arm: AnyArm) -> list[Row]:
        """Finished rows of an arm, by seed."""
        return [row for row in self.rows if row.arm == arm.label and row.finished]

    def by_seed(self, measure: str) -> dict[str, dict[int, float]]:
        """A measure of the finished runs: label -> seed -> value, without arms that have none."""
        found: dict[str, dict[int, float]] = {}
        for arm in self.arms:
            for row in self.finished(arm):
                if (value := row[measure]) is not None:
                    found.setdefault(arm.label, {})[row.seed] = value
        return found

    def histories_of(self, arm: AnyArm) -> dict[int, History]:
        """Histories of an arm by seed."""
        return {seed: h for (label, seed), h in self.histories.items() if label == arm.label}


def read_outcome(cell: Cell) -> Outcome:
    """Files of a run, as far as they are written."""
    evaluation = read_evaluation(cell.workdir)
    if evaluation is not None and evaluation["step"] != cell.config.train.steps:
        evaluation = None
    trained = None if cell.trained is None else read_evaluation(cell.trained)
    rows = read_rows(cell.workdir)
    return Outcome(cell.config, cell.measured, rows, evaluation, cell.before, trained)


def read_row(cell: Cell) -> Row:
    """The row of a run, finished or not."""
    outcome = read_outcome(cell)
    record = read_record(cell.record)
    domains = (outcome.evaluation or {}).get("domains", {})
    return Row(
        cell.arm.label,
        cell.seed,
        cell.config.name,
        config_sha256(cell.config),
        {name: measure.read(outcome) for name, measure in MEASURES.items()},
        {name: found["bits_per_byte"] for name, found in domains.items()},
        record.get("data_fingerprint"),
        record.get("machine"),
        record.get("failed"),
    )


def read_record(path: pathlib.Path) -> dict[str, Any]:
    """The record beside a workdir, see `runner.py`; empty before the run begins.

    Raises:
      ValueError: naming the file, if it is damaged.
    """
    if not path.exists():
        return {}
    record = json_files.read(path)
    for key in ("data_fingerprint", "machine", "failed"):
        if not isinstance(record.get(key), str | None):
            raise ValueError(f"{path}: {key}={record[key]!r}: must be a string")
    if not isinstance(record.get("wall_seconds"), int | float | None):
        raise ValueError(f"{path}: wall_seconds={record['wall_seconds']!r}: must be a number")
    return record


@dataclasses.dataclass(frozen=True)
class Trained:
    """The run whose model a probe measures; None is not known.

    Attributes:
      data_fingerprint: of the corpus on which it was trained.
      step: of its evaluation.
      validation_tokens: of the held-out text on which it was evaluated.
    """

    data_fingerprint: str | None
    step: int | None
    validation_tokens: int | None


def read_trained(cell: Cell) -> Trained:
    """The run whose model a probe measures, as far as its files are written."""
    assert cell.trained is not None, "only a probe measures another run's model"
    evaluation = read_evaluation(cell.trained) or {}
    record = read_record(cell.trained.with_suffix(".json"))
    return Trained(record.get("data_fingerprint"), evaluation.get("step"), evaluation.get("tokens"))


def config_sha256(config: Config) -> str:
    """Hexadecimal sha256 of a config's JSON."""
    text = json.dumps(trees.to_tree(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_rows(path: pathlib.Path, rows: list[Row]) -> None:
    """Writes `results.jsonl`, whole or not at all."""
    json_files.write_text(path, "".join(_line(row) + "\n" for row in rows))


def _line(row: Row) -> str:
    columns = dataclasses.asdict(row)
    values = columns.pop("measures")
    if row.failed is None:
        del columns["failed"]
    assert not values.keys() & columns.keys(), "a measure needs a name of its own"
    return json_files.dumps(columns | values)


def load_rows(path: pathlib.Path) -> list[Row]:
    """Reads `results.jsonl`; every key that is not a field of `Row` is a measure.

    Raises:
      ValueError: naming file and line, if one is not a row.
    """
    keys = {field.name for field in dataclasses.fields(Row)} - {"measures"}
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        place = f"{path}: line {number} is not a row of results"
        columns = json_files.parse(line, place)
        values = {name: columns.pop(name) for name in list(columns) if name not in keys}
        try:
            rows.append(Row(measures=values, **columns))
        except TypeError as error:  # a key is missing
            raise ValueError(f"{place}: {error}") from error
    return rows
