"""The dispatchers between devices: *_on_eight_devices.py in a process that has them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["dispatch", "dispatch_product"])
def test_on_eight_devices(name):
    cases = Path(__file__).with_name(f"{name}_on_eight_devices.py")
    # They are compiled, run a few times, and forgotten: the compiler's effort is what they cost.
    quick = "--xla_cpu_use_fusion_emitters=false"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--numprocesses=0", str(cases)],
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {quick}",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
