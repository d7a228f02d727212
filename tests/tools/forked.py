"""Runs many command lines from one interpreter: starting it is the slow part, so each is a fork."""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.tools.patience import PATIENCE

# Answers each line [function, arguments] with what the function returns; a case is the arguments
# after `python -m MODULE`, or after `python SCRIPT`.
_DRIVER = """
import json, os, runpy, sys, tempfile
from dsmoe_jax.commands import command_line
# What the modules import, so that it is imported once.
import tensorboardX
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
outputs = {}  # of the children that have not been waited for

def start(module, case, only_parse, environment):
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    if child := os.fork():
        outputs[child] = out, err
        return child
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *case]
    if only_parse:
        command_line.run = lambda main, arguments: run(check, arguments)
    try:
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    sys.stdout.flush()
    os._exit(code)  # an orderly end takes half a second here

def end(child, wait):
    ended, status = os.waitpid(child, 0 if wait else os.WNOHANG)
    if not ended:
        return None
    texts = []
    for file in outputs.pop(child):
        file.seek(0)
        texts.append(file.read().decode())
    return os.waitstatus_to_exitcode(status), *texts

for line in sys.stdin:
    function, arguments = json.loads(line)
    print(json.dumps({"start": start, "end": end}[function](*arguments)), flush=True)
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


class Process:
    """A command line that runs, or has ended.

    Args:
      case: the arguments after `python -m MODULE`, or after `python SCRIPT`.
      only_parse: parse the flags and build the config, but do not run the command.
      module: dsmoe_jax, an experiment, or a script: a path that ends in .py.
    """

    def __init__(self, case: Sequence[str], *, only_parse: bool = False, module: str = "dsmoe_jax"):
        self.pid: int = _ask("start", module, list(case), only_parse, dict(os.environ))
        self._result: Result | None = None

    def result(self, *, wait: bool = True) -> Result | None:
        """Its exit code and output; None if it has not ended and is not waited for."""
        if self._result is None and (ended := _ask("end", self.pid, wait)) is not None:
            self._result = Result(*ended)
        return self._result


def run_all(
    cases: Sequence[Sequence[str]], *, only_parse: bool = False, module: str = "dsmoe_jax"
) -> list[Result]:
    """Exit code and output of each command line, one after the other; see `Process`."""
    results = [Process(case, only_parse=only_parse, module=module).result() for case in cases]
    return [result for result in results if result is not None]


def run_script(script: Path, *arguments: str) -> Result:
    """Exit code and output of `python SCRIPT ARGUMENTS`."""
    (result,) = run_all([arguments], module=str(script))
    return result


def _ask(function: str, *arguments: Any) -> Any:
    """The answer of the driver."""
    process = _driver()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([function, arguments]) + "\n")
    process.stdin.flush()
    ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
    assert ready, "the commands do not come to an end"
    return json.loads(process.stdout.readline())


@functools.cache
def _driver() -> subprocess.Popen[str]:
    """One for all tests of a process; it ends when its input does."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _DRIVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
