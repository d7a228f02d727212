"""Expert-parallel dispatch: time beside one device, and bytes sent beside the least possible.

    python -m benchmarks.parallel
    python -m benchmarks.parallel --json=benchmarks/results/NAME.json

On a CPU it makes eight virtual devices, which share the cores and have no wires: times there say
what a dispatcher adds in copies, sorting and padding, and nothing about a network.  (The ragged
exchange is an emulation there, in which every device gets everything.)  Bytes are exact everywhere.

A case is dispatch, experts and combine for a given routing, in float32 on a CPU, forward and all
gradients; all devices along the mesh axis `expert`.  Interleaved rounds, medians; `ratio` is to the
same tokens and experts on one device, in the same round.  Bytes are of one forward pass, there and
back, summed over the devices.  `least` is one row a (token, other device) pair each way;
`per_choice` is one row a (token, expert elsewhere) pair, as without merging.

Shape suffixes: T tokens of the batch, D hidden, F expert width, E routed experts, K activated, G
groups of experts = P devices.
"""

import functools
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from benchmarks import harness
from dsmoe_jax.config import DispatchConfig, MeshConfig, MoEConfig
from dsmoe_jax.hardware import virtual_devices
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.moe import kernels
from dsmoe_jax.moe.dispatch import DispatchReport
from dsmoe_jax.moe.experts import ExpertWeights
from dsmoe_jax.moe.routed import routed_experts
from dsmoe_jax.moe.types import Routing
from dsmoe_jax.parallel.mesh import make_mesh
from dsmoe_jax.parallel.sharding import spec

T, D, F, E, K = 4096, 256, 176, 64, 6  # the experts of V1 16B, an eighth as wide
GROUP_LIMIT = 3  # V2's M


class Case(NamedTuple):
    """One way to dispatch.

    Attributes:
      dispatch: that section of the config.
      fixed_rows: every device sends every other one a row for each of its tokens, used or not.
      all_choices: a row takes all K choices and gates along, not only those for its device.
    """

    dispatch: DispatchConfig
    fixed_rows: bool = False
    all_choices: bool = False


ONE_DEVICE = "one device"
CASES = {
    "all_to_all": Case(DispatchConfig("all_to_all")),
    "all_to_all, 4 chunks": Case(DispatchConfig("all_to_all", chunks=4)),
    # Named as in the committed results; nothing is dropped, so each device has a slot for all.
    "capacity, worst case": Case(DispatchConfig("fixed_slots"), fixed_rows=True),
    "all_gather": Case(DispatchConfig("all_gather"), fixed_rows=True, all_choices=True),
}


def routings(n_devices: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`(ids_TK, gates_TK)` by name, from random logits."""
    rng = np.random.default_rng(0)
    even_TE = rng.standard_normal((T, E), np.float32)
    skewed_TE = even_TE + np.linspace(1.5, 0, E, dtype=np.float32)
    groups_TGE = even_TE.reshape(T, n_devices, -1)
    best_TG = groups_TGE.max(axis=2)
    worst_kept_T = np.sort(best_TG, axis=1)[:, -min(GROUP_LIMIT, n_devices)]
    allowed_TG = best_TG >= worst_kept_T[:, None]
    limited_TE = np.where(allowed_TG[:, :, None], groups_TGE, -np.inf).reshape(T, E)
    found = {}
    for name, logits_TE in (
        ("even", even_TE),
        ("skewed", skewed_TE),
        (f"at most {GROUP_LIMIT} devices", limited_TE),
    ):
        ids_TK = np.argsort(-logits_TE, axis=1)[:, :K].astype(np.int32)
        affinity_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(axis=1, keepdims=True)
        found[name] = ids_TK, np.take_along_axis(affinity_TE, ids_TK, axis=1)
    return found


def build(dispatch: DispatchConfig) -> Callable:
    """`(ids_TK, x_TD, gates_TK, weights, dy_TD) -> y, gradients, DispatchReport`, jitted."""
    moe = MoEConfig(E, 0, K, F, dispatch=dispatch)

    def run(ids_TK, x_TD, gates_TK, weights, dy_TD):
        def layer(x_TD, gates_TK, weights):
            row_kernels = kernels.choose_rows(moe.row_kernels, x_TD.dtype)
            routing = Routing(ids_TK, gates_TK, None)
            return routed_experts(x_TD, routing, weights, moe, row_kernels)

        y_TD, transpose, did = jax.vjp(layer, x_TD, gates_TK, weights, has_aux=True)
        return y_TD, transpose(dy_TD), did

    return jax.jit(run)


def sent_bytes(case: Case, n_devices: int, exchanged_rows: float, itemsize: int) -> float:
    """Bytes that a forward pass moves between devices: rows there, results back, labels."""
    choices = K if case.all_choices else min(K, E // n_devices)
    labels = 2 * 4 * choices  # a gate and an expert's number each
    rows = (n_devices - 1) * T if case.fixed_rows else exchanged_rows
    return rows * (2 * D * itemsize + labels)


def least_rows(ids_TK: np.ndarray, n_devices: int) -> tuple[int, int]:
    """(token, other device) and (token, expert on another device) pairs of a routing."""
    device_TK = ids_TK // (E // n_devices)
    home_T = np.arange(T) // (T // n_devices)
    away_TK = device_TK != home_T[:, None]
    pairs = np.zeros((T, n_devices), bool)
    np.put_along_axis(pairs, device_TK, away_TK, axis=1)
    return int(pairs.sum()), int(away_TK.sum())


def place(mesh: Mesh, tokens: tuple, weights: ExpertWeights, dy_TD: jax.Array) -> tuple:
    """The arguments of `build`'s function, split as the layer wants them."""

    def put(array, letters):
        return jax.device_put(array, NamedSharding(mesh, spec(letters)))

    gate_EFD, up_EFD, down_EDF = weights[:3]
    weights = ExpertWeights(put(gate_EFD, "EFD"), put(up_EFD, "EFD"), put(down_EDF, "EDF"))
    return *(put(a, "T") for a in tokens), weights, put(dy_TD, "T")


def measure(repeats: int, dtype: str) -> list[dict]:
    """Times every case and routing, interleaved; a row of results for each."""
    n_devices = jax.device_count()
    chosen = routings(n_devices)
    one = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    every = make_mesh(MeshConfig(data=1, expert=n_devices))
    compiled = {ONE_DEVICE: (one, build(DispatchConfig("local")))}
    compiled |= {name: (every, build(case.dispatch)) for name, case in CASES.items()}
    arguments = placed_arguments((one, every), chosen, dtype)
    reports = {}

    def run_case(case, routing):
        mesh, run = compiled[case]
        with jax.set_mesh(mesh):
            *_, did = jax.block_until_ready(run(*arguments[mesh, routing]))
        reports[case, routing] = did

    runs = {(c, r): functools.partial(run_case, c, r) for r in chosen for c in compiled}
    seconds = harness.interleaved(runs, repeats)  # the round that warms up compiles
    return [
        {
            "dispatch": case,
            "routing": routing,
            "ms": 1e3 * statistics.median(times),
            "ratio": harness.ratio(times, seconds[ONE_DEVICE, routing]),
            **traffic(case, chosen[routing][0], reports[case, routing], jnp.dtype(dtype).itemsize),
        }
        for (case, routing), times in seconds.items()
    ]


def placed_arguments(meshes: tuple[Mesh, ...], chosen: dict, dtype: str) -> dict:
    """The arguments by mesh and routing, on their devices: no time goes into getting there."""
    keys = iter(jax.random.split(jax.random.key(0), 5))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype) * shape[-1] ** -0.5

    weights = ExpertWeights(normal(E, F, D), normal(E, F, D), normal(E, D, F))
    x_TD = normal(T, D)
    dy_TD = normal(T, D)
    return {
        (mesh, name): place(mesh, (ids_TK, x_TD, gates_TK), weights, dy_TD)
        for mesh in meshes
        for name, (ids_TK, gates_TK) in chosen.items()
    }


def traffic(case: str, ids_TK: np.ndarray, did: DispatchReport, itemsize: int) -> dict:
    """Megabytes that travel, beside the least possible; None on one device."""
    if did.exchanged_rows is None:
        return dict.fromkeys(("sent_mb", "least_mb", "per_choice_mb"))
    n_devices = jax.device_count()
    least, per_choice = least_rows(ids_TK, n_devices)
    sent = sent_bytes(CASES[case], n_devices, float(did.exchanged_rows), itemsize)
    there_and_back_mb = 2 * D * itemsize / 1e6
    return {
        "sent_mb": sent / 1e6,
        "least_mb": least * there_and_back_mb,
        "per_choice_mb": per_choice * there_and_back_mb,
    }


def main(argv: list[str] | None = None) -> None:
    kept = keep_freed_memory()  # before the first call into XLA
    flags = harness.flag_parser("benchmarks.parallel", __doc__, repeats=9).parse_args(argv)
    jax.config.update("jax_num_cpu_devices", 8)
    virtual_devices.allow_waiting(8)
    if E % jax.device_count():
        sys.exit(f"{jax.device_count()} devices: must divide the {E} experts of the benchmark")
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    report = {
        **harness.device_header(),
        "dtype": dtype,
        "freed_memory_kept": kept,
        "repeats": flags.repeats,
        "layer": {"tokens": T, "hidden_size": D, "moe_intermediate_size": F,
                  "n_routed_experts": E, "num_experts_per_tok": K},
    }  # fmt: skip
    print(report)
    report["rows"] = measure(flags.repeats, dtype)
    print(harness.table(report["rows"]), flush=True)
    harness.write(report, flags.json)


if __name__ == "__main__":
    main()
