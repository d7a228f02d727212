"""Start-up self-check: the run's router, dispatcher and experts against the dense loop, in seconds.

A dispatcher or a kernel can be wrong on one mesh or one kind of chip only, and training goes on
with a plausible loss.  So before the first step one MoE layer takes one step on the run's own mesh:
the code, the number of experts, K, groups, dispatcher, backend and dtype of the config, with small
widths and few tokens.  Room that nobody has written is NaN (moe/room.py).  The same layer as one
dense loop on one device, in float32, says what should have come out:

    router      experts and gates of each token; the gradient of the router
    forward     the output
    d-inputs    the gradient of the input
    d-weights   the gradient of each matrix (and bias) of the experts

Every device's part of each of them is compared by itself, so an error names its devices.

Shapes: B sequences, one for each part of the tokens, S positions, T = B*S tokens, D hidden, F
expert width, E routed experts, K activated per token.

    small_layer.py  the layer and its inputs
    on_mesh.py      its step on the mesh
    dense_loop.py   the same step as one loop
    comparison.py   where the two differ
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsmoe_jax.config import Config, ModelConfig, MoEConfig, stages_of
from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.model.block import compute_dtype
from dsmoe_jax.moe import dispatch, experts
from dsmoe_jax.moe.routed import expert_devices
from dsmoe_jax.nn.feed_forward import form_of
from dsmoe_jax.parallel.sharding import batch_shards
from dsmoe_jax.runs.summaries import missing_assignments
from dsmoe_jax.training.self_check.comparison import Failure, devices_of, differences, refuse
from dsmoe_jax.training.self_check.dense_loop import step_on_one_device
from dsmoe_jax.training.self_check.on_mesh import step_on_mesh
from dsmoe_jax.training.self_check.small_layer import draw_arrays, small_model

# The largest error of a row, relative to a typical row, that is taken for rounding.  Measured on a
# CPU over dispatchers, backends and two meshes of eight: at most 2e-6 in float32, 0.03 in bfloat16.
_ROUNDING = {"float32": 1e-4, "bfloat16": 0.15}
_FLIPS = 0.01  # share of the tokens whose choice between two experts rounding may decide


def self_check(config: Config, mesh: Mesh) -> str:
    """Compares the MoE layers of a run on its mesh with the dense loop on one device.

    Call it outside of the mesh, in all processes.

    Returns:
      A line for the log: what was compared, and how long it took.

    Raises:
      ValueError: naming devices, leg and size of the error.
    """
    start = time.perf_counter()
    models = [stage.config.model for stage in stages_of(config) if stage.config.model.moe_layers]
    layers = {(model.moe, model.compute_dtype): model for model in models}  # each layer once
    if not layers:
        return "self-check: there are no routed experts to check"
    checked = [_check(model, mesh) for model in layers.values()]
    seconds = time.perf_counter() - start
    return (
        f"self-check: {'; '.join(checked)}: forward, d-inputs, d-weights and router agree with the"
        f" dense loop on each of {mesh.size} devices ({seconds:.1f} s)"
    )


def _check(model: ModelConfig, mesh: Mesh) -> str:
    """Checks one kind of layer; what it is, in words."""
    with jax.set_mesh(mesh):
        dtype = compute_dtype(model)
        model = small_model(model, mesh)
        described = _describe(model.moe, dtype, mesh)
        tolerance = _ROUNDING[
            "float32" if platform() == "cpu" and dtype == "float32" else "bfloat16"
        ]
        tokens = batch_shards()
    graph, arrays = draw_arrays(model, dtype, tokens)
    on_mesh = step_on_mesh(graph, arrays, mesh)
    on_one_device = step_on_one_device(graph, arrays, model.moe)
    found = on_mesh(arrays.dy_BSD)
    recorded = jax.tree.map(np.asarray, found.recorded)
    wanted, ids_BSK = on_one_device(arrays.dy_BSD, recorded)
    # Rounding may decide between two experts: tokens that it sends elsewhere are left out.
    same_BS = (recorded.sent == ids_BSK).all(axis=-1)
    flipped = float(1 - same_BS.mean())
    if flipped > _FLIPS:  # what else is wrong follows from it
        failures = [Failure("router", devices_of(found.ids_BSK, same_BS), flipped)]
    else:
        if flipped:
            dy_BSD = np.where(same_BS[..., None], arrays.dy_BSD, 0)
            found, (wanted, _) = on_mesh(dy_BSD), on_one_device(dy_BSD, recorded)
        failures = list(differences(found.parts, wanted, same_BS, tolerance))
    ledger = jax.tree.map(lambda count: np.asarray(count)[None], found.ledger)
    refuse(failures, missing_assignments(ledger), described, tolerance)
    return described


def _describe(moe: MoEConfig, dtype: jnp.dtype, mesh: Mesh) -> str:
    sizes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    backend = experts.choose_name(moe.expert_backend, dtype, form_of(moe.expert))
    dispatcher = dispatch.choose_name(moe.dispatch.name, expert_devices())
    layer = f"router {moe.router.name}, dispatcher {dispatcher}, experts {backend}"
    return f"{layer} in {dtype} on {sizes}"
