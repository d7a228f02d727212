"""What the metrics of routing cost, which every run has: the demo training step with and without.

    python -m benchmarks.router_metrics --json=benchmarks/results/NAME.json
    python -m benchmarks.router_metrics --scale=proxy --layers=2 --sequences=1   # a wider model

Without: the MoE layer reports nothing but its balance terms, which are part of the loss; load,
ledger, entropy, gates, router z and rows by device are constants. In one process, interleaved, on
text by chance. `ratio` is the median over rounds of (with / without in the same round), `ratio_min`
that of the two minima. What the host adds is beside it: fetching a step's numbers, and writing a
row (JSON and TensorBoard), which is done while the device is at work on the next step.

Shape suffixes: B sequences, S positions, V vocabulary, E routed experts, D devices of the config.
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

import configs
from benchmarks import harness
from dsmoe_jax.config import Config, from_config_dict, replace
from dsmoe_jax.host_memory import keep_freed_memory
from dsmoe_jax.moe import capacity, dispatch, losses
from dsmoe_jax.moe.layer import MoELayer, RouterStats
from dsmoe_jax.training.metrics import MetricsLog, RunningLoad, training_row
from dsmoe_jax.training.step import init_state, make_train_step


def bare(self: MoELayer, routing, kept_TK, valid_BS, ledger, exchange) -> RouterStats:
    """`MoELayer.stats` without what is only logged."""
    del kept_TK, ledger
    moe, none = self.config, jnp.zeros
    e, d = moe.n_routed_experts, moe.expert_groups
    reasons, buckets = len(capacity.REASONS), capacity.POSITION_BUCKETS
    nothing = capacity.Ledger(none(e), none(e), none(e), none(d), none(buckets), none(reasons))
    terms = {name: losses.part(name, routing, valid_BS, moe) for name in losses.active_terms(moe)}
    unseen = dispatch.Exchange(none(e), *(None if x is None else none(()) for x in exchange[1:]))
    return RouterStats(none(()), none(e), {}, terms, nothing, none(d), unseen)


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
    """A full batch of tokens by chance."""
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


def step_case(config: Config) -> tuple[Callable[[], Any], Any]:
    """A call of the compiled training step that waits for its results, and its metrics."""
    batch, state = make_batch(config), init_state(config)
    step = make_train_step(config, np.ones(config.model.vocab_size, np.int32))
    compiled = jax.jit(step).lower(state, batch).compile()
    _, metrics = compiled(state, batch)
    return lambda: jax.block_until_ready(compiled(state, batch)), jax.device_get(metrics)


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


def rows_of(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row of results for each step."""
    base = seconds["without"]
    return [
        {
            "step": name,
            "ms": 1e3 * statistics.median(times),
            "min_ms": 1e3 * min(times),
            "ratio": harness.ratio(times, base),
            "ratio_min": min(times) / min(base),
        }
        for name, times in seconds.items()
    ]


def main(argv: list[str] | None = None) -> None:
    kept = keep_freed_memory()  # before the first call into XLA
    parser = harness.flag_parser("benchmarks.router_metrics", __doc__, repeats=41)
    parser.add_argument("--scale", default="demo", help="of DeepSeekMoE 2B (default demo)")
    parser.add_argument("--layers", type=int, help="default: the scale's")
    parser.add_argument("--sequences", type=int, help="of a step, default: the scale's batch")
    flags = parser.parse_args(argv)
    config = make_config(flags.scale, flags.layers, flags.sequences)
    with_metrics, metrics = step_case(config)
    with mock.patch.object(MoELayer, "stats", bare):
        without, _ = step_case(config)
    rows = rows_of(harness.interleaved({"with": with_metrics, "without": without}, flags.repeats))
    host = host_ms(config, metrics)
    print(harness.table(rows))
    steps = config.train.log_every
    per_step = host["running_load"] + (host["row"] + host["write"]) / steps
    print(f"host: {per_step:.3f} ms a step with a row every {steps} steps ({host})")
    report = harness.device_header() | {
        "freed_memory_kept": kept,
        "repeats": flags.repeats,
        "config": f"dsmoe_2b:{flags.scale}",
        "layers": config.model.num_hidden_layers,
        "sequences": config.train.global_batch_size,
        "rows": rows,
        "host_ms": host,
        "log_every": steps,
    }
    harness.write(report, flags.json)


if __name__ == "__main__":
    main()
