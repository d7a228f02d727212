"""Cost of the metrics of routing, which every run has.

    python -m benchmarks.router_metrics --json=benchmarks/results/NAME.json
    python -m benchmarks.router_metrics --scale=proxy --layers=2 --sequences=1   # a wider model

Each program is compiled with them, without them, and once more without them (`control`: the ratio
found where there is no difference).  Without: the layer's logged sums are constants, so that XLA
leaves out what they would need; the balance terms, which are part of the loss, stay.  All are timed
in one process, interleaved, on random tokens:

    step     the training step. What the metrics take is near what the timing cannot resolve, hence
    layers   its MoE layers alone, forward and gradients, with experts that return their input

`ratio` is the median over rounds of (a program / `without` in the same round), `ratio_min` that of
the two minima; `more_ms` the difference of the medians. `share` is that of `layers` in the time of
a step. The host's work is beside it: fetching a step's numbers, and writing a row (JSON and
TensorBoard), while the device is at work on the next step.

Shape suffixes: B sequences, S positions, D hidden, N rows, E routed experts, L MoE layers.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import configs
from benchmarks import harness
from dsmoe_jax.config import Config, from_config_dict, replace
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.moe import experts, losses
from dsmoe_jax.moe import layer as moe_layer
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.report import LoggedSums, logged_sums
from dsmoe_jax.moe.schedules import Progress
from dsmoe_jax.moe.types import MoEInputs
from dsmoe_jax.runs.metrics_log import MetricsLog
from dsmoe_jax.training.rows import RunningLoad, training_row
from dsmoe_jax.training.start import init_state
from dsmoe_jax.training.step import make_train_step

NO_EXPERTS = "benchmark_none"  # an expert backend that returns its rows as they are


def constant_sums(*args) -> LoggedSums:
    """`logged_sums`, but all of them are 0: nothing is computed for the log."""
    shapes = jax.eval_shape(lambda: logged_sums(*args))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def make_config(scale: str, layers: int | None, sequences: int | None) -> Config:
    """DeepSeekMoE 2B at a scale, with another depth or batch; no accumulation."""
    config = from_config_dict(configs.load("dsmoe_2b", scale))
    return replace(
        config,
        **{
            "model.num_hidden_layers": layers or config.model.num_hidden_layers,
            "train.global_batch_size": sequences or config.train.global_batch_size,
            "train.accumulation_steps": 1,
        },
    )


def make_batch(config: Config) -> dict[str, np.ndarray]:
    """A full batch of random tokens."""
    b, s = config.train.global_batch_size, config.data.sequence_length
    tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=(b, s + 1))
    tokens = tokens.astype(np.int32)
    return {
        "tokens_BS": tokens[:, :-1],
        "targets_BS": tokens[:, 1:],
        "loss_mask_BS": np.ones((b, s), np.float32),
        "segment_ids_BS": np.ones((b, s), np.int32),
        "positions_BS": np.tile(np.arange(s, dtype=np.int32), (b, 1)),
    }


Case = tuple[Callable[[], Any], Any]  # a call that waits for its results, and such results


def step_case(config: Config) -> Case:
    """The compiled training step."""
    batch = make_batch(config)
    state = init_state(config)
    step = make_train_step(config, np.ones(config.model.vocab_size, np.int32))
    return _compiled(step, state, batch)


def layers_case(config: Config) -> Case:
    """The MoE layers of the model and their gradients; routed experts return their input."""
    model = replace(config, **{"model.moe.expert_backend": NO_EXPERTS}).model
    b, s = make_batch(config)["tokens_BS"].shape
    n_layers = len(model.moe_layers)
    inputs = MoEInputs(jnp.zeros((b, s), jnp.int32), jnp.ones((b, s), bool), jax.random.key(2))
    x_BSD = jax.random.normal(jax.random.key(1), (b, s, model.hidden_size))

    def make(key):
        layer = MoELayer(
            model.moe,
            hidden_size=model.hidden_size,
            vocab_size=model.vocab_size,
            initializer_range=model.initializer_range,
            rngs=nnx.Rngs(key),
        )
        return nnx.split(layer)

    def loss(params_L, x_BSD, inputs):
        def layer(x_BSD, params):
            y_BSD, report = nnx.merge(graph, params)(x_BSD, inputs)
            assert report is not None
            return x_BSD + y_BSD, (report.loss_inputs.terms, report.logged)

        y_BSD, (terms, logged) = jax.lax.scan(layer, x_BSD, params_L)
        whole = losses.whole_batch(inputs.valid_BS)
        weights = losses.weights_at(model.moe.balance, Progress(jnp.int32(0), 1))
        balance = sum(
            weight * losses.value(name, terms[name], whole).sum()
            for name, weight in weights.items()
        )
        return jnp.square(y_BSD).mean() + balance, logged

    no_experts = {NO_EXPERTS: experts.Backend(lambda rows_ND, *_: rows_ND)}
    with mock.patch.dict(experts.BACKENDS, no_experts):
        graph = nnx.split(nnx.eval_shape(lambda: nnx.merge(*make(jax.random.key(0)))))[0]
        params_L = jax.vmap(lambda key: make(key)[1])(jax.random.split(jax.random.key(0), n_layers))
        return _compiled(jax.grad(loss, has_aux=True), params_L, x_BSD, inputs)


def _compiled(function: Callable[..., Any], *args: Any) -> Case:
    compiled = jax.jit(function).lower(*args).compile()
    _, seen = compiled(*args)
    return lambda: jax.block_until_ready(compiled(*args)), jax.device_get(seen)


def host_ms(config: Config, metrics: Any, times: int = 50) -> dict[str, float]:
    """Milliseconds of the host: a step's numbers counted, a row made, a row written."""
    running = RunningLoad()
    row = training_row(metrics, config.model)
    with tempfile.TemporaryDirectory() as directory:
        log = MetricsLog(Path(directory), 0)
        work = {
            "running_load": lambda i: running.add(metrics),
            "row": lambda i: training_row(metrics, config.model),
            "write": lambda i: log.write({"step": i} | row),
        }
        found = {}
        for name, call in work.items():
            seconds = []
            for i in range(times):
                start = time.perf_counter()
                call(i)
                seconds.append(time.perf_counter() - start)
            found[name] = 1e3 * statistics.median(seconds)
        log.close()
    return found


def measure(case: Callable[[Config], Case], config: Config, repeats: int) -> tuple[list, Any]:
    """The rows of results of a program with, without, and without again; the first's results."""
    with_metrics, metrics = case(config)
    with mock.patch.object(moe_layer, "logged_sums", constant_sums):
        without, control = (case(config)[0] for _ in range(2))
    calls = {"with": with_metrics, "without": without, "control": control}
    seconds = harness.interleaved(calls, repeats)
    base = seconds["without"]
    name = case.__name__.removesuffix("_case")
    rows = [
        {
            "program": f"{name}, {metrics_are}",
            "ms": 1e3 * statistics.median(times),
            "min_ms": 1e3 * min(times),
            "ratio": harness.ratio(times, base),
            "ratio_min": min(times) / min(base),
            "more_ms": 1e3 * (statistics.median(times) - statistics.median(base)),
        }
        for metrics_are, times in seconds.items()
    ]
    return rows, metrics


def main(argv: list[str] | None = None) -> None:
    kept = keep_freed_memory()  # before the first call into XLA
    parser = harness.flag_parser("benchmarks.router_metrics", __doc__, repeats=101)
    parser.add_argument("--scale", default="demo", help="of DeepSeekMoE 2B (default demo)")
    parser.add_argument("--layers", type=int, help="default: the scale's")
    parser.add_argument("--sequences", type=int, help="of a step, default: the scale's batch")
    flags = parser.parse_args(argv)
    config = make_config(flags.scale, flags.layers, flags.sequences)
    step_rows, metrics = measure(step_case, config, flags.repeats)
    layers_rows, _ = measure(layers_case, config, 2 * flags.repeats)
    share = layers_rows[0]["more_ms"] / step_rows[1]["ms"]
    host = host_ms(config, metrics)
    print(harness.table(step_rows + layers_rows))
    print(f"share of the step that the layers' difference is: {share:.2%}")
    steps = config.train.log_every
    per_step = host["running_load"] + (host["row"] + host["write"]) / steps
    print(f"host: {per_step:.3f} ms a step with a row every {steps} steps ({host})")
    report = harness.device_header() | {
        "freed_memory_kept": kept,
        "repeats": flags.repeats,
        "config": f"dsmoe_2b:{flags.scale}",
        "layers": config.model.num_hidden_layers,
        "sequences": config.train.global_batch_size,
        "rows": step_rows + layers_rows,
        "share": share,
        "host_ms": host,
        "log_every": steps,
    }
    harness.write(report, flags.json)


if __name__ == "__main__":
    main()
