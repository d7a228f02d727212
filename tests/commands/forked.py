"""Runs many command lines in one interpreter: starting it is the slow part, so each is a fork."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from tests.tools.patience import PATIENCE

# Reads [cases, only_parse]; a case is the arguments after `python -m dsmoe_jax`.
_DRIVER = """
import json, os, sys, tempfile
from dsmoe_jax import commands
from dsmoe_jax.commands import command_line
# What the commands import, so that it is imported once.
from dsmoe_jax.evaluation import downstream, held_out
from dsmoe_jax.model import generation
from dsmoe_jax.planning import ahead_of_time, plan_report
from dsmoe_jax.report import load_over_training
from dsmoe_jax.runs import loading
from dsmoe_jax.training import loop

def check():
    if "config" in command_line.FLAGS and command_line.FLAGS.config:
        command_line.config()

run = command_line.run
results = []
cases, only_parse = json.load(sys.stdin)
for case in cases:
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    if (child := os.fork()) == 0:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.argv = ["dsmoe_jax", *case]
        if only_parse:
            command_line.run = lambda main, arguments: run(check, arguments)
        try:
            commands.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        sys.stdout.flush()
        os._exit(code)  # an orderly end takes half a second here
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in (out, err):
        file.seek(0)
        texts.append(file.read().decode())
    results.append((code, *texts))
print(json.dumps(results))
"""


class Result(NamedTuple):
    """Exit code and output of a process."""

    code: int
    out: str
    err: str


def run_all(cases: Sequence[Sequence[str]], *, only_parse: bool = False) -> list[Result]:
    """Exit code and output of each command line.

    Args:
      cases: the arguments after `python -m dsmoe_jax`.
      only_parse: parse the flags and build the config, but do not run the command.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _DRIVER],
        input=json.dumps([list(map(list, cases)), only_parse]),
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [Result(*result) for result in json.loads(done.stdout)]
