"""Runs an experiment: every arm with every seed.

Each run has a workdir, shared by all experiments that train the same model (see `cells.py`), and is
trained in this process by `dsmoe_jax.training.loop.train`: finished runs are skipped, interrupted
ones continue.  `seedN.json` beside the workdir records data, machine, time and, if it failed, the
error.  All arms run with the first seed before any runs with the second, so that early results
compare the same seeds.  Several processes may run the same experiment, or several: each takes runs
that no other one holds.

The workdir of a probe holds evaluation.json alone: measures of a model that another experiment has
trained.  The probe is refused if that model is not finished; so is a run that needs one to begin
with, or to learn from.  What surgery makes of it is made when it is needed, once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from dsmoe_jax.config import Config, DataConfig
from dsmoe_jax.data.opening import open_corpus
from dsmoe_jax.progress import duration
from dsmoe_jax.runs import json_files, workdir
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.study import existing, fairness, made_models, results
from dsmoe_jax.study.cells import Cell, Options, chosen, make_cells, shell_command
from dsmoe_jax.study.experiment import Experiment, ProbeArm
from dsmoe_jax.study.histories import read_history
from dsmoe_jax.study.results import Comparison
from dsmoe_jax.training import loop
from dsmoe_jax.training.devices import open_mesh

Train = Callable[[Config, pathlib.Path], Any]
Fingerprint = Callable[[DataConfig], str]


def run(
    experiment: Experiment,
    options: Options,
    train: Train = loop.train,
    fingerprint: Fingerprint = lambda data: open_corpus(data).fingerprint,
) -> Comparison:
    """Checks, trains and probes what is missing, and writes `results.jsonl`.

    Args:
      experiment: to run.
      options: see `Options`.
      train: as `dsmoe_jax.training.loop.train`.
      fingerprint: prepares the corpus of a config, if need be, and returns its fingerprint.

    Returns:
      The results; the rows of runs that failed say why.

    Raises:
      ValueError: before training, if the comparison is not fair, existing results are of other
        configs or data, or a model to probe is not finished.
      OSError: if the disk is full.
    """
    maker = _Maker(experiment, train, fingerprint)
    with _compiling_once():
        if options.minutes is None:
            cells = _make_missing(experiment, options, maker)
        else:
            cells = _make_what_fits(experiment, options, options.minutes, maker)
    comparison = read(experiment, options, cells)
    fairness.check_measured(experiment, list(comparison.rows))
    directory = options.directory(experiment)
    directory.mkdir(parents=True, exist_ok=True)
    results.write_rows(directory / "results.jsonl", list(comparison.rows))
    return comparison


def _make_missing(experiment: Experiment, options: Options, maker: _Maker) -> list[Cell]:
    """Makes the runs that are missing; returns all."""
    cells = make_cells(experiment, options)
    fairness.check_configs(experiment, [cell for cell in cells if cell.seed == 0])
    moved = [existing.check_workdir(cell) for cell in cells]
    for cell in cells:
        existing.check_probe(cell)
        existing.check_needs(cell)
    fairness.check_probes(experiment, cells)
    fairness.check_measured(experiment, [results.read_row(cell) for cell in cells])
    wanted = cells if options.cell is None else [_single(cells, options.cell)]
    todo = [] if options.report_only else [cell for cell in wanted if not _is_finished(cell)]
    existing.check_trained(todo, options)
    if todo or any(moved):
        maker.make(cells, todo)
    return cells


def _single(cells: list[Cell], number: int) -> Cell:
    if not 0 <= number < len(cells):
        raise ValueError(f"--cell={number}: must be 0 to {len(cells) - 1}, the number of a run")
    return cells[number]


def _make_what_fits(
    experiment: Experiment, options: Options, minutes: float, maker: _Maker
) -> list[Cell]:
    """Makes one seed after another while the next one fits into the time; the first in any case."""
    start = time.monotonic()
    seeds = 1
    while True:
        cells = _make_missing(experiment, dataclasses.replace(options, seeds=seeds), maker)
        if options.report_only or seeds == options.seeds:
            return cells
        more = make_cells(experiment, dataclasses.replace(options, seeds=seeds + 1))
        needed = _estimate(more, [cell for cell in more if not _is_finished(cell)])
        spent = time.monotonic() - start
        if spent + needed > 60 * minutes:
            plural = "s" if seeds > 1 else ""
            print(
                f"{experiment.name}: {seeds} seed{plural} in {duration(spent)} of {minutes:g}"
                f" minutes; one more takes about {duration(needed)}: --seeds={seeds + 1} instead of"
                " --minutes trains it in any case",
                file=sys.stderr,
                flush=True,
            )
            return cells
        seeds += 1


def _is_finished(cell: Cell) -> bool:
    return results.read_row(cell).finished


def _estimate(cells: Sequence[Cell], todo: Sequence[Cell]) -> float:
    """Seconds for the runs in `todo`, from those of the same arms, or of all; 0 is not known."""
    known = {}
    for cell in cells:
        seconds = results.read_record(cell.record).get("wall_seconds")
        if seconds is not None and _is_finished(cell):
            known[cell.arm.label] = seconds
    if not known:
        return 0.0
    mean = sum(known.values()) / len(known)
    return sum(known.get(cell.arm.label, mean) for cell in todo)


class _Maker:
    """Trains and probes.

    Args:
      experiment, train, fingerprint: see `run`.
    """

    def __init__(self, experiment: Experiment, train: Train, fingerprint: Fingerprint):
        self._experiment = experiment
        self._train = train
        self._fingerprint = fingerprint

    def make(self, cells: list[Cell], todo: list[Cell]) -> None:
        """Makes the runs in `todo`, a part of `cells`."""
        fingerprint = self._fingerprint(cells[0].launched.data)  # of all: the arms' data are equal
        for cell in cells:
            existing.check_data(cell, fingerprint)
        fairness.check_corpus(self._experiment, cells, fingerprint)
        for done, cell in enumerate(todo):
            if _is_finished(cell):  # by another process, or as another arm
                continue
            place = len(cells) - len(todo) + done + 1
            left = _estimate(cells, todo[done:])
            tail = f", about {duration(left)} to go" if left else ""
            print(f"[{place}/{len(cells)}] {cell}{tail}", file=sys.stderr, flush=True)
            self._make(cell, fingerprint)
            jax.clear_caches()  # or every model's compiled code stays in memory

    def _make(self, cell: Cell, fingerprint: str) -> None:
        """Makes one run; a failure is written down, and the others go on."""
        cell.record.parent.mkdir(parents=True, exist_ok=True)
        before = results.read_record(cell.record).get("wall_seconds") or 0.0
        start = time.monotonic()
        record: dict[str, Any] = {"data_fingerprint": fingerprint, "machine": machine()}
        if isinstance(cell.arm, ProbeArm):
            record["probed"] = existing.probed(cell)
        if cell.needs:
            record["needs"] = existing.needs(cell)
        json_files.write(cell.record, record)
        try:
            self._train_or_probe(cell)
        except workdir.InUse:
            print(f"{cell}: another process is at it", file=sys.stderr, flush=True)
            return
        except OSError:
            raise  # a full disk: no other run would go better
        except Exception as error:  # what fails for one arm need not fail for the next
            if not isinstance(error, ValueError):
                traceback.print_exc()
            print(f"error: {cell}: {error}", file=sys.stderr, flush=True)
            record["failed"] = str(error) or type(error).__name__
        record["wall_seconds"] = round(before + time.monotonic() - start, 1)
        json_files.write(cell.record, record)

    def _train_or_probe(self, cell: Cell) -> None:
        if isinstance(cell.arm, ProbeArm):
            _probe(cell, cell.arm)
        else:
            made_models.make(cell)
            self._train(cell.launched, cell.workdir)


def _probe(cell: Cell, arm: ProbeArm) -> None:
    assert cell.trained is not None
    with jax.set_mesh(open_mesh(cell.config)):
        trained = load_run(cell.trained, cell.config.train.steps, cell.config.data.corpus)
        found = arm.probe(trained, arm.intervention)
    cell.workdir.mkdir(exist_ok=True)
    json_files.write(cell.workdir / workdir.EVALUATION, {"step": trained.step, **found})


@contextlib.contextmanager
def _compiling_once() -> Iterator[None]:
    """Shares compiled steps between the seeds of an arm, on disk until this process ends.

    Not longer: a later process on another processor must not load this code.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore
        yield  # the user has a cache already
        return
    with contextlib.ExitStack() as at_the_end:
        with contextlib.suppress(OSError):  # no place for it: every run compiles for itself
            made = tempfile.TemporaryDirectory(prefix="dsmoe_jax-compiled-")
            _use_compilation_cache(at_the_end.enter_context(made))
            at_the_end.callback(_use_compilation_cache, None)
        yield


def _use_compilation_cache(directory: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", directory)
    compilation_cache.reset_cache()


def read(experiment: Experiment, options: Options, cells: list[Cell]) -> Comparison:
    """Reads all results from the workdirs."""
    histories = {(c.arm.label, c.seed): read_history(results.read_outcome(c)) for c in cells}
    return Comparison(
        experiment=experiment,
        scale=options.scale,
        arms=tuple(chosen(experiment, options.arms)),
        rows=tuple(results.read_row(cell) for cell in cells),
        histories={key: history for key, history in histories.items() if history is not None},
        command=shell_command(experiment, options),
        overrides=options.overrides,
    )


def machine() -> str:
    """Devices, system and versions of this machine, in words."""
    device = jax.devices()[0]
    kind = f"{jax.device_count()} x {device.device_kind}"
    if device.platform == "cpu":
        kind = f"{os.cpu_count()} CPU cores"
        cpuinfo = pathlib.Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        kind += f" ({models[0]})" if models else ""
    return f"{kind}, {platform.system()}, Python {platform.python_version()}, jax {jax.__version__}"
