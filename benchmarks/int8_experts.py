"""Speed of INT8 experts beside the model that they were made from.

    python -m benchmarks.int8_experts --json=benchmarks/results/NAME.json
    python -m benchmarks.int8_experts --size=demo --workdir=RUN

The routed experts of a layer, forward, with few and many tokens: as decoding and reading prompts
have them. `float` is the backend that training takes, `float, same backend` the one that quantised
experts take; `int8` has weights of 8 bits, `int8 x int8` their inputs too. Rounds are interleaved;
a ratio is the median over rounds of (case / float in the same round). With --workdir also greedy
text of that model, as it is and quantised: tokens/s of decoding.

Shape suffixes: T tokens, D hidden, F expert width, E routed experts.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import harness
from benchmarks.moe_layer import SIZES, Arrays, Size, moe_layer, parts_for, random_arrays
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.model.build import ModelState, abstract_model
from dsmoe_jax.model.generation import generate
from dsmoe_jax.model.size import weight_bytes
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.moe.experts import ExpertWeights, choose_name
from dsmoe_jax.nn.quantisation import Quantised, quantise
from dsmoe_jax.runs.loading import Writer, load_writer
from dsmoe_jax.surgery.quantising import quantised_config, quantised_state

TOKENS = (1, 16, 256, 2048)
NEW_TOKENS = 128
PROMPT = "def main("
FLOAT = "float"


def quantised(weights: ExpertWeights, *, inputs: bool) -> ExpertWeights:
    """The matrices of 8 bits."""

    def of(w: Any) -> Quantised:
        return dataclasses.replace(quantise(w), inputs=inputs)

    return ExpertWeights(of(weights.gate_EFD), of(weights.up_EFD), of(weights.down_EDF))


def layer_runs(size: Size, arrays: Arrays, dtype: Any) -> dict[str, Callable[[], Any]]:
    """Compiled forward passes of the layer, by case."""
    backends = {
        FLOAT: choose_name("auto", dtype),
        "float, same backend": choose_name("auto", dtype, quantised=True),
    }
    weights = {name: (backend, arrays.routed) for name, backend in backends.items()}
    for name, inputs in (("int8", False), ("int8 x int8", True)):
        weights[name] = backends["float, same backend"], quantised(arrays.routed, inputs=inputs)
    if backends[FLOAT] == backends["float, same backend"]:
        del weights["float, same backend"]
    return {name: layer_run(size, arrays, *case) for name, case in weights.items()}


def layer_run(
    size: Size, arrays: Arrays, backend: str, weights: ExpertWeights
) -> Callable[[], Any]:
    """One compiled forward pass; it returns when the result is there."""
    parts = parts_for(backend, arrays.x_TD.dtype)
    k = size.num_experts_per_tok

    def layer(x_TD: jax.Array, router_ED: jax.Array, weights: ExpertWeights) -> jax.Array:
        return moe_layer(x_TD, router_ED, weights, 0.0, k, parts)

    args = arrays.x_TD, arrays.router_ED, weights
    compiled = jax.jit(layer).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


def layer_rows(size: Size, dtype: Any, repeats: int) -> list[dict[str, Any]]:
    """Times of all cases with a number of tokens."""
    runs = layer_runs(size, random_arrays(size).cast(dtype.name), dtype)
    seconds = harness.interleaved(runs, repeats)
    matrices = 3 * size.n_routed_experts * size.hidden_size * size.moe_intermediate_size
    return [
        {
            "tokens": size.tokens,
            "case": name,
            "ms": 1e3 * statistics.median(times),
            "ratio": harness.ratio(times, seconds[FLOAT]),
            "weight_mb": matrices * (1 if "int8" in name else dtype.itemsize) / 1e6,
        }
        for name, times in seconds.items()
    ]


def quantised_model(writer: Writer, *, activations: bool) -> Transformer:
    """A model with quantised experts."""
    config = quantised_config(writer.config, bits=8, activations=activations, gates="float32")
    _, params, other = nnx.split(writer.model, nnx.Param, ...)
    state, _ = quantised_state(config.model, ModelState(params, other))
    return nnx.merge(abstract_model(config.model), *state)


def generation_rows(workdir: str, repeats: int) -> list[dict[str, Any]]:
    """Tokens/s of greedy text, by model; compilation does not count."""
    writer = load_writer(workdir)
    models = {
        FLOAT: writer.model,
        "int8": quantised_model(writer, activations=False),
        "int8 x int8": quantised_model(writer, activations=True),
    }
    prompt = [[writer.tokenizer.eos_id, *writer.tokenizer.encode(PROMPT)]]
    speeds: dict[str, list[float]] = {name: [] for name in models}

    def run(name: str) -> None:
        text = generate(models[name], prompt, NEW_TOKENS)
        speeds[name].append(text.decoded_tokens / text.seconds.decode)

    harness.interleaved({name: lambda name=name: run(name) for name in models}, repeats)
    return [
        {
            "case": name,
            "tokens_per_second": statistics.median(found[1:]),  # without the warm-up
            "ratio": statistics.median(
                a / b for a, b in zip(found[1:], speeds[FLOAT][1:], strict=True)
            ),
            "weight_mb": weight_bytes(models[name].config).total / 1e6,
        }
        for name, found in speeds.items()
    ]


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    """Command-line flags; wrong ones end the program with one line."""
    parser = harness.flag_parser("benchmarks.int8_experts", __doc__, repeats=15)
    parser.add_argument("--size", choices=[*SIZES], default="2b")
    parser.add_argument("--tokens", help="comma-separated numbers, in place of 1,16,256,2048")
    parser.add_argument("--workdir", help="of a trained model, for text")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    flags = parse_flags(argv)
    keep_freed_memory()
    dtype = jnp.dtype("float32" if platform() == "cpu" else "bfloat16")
    tokens = [int(n) for n in flags.tokens.split(",")] if flags.tokens else TOKENS
    report: dict[str, Any] = {**harness.device_header(), "dtype": dtype.name, "size": flags.size}
    size = SIZES[flags.size]
    rows = []
    for n in tokens:
        rows += layer_rows(size._replace(tokens=n), dtype, flags.repeats)
    report["layer"] = rows
    print(harness.table(rows), flush=True)
    if flags.workdir is not None:
        report["generation"] = generation_rows(flags.workdir, flags.repeats)
        print(f"\n{harness.table(report['generation'])}", flush=True)
    harness.write(report, flags.json)


if __name__ == "__main__":
    main()
