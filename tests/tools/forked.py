"""Runs many command lines from one interpreter: starting it is the slow part, so each is a fork."""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from tests.tools.patience import PATIENCE

# Reads [module, cases, only_parse, environment] from each line; a case is the arguments after
# `python -m MODULE`.
_DRIVER = """
import json, os, runpy, sys, tempfile
from dsmoe_jax.commands import command_line
# What the modules import, so that it is imported once.
from dsmoe_jax.evaluation import downstream, held_out
from dsmoe_jax.model import generation
from dsmoe_jax.planning import ahead_of_time, plan_report
from dsmoe_jax.report import load_over_training
from dsmoe_jax.runs import loading
from dsmoe_jax.training import loop
from experiments import source_claims

def check():
    if "config" in command_line.FLAGS and command_line.FLAGS.config:
        command_line.config()

run = command_line.run

def result(module, case, only_parse, environment):
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    if (child := os.fork()) == 0:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [module, *case]
        if only_parse:
            command_line.run = lambda main, arguments: run(check, arguments)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
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
    return code, *texts

for line in sys.stdin:
    module, cases, *rest = json.loads(line)
    print(json.dumps([result(module, case, *rest) for case in cases]), flush=True)
"""


class Result(NamedTuple):
    """Exit code and output of a process."""

    code: int
    out: str
    err: str


def assert_refused(result: Result, says: str) -> None:
    """Asserts that a command ended with one line of error, and nothing on stdout."""
    assert (result.code, result.out) == (2, "")
    line = result.err.splitlines()[-1]  # what comes before is of JAX looking for devices
    assert line.startswith("error: ")
    assert says in line


def run_all(
    cases: Sequence[Sequence[str]], *, only_parse: bool = False, module: str = "dsmoe_jax"
) -> list[Result]:
    """Exit code and output of each command line.

    Args:
      cases: the arguments after `python -m MODULE`.
      only_parse: parse the flags and build the config, but do not run the command.
      module: dsmoe_jax, or an experiment.
    """
    process = _driver()
    assert process.stdin is not None
    assert process.stdout is not None
    request = [module, list(map(list, cases)), only_parse, dict(os.environ)]
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
    assert ready, "the commands do not come to an end"
    return [Result(*result) for result in json.loads(process.stdout.readline())]


@functools.cache
def _driver() -> subprocess.Popen[str]:
    """One for all tests of a process; it ends when its input does."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _DRIVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
