"""The command line of every experiment: `python -m experiments.v1.table1 --scale=demo`.

The docstring of an experiment's module is its manual; a run ends with the report.
"""

from __future__ import annotations

import sys

from absl import flags

from dsmoe_jax.commands import command_line
from dsmoe_jax.config import overrides
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.report import blocks, page, plan_tables, sentences, tables, text
from dsmoe_jax.study import runner
from dsmoe_jax.study.cells import Options
from dsmoe_jax.study.experiment import Experiment
from dsmoe_jax.study.plans import Hardware, plan_arms

CHIP = "h100"
UTILISATION = 0.4


def main(experiment: Experiment) -> None:
    """Parses the flags, runs the experiment, writes its report and leaves the process."""
    flags.DEFINE_enum("scale", "demo", list(experiment.seeds), "Sizes of the models.")
    flags.DEFINE_integer("seeds", None, "How many seeds (default: the experiment's own).")
    flags.DEFINE_string("results", "runs", "Directory for NAME-SCALE/ with runs and report.")
    flags.DEFINE_list("arms", [], "Only these arms, by label or directory name.")
    flags.DEFINE_multi_string("set", [], "KEY=VALUE: changes a config key in every arm.")
    flags.DEFINE_float(
        "minutes",
        None,
        "Train as many seeds as fit into this time, the first in any case (with --seeds: at most so"
        " many).  A seed's numbers do not depend on it.",
    )
    flags.DEFINE_integer(
        "cell",
        None,
        "Make only the run with this number, from 0 to arms x seeds - 1: one task of a job array."
        "  Without it, processes with the same command share the runs.",
    )
    flags.DEFINE_bool("report_only", False, "Train nothing; report the runs that are there.")
    flags.DEFINE_bool(
        "plan",
        False,
        "Train nothing; print for each arm its sizes, tokens, FLOPs and chip-hours, the mesh and"
        " the command that trains it.  Works at every scale.",
    )
    flags.DEFINE_string("chip", None, f"For --plan: {', '.join(CHIPS)} (default: {CHIP}).")
    flags.DEFINE_integer(
        "chips",
        None,
        "For --plan: how many (default: for each arm the fewest, a power of two, that it fits).",
        lower_bound=1,
    )
    flags.DEFINE_float(
        "utilisation",
        None,
        "For --plan: the share of the chip's peak FLOP/s that training is taken to reach (default:"
        f" {UTILISATION}).",
    )
    manual = sys.modules["__main__"].__doc__
    command_line.run(lambda: _main(experiment), manual=manual)


def _main(experiment: Experiment) -> None:
    if command_line.FLAGS.plan:
        if command_line.FLAGS.report_only:
            raise ValueError("--report_only: there is nothing to report in a --plan")
        _plan(experiment, options())
        return
    for flag in ("chip", "chips", "utilisation"):
        value = command_line.FLAGS[flag].value
        if value is not None:
            raise ValueError(f"--{flag}={value}: is for --plan, which is not there")
    _run(experiment, options())


def options() -> Options:
    """The options of the command line.

    Raises:
      ValueError: for an override that is not KEY=VALUE, or that sets the seed.
    """
    parsed = command_line.FLAGS
    return Options(
        parsed.scale,
        parsed.seeds,
        parsed.results,
        tuple(parsed.arms),
        dict(override(item) for item in parsed.set),
        parsed.report_only,
        parsed.minutes,
        parsed.cell,
    )


def override(item: str) -> tuple[str, object]:
    """A key and its value: "train.steps=100" -> ("train.steps", 100).

    Raises:
      ValueError: if the item is not KEY=VALUE, or sets the seed.
    """
    try:
        key, value = overrides.parse(item)
    except ValueError as error:
        raise ValueError(f"--set={error}") from error
    if key == "train.seed":
        raise ValueError(f"--set={item}: seeds are 0, 1, ...; --seeds says how many")
    return key, value


def _plan(experiment: Experiment, options: Options) -> None:
    parsed = command_line.FLAGS
    utilisation = UTILISATION if parsed.utilisation is None else parsed.utilisation
    hardware = Hardware(parsed.chip or CHIP, parsed.chips, utilisation)
    planned = plan_arms(experiment, options, hardware)
    print(text.to_text(plan_tables.table(planned)))
    for block in plan_tables.notes(experiment, options, hardware, planned):
        print("\n" + block)


def _run(experiment: Experiment, options: Options) -> None:
    keep_freed_memory()
    comparison = runner.run(experiment, options)
    written = page.write(comparison, options.directory(experiment))
    print(text.to_text(tables.results_table(comparison)))
    for sentence in sentences.findings(comparison):
        print("\n" + blocks.plain(sentence))
    print(f"\nReport: {written}")
    if comparison.failed:
        errors = [f"{row.arm}, seed {row.seed}: {row.failed}" for row in comparison.failed]
        raise ValueError(f"{experiment.name}: {len(errors)} failed: {'; '.join(errors)}")
