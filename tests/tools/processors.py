"""Runs the tests as other processors would compute, on one x86-64 processor with AVX-512.

    python -m tests.tools.processors                      # the six runs below, one after the other
    python -m tests.tools.processors --only=v2-avx2-2 tests/moe

The compiled kernels are built for a level of x86-64 (v2 has SSE, v3 AVX2 and fused products, v4
AVX-512), XLA is held to AVX2 or takes what the machine has, and there are one or two threads.  Six
of the twelve combinations have every pair of them.  At the end are the tests that failed, and the
comparisons that used more than half of their tolerance: those hold by luck.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

LUCK = 0.5


class Processor(NamedTuple):
    """The processor to compute as: the kernels' level of x86-64, XLA's instructions, threads."""

    level: str
    xla: str | None
    threads: int


RUNS = {
    "v2-avx2-2": Processor("v2", "AVX2", 2),
    "v3-avx2-1": Processor("v3", "AVX2", 1),
    "v4-avx2-2": Processor("v4", "AVX2", 2),
    "v2-machine-1": Processor("v2", None, 1),
    "v3-machine-2": Processor("v3", None, 2),
    "v4-machine-1": Processor("v4", None, 1),
}


def main() -> int:
    """Runs the tests; the number of runs that failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", choices=RUNS, help="this run only")
    options, pytest_arguments = parser.parse_known_args()
    names = [options.only] if options.only else list(RUNS)
    return sum(run(name, RUNS[name], pytest_arguments) for name in names)


def run(name: str, processor: Processor, arguments: list[str]) -> bool:
    """Runs pytest as a processor and prints what to look at; whether it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        used = Path(scratch) / "used.jsonl"
        environment = os.environ | {
            "CXX": str(compiler(Path(scratch), processor.level)),
            "PYTEST_PLUGINS": "tests.tools.headroom",
            "HEADROOM": str(used),
        }
        if processor.xla:
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa={processor.xla}"
            environment["XLA_FLAGS"] = flags
        print(f"== {name}", flush=True)
        code = subprocess.call(
            [sys.executable, "-m", "pytest", *arguments],
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, cores(processor.threads)),
        )
        rows = [json.loads(line) for line in used.read_text().splitlines()]
    rows = sorted((row for row in rows if row["used"] > LUCK), key=lambda row: -row["used"])
    for row in rows:
        print(f"{row['used']:6.0%} of {row['tolerance']}: {row['test']}")
    return code != 0


def cores(n: int) -> list[int]:
    """The last n cores that this process may use."""
    return sorted(os.sched_getaffinity(0))[-n:]


def compiler(directory: Path, level: str) -> Path:
    """A C++ compiler that builds for a level of x86-64 where it is asked for this machine."""
    path = directory / "c++"
    real = shutil.which(os.environ.get("CXX") or "c++")
    path.write_text(f'#!/bin/bash\nexec {real} "${{@/#-march=native/-march=x86-64-{level}}}"\n')
    path.chmod(0o755)
    return path


if __name__ == "__main__":
    sys.exit(main())
