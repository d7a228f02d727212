"""Tests on eight virtual devices: a pytest plugin, which tests/conftest.py loads.

    @pytest.mark.eight_devices
    def test_all_gather(): ...

How many devices XLA's CPU backend has is decided when JAX starts.  So these tests run in a second
pytest process, which is started when the first of them comes and kept for the others (with xdist:
one for each worker).  They are collected, selected (`-k`, `-m`) and reported as all tests are; a
file may have both kinds.  Their fixtures are made in the second process.

A process that was started with eight devices runs them itself, which is the way to a debugger:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest -n 0 --pdb -m eight_devices
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from dsmoe_jax.hardware import virtual_devices

MARK = "eight_devices"
FLAG = "--xla_force_host_platform_device_count=8"
CONNECTION = "EIGHT_DEVICES_CONNECTION"  # in the second process: a file descriptor


def has_mark(item: pytest.Item | None) -> bool:
    """Whether a test wants eight devices."""
    return item is not None and item.get_closest_marker(MARK) is not None


def pytest_configure(config: pytest.Config) -> None:
    """Registers the mark; in the second process, has tests run as they are asked for."""
    virtual_devices.allow_waiting()
    config.addinivalue_line("markers", f"{MARK}: runs in a process with eight virtual devices")
    if descriptor := os.environ.pop(CONNECTION, None):
        config.pluginmanager.register(_TestsOnRequest(config, Connection(int(descriptor))))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Sends a marked test to the second process, and reports what that says."""
    if not has_mark(item) or FLAG in os.environ.get("XLA_FLAGS", ""):
        return None
    stash = item.config.stash
    if _PROCESS not in stash:
        stash[_PROCESS] = _SecondProcess([i for i in item.session.items if has_mark(i)])
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in stash[_PROCESS].run(item, nextitem):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What an earlier test of this process has left set up because this one shares its module.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends the second process."""
    if process := session.config.stash.get(_PROCESS, None):
        process.end()


class _SecondProcess:
    """Pytest with eight devices, seen from the first process.

    Args:
      items: all tests that it may be asked for.
    """

    def __init__(self, items: list[pytest.Item]):
        self._connection, theirs = multiprocessing.Pipe()
        says, self._says = tempfile.mkstemp(text=True)
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "pytest", "-o", "addopts=--strict-markers"),
                *("-p", "no:xdist", "-p", "no:cacheprovider"),
                *sorted({str(item.path) for item in items}),
            ],
            cwd=items[0].config.rootpath,
            env=_environment() | {CONNECTION: str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=says,
            stderr=subprocess.STDOUT,
        )
        os.close(says)
        theirs.close()  # else the end of the process would not end the connection

    def run(self, item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
        """The reports of set-up, call and tear-down of a test."""
        following = nextitem.nodeid if nextitem and has_mark(nextitem) else None
        try:
            self._connection.send((item.nodeid, following))
            reports = self._connection.recv()
        except (EOFError, OSError):
            del item.config.stash[_PROCESS]  # the next test gets a new one
            return [self._crashed(item)]
        read = item.config.hook.pytest_report_from_serializable
        return [read(config=item.config, data=report) for report in reports]

    def end(self) -> str:
        """Waits until it has torn down its fixtures; its exit code, and what it printed."""
        self._connection.close()
        code = self._process.wait()
        printed = Path(self._says).read_text()
        os.unlink(self._says)
        return f"exit code {code}:\n{printed}"

    def _crashed(self, item: pytest.Item) -> pytest.TestReport:
        return pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords={},
            outcome="failed",
            longrepr=f"the process with eight devices ended, {self.end()}",
            when="call",
        )


_PROCESS = pytest.StashKey[_SecondProcess]()


def _environment() -> dict[str, str]:
    return {
        **{key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"},
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAG}",
    }


class _TestsOnRequest:
    """The second process: runs the tests that the first one sends."""

    def __init__(self, config: pytest.Config, connection: Connection):
        self._config = config
        self._connection = connection
        self._reports: list[dict] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Until the first process closes the connection."""
        items = {item.nodeid: item for item in session.items}
        while True:
            try:
                nodeid, following = self._connection.recv()
            except EOFError:
                return True
            item = items[nodeid]
            item.ihook.pytest_runtest_protocol(item=item, nextitem=items.get(following))
            self._connection.send(self._reports)
            self._reports = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps a report, to be sent when its test has ended."""
        write = self._config.hook.pytest_report_to_serializable
        self._reports.append(write(config=self._config, report=report))
