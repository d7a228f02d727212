"""The command line of every experiment: `python -m experiments.v1.table1 --scale=demo`.

The docstring of an experiment's module is its manual; a run ends with the report.
"""

from __future__ import annotations

import sys

from absl import flags

from dsmoe_jax.commands import command_line
from dsmoe_jax.config import overrides
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.report import blocks, page, sentences, tables, text
from dsmoe_jax.study import runner
from dsmoe_jax.study.cells import Options
from dsmoe_jax.study.experiment import Experiment


def main(experiment: Experiment) -> None:
    """Parses the flags, runs the experiment, writes its report and leaves the process."""
    flags.DEFINE_enum("scale", "demo", list(experiment.seeds), "Sizes of the models.")
    flags.DEFINE_integer("seeds", None, "How many seeds (default: the experiment's own).")
    flags.DEFINE_string("results", "runs", "Directory for NAME-SCALE/ with runs and report.")
    flags.DEFINE_list("arms", [], "Only these arms, by label or directory name.")
    flags.DEFINE_multi_string("set", [], "KEY=VALUE: changes a config key in every arm.")
    flags.DEFINE_bool("report_only", False, "Train nothing; report the runs that are there.")
    manual = sys.modules["__main__"].__doc__
    command_line.run(lambda: _run(experiment, options()), manual=manual)


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


def _run(experiment: Experiment, options: Options) -> None:
    keep_freed_memory()
    comparison = runner.run(experiment, options)
    written = page.write(comparison, options.directory(experiment))
    print(text.to_text(tables.results_table(comparison)))
    for sentence in sentences.findings(comparison):
        print("\n" + blocks.plain(sentence))
    print(f"\nReport: {written}")
    if comparison.failed:
        failed = comparison.failed
        raise ValueError(f"{experiment.name}: {len(failed)} runs failed: {'; '.join(failed)}")
