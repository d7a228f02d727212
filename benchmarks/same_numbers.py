"""Trains the same models in two checkouts and compares all their numbers, bit for bit.

    python -m benchmarks.same_numbers OLD_CHECKOUT NEW_CHECKOUT --workdir=runs/same_numbers
    python -m benchmarks.same_numbers OLD NEW --workdir=DIR --only=smoke
    python -m benchmarks.same_numbers OLD NEW --workdir=DIR --only=demo-dsmoe_2b,gshard_2b \\
        --renamed expert_balance=balance_expert

It shows that a refactoring changes no result.  Every config file at smoke scale, and the five
models of table 1 (V1) at demo scale, are trained in each checkout by its own command line, with the
interpreter, and so the libraries, that run this.  Every row of metrics.jsonl, and evaluation.json,
must be equal, except for speeds.  One line a run says `identical`, or which keys differ, from which
step on, and their values there.

Finished runs are not trained again.  They are kept under a digest of the checkout's code, so that
changed code is trained anew: WORKDIR/DIGEST/SCALE-CONFIG, with what it printed beside it.

Exit code 0: all identical.  1: a run differs or fails, or a config file is gone.
"""

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsmoe_jax.progress import ProgressLine
from dsmoe_jax.runs.metrics_log import KERNELS
from dsmoe_jax.runs.workdir import EVALUATION, METRICS
from dsmoe_jax.study.experiment import Arm
from experiments.v1.table1 import EXPERIMENT

SPEEDS = {
    *("tokens_per_second", "flops_per_second", "flops_utilization", "overhead", "step_seconds"),
    *("host_data_seconds", "host_work_seconds"),
}
NO_MODEL = {"__init__", "base"}  # files in configs/ that describe no model
CODE = ("dsmoe_jax/**/*.py", "dsmoe_jax/**/*.cc", "dsmoe_jax/**/*.h", "configs/*.py")
MISSING = "missing"


class Failed(Exception):
    """A training run that did not end well; the text is one line."""


class Run(NamedTuple):
    """One config file at a scale."""

    scale: str
    config: str

    @property
    def name(self) -> str:
        """As `--only` and the workdirs name it."""
        return f"{self.scale}-{self.config}"


class Keys(NamedTuple):
    """The keys that differ on purpose between old and new rows.

    Attributes:
      renamed: old key -> new key, for rows that have the new one; in others the key stays.
      added: keys that only the new rows have.
    """

    renamed: Mapping[str, str] = {}
    added: frozenset[str] = frozenset()


class Difference(NamedTuple):
    """The first place where a key differs.

    Attributes:
      step: of the row; None in evaluation.json.
      key: in the new rows, with the place in lists and dictionaries: "load[1][7]".
      old, new: the values, or MISSING.
    """

    step: int | None
    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        where = "in the evaluation" if self.step is None else f"at step {self.step}"
        return f"{self.key} {where}: {self.old!r} -> {self.new!r}"


def runs_of(checkout: Path) -> list[Run]:
    """Every config file at smoke scale, and the models of table 1 at demo scale."""
    files = sorted(path.stem for path in (checkout / "configs").glob("*.py"))
    smoke = [Run("smoke", name) for name in files if name not in NO_MODEL]
    trained = [arm for arm in EXPERIMENT.arms if isinstance(arm, Arm)]
    return smoke + [Run("demo", arm.config) for arm in trained]


def selected(runs: list[Run], only: str | None) -> list[Run]:
    """The runs whose scale, config or name is in a comma-separated list; None: all.

    Raises:
      ValueError: for an item that selects nothing.
    """
    if only is None:
        return runs
    chosen = set()
    for item in only.split(","):
        found = {run for run in runs if item in (run.scale, run.config, run.name)}
        if not found:
            raise ValueError(f"--only={item}: must be a scale, a config or SCALE-CONFIG")
        chosen |= found
    return [run for run in runs if run in chosen]


def digest(checkout: Path) -> str:
    """Twelve hexadecimal digits that change with the code of a checkout."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in checkout.glob(pattern)):
        found.update(f"{path.relative_to(checkout)}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def command(checkout: Path) -> list[str]:
    """The training command of a checkout; in older ones every command was a module."""
    old = (checkout / "dsmoe_jax" / "train.py").is_file()
    return [sys.executable, "-m", *(["dsmoe_jax.train"] if old else ["dsmoe_jax", "train"])]


def train(checkout: Path, run: Run, workdir: Path) -> None:
    """Trains a run, or goes on with it; does nothing if it is finished.

    Raises:
      Failed: with the last line that the command printed.
    """
    if (workdir / EVALUATION).is_file():
        return
    workdir.parent.mkdir(parents=True, exist_ok=True)
    log = workdir.with_name(f"{workdir.name}.log")
    config = f"--config=configs/{run.config}.py:{run.scale}"
    with open(log, "w") as printed:
        ended = subprocess.run(
            [*command(checkout), config, f"--workdir={workdir}"],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
    if ended.returncode or not (workdir / EVALUATION).is_file():
        lines = log.read_text().split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        raise Failed(f"exit code {ended.returncode} in {checkout}: {last}")


def compare(old: Path, new: Path, keys: Keys) -> list[Difference]:
    """The first difference of every key that differs between two finished workdirs."""
    found = compare_rows(_rows(old), _rows(new), keys)
    evaluations = compare_row(_evaluation(old), _evaluation(new), keys)
    return found + [difference._replace(step=None) for difference in evaluations]


def _rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]


def _evaluation(workdir: Path) -> dict:
    return json.loads((workdir / EVALUATION).read_text())


def compare_rows(old: list[dict], new: list[dict], keys: Keys) -> list[Difference]:
    """The first difference of every key that differs; rows belong together by their order."""
    if len(old) != len(new):
        step = (old if len(old) > len(new) else new)[min(len(old), len(new))]["step"]
        return [Difference(step, "number of rows", len(old), len(new))]
    first: dict[str, Difference] = {}
    for old_row, new_row in zip(old, new, strict=True):
        for difference in compare_row(old_row, new_row, keys):
            first.setdefault(difference.key.partition("[")[0], difference)
    return list(first.values())


def compare_row(old: dict[str, Any], new: dict[str, Any], keys: Keys) -> list[Difference]:
    """Every key that differs between two rows, in the order of the old row."""
    renamed = {}
    for key, value in old.items():
        other = keys.renamed.get(key, key)
        renamed[other if other in new else key] = value
    names = [*renamed, *(key for key in new if key not in renamed and key not in keys.added)]
    found = []
    for name in names:
        if name in {*SPEEDS, KERNELS}:
            continue
        place, *values = first_unequal(renamed.get(name, MISSING), new.get(name, MISSING))
        if values:
            found.append(Difference(new["step"], name + place, *values))
    return found


def first_unequal(old: Any, new: Any) -> tuple[Any, ...]:
    """`(place, old value, new value)` of the first leaf that differs; `("",)` where all are equal.

    Leaves are equal if JSON writes them alike: 1 is not 1.0, and NaN is NaN.
    """
    if type(old) is type(new) and isinstance(old, list | dict) and len(old) == len(new):
        items = list(enumerate(old)) if isinstance(old, list) else list(old.items())
        for key, value in items:
            other = new[key] if isinstance(new, list) else new.get(key, MISSING)
            place, *values = first_unequal(value, other)
            if values:
                return f"[{key}]{place}", *values
        return ("",)
    return ("",) if json.dumps(old) == json.dumps(new) else ("", old, new)


def check(run: Run, checkouts: list[Path], workdirs: list[Path], keys: Keys) -> str | None:
    """Trains a run in both checkouts and compares it; what is wrong, None if nothing is."""
    for checkout in checkouts:
        if not (checkout / "configs" / f"{run.config}.py").is_file():
            return f"configs/{run.config}.py: not in {checkout}"
    try:
        for checkout, workdir in zip(checkouts, workdirs, strict=True):
            train(checkout, run, workdir / run.name)
    except Failed as error:
        return f"failed: {error}"
    old, new = (workdir / run.name for workdir in workdirs)
    found = compare(old, new, keys)
    return "differs: " + "; ".join(map(str, found)) if found else None


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Command-line flags; wrong ones end the program with one line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_numbers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkouts", type=_checkout, nargs=2, metavar="CHECKOUT", help="OLD, NEW")
    parser.add_argument("--workdir", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--only", help="scales, configs or SCALE-CONFIG, comma-separated")
    parser.add_argument(
        "--renamed",
        type=_renamed,
        nargs="+",
        action="extend",
        default=[],
        metavar="OLD=NEW",
        help="keys with another name in the new rows; in rows without the new key it stays",
    )
    parser.add_argument(
        "--added",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="keys that only the new rows have",
    )
    flags = parser.parse_args(argv)
    try:
        flags.runs = selected(runs_of(flags.checkouts[0]), flags.only)
    except ValueError as error:
        parser.error(str(error))
    return flags


def _checkout(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if not (path / "dsmoe_jax").is_dir() or not (path / "configs").is_dir():
        raise argparse.ArgumentTypeError(
            f"{text}: must be a checkout, with dsmoe_jax/ and configs/"
        )
    return path


def _renamed(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise argparse.ArgumentTypeError(f"{text}: must be OLD=NEW")
    return old, new


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    keys = Keys(dict(flags.renamed), frozenset(flags.added))
    workdir = flags.workdir.expanduser().absolute()
    workdirs = [workdir / digest(checkout) for checkout in flags.checkouts]
    different = 0
    with contextlib.closing(ProgressLine("same numbers", len(flags.runs))) as progress:
        for done, run in enumerate(flags.runs):
            progress.update(done, training=run.name)
            wrong = check(run, flags.checkouts, workdirs, keys)
            different += wrong is not None
            progress.close()
            print(f"{run.name:<24} {wrong or 'identical'}", flush=True)
    print(f"{len(flags.runs) - different} of {len(flags.runs)} runs identical")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
