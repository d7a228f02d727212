"""The FLOP/s that a run's devices could reach: the denominator of MFU."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

from dsmoe_jax.hardware.chips import chip_of


@functools.cache
def peak_flops() -> float | None:
    """FLOP/s of all devices together; on CPU measured, None for a chip that is not listed."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured()
    chip = chip_of(device.device_kind)
    return None if chip is None else chip.peak_flops * jax.device_count()


def _measured(size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest of a few float32 products of square matrices."""
    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda x: x @ x).lower(x).compile()
    multiply(x).block_until_ready()
    fastest = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        multiply(x).block_until_ready()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
