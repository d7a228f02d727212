"""Tests as other processors compute them: the compiler that builds for them, what is measured."""

import json
import os
import platform
import subprocess
import sys

import pytest

from tests.tools.headroom import share_used
from tests.tools.patience import PATIENCE
from tests.tools.processors import compiler

COMPARES = """
import numpy as np
import pytest
from tests.tools import trees

def test_a():
    np.testing.assert_allclose(1.0 + 3e-6, 1.0, rtol=1e-5)
    np.testing.assert_allclose(1.0 + 8e-6, 1.0, rtol=1e-5)
    assert 2.5 == pytest.approx(2.0, abs=1.0)
    trees.assert_all_below({"a": 0.1, "b": 0.2}, 1.0)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
@pytest.mark.parametrize(
    ("level", "has"), [("v2", (False, False)), ("v3", (True, False)), ("v4", (True, True))]
)
def test_the_compiler_builds_for_the_level(tmp_path, level, has):
    command = [compiler(tmp_path, level), "-O3", "-march=native", "-dM", "-E", "-x", "c++"]
    macros = subprocess.run([*command, os.devnull], capture_output=True, text=True, check=True)
    assert (
        tuple(f"#define {name} 1" in macros.stdout for name in ("__AVX2__", "__AVX512F__")) == has
    )


def test_share_used():
    assert share_used([1.0, 2.1], [1.0, 2.0], rtol=0.1, atol=0.0) == pytest.approx(0.5)
    assert share_used([float("nan"), 1.0], [float("nan"), 1.0], 0.0, 0.0) == 0.0
    assert share_used(1.5, 1.0, rtol=0.0, atol=0.25) == 2.0


def test_every_kind_of_comparison_is_measured(tmp_path):
    test, used = tmp_path / "test_it.py", tmp_path / "used.jsonl"
    test.write_text(COMPARES)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", str(test)],
        env=os.environ | {"PYTEST_PLUGINS": "tests.tools.headroom", "HEADROOM": str(used)},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    rows = {row["tolerance"]: row["used"] for row in map(json.loads, used.read_text().splitlines())}
    assert rows == {
        "rtol=1e-05, atol=0": pytest.approx(0.8),
        "approx, 1.0e+00": pytest.approx(0.5),
        "norms below 1": pytest.approx(0.2),
    }
