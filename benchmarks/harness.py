"""Parts that all benchmarks share: command line, interleaved rounds, the report and its table."""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)


def flag_parser(module: str, doc: str | None, repeats: int | None) -> argparse.ArgumentParser:
    """The parser of `python -m MODULE`, with --repeats (None: the cases decide) and --json."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--repeats",
        type=_positive,
        default=repeats,
        help=f"rounds (default {repeats or 'by size'})",
    )
    parser.add_argument("--json", type=_new_file, help="write the results here; must not exist")
    return parser


def interleaved(
    runs: Mapping[Name, Callable[[], Any]],
    repeats: int,
    warm_up: int = 1,
) -> dict[Name, list[float]]:
    """Times all cases in turn, round after round: what slows the machine down slows all of them.

    Every round has another order, so that no case always comes behind the same one.

    Args:
      runs: calls that return when their results are there.
      repeats: rounds that count.
      warm_up: rounds before those.

    Returns:
      Seconds of every round, by case.
    """
    seconds = {name: [] for name in runs}
    names = list(runs)
    for round_ in range(-warm_up, repeats):
        random.Random(round_).shuffle(names)
        for name in names:
            start = time.perf_counter()
            runs[name]()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
        print(f"round {round_ + 1}/{repeats}", file=sys.stderr)
    return seconds


def ratio(seconds: list[float], others: list[float]) -> float:
    """Median over rounds of (a case / another in the same round)."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def device_header() -> dict[str, Any]:
    """The machine that measures: the first entries of a report."""
    on_linux = hasattr(os, "sched_getaffinity")
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cpus": len(os.sched_getaffinity(0)) if on_linux else os.cpu_count(),
        "jax": jax.__version__,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; a missing number is a dash."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_shown(row[c]) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(report: dict[str, Any], path: Path | None) -> None:
    """Writes the report as JSON; None writes nothing."""
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.4g}"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, at least 1")
    return int(text)


def _new_file(text: str) -> Path:
    if (path := Path(text)).exists():
        raise argparse.ArgumentTypeError(f"{text}: exists already; name a new file")
    return path
