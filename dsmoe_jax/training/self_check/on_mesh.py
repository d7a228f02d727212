"""The step of the self-check on the mesh of the run, as training computes it.

Shapes: B sequences, S positions, T = B*S tokens, D hidden, K activated per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from dsmoe_jax.moe import dropping, room
from dsmoe_jax.moe.types import MoEInputs, RecordedRouting
from dsmoe_jax.parallel import sharding
from dsmoe_jax.training.self_check.small_layer import Arrays, step_key


class Result(NamedTuple):
    """Results of the step on the mesh.

    Attributes:
      parts: output and gradients by leg, in their shards.
      ids_BSK: the experts that the router chose, in shards too.
      recorded, ledger: whole on every device.
    """

    parts: dict[str, Any]
    ids_BSK: jax.Array
    recorded: RecordedRouting
    ledger: dropping.Ledger


def step_on_mesh(graph: nnx.GraphDef, arrays: Arrays, mesh: Mesh) -> Any:
    """`dy_BSD -> Result`, as training computes it, with NaN where nobody has written."""
    with jax.set_mesh(mesh):
        by_row = sharding.batch_sharding(mesh)
        whole = sharding.whole()
        of_params = sharding.shardings(arrays.params)
        inputs = jax.tree.map(lambda x: _put(x, by_row), arrays.inputs)
        x_BSD = _put(arrays.x_BSD, by_row)
        params = jax.tree.map(_put, arrays.params, of_params)
        other = jax.tree.map(_put, arrays.other, sharding.shardings(arrays.other))

    def step(params: Any, other: Any, x_BSD: jax.Array, dy_BSD: jax.Array, inputs: MoEInputs):
        def apply(params: Any, x_BSD: jax.Array) -> Any:
            layer = nnx.merge(graph, params, other)
            return layer(x_BSD, inputs._replace(rng=step_key()))

        y_BSD, pull, report = jax.vjp(apply, params, x_BSD, has_aux=True)
        dparams, dx_BSD = pull(dy_BSD)
        parts = legs_of(y_BSD, dx_BSD, dparams, report.recorded.gates)
        return Result(parts, report.recorded.sent, report.recorded, report.logged.ledger)

    split = legs_of(by_row, by_row, of_params, by_row)
    out_shardings: Any = Result(split, by_row, whole, whole)  # pyright: ignore
    compiled = jax.jit(step, out_shardings=out_shardings)

    def run(dy_BSD: Any) -> Result:
        with jax.set_mesh(mesh), room.poisoned():
            return compiled(params, other, x_BSD, _put(dy_BSD, by_row), inputs)

    return run


def legs_of(y_BSD: Any, dx_BSD: Any, dparams: Any, gates_BSK: Any) -> dict[str, Any]:
    """The arrays that are compared, by leg."""
    weights = {}
    of_router = {"gates": gates_BSK}
    for path, x in jax.tree.leaves_with_path(dparams):
        name = str(sharding.parameter_name(path)).rpartition("_")[0]
        leg = of_router if name.startswith("router") else weights
        leg[name] = x
    legs = {"router": of_router, "forward": y_BSD, "d-inputs": dx_BSD}
    return legs | {f"d-weights of {name}": x for name, x in weights.items()}


def _put(x: Any, sharding: Any) -> jax.Array:
    """An array of the host as a global one; every process has all of it."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
