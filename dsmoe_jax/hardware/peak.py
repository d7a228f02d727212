"""What the machine could do, to compare what a run does with."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

# bfloat16 matrix products of one chip without sparsity, FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,  # what some runtimes call v5p
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


@functools.cache
def peak_flops() -> float | None:
    """FLOP/s of all devices together; on CPU measured, None for a device that is not listed.

    The longest name that the device's kind begins with counts ("NVIDIA H100 80GB HBM3").
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured()
    names = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] * jax.device_count() if names else None


def _measured(size: int = 1024, seconds: float = 0.3) -> float:
    """The best of a few float32 products of square matrices, in FLOP/s."""
    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda x: x @ x).lower(x).compile()
    multiply(x).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
