"""Items of a checkpoint: loaded one by one, checked one by one, and never held twice."""

import itertools
import json
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import pytest

from dsmoe_jax.runs.checkpoint import Checkpoints, _chunks, target
from dsmoe_jax.runs.digests import _digest_on_devices, digests
from tests.tools.patience import PATIENCE

MEGABYTE = 1_000_000


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


# In a process that has freed nothing: memory to use again would hide a second copy.
RESTORE = """
import re, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from dsmoe_jax.runs.checkpoint import Checkpoints, _chunks, target
from dsmoe_jax.runs.digests import _digest_on_devices, digests

def resident(key):
    return int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

n = int(sys.argv[2])
shapes = {f"w{i}_DD": jax.ShapeDtypeStruct((1250, 1000), jnp.float32) for i in range(n)}
wanted = target(shapes)
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
before = resident("VmRSS")
restored = Checkpoints(Path(sys.argv[1]), keep=None).restore(1, {"state": wanted}).items["state"]
assert all((np.asarray(restored[f"w{i}_DD"]) == i).all() for i in range(n))
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of resident memory")
def test_restoring_holds_nothing_twice(tmp_path):
    n = 80
    state = {f"w{i}_DD": jnp.full((1250, 1000), i, jnp.float32) for i in range(n)}
    size = sum(x.nbytes for x in state.values())
    assert size == 400 * MEGABYTE
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"state": state}, {})
    checkpoints.close()
    done = subprocess.run(
        [sys.executable, "-c", RESTORE, str(tmp_path), str(n)],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # With the buffers of arrays on their way it is 1.2 to 1.9 times as much; a second copy adds 1.
    assert int(done.stdout) < 2.1 * size


@pytest.fixture
def two_items(tmp_path):
    """A checkpoint of two trees, and targets to load them into."""
    items = {"small": {"a_D": jnp.arange(4.0)}, "large": [jnp.arange(6).reshape(2, 3)] * 2}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(7, items, {"text": "kept"})
    checkpoints.close()
    targets = {name: target(shapes_of(items[name])) for name in items}
    return tmp_path, items, targets


def test_items_are_loaded_by_name(two_items):
    directory, items, targets = two_items
    checkpoints = Checkpoints(directory, keep=None)
    whole = checkpoints.restore(7, targets)
    chex.assert_trees_all_equal(whole.items, items)
    assert whole.extra == {"text": "kept", "step": 7}
    shutil.rmtree(directory / "7" / "large")
    part = checkpoints.restore(7, {"small": targets["small"]})
    chex.assert_trees_all_equal(part.items, {"small": items["small"]})
    with pytest.raises(ValueError, match=r"checkpoint cannot be read \(large/.* has 0 bytes"):
        checkpoints.restore(7, targets)


def test_an_array_that_was_not_saved_is_noticed(two_items):
    """Each item has digests of its own."""
    directory, _, targets = two_items
    path = next((directory / "7" / "meta").rglob("metadata"))
    meta = json.loads(path.read_text())
    meta["digests"]["large"][1] += 1
    path.write_text(json.dumps(meta))
    (directory / "7" / "files.json").unlink()
    checkpoints = Checkpoints(directory, keep=None)
    checkpoints.restore(7, {"small": targets["small"]})
    with pytest.raises(ValueError, match="an array is not what was saved"):
        checkpoints.restore(7, targets)


def test_an_array_in_parts(tmp_path):
    """Parts of a stack are read without the rest, and add up to the digest of the whole."""
    x_LED = jax.random.normal(jax.random.key(0), (3, 4, 1500, 256))
    tree = {"a_D": jnp.arange(5.0).astype(jnp.bfloat16), "x_LED": x_LED}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"item": tree}, {})
    checkpoints.wait()
    assert int(_digest_on_devices(x_LED)) == digests(x_LED)[0]
    arrays = checkpoints.arrays(1, "item", shapes_of(tree))
    arrays.read("a_D", (slice(0, 5),))
    for layer, expert, half in itertools.product(range(3), range(4), range(2)):
        part = (
            slice(layer, layer + 1),
            slice(expert, expert + 1),
            slice(750 * half, 750 * half + 750),
        )
        with pytest.raises(ValueError, match="not what was saved"):
            arrays.check()
        found = arrays.read("x_LED", (*part, slice(0, 256)))
        chex.assert_trees_all_equal(found, x_LED[part])
    arrays.check()
    with pytest.raises(ValueError, match=r"cannot be read \(x_LED is \(3, 4, 1500, 256\), not \(3"):
        checkpoints.arrays(1, "item", shapes_of({**tree, "x_LED": x_LED[:, :3]}))
    checkpoints.close()


def test_chunks():
    """A layer, then an expert, as long as a megabyte is left; then Orbax cuts the longest axis."""

    def axes(*shape):
        return _chunks(jax.ShapeDtypeStruct(shape, jnp.float32)).shard_axes

    assert axes(27, 64, 1408, 2048) == (0, 1)
    assert axes(27, 64, 64, 256) == (0,)
    assert axes(102_400, 2048) == ()
    assert axes(9, 1280) == ()
