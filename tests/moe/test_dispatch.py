"""The dispatchers between devices: dispatch_on_eight_devices.py in a process that has them."""

import os
import subprocess
import sys
from pathlib import Path


def test_on_eight_devices():
    cases = Path(__file__).with_name("dispatch_on_eight_devices.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(cases)],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # they compile faster
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
