"""Runs an experiment: every arm with every seed.

Each run has a workdir of its own, RESULTS/NAME-SCALE/ARM/seedN, and is trained in this process by
`dsmoe_jax.training.loop.train`: finished runs are skipped, interrupted ones continue.  `seedN.json`
beside the workdir records data and machine.  All arms run with the first seed before any runs with
the second, so that early results compare the same seeds.

The workdir of a probe holds evaluation.json alone: measures of a model that another experiment has
trained.  The probe is refused if that model is not finished.
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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from dsmoe_jax.config import Config, DataConfig
from dsmoe_jax.data.opening import open_corpus
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.progress import duration
from dsmoe_jax.runs import json_files, workdir
from dsmoe_jax.runs.loading import load_run
from dsmoe_jax.study import fairness, results
from dsmoe_jax.study.cells import Cell, Options, chosen, make_cells, shell_command
from dsmoe_jax.study.experiment import Experiment, ProbeArm
from dsmoe_jax.study.histories import read_history
from dsmoe_jax.study.results import Comparison
from dsmoe_jax.training import loop
from dsmoe_jax.training.devices import open_mesh


def run(
    experiment: Experiment,
    options: Options,
    train: Callable[[Config, pathlib.Path], Any] = loop.train,
    fingerprint: Callable[[DataConfig], str] = lambda data: open_corpus(data).fingerprint,
) -> Comparison:
    """Checks, trains and probes what is missing, and writes `results.jsonl`.

    Args:
      experiment: to run.
      options: see `Options`.
      train: as `dsmoe_jax.training.loop.train`.
      fingerprint: prepares the corpus of a config, if need be, and returns its fingerprint.

    Returns:
      The results; `failed` names the runs that diverged.

    Raises:
      ValueError: before training, if the comparison is not fair, existing results are of other
        configs or data, or a model to probe is not finished.
    """
    cells = make_cells(experiment, options)
    fairness.check_configs(experiment, [cell for cell in cells if cell.seed == 0])
    moved = [_check_workdir(cell, cell.trained or cell.workdir) for cell in cells]
    for cell in cells:
        _check_probe(cell)
    fairness.check_measured(experiment, [results.read_row(cell) for cell in cells])
    failed: list[str] = []
    todo = [cell for cell in cells if not results.read_row(cell).finished]
    todo = [] if options.report_only else todo
    _check_trained(todo, options)
    if todo or any(moved):
        now = fingerprint(cells[0].config.data)  # the arms' data are equal, as was checked
        for cell in cells:
            _check_data(cell, now)
        with _compiling_once():
            failed = _make_all(cells, todo, now, train)
    comparison = read(experiment, options, cells, failed)
    fairness.check_measured(experiment, list(comparison.rows))
    directory = options.directory(experiment)
    directory.mkdir(parents=True, exist_ok=True)
    results.write_rows(directory / "results.jsonl", list(comparison.rows))
    return comparison


def _check_workdir(cell: Cell, directory: pathlib.Path) -> bool:
    """Refuses a workdir of another config before any arm is trained, instead of hours later.

    Returns:
      Whether the corpus is named by another path than it was: it must be the same text.
    """
    if not (directory / workdir.CONFIG).exists():
        return False
    changes = workdir.changes(directory, cell.config)
    recorded = directory.with_suffix(".json").exists()  # of what text the run is
    for key, (there, here) in changes.items():
        if key != workdir.MOVED or not recorded:
            raise ValueError(
                f"{directory}: holds a run with {key}={there!r}, here it is {here!r}; choose"
                " another --results"
            )
    return bool(changes)


def _check_data(cell: Cell, now: str) -> None:
    then = results.read_record(cell).get("data_fingerprint")
    if then is not None and then != now:
        raise ValueError(
            f"unfair: {cell} was trained on data {then[:12]}, the corpus is {now[:12]} now; bring"
            " the old text back or choose another --results"
        )


def _check_trained(cells: list[Cell], options: Options) -> None:
    """Refuses probes of models that are not finished."""
    for cell in cells:
        if isinstance(cell.arm, ProbeArm) and _trained_loss(cell) is None:
            command = shell_command(cell.arm.experiment, dataclasses.replace(options, arms=()))
            raise ValueError(
                f"{cell.trained}: holds no finished run, which {cell} measures; train it with"
                f" {command}"
            )


def _check_probe(cell: Cell) -> None:
    """Refuses an existing measurement whose model or intervention has changed since."""
    then = results.read_record(cell).get("probed")
    now = _probed(cell)
    if then is None or now is None:
        return
    then = {**dataclasses.asdict(Intervention()), **then}  # a field of today, not known then
    if then != now:
        raise ValueError(
            f"{cell.workdir}: measured {then}, here it is {now}; remove it, or choose another"
            " --results"
        )


def _probed(cell: Cell) -> dict[str, Any] | None:
    """Intervention and model of a probe, for comparison later; None for an arm that is trained."""
    if not isinstance(cell.arm, ProbeArm) or _trained_loss(cell) is None:
        return None
    return {**dataclasses.asdict(cell.arm.intervention), "loss": _trained_loss(cell)}


def _trained_loss(cell: Cell) -> float | None:
    """The held-out loss of the finished run that a probe measures; None if it is not finished."""
    assert cell.trained is not None
    evaluation = workdir.read_evaluation(cell.trained, "loss")
    finished = evaluation is not None and evaluation["step"] == cell.config.train.steps
    return evaluation["loss"] if evaluation is not None and finished else None


def _make_all(
    cells: list[Cell], todo: list[Cell], fingerprint: str, train: Callable[..., Any]
) -> list[str]:
    """Trains or probes the runs in `todo`; returns the errors of those that diverged."""
    failed = []
    took = {}
    for done, cell in enumerate(todo):
        place = len(cells) - len(todo) + done + 1
        left = _time_left(todo[done:], took)
        print(f"[{place}/{len(cells)}] {cell}{left}", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            _make(cell, fingerprint, train)
        except loop.NonFinite as error:  # also a result: the others go on, this one stays missing
            print(f"error: {cell}: {error}", file=sys.stderr, flush=True)
            failed.append(f"{cell}: {error}")
        took.setdefault(cell.arm.label, []).append(time.monotonic() - start)
        jax.clear_caches()  # or every model's compiled code stays in memory
    return failed


def _make(cell: Cell, fingerprint: str, train: Callable[..., Any]) -> None:
    cell.record.parent.mkdir(parents=True, exist_ok=True)
    origin = {"data_fingerprint": fingerprint, "machine": machine()}
    if isinstance(cell.arm, ProbeArm):
        json_files.write(cell.record, {**origin, "probed": _probed(cell)})
        _probe(cell, cell.arm)
    else:
        json_files.write(cell.record, origin)
        train(cell.config, cell.workdir)


def _probe(cell: Cell, arm: ProbeArm) -> None:
    assert cell.trained is not None
    with jax.set_mesh(open_mesh(cell.config)):
        trained = load_run(cell.trained, corpus=cell.config.data.corpus)
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


def _time_left(todo: list[Cell], took: Mapping[str, list[float]]) -> str:
    """Time left, from that of the same arm's runs or the mean of all; "" before the first ends."""
    known = {label: sum(times) / len(times) for label, times in took.items()}
    if not known:
        return ""
    mean = sum(known.values()) / len(known)
    seconds = sum(known.get(cell.arm.label, mean) for cell in todo)
    return f", about {duration(seconds)} to go"


def read(
    experiment: Experiment, options: Options, cells: list[Cell], failed: list[str]
) -> Comparison:
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
        failed=tuple(failed),
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
