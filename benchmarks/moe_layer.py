"""Speed of the routed MoE layer against a dense SwiGLU of the same activated FLOPs.

    python -m benchmarks.moe_layer --size=2b
    python -m benchmarks.moe_layer --size=all --hf --json=benchmarks/results/NAME.json
    python -m benchmarks.moe_layer --size=2b --shared=1
    python -m benchmarks.moe_layer --size=demo --routing=RUN/routing/train/00000480.npz --layer=2

One process, interleaved: in every round each case runs once (first all forward passes, then all
with gradients), and a ratio is the median over rounds of (case / dense in the same round), so a
machine that slows down slows both (torch has rounds of its own). The layer is the router's matmul,
softmax, top-k, sort, gather, experts and weighted sum; nothing is dropped. Its dense rival has the
width of the K activated experts. With --shared=Ks both have Ks shared experts more: the whole layer
of a DeepSeekMoE model. Gradients are those of tokens, router and all weights, and the output is
computed too.

Shape suffixes: T tokens, D hidden, F expert width, E routed experts, K activated experts.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness, recorded
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.moe import dispatch, experts, kernels, routed
from dsmoe_jax.moe.reference import ffn


class Size(NamedTuple):
    """One MoE layer and how many tokens it sees."""

    tokens: int
    hidden_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int = 0

    @property
    def activated_width(self) -> int:
        """Width of a dense FFN with the activated FLOPs of the layer."""
        activated = self.num_experts_per_tok + self.n_shared_experts
        return activated * self.moe_intermediate_size

    def gflop(self, with_gradients: bool) -> float:
        """Multiply-adds of the activated matmuls, counted as 2 operations; backward is twice."""
        passes = 3 if with_gradients else 1
        return 6 * self.tokens * self.hidden_size * self.activated_width * passes / 1e9


SIZES = {
    "2b": Size(1024, 1280, 63, 7, 853),  # a layer of the paper's 2B model (V1 section 4.1)
    "demo": Size(2048, 48, 63, 7, 32),  # a layer of the demo scale in configs/base.py
    "demo256": Size(2048, 256, 63, 7, 171),
}
# Rounds: a pass of the demo layer takes milliseconds, and other jobs disturb single ones.
REPEATS = {"2b": 9, "demo": 101, "demo256": 31}
ROUTINGS = ("real", "balanced")
REAL_SKEW = 1.7  # max load / mean load that trained routers show on real text
# The row kernels that a backend is measured with: JAX with JAX, compiled with compiled.
ROW_KERNELS = {"native": "native", "auto": "auto"}


class Case(NamedTuple):
    """One case to time: `run()` returns when its results are there."""

    name: str
    routing: str
    with_gradients: bool
    run: Callable[[], object]
    compile_s: float | None = None
    temp_mb: float | None = None


def routing_offsets_TE(size: Size, routing: str, logits_TE: np.ndarray) -> np.ndarray:
    """Offsets of the logits, for the choice of experts and not for the gates.

    `real`: a preference of each expert, scaled until max load / mean load is REAL_SKEW.
    `balanced`: token t takes experts tK .. tK + K - 1 (mod E), every expert the same load.
    """
    t, e, k = size.tokens, size.n_routed_experts, size.num_experts_per_tok
    if routing == "balanced":
        chosen_TK = (np.arange(t * k) % e).reshape(t, k)
        offsets_TE = np.zeros((t, e), np.float32)
        np.put_along_axis(offsets_TE, chosen_TK, 1e4, axis=1)
        return offsets_TE
    preference_E = np.random.default_rng(1).standard_normal(e).astype(np.float32)
    low, high = 0.0, 4.0
    for _ in range(30):
        scale = (low + high) / 2
        ids_TK = np.argsort(-(logits_TE + scale * preference_E), axis=1)[:, :k]
        skew = np.bincount(ids_TK.ravel(), minlength=e).max() / (t * k / e)
        low, high = (scale, high) if skew < REAL_SKEW else (low, scale)
    return np.broadcast_to(low * preference_E, (t, e))


def parts_for(backend: str, dtype: jnp.dtype) -> routed.Parts:
    """The parts of the layer on one device, with a backend and its row kernels."""
    return routed.Parts(
        dispatch.DISPATCHERS["local"],
        experts.choose_backend(backend, dtype),
        kernels.choose_rows(ROW_KERNELS.get(backend, "jax"), dtype),
    )


def moe_layer(x_TD, router_ED, weights, offsets_TE, k: int, parts: routed.Parts):
    """The routed experts of an MoE layer, router included: y_TD."""
    logits_TE = x_TD.astype(jnp.float32) @ router_ED.T
    affinity_TE = jax.nn.softmax(logits_TE, axis=-1)
    _, ids_TK = parts.kernels.top_k(logits_TE + offsets_TE, k)
    gates_TK = jnp.take_along_axis(affinity_TE, ids_TK, axis=1)
    tokens = routed.Tokens(x_TD, ids_TK, gates_TK)
    y_TD, _ = routed.on_one_device(parts, weights, tokens)
    return y_TD


def jax_case(name: str, routing: str, with_gradients: bool, layer: Callable, dy_TD, args) -> Case:
    """Compile `layer(*args)`, or it and its gradients, and wrap it for timing."""

    def with_grads(dy_TD, *args):
        y_TD, transpose = jax.vjp(layer, *args)
        return y_TD, transpose(dy_TD)

    start = time.perf_counter()
    if with_gradients:
        args = (dy_TD, *args)
        compiled = jax.jit(with_grads).lower(*args).compile()
    else:
        compiled = jax.jit(layer).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    temp_mb = None if memory is None else memory.temp_size_in_bytes / 1e6

    def run():
        return jax.block_until_ready(compiled(*args))

    return Case(name, routing, with_gradients, run, seconds, temp_mb)


class Arrays(NamedTuple):
    """Weights of a layer and of its rival; `shared` has width 0 without shared experts."""

    x_TD: Any
    dy_TD: Any
    router_ED: Any
    routed: experts.ExpertWeights
    dense: tuple[Any, Any, Any]
    shared: tuple[Any, Any, Any]

    def cast(self, dtype: str) -> "Arrays":
        """As JAX arrays in the compute dtype; the router stays in float32."""
        on_device = jax.tree.map(lambda a: jnp.asarray(a, dtype), self)
        return on_device._replace(router_ED=jnp.asarray(self.router_ED))


def random_arrays(size: Size) -> Arrays:
    """Tokens and weights by chance, always the same ones."""
    t, d, e, _, f, n_shared = size
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32) * max(shape[-1], 1) ** -0.5

    def swiglu(width: int) -> tuple[Any, Any, Any]:
        return matrix(width, d), matrix(width, d), matrix(d, width)

    return Arrays(
        x_TD=rng.standard_normal((t, d), np.float32),
        dy_TD=matrix(t, d),
        router_ED=matrix(e, d),
        routed=experts.ExpertWeights(matrix(e, f, d), matrix(e, f, d), matrix(e, d, f)),
        dense=swiglu(size.activated_width),
        shared=swiglu(n_shared * f),
    )


def build_cases(
    size: Size, backends: list[str], hf: bool, dtype: str, recorded_TE: np.ndarray | None
) -> list[Case]:
    """The dense rival first, then every backend x routing x {forward, with gradients}."""
    arrays = random_arrays(size)
    offsets = {
        routing: routing_offsets_TE(size, routing, arrays.x_TD @ arrays.router_ED.T)
        for routing in ROUTINGS
    }
    if recorded_TE is not None:
        offsets["real"] = recorded_TE
    cases = jax_cases(size, backends, arrays.cast(dtype), offsets)
    if hf:
        from benchmarks import moe_layer_hf

        cases += moe_layer_hf.cases(
            arrays.x_TD,
            arrays.dy_TD,
            arrays.router_ED,
            arrays.routed,
            offsets,
            size.num_experts_per_tok,
        )
    return cases


def jax_cases(
    size: Size, backends: list[str], arrays: Arrays, offsets: dict[str, np.ndarray]
) -> list[Case]:
    """Compiles the dense rival, and the layer with every backend and routing."""
    cases = []
    for grads in (False, True):
        args = (arrays.x_TD, *arrays.dense)
        cases.append(jax_case("dense", "-", grads, ffn, arrays.dy_TD, args))
        for backend in backends:
            parts = parts_for(backend, arrays.x_TD.dtype)
            for routing in ROUTINGS:
                layer = make_layer(size, parts, jnp.asarray(offsets[routing]))
                args = (arrays.x_TD, arrays.router_ED, arrays.routed, arrays.shared)
                print(f"compiling {backend}, {routing}, gradients={grads}", file=sys.stderr)
                cases.append(jax_case(backend, routing, grads, layer, arrays.dy_TD, args))
    return cases


def make_layer(size: Size, parts: routed.Parts, offsets_TE: jax.Array) -> Callable:
    """The layer with its shared experts, if it has any."""

    def layer(x_TD, router_ED, weights, shared):
        y_TD = moe_layer(x_TD, router_ED, weights, offsets_TE, size.num_experts_per_tok, parts)
        return y_TD + ffn(x_TD, *shared) if size.n_shared_experts else y_TD

    return layer


def measure(size: Size, cases: list[Case], repeats: int) -> list[dict]:
    """Time all cases interleaved; a row of results for each."""
    seconds = {}
    for with_gradients in (False, True):
        # Forward passes and gradients apart: between gradients of 825 MB, the buffers of a forward
        # pass break up the heap.  A training step asks for the same sizes again and again.
        # Torch apart too: its threads spin for a while after its last operation, which doubled the
        # time of a dense demo layer that came next.
        for torch in (False, True):
            wanted = with_gradients, torch
            runs = {c: c.run for c in cases if (c.with_gradients, c.name == "hf") == wanted}
            seconds |= harness.interleaved(runs, repeats, warm_up=2 + repeats // 10)
    dense = {c.with_gradients: seconds[c] for c in cases if c.name == "dense"}
    rows = []
    for case in cases:
        median = statistics.median(seconds[case])
        rows.append(
            {
                "backend": case.name,
                "routing": case.routing,
                "pass": "forward+gradients" if case.with_gradients else "forward",
                "ms": 1e3 * median,
                "ratio_to_dense": harness.ratio(seconds[case], dense[case.with_gradients]),
                "gflop_per_s": size.gflop(case.with_gradients) / median,
                "temp_mb": case.temp_mb,
                "compile_s": case.compile_s,
            }
        )
    return rows


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Command-line flags; wrong ones end the program with one line."""
    parser = harness.flag_parser("benchmarks.moe_layer", __doc__, repeats=None)
    parser.add_argument("--size", choices=[*SIZES, "all"], default="all")
    parser.add_argument(
        "--backends",
        help="comma-separated (default native,blocked on CPU, else ragged_dot,tokamax)",
    )
    parser.add_argument(
        "--routing",
        type=Path,
        help="a step of a recorded run (WORKDIR/routing/train/*.npz)",
    )
    parser.add_argument("--layer", type=int, default=0, help="of --routing (default 0)")
    parser.add_argument("--tokens", type=int, help="tokens in place of those of the size")
    parser.add_argument("--shared", type=int, default=0, help="shared experts (default 0)")
    parser.add_argument(
        "--hf", action="store_true", help="also Hugging Face's DeepseekV3MoE on torch, CPU only"
    )
    parser.add_argument(
        "--malloc", choices=["keep", "system"], default="keep",
        help="keep: freed memory stays in the process, see dsmoe_jax/hardware/host_memory.py"
        " (default)",
    )  # fmt: skip
    flags = parser.parse_args(argv)
    # Before the first call into XLA: its threads would have got heaps of their own.
    flags.kept = flags.malloc == "keep" and keep_freed_memory()
    on_cpu = jax.default_backend() == "cpu"
    flags.backends = flags.backends or ("native,blocked" if on_cpu else "ragged_dot,tokamax")
    try:
        for backend in flags.backends.split(","):
            experts.check_backend(backend)
    except ValueError as error:
        parser.error(f"--backends: {error}")
    if flags.hf and not on_cpu:
        parser.error("--hf: torch runs on the CPU here, comparing it with an accelerator is no use")
    if flags.hf and flags.shared:
        parser.error("--hf: compares the routed experts; leave out --shared")
    if flags.routing and not flags.routing.is_file():
        parser.error(f"--routing={flags.routing}: no such file")
    return flags


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    report = {
        **harness.device_header(),
        "dtype": dtype,
        "freed_memory_kept": flags.kept,
        "routing": str(flags.routing) if flags.routing else None,
        "sizes": {},
    }
    print({key: value for key, value in report.items() if key != "sizes"})
    for name in SIZES if flags.size == "all" else [flags.size]:
        size = SIZES[name]._replace(n_shared_experts=flags.shared)
        size = size._replace(tokens=flags.tokens or size.tokens)
        offsets_TE = None
        if flags.routing:
            offsets_TE = recorded.offsets_TE(flags.routing, flags.layer, *size[:1], *size[2:4])
        cases = build_cases(size, flags.backends.split(","), flags.hf, dtype, offsets_TE)
        repeats = flags.repeats or REPEATS[name]
        rows = measure(size, cases, repeats)
        report["sizes"][name] = {**size._asdict(), "repeats": repeats, "rows": rows}
        print(f"\n{name}: {size}\n{harness.table(rows)}", flush=True)
    harness.write(report, flags.json)


if __name__ == "__main__":
    main()
