"""Marked tests see eight devices, the others one; each says itself how it ended."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TESTS = """
import os, jax, pytest

def test_one_device():
    assert jax.device_count() == 1

@pytest.fixture(scope="module")
def process():
    yield os.getpid()
    print("torn down")

@pytest.mark.eight_devices
class TestMarked:
    first = None

    @pytest.mark.parametrize("n", [8, 7])
    def test_count(self, n, process):
        TestMarked.first = process
        assert jax.device_count() == n, "another number of devices"

    def test_in_the_same_process_with_the_same_fixture(self, process):
        assert process == TestMarked.first == os.getpid()

    def test_that_crashes(self):
        print("last words", flush=True)
        os._exit(3)

    def test_after_a_crash(self, process):
        assert TestMarked.first is None
        assert jax.device_count() == 8

    @pytest.mark.skip(reason="not today")
    def test_skipped(self):
        pass

    def test_not_chosen(self):
        os._exit(4)
"""


# A module of its own, after one that ended with marked tests: what that had set up must be gone.
MORE_TESTS = """
def test_in_the_next_module():
    pass
"""


def test_each_test_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["tests.tools.eight_devices"]')
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_some_more.py").write_text(MORE_TESTS)
    command = [sys.executable, "-m", "pytest", "-v", "-n", "1", "-k", "not not_chosen"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "2 failed, 5 passed, 1 skipped" in found, found
    assert "another number of devices" in found
    assert "assert 8 == 7" in found
    assert "ended, exit code 3" in found
