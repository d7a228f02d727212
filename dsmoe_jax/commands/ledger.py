"""The command line of the ledger: `python -m experiments.ledger`.

The docstring of the module that is started is its manual.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from absl import flags

from dsmoe_jax.commands import command_line
from dsmoe_jax.config import files
from dsmoe_jax.config.paths import local_path
from dsmoe_jax.report import ledger_page
from dsmoe_jax.study import ledger
from dsmoe_jax.study.ledger import SourceClaim

RESULTS = files.REPOSITORY / "experiments" / "results"


def main(claims: Sequence[SourceClaim], sources: Mapping[str, str]) -> None:
    """Parses the flags, judges the claims, writes the ledger and leaves the process."""
    flags.DEFINE_string(
        "results", str(RESULTS), "Directory of the results of experiments, NAME-SCALE/."
    )
    flags.DEFINE_string("out", None, "Directory for the three files (default: that of --results).")
    manual = sys.modules["__main__"].__doc__
    parsed = command_line.FLAGS
    command_line.run(lambda: write(claims, sources, parsed.results, parsed.out), manual=manual)


def write(
    claims: Sequence[SourceClaim], sources: Mapping[str, str], results: str, out: str | None
) -> None:
    """Judges the claims, writes the three files and says where they are.

    Args:
      claims: in the order of their numbers.
      sources: letter of a source -> the source, in words.
      results: directory of the results of experiments, as on the command line.
      out: directory of the files; None is that of the results.

    Raises:
      ValueError: for a directory that is not there, or damaged results.
    """
    directory = local_path("--results", results)
    if not directory.is_dir():
        raise ValueError(f"--results={results}: no such directory; give that of the experiments")
    judged = ledger.judge_all(claims, directory)
    written = ledger_page.write(judged, sources, local_path("--out", out or results))
    print(ledger_page.summary(judged))
    for path in written:
        print(path)
