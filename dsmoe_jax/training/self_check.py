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
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsmoe_jax.config import Config, ModelConfig, MoEConfig, stages_of
from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.model.block import compute_dtype
from dsmoe_jax.moe import dispatch, dropping, experts, room, routers
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.routed import expert_devices
from dsmoe_jax.moe.types import MoEInputs, RecordedRouting, RouterInputs, Routing, unassign
from dsmoe_jax.nn.feed_forward import form_of
from dsmoe_jax.parallel import hosts, sharding
from dsmoe_jax.parallel.sharding import batch_shards
from dsmoe_jax.runs.summaries import missing_assignments
from dsmoe_jax.training import router_state

_TILE = 128  # of the kernels: small widths keep the rest that the real ones have
# The largest error of a row, relative to a typical row, that is taken for rounding.  Measured on a
# CPU over dispatchers, backends and two meshes of eight: at most 2e-6 in float32, 0.03 in bfloat16.
_ROUNDING = {"float32": 1e-4, "bfloat16": 0.15}
_FLIPS = 0.01  # share of the tokens whose choice between two experts rounding may decide


class Failure(NamedTuple):
    """A leg that is wrong on some devices.

    Attributes:
      leg: forward, d-inputs, d-weights of a matrix, or router.
      devices: their ids.
      error: of the worst row, relative to a typical row; NaN if a number is none.
    """

    leg: str
    devices: list[int]
    error: float


class _Arrays(NamedTuple):
    """Inputs of the step on the host, the same in every process.

    Attributes:
      params, other: of the layer.
      x_BSD, dy_BSD: its input, and the gradient of its output.
      inputs: besides the activations, without the random key.
    """

    params: nnx.State
    other: nnx.State
    x_BSD: Any
    dy_BSD: Any
    inputs: MoEInputs


class _Result(NamedTuple):
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
        model = _small(model, mesh)
        described = _describe(model.moe, dtype, mesh)
        tolerance = _ROUNDING[
            "float32" if platform() == "cpu" and dtype == "float32" else "bfloat16"
        ]
        tokens = batch_shards()
    graph, arrays = _arrays(model, dtype, tokens)
    on_mesh = _step_on_mesh(graph, arrays, mesh)
    on_one_device = _step_on_one_device(graph, arrays, model.moe)
    found = on_mesh(arrays.dy_BSD)
    recorded = jax.tree.map(np.asarray, found.recorded)
    wanted, ids_BSK = on_one_device(arrays.dy_BSD, recorded)
    # Rounding may decide between two experts: tokens that it sends elsewhere are left out.
    same_BS = (recorded.sent == ids_BSK).all(axis=-1)
    flipped = float(1 - same_BS.mean())
    if flipped > _FLIPS:  # what else is wrong follows from it
        failures = [Failure("router", _devices_of(found.ids_BSK, same_BS), flipped)]
    else:
        if flipped:
            dy_BSD = np.where(same_BS[..., None], arrays.dy_BSD, 0)
            found, (wanted, _) = on_mesh(dy_BSD), on_one_device(dy_BSD, recorded)
        failures = list(_differences(found.parts, wanted, same_BS, tolerance))
    ledger = jax.tree.map(lambda count: np.asarray(count)[None], found.ledger)
    _refuse(failures, missing_assignments(ledger), described, tolerance)
    return described


def _small(model: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The model with an MoE layer of small widths that the mesh divides, and no shared expert."""
    sizes = mesh.shape
    moe = dataclasses.replace(
        model.moe,
        moe_intermediate_size=_width(model.moe.moe_intermediate_size, sizes["tensor"]),
        n_shared_experts=0,
        shared_expert_intermediate_size=None,
        shared_expert_gate=False,
    )
    width = _width(model.hidden_size, sizes["fsdp"] * sizes["expert"])
    return dataclasses.replace(model, hidden_size=width, moe=moe)


def _width(real: int, parts: int) -> int:
    """A small width with the same rest: 853 becomes 213, which is as far from whole tiles."""
    step = math.lcm(_TILE, parts)
    return real if real <= step else step + real % step


def _tokens_of_a_part(moe: MoEConfig) -> int:
    """S: so many that a part of the tokens sends each expert two rows, or more."""
    s = max(8, math.ceil(2 * moe.n_routed_experts / moe.num_experts_per_tok))
    return s * moe.dispatch.chunks


def _describe(moe: MoEConfig, dtype: jnp.dtype, mesh: Mesh) -> str:
    sizes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    backend = experts.choose_name(moe.expert_backend, dtype, form_of(moe.expert))
    dispatcher = dispatch.choose_name(moe.dispatch.name, expert_devices())
    layer = f"router {moe.router.name}, dispatcher {dispatcher}, experts {backend}"
    return f"{layer} in {dtype} on {sizes}"


def _arrays(model: ModelConfig, dtype: jnp.dtype, b: int) -> tuple[nnx.GraphDef, _Arrays]:
    """The layer's structure, and arrays drawn from a fixed seed, in numbers of the dtype."""
    moe = model.moe
    rng = np.random.default_rng(0)
    shapes = nnx.eval_shape(
        lambda: MoELayer(
            moe,
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size,
            initializer_range=1.0,
            rngs=nnx.Rngs(0),
        )
    )
    graph, params, other = nnx.split(shapes, nnx.Param, ...)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        drawn = scale * rng.standard_normal(shape, np.float32)
        return drawn.astype(dtype).astype(np.float32)

    def weight(x: Any) -> np.ndarray:
        return normal(*x.shape, scale=x.shape[-1] ** -0.5)

    tables = router_state.first_values(model, lambda: np.ones(model.vocab_size, np.int64))

    def variable(path: tuple, x: Any) -> np.ndarray:
        name = str(sharding.parameter_name(path))
        if name in tables:
            return np.asarray(tables[name])
        if jnp.issubdtype(x.dtype, jnp.floating):
            return normal(*x.shape, scale=0.01)  # a bias that has moved
        return np.asarray(first[name])

    router, settings = routers.get_router(moe)
    first = {}
    if router.state is not None:
        first = router.state.first(dataclasses.replace(settings, vocab_size=model.vocab_size))
    params = jax.tree.map(weight, params)
    other = jax.tree.map_with_path(variable, other)
    s = _tokens_of_a_part(moe)
    x_BSD = normal(b, s, model.hidden_size).astype(dtype)
    dy_BSD = normal(b, s, model.hidden_size).astype(dtype)
    valid_BS = np.arange(s) < np.where(np.arange(b) % 3 == 2, s - s // 4, s)[:, None]  # and padding
    on_host: dict[str, Any] = {
        "token_ids_BS": rng.integers(0, model.vocab_size, (b, s), np.int32),
        "valid_BS": valid_BS,
        "sequence_ids_B": np.arange(b, dtype=np.int32),
        "replayed": _recording(moe, router, rng, (b, s)) if router.needs_recording else None,
        "task_ids_BS": rng.integers(0, max(1, len(moe.router.tasks)), (b, s), np.int32),
    }
    return graph, _Arrays(params, other, x_BSD, dy_BSD, MoEInputs(**on_host))


def _recording(moe: MoEConfig, router: Any, rng: Any, shape: tuple[int, int]) -> RecordedRouting:
    """A routing to replay: K different experts for each token, with any gates."""
    k = router.columns(moe.n_choices, moe.num_experts_per_tok)
    order_BSE = rng.random((*shape, moe.n_choices)).argsort(axis=-1).astype(np.int32)
    ids_BSK = order_BSE[..., :k]
    gates_BSK = rng.random(ids_BSK.shape, np.float32)
    return RecordedRouting(ids_BSK, gates_BSK, ids_BSK, ids_BSK)


def _key() -> jax.Array:
    return jax.random.key(0)  # of the step: training draws noise


def _step_on_mesh(graph: nnx.GraphDef, arrays: _Arrays, mesh: Mesh) -> Any:
    """`dy_BSD -> _Result`, as training computes it, with NaN where nobody has written."""
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
            return layer(x_BSD, inputs._replace(rng=_key()))

        y_BSD, pull, report = jax.vjp(apply, params, x_BSD, has_aux=True)
        dparams, dx_BSD = pull(dy_BSD)
        parts = _parts(y_BSD, dx_BSD, dparams, report.recorded.gates)
        return _Result(parts, report.recorded.sent, report.recorded, report.logged.ledger)

    split = _parts(by_row, by_row, of_params, by_row)
    out_shardings: Any = _Result(split, by_row, whole, whole)  # pyright: ignore
    compiled = jax.jit(step, out_shardings=out_shardings)

    def run(dy_BSD: Any) -> _Result:
        with jax.set_mesh(mesh), room.poisoned():
            return compiled(params, other, x_BSD, _put(dy_BSD, by_row), inputs)

    return run


def _parts(y_BSD: Any, dx_BSD: Any, dparams: Any, gates_BSK: Any) -> dict[str, Any]:
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


def _step_on_one_device(graph: nnx.GraphDef, arrays: _Arrays, moe: MoEConfig) -> Any:
    """`dy_BSD, recorded -> parts, ids_BSK`: the same as one dense loop, in float32.

    What the step on the mesh has dropped is dropped here: with a capacity for each part of the
    tokens that depends on the mesh.
    """

    def step(
        arrays: _Arrays, dy_BSD: jax.Array, recorded: RecordedRouting
    ) -> tuple[dict[str, Any], jax.Array]:
        by_token = _by_token(arrays.inputs)
        valid_T1 = by_token.valid_T[:, None]  # pyright: ignore[reportOptionalSubscript]

        def apply(params: Any, x_BSD: jax.Array) -> Any:
            layer = nnx.merge(graph, params, arrays.other)
            x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
            routing, _ = layer.route(x_TD, by_token)
            kept_TK = recorded.ids.reshape(routing.ids_TK.shape) < moe.n_choices
            kept = unassign(routing, kept_TK, moe.n_choices)
            y_TD = dense_loop(x_TD, kept, layer.expert_weights(), moe)
            sent_TK = jnp.where(valid_T1, routing.ids_TK, moe.n_choices)
            return y_TD.reshape(x_BSD.shape), (sent_TK, kept.gates_TK)

        y_BSD, pull, routing = jax.vjp(apply, arrays.params, arrays.x_BSD, has_aux=True)
        dparams, dx_BSD = pull(dy_BSD)
        ids_BSK, gates_BSK = (x.reshape(*y_BSD.shape[:2], -1) for x in routing)
        return _parts(y_BSD, dx_BSD, dparams, gates_BSK), ids_BSK

    compiled = jax.jit(step)
    in_float32 = arrays._replace(x_BSD=np.asarray(arrays.x_BSD, np.float32))

    def run(dy_BSD: Any, recorded: RecordedRouting) -> tuple[dict[str, Any], np.ndarray]:
        here = jax.default_device(jax.local_devices()[0])
        with here, jax.default_matmul_precision("highest"):
            return jax.device_get(compiled(in_float32, np.asarray(dy_BSD, np.float32), recorded))

    return run


def _by_token(inputs: MoEInputs) -> RouterInputs:
    """The router's inputs, with B and S as one axis."""

    def flat(x: Any) -> Any:
        return jax.tree.map(lambda a: jnp.asarray(a).reshape(-1, *a.shape[2:]), x)

    return RouterInputs(
        flat(inputs.token_ids_BS),
        flat(inputs.valid_BS),
        _key(),
        replayed=flat(inputs.replayed),
        sequence_ids_B=jnp.asarray(inputs.sequence_ids_B),
        task_ids_T=flat(inputs.task_ids_BS),
    )


def dense_loop(
    x_TD: jax.Array, routing: Routing, weights: experts.ExpertWeights, moe: MoEConfig
) -> jax.Array:
    """`reference.moe_layer` without shared experts, as a scan: 256 experts compile as fast as one.

    Args:
      x_TD: tokens.
      routing: of those tokens, in the ids of the router; unassigned ones have id E + Z.
      weights: of all experts, in the dtype of the tokens.
      moe: config of the layer.
    """
    activation = form_of(moe.expert).activation

    def gate_of(i: jax.Array | int) -> jax.Array:
        return jnp.where(routing.ids_TK == i, routing.gates_TK, 0.0).sum(axis=1)[:, None]

    @jax.checkpoint  # else the scan keeps every expert's rows of every token
    def one_more(y_TD: jax.Array, expert: tuple[jax.Array, experts.ExpertWeights]) -> Any:
        i, w = expert
        return y_TD + gate_of(i) * experts.one_expert_on(x_TD, w, activation), None

    y_TD = jnp.zeros_like(x_TD)
    y_TD, _ = jax.lax.scan(one_more, y_TD, (jnp.arange(moe.n_routed_experts), weights))
    for i in range(moe.n_routed_experts, moe.n_choices):
        y_TD += gate_of(i) * x_TD  # an identity expert
    return y_TD


def _differences(
    found: dict[str, Any], wanted: dict[str, Any], same_BS: np.ndarray, tolerance: float
) -> Iterator[Failure]:
    """Every leg in which some device of this process is off by more than rounding."""
    for (path, want), got in zip(
        jax.tree.leaves_with_path(wanted), jax.tree.leaves(found), strict=True
    ):
        by_token = want.shape[:2] == same_BS.shape
        typical = math.sqrt(np.square(want).mean()) or 1.0
        errors = {}
        for shard in got.addressable_shards:
            off = np.asarray(shard.data, np.float32) - want[shard.index]
            if by_token:
                off = np.where(same_BS[shard.index[:2]][..., None], off, 0)
            squares = np.square(off)
            rows = squares.mean(axis=-1) if off.ndim > 1 else squares
            errors[shard.device.id] = math.sqrt(rows.max()) / typical
        wrong = sorted(device for device, error in errors.items() if not error <= tolerance)
        if wrong:
            yield Failure(path[0].key, wrong, max((errors[d] for d in wrong), key=_size))


def _size(error: float) -> float:
    """An error to compare: NaN is the worst."""
    return math.inf if math.isnan(error) else error


def _devices_of(ids_BSK: jax.Array, same_BS: np.ndarray) -> list[int]:
    """The devices of this process whose tokens went to other experts."""
    return sorted(
        shard.device.id
        for shard in ids_BSK.addressable_shards
        if not same_BS[shard.index[:2]].all()
    )


def _refuse(failures: list[Failure], missing: str | None, described: str, tolerance: float) -> None:
    """Ends all processes with what any of them has found."""
    by_leg: dict[str, Failure] = {}
    for one in hosts.gather(failures):
        for leg, devices, error in one:
            before = by_leg.get(leg, Failure(leg, [], 0.0))
            worst = max(before.error, error, key=_size)
            by_leg[leg] = Failure(leg, sorted({*before.devices, *devices}), worst)
    said = [_say(failure) for failure in by_leg.values()]
    said += [missing] if missing else []
    if said:
        raise ValueError(
            f"--self_check: {described}: {'; '.join(said)} (error of the worst row relative to a"
            f" typical one; rounding stays below {tolerance:g}).  Nothing was written; take another"
            " model.moe.dispatch.name or model.moe.expert_backend, or --noself_check to train all"
            " the same"
        )


def _say(failure: Failure) -> str:
    devices = f"device{'s' * (len(failure.devices) > 1)} {', '.join(map(str, failure.devices))}"
    if math.isnan(failure.error):
        return f"{failure.leg} is not a number on {devices}: rows are read that nobody has written"
    return f"{failure.leg} is off by {failure.error:.2g} on {devices}"
