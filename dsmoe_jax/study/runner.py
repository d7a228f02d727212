"""Runs an experiment: every arm with every seed, then the report.

Each run has a workdir of its own, RESULTS/NAME-SCALE/ARM/seedN, and goes through
`dsmoe_jax.training.loop.train` in this process: what is finished is skipped, what was interrupted
continues.  Beside it, `seedN.json` says on which data and machine.  All arms run with the first
seed before any runs with the second, so that an early look compares like with like.
"""

from __future__ import annotations

import ast
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
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from dsmoe_jax.commands import command_line
from dsmoe_jax.config import Config, DataConfig, differences
from dsmoe_jax.data.opening import open_corpus
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.report import blocks, page, tables
from dsmoe_jax.runs import workdir
from dsmoe_jax.study import fairness, results
from dsmoe_jax.study.results import Cell, Comparison
from dsmoe_jax.study.spec import Arm, Experiment
from dsmoe_jax.training import loop


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
      scale: "smoke", "demo", "proxy" or "paper".
      seeds: how many; None is what the experiment says for the scale.
      results: directory under which `NAME-SCALE` is made.
      arms: labels or directory names; () is all.
      overrides: dotted config keys to change in every arm.
      report_only: train nothing; report what there is.
    """

    scale: str
    seeds: int | None = None
    results: str = "runs"
    arms: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    report_only: bool = False


def main(experiment: Experiment) -> None:
    """The command line of an experiment."""
    flags.DEFINE_enum("scale", "demo", ["smoke", "demo", "proxy", "paper"], "Sizes of the models.")
    flags.DEFINE_integer("seeds", None, "How many seeds (default: the experiment's own).")
    flags.DEFINE_string("results", "runs", "Directory for NAME-SCALE/ with runs and report.")
    flags.DEFINE_list("arms", [], "Only these arms, by label or directory name.")
    flags.DEFINE_multi_string("set", [], "KEY=VALUE: changes a config key in every arm.")
    flags.DEFINE_bool("report_only", False, "Train nothing; report the runs that are there.")

    def parsed() -> None:
        f = command_line.FLAGS
        keep_freed_memory()
        overrides = dict(parse_override(item) for item in f.set)
        run(
            experiment,
            Options(f.scale, f.seeds, f.results, tuple(f.arms), overrides, f.report_only),
        )

    command_line.run(parsed, manual=sys.modules["__main__"].__doc__)


def parse_override(item: str) -> tuple[str, Any]:
    """ "train.steps=100" -> ("train.steps", 100); what is no Python literal is a string."""
    key, found, value = item.partition("=")
    if not found:
        raise ValueError(f"--set={item!r}: must be KEY=VALUE, such as --set=train.steps=100")
    if key == "train.seed":
        raise ValueError(f"--set={item!r}: seeds are 0, 1, ...; --seeds says how many")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def run(
    experiment: Experiment,
    options: Options,
    train: Callable[[Config, pathlib.Path], Any] = loop.train,
    fingerprint: Callable[[DataConfig], str] = lambda data: open_corpus(data).fingerprint,
) -> Comparison:
    """Checks, trains what is missing, writes `results.jsonl` and the report, prints the table.

    Args:
      experiment: to run.
      options: see `Options`.
      train: as `dsmoe_jax.training.loop.train`.
      fingerprint: prepares the corpus of a config, if need be, and returns its fingerprint.

    Raises:
      ValueError: before training, if the comparison is not fair or the results are of other
        configs or data; after it, if runs came to grief.
    """
    directory = pathlib.Path(options.results).expanduser() / f"{experiment.name}-{options.scale}"
    cells = make_cells(experiment, options, directory)
    first = {cell.arm.label: cell.config for cell in cells if cell.seed == 0}
    fairness.check_configs(experiment, first)
    for cell in cells:
        _check_workdir(cell)
    fairness.check_measured(experiment, [results.read_row(cell) for cell in cells])
    failed: list[str] = []
    todo = [cell for cell in cells if not results.read_row(cell).finished]
    if todo and not options.report_only:
        now = fingerprint(cells[0].config.data)  # the arms' data are equal, as was checked
        for cell in cells:
            _check_data(cell, now)
        with _compiling_once():
            failed = _train_all(cells, todo, now, train)
    comparison = compare(experiment, options, cells)
    fairness.check_measured(experiment, list(comparison.rows))
    directory.mkdir(parents=True, exist_ok=True)
    results.write_rows(directory / "results.jsonl", list(comparison.rows))
    written = page.write(comparison, directory)
    print(blocks.to_text(tables.results_table(comparison)))
    for sentence in page.findings(comparison):
        print("\n" + sentence.replace("**", ""))
    print(f"\nReport: {written}")
    if failed:
        raise ValueError(f"{experiment.name}: {len(failed)} runs failed: {'; '.join(failed)}")
    return comparison


def make_cells(experiment: Experiment, options: Options, directory: pathlib.Path) -> list[Cell]:
    """All runs in the order in which they are made: the first seed of every arm, then the next.

    Raises:
      ValueError: for an unknown arm, fewer than one seed, or an override that does not fit.
    """
    seeds = experiment.seeds[options.scale] if options.seeds is None else options.seeds
    if seeds < 1:
        raise ValueError(f"--seeds={seeds}: must be at least 1")
    return [
        Cell(
            arm,
            seed,
            arm.run_config(options.scale, seed, options.overrides),
            directory / arm.slug / f"seed{seed}",
        )
        for seed in range(seeds)
        for arm in _chosen(experiment, options.arms)
    ]


def _chosen(experiment: Experiment, names: tuple[str, ...]) -> list[Arm]:
    known = {name: arm for arm in experiment.arms for name in (arm.label, arm.slug)}
    for name in names:
        if name not in known:
            slugs = ", ".join(arm.slug for arm in experiment.arms)
            raise ValueError(f"--arms={name}: no such arm; there are {slugs}")
    wanted = {known[name] for name in names} if names else set(experiment.arms)
    return [arm for arm in experiment.arms if arm in wanted]


def _check_workdir(cell: Cell) -> None:
    """Finds out before hours of training that a later run would be refused."""
    if not (cell.workdir / workdir.CONFIG).exists():
        return
    for key, (there, here) in differences(workdir.read_config(cell.workdir), cell.config).items():
        if not workdir.may_change(key, cell.config):
            raise ValueError(
                f"{cell.workdir}: holds a run with {key}={there!r}, here it is {here!r}; choose"
                " another --results"
            )


def _check_data(cell: Cell, now: str) -> None:
    then = results.read_row(cell).data_fingerprint
    if then is not None and then != now:
        raise ValueError(
            f"unfair: {cell} was trained on data {then[:12]}, the corpus is {now[:12]} now; bring"
            " the old text back or choose another --results"
        )


def _train_all(
    cells: list[Cell], todo: list[Cell], fingerprint: str, train: Callable[..., Any]
) -> list[str]:
    """Trains the runs in `todo`; returns what went wrong with those that lost their numbers."""
    failed, took = [], {}
    for done, cell in enumerate(todo):
        place = len(cells) - len(todo) + done + 1
        left = _time_left(todo[done:], took)
        print(f"[{place}/{len(cells)}] {cell}{left}", file=sys.stderr, flush=True)
        start = time.monotonic()
        cell.record.parent.mkdir(parents=True, exist_ok=True)
        origin = {"data_fingerprint": fingerprint, "machine": machine()}
        workdir.write_json(cell.record, origin)
        try:
            train(cell.config, cell.workdir)
        except loop.NonFinite as error:  # a result too: the others go on, this one stays missing
            print(f"error: {cell}: {error}", file=sys.stderr, flush=True)
            failed.append(f"{cell}: {error}")
        took.setdefault(cell.arm.label, []).append(time.monotonic() - start)
        jax.clear_caches()  # or every model's compiled code stays in memory
    return failed


@contextlib.contextmanager
def _compiling_once() -> Iterator[None]:
    """Lets the seeds of an arm share their compiled steps, on disk while this process lives.

    Not for longer: code compiled for one processor must not be found by another one.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore
        yield  # the user has a cache already
        return
    with tempfile.TemporaryDirectory(prefix="dsmoe_jax-compiled-") as directory:
        jax.config.update("jax_compilation_cache_dir", directory)
        compilation_cache.reset_cache()
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()


def _time_left(todo: list[Cell], took: Mapping[str, list[float]]) -> str:
    """From how long the same arm took, or the mean of all; "" before the first is done."""
    known = {label: sum(times) / len(times) for label, times in took.items()}
    if not known:
        return ""
    mean = sum(known.values()) / len(known)
    seconds = sum(known.get(cell.arm.label, mean) for cell in todo)
    return f", about {tables.duration(seconds)} to go"


def compare(experiment: Experiment, options: Options, cells: list[Cell]) -> Comparison:
    """Reads all results from the workdirs."""
    histories = {(c.arm.label, c.seed): results.read_history(c) for c in cells}
    return Comparison(
        experiment=experiment,
        scale=options.scale,
        arms=tuple(_chosen(experiment, options.arms)),
        rows=tuple(results.read_row(cell) for cell in cells),
        histories={key: history for key, history in histories.items() if history is not None},
        command=_command(experiment, options),
        overrides=options.overrides,
    )


def _command(experiment: Experiment, options: Options) -> str:
    parts = [f"python -m experiments.{experiment.name} --scale={options.scale}"]
    parts += [f"--seeds={options.seeds}"] if options.seeds is not None else []
    parts += [f"--arms={','.join(options.arms)}"] if options.arms else []
    parts += [f"--set={key}={value}" for key, value in options.overrides.items()]
    return " ".join(parts)


def machine() -> str:
    """What the runs are made on."""
    device = jax.devices()[0]
    kind = f"{jax.device_count()} x {device.device_kind}"
    if device.platform == "cpu":
        kind = f"{os.cpu_count()} CPU cores"
        cpuinfo = pathlib.Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        kind += f" ({models[0]})" if models else ""
    return f"{kind}, {platform.system()}, Python {platform.python_version()}, jax {jax.__version__}"
