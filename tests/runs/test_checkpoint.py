"""What a checkpoint costs in memory."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.runs.checkpoint import Checkpoints

MEGABYTE = 1_000_000


def resident(key):
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of resident memory")
def test_restoring_holds_nothing_twice(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"w{i}_DD": rng.standard_normal((1250, 1000), np.float32) for i in range(40)}
    state = {name: jnp.asarray(array) for name, array in arrays.items()}
    size = sum(x.nbytes for x in state.values())
    assert size == 200 * MEGABYTE
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {})
    checkpoints.close()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for k, x in state.items()
    }
    del state
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = resident("VmRSS")
    restored = Checkpoints(tmp_path, keep=None).restore(abstract, 1).state
    assert resident("VmHWM") - before < 1.6 * size
    for name, array in arrays.items():
        np.testing.assert_array_equal(restored[name], array)
