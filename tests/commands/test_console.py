"""Output into a pipe that is closed, a full disk, a terminal of ASCII."""

import os
import subprocess
import sys

import pytest

from tests.tools.patience import PATIENCE

PRINTING = """
from absl import flags
from dsmoe_jax.commands import command_line
def main():
    print("d\\xe9j\\xe0 \\u5df7")
    for _ in range(1000):
        print("x" * 1000)
command_line.run(main, [])
"""


def run(command, stdout=subprocess.PIPE, **variables):
    """Exit code, output and errors of a process."""
    done = subprocess.run(
        [sys.executable, *command], stdout=stdout, stderr=subprocess.PIPE, timeout=PATIENCE,
        env={**os.environ, **variables},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


LISTING = ["-m", "dsmoe_jax"]


@pytest.mark.parametrize("command", [LISTING, ["-c", PRINTING]], ids=["listing", "printing"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
class TestOutput:
    def test_a_closed_pipe_ends_quietly(self, command, unbuffered):
        reading, writing = os.pipe()
        os.close(reading)
        with open(writing, "wb") as closed:
            found = run(command, stdout=closed, PYTHONUNBUFFERED=unbuffered)
        assert found == (141, None, b"")

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
    def test_a_full_disk_is_one_line(self, command, unbuffered):
        with open("/dev/full", "w") as full:
            code, _, error = run(command, stdout=full, PYTHONUNBUFFERED=unbuffered)
        assert code == 2
        assert error.startswith(b"error: [Errno 28] No space left on device")
        assert error.count(b"\n") == 1


def test_what_a_terminal_lacks_is_escaped():
    code, out, error = run(["-c", PRINTING], PYTHONIOENCODING="ascii")
    assert (code, error) == (0, b"")
    assert out.splitlines()[0] == rb"d\xe9j\xe0 \u5df7"
    assert run(["-c", PRINTING], PYTHONIOENCODING="utf-8")[1].startswith("déjà 巷".encode())


def test_without_standard_streams():
    shell = [
        "-c",
        "import os, sys; os.close(2); os.execv(sys.executable, ['p', '-m', 'dsmoe_jax'])",
    ]
    code, out, _ = run(shell)
    assert code == 0
    assert b"prepare_data" in out
