"""Says of any directory what run it holds, how far and how fast it is, and what went wrong.

python -m dsmoe_jax status runs/dsmoe
python -m dsmoe_jax status runs/*
python -m dsmoe_jax status --workdir=runs/dsmoe --json

A workdir is empty, foreign, damaged, fresh, running, stopped, failed, dead, finished, or a model
that was not trained here.  It is read from files alone: a run is not disturbed, no device is
touched, and a directory that is damaged or of another program gets a line too.  A run on several
hosts is running if the lock of its first process is seen from here, on its own host or over the
file system.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from typing import Any

from absl import flags

from dsmoe_jax.commands import command_line
from dsmoe_jax.report.status_text import text
from dsmoe_jax.runs.status import Status, read_status

_WORKDIR = flags.DEFINE_multi_string("workdir", [], "Directory to look at; may be repeated.")
_JSON = flags.DEFINE_bool("json", False, "Print a JSON list instead, all events included.")
command_line.define_places("workdirs, as --workdir")


def main() -> None:
    """Runs the command."""
    paths = [*_WORKDIR.value, *command_line.places()]
    if not paths:
        raise ValueError("--workdir: missing; for example status runs/dsmoe")
    found: list[Status] = []
    refused = []
    for path in paths:
        try:
            found.append(read_status(path))
        except (ValueError, OSError) as error:  # the others are shown all the same
            refused.append(str(error))
    if _JSON.value:
        print(json.dumps([_finite(dataclasses.asdict(status)) for status in found], indent=2))
    elif found:
        print("\n\n".join(text(status, time.time()) for status in found))
    if refused:
        raise ValueError("; ".join(refused))


def _finite(tree: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
