"""Time of a layer by its parts, on one device and eight, before and after the fast paths.

    python -m benchmarks.latency
    python -m benchmarks.latency --json=benchmarks/results/NAME.json \\
        --page=docs/latency.md --picture=docs/latency.svg
    python -m benchmarks.latency --read=benchmarks/results/NAME.json --page=docs/latency.md

A forward pass of a DeepSeekMoE layer in evaluation, in float32 on a CPU, without the report that
training logs.  A part is the layer's own code, compiled by itself, on the arrays that reach it:

    router     logits, scores, groups of experts if a token is limited to some, top k, gates
    exchange   dispatch and combine, a program each: on one device rows are sorted by expert,
               gathered, and added up again; on several they are sent there and back
    experts    the routed experts; on several devices with the sorting of the rows that came
    shared     the shared experts
    layer      the whole, compiled as one: what the parts together are compared with

On one device the paths are the plain one and the compiled one: row kernels and experts in JAX, or
in C++.  On eight, the dispatcher that collects every token on every device, and the ragged one,
which sends what is needed; a limit is that of V2 section 2.1.2: a token's experts are on so many
devices at most.  The first path of either is `before`.

Eight devices are virtual ones of one CPU, which share its cores and have no wires, and the ragged
exchange is an emulation there, which collects everything: their times say what a path costs in
copies and sorting.  `rows` is exact everywhere: rows that a token sends to other devices, in each
direction.

One process, interleaved; medians over rounds.  A ratio is the median over rounds of (before / path
in the same round): 2 is twice as fast.  `call` is a compiled call that does nothing: what is not
far above it cannot be resolved, and the sum of the parts contains it several times.

Shapes: T tokens, D hidden, F expert width, E routed experts, K activated of a token, P devices.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path as File
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import harness, latency_page
from dsmoe_jax.config import Config, MeshConfig, MoEConfig, replace
from dsmoe_jax.hardware import virtual_devices
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.moe import blocks, experts, kernels
from dsmoe_jax.moe.dispatch import choose_dispatcher, local, volume
from dsmoe_jax.moe.kernels import RowKernels
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.types import MoEInputs, RouterInputs, Routing
from dsmoe_jax.parallel import sharding
from dsmoe_jax.parallel.mesh import make_mesh
from dsmoe_jax.runs import json_files

D = 256  # an eighth of V1 16B's, whose numbers of experts these are
LAYER: dict[str, Any] = {
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 176,
    "balance.expert": None,
}
DEVICES = 8
LIMITS = (4, 2, 1)  # devices of a token's experts
# Rounds by tokens: a pass over few takes less than what disturbs it.
ROUNDS = {8: 101, 64: 51, 1024: 15, 4096: 7}
LIMITED = 1024  # the tokens with which the limits are measured
RAGGED = "all_to_all"
ROUTER, EXCHANGE, EXPERTS, SHARED, WHOLE, CALL = (
    "router", "exchange", "experts", "shared", "layer", "call",
)  # fmt: skip
PARTS = (ROUTER, EXCHANGE, EXPERTS, SHARED)


class Path(NamedTuple):
    """A way to compute the layer.

    Attributes:
      settings: keys of `model.moe`.
      measured: what has times of its own; the others are those of the first path.
    """

    settings: dict[str, Any]
    measured: tuple[str, ...] = (*PARTS, WHOLE)


# By number of devices; the first one is `before`.
PATHS: dict[int, dict[str, Path]] = {
    1: {
        "plain JAX": Path({"row_kernels": "jax", "expert_backend": "blocked"}),
        "compiled": Path({"row_kernels": "native", "expert_backend": "native"}),
    },
    DEVICES: {
        "all_gather": Path({"dispatch.name": "all_gather"}),
        RAGGED: Path({"dispatch.name": RAGGED}, (EXCHANGE, EXPERTS, WHOLE)),
    },
}


class Setting(NamedTuple):
    """The devices, the most of them that a token's experts may be on, and the tokens."""

    devices: int
    limit: int | None
    tokens: int


def moe_of(setting: Setting, path: Path) -> MoEConfig:
    """The config of the layer."""
    limited = {}
    if setting.limit is not None:
        limited = {"router.n_group": setting.devices, "router.topk_group": setting.limit}
    keys = {**LAYER, **limited, **path.settings}
    return replace(Config(), **{f"model.moe.{key}": x for key, x in keys.items()}).model.moe


@contextlib.contextmanager
def on_devices(n: int) -> Iterator[None]:
    """The mesh of several devices, all along the axis of the experts; none for one."""
    if n == 1:
        yield
        return
    with jax.set_mesh(make_mesh(MeshConfig(data=1, expert=n), jax.devices()[:n])):
        yield


class Layer:
    """A layer with its tokens, on the devices of the ambient mesh; `calls` are its parts."""

    def __init__(self, setting: Setting, path: Path):
        self.setting = setting
        self.moe = moe_of(setting, path)
        self.kernels = kernels.choose_rows(self.moe.row_kernels, jnp.dtype("float32"))
        layer = MoELayer(
            self.moe, hidden_size=D, vocab_size=1, initializer_range=D**-0.5, rngs=nnx.Rngs(0)
        )
        self.graph, state = nnx.split(layer)
        self.state = jax.device_put(state, sharding.shardings(state))
        x_TD = np.random.default_rng(0).standard_normal((setting.tokens, D), np.float32)
        self.x_TD = placed(x_TD, "TD")
        inputs = RouterInputs(jnp.zeros(setting.tokens, jnp.int32))
        self.route, routing = compiled(
            lambda state, x_TD: self.merged(state).route(x_TD, inputs, self.kernels)[0][:2],
            self.state,
            self.x_TD,
        )
        self.routing = Routing(routing[0], routing[1], None)
        seams = seams_on_one_device if setting.devices == 1 else seams_on_a_mesh
        dispatch, compute, combine = seams(self.moe, self.kernels, setting)
        weights = self.merged(self.state).expert_weights()
        self.there, arrived = compiled(dispatch, self.x_TD, *routing)
        self.compute, out = compiled(compute, arrived, weights)
        self.back, _ = compiled(combine, out, arrived)

    def merged(self, state: Any) -> MoELayer:
        """The layer with these arrays."""
        return nnx.merge(self.graph, state)

    def calls(self, names: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
        """Compiled parts by name; each returns when its results are there."""
        make = {
            ROUTER: lambda: self.route,
            EXCHANGE: self._exchange,
            EXPERTS: lambda: self.compute,
            SHARED: self._shared,
            WHOLE: self._whole,
            CALL: lambda: compiled(lambda x_TD: x_TD[:1], self.x_TD)[0],
        }
        return {name: make[name]() for name in names}

    def _exchange(self) -> Callable[[], Any]:
        """Both ways, one call each: in one program XLA could gather and add up in one pass."""
        return lambda: (self.there(), self.back())

    def _shared(self) -> Callable[[], Any]:
        return compiled(lambda state, x: self.merged(state).shared(x), self.state, self.x_TD)[0]

    def _whole(self) -> Callable[[], Any]:
        t = self.setting.tokens
        inputs = MoEInputs(jnp.zeros((t, 1), jnp.int32), jnp.ones((t, 1), bool))

        def layer(state, x_TD):
            return self.merged(state)(x_TD[:, None], inputs)[0][:, 0]

        return compiled(layer, self.state, self.x_TD)[0]


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[[], Any], Any]:
    """A call that waits for its results, and such results."""
    run = jax.jit(function).lower(*args).compile()
    return lambda: jax.block_until_ready(run(*args)), run(*args)


def placed(x: np.ndarray, letters: str) -> jax.Array:
    """An activation where the ambient mesh has it; whole on every device if it cannot be split."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jnp.asarray(x)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.device_put(x, NamedSharding(mesh, sharding.spec_of(x.shape, letters)))


Seams = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


def seams_on_one_device(moe: MoEConfig, row_kernels: RowKernels, setting: Setting) -> Seams:
    """Rows to their experts, the experts, the results back to their tokens."""
    del setting
    backend = experts.choose_backend(moe.expert_backend, jnp.dtype("float32"))

    def dispatch(x_TD, ids_TK, gates_TK):
        routing = Routing(ids_TK, gates_TK, None)
        return local.dispatch(x_TD, routing, moe.n_routed_experts, row_kernels)

    def compute(grouped, weights):
        return backend.run(grouped.rows_ND, grouped.group_sizes_e, weights)

    def combine(out_ND, grouped):
        return local.combine(out_ND, grouped.state, row_kernels)

    return dispatch, compute, combine


def seams_on_a_mesh(moe: MoEConfig, row_kernels: RowKernels, setting: Setting) -> Seams:
    """The same between devices: what a device does with rows that came belongs to the experts."""
    p = setting.devices
    t = setting.tokens // p
    e, k = moe.n_routed_experts, moe.num_experts_per_tok
    dispatcher = choose_dispatcher(moe.dispatch.name, p)
    run = experts.choose_backend(moe.expert_backend, jnp.dtype("float32")).run_weighted
    max_rows = int(volume(moe, t, p).room)
    usual = blocks.usual(t, k, e, p)

    def dispatch(x_tD, ids_tK, gates_tK):
        routing = Routing(ids_tK, gates_tK, None)
        arrived = dispatcher.dispatch(x_tD, routing, e, max_rows, row_kernels)
        # A number for each device is a vector over the devices.
        n_rows = arrived.n_rows
        return arrived if n_rows is None else arrived._replace(n_rows=n_rows[None])

    def compute(arrived, weights):
        if arrived.n_rows is not None:
            arrived = arrived._replace(n_rows=arrived.n_rows[0])
        return blocks.weighted_sums(run, arrived, experts.join(weights), max_rows, usual)[0]

    def combine(out_RD, arrived):
        return dispatcher.combine(out_RD, arrived.state, row_kernels)

    def by_device(function: Callable[..., Any]) -> Callable[..., Any]:
        device = P("expert")
        return jax.shard_map(function, in_specs=device, out_specs=device, check_vma=False)

    return by_device(dispatch), by_device(compute), by_device(combine)


def rows_sent(name: str, routing: Routing, n_devices: int, moe: MoEConfig) -> float | None:
    """Rows that go to other devices for each token, in each direction; None on one device."""
    if n_devices == 1:
        return None
    if name != RAGGED:  # every row to every device
        return float(n_devices - 1)
    ids_TK = np.asarray(routing.ids_TK)
    t = len(ids_TK)
    there_TP = np.zeros((t, n_devices), bool)
    np.put_along_axis(there_TP, ids_TK // (moe.n_routed_experts // n_devices), True, axis=1)
    there_TP[np.arange(t), np.arange(t) // (t // n_devices)] = False
    return float(there_TP.sum() / t)


def measure_tokens(devices: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of results of all limits and paths, interleaved."""
    runs, rows = {}, {}
    for limit in (None, *LIMITS) if devices > 1 and tokens == LIMITED else (None,):
        setting = Setting(devices, limit, tokens)
        for number, (name, path) in enumerate(PATHS[devices].items()):
            print(f"compiling {setting}, {name}", file=sys.stderr)
            layer = Layer(setting, path)
            parts = path.measured if number else (*path.measured, CALL)
            runs |= {(limit, name, part): run for part, run in layer.calls(parts).items()}
            rows[limit, name] = rows_sent(name, layer.routing, devices, layer.moe)
    seconds = harness.interleaved(runs, rounds, warm_up=2)
    found = []
    for (limit, name), sent in rows.items():
        before = next(iter(PATHS[devices]))
        first = {part: seconds[limit, before, part] for part in (*PARTS, WHOLE, CALL)}
        own = first | {part: seconds[limit, name, part] for part in PATHS[devices][name].measured}
        found.append(
            {"devices": devices, "limit": limit, "tokens": tokens, "path": name, "rows": sent}
            | {f"{part}_ms": 1e3 * statistics.median(times) for part, times in own.items()}
            | {
                f"{part}_ratio": None if name == before else harness.ratio(first[part], own[part])
                for part in (*PARTS, WHOLE)
                if part in PATHS[devices][name].measured
            }
        )
    return found


def measure(repeats: int | None) -> list[dict[str, Any]]:
    """A row of results for each setting and path, medians over that many rounds."""
    found = []
    for devices in PATHS:
        for tokens, rounds in ROUNDS.items():
            with on_devices(devices):
                found += measure_tokens(devices, tokens, repeats or rounds)
    return found


def measured(repeats: int | None, kept: bool) -> dict[str, Any]:
    """The whole report."""
    return {
        **harness.device_header(),
        "dtype": "float32",
        "freed_memory_kept": kept,
        "rounds": {str(tokens): repeats or rounds for tokens, rounds in ROUNDS.items()},
        "hidden_size": D,
        **LAYER,
        "rows": measure(repeats),
    }


def main(argv: list[str] | None = None) -> None:
    kept = keep_freed_memory()  # before the first call into XLA
    parser = harness.flag_parser("benchmarks.latency", __doc__, repeats=None)
    parser.add_argument("--read", type=File, help="show these results, measure nothing")
    parser.add_argument("--page", type=File, help="renew the tables of this page")
    parser.add_argument("--picture", type=File, help="draw into this SVG file")
    flags = parser.parse_args(argv)
    if flags.read is None:
        if not kernels.native_serves(jnp.dtype("float32")):
            parser.error("the compiled kernels, one of the paths, cannot be used on this machine")
        report = measured(flags.repeats, kept)
    else:
        report = json_files.read(flags.read)
    print(latency_page.tables(report), flush=True)
    harness.write(report, flags.json)
    if flags.page is not None:
        flags.page.write_text(latency_page.renewed(flags.page.read_text(), report))
    if flags.picture is not None:
        flags.picture.write_text(latency_page.picture(report), encoding="utf-8")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)  # before the first call into XLA
    virtual_devices.allow_waiting(DEVICES)
    main()
