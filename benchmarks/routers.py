"""Cost of routing: routers, balance terms and drop policies at the demo scale's layer.

    python -m benchmarks.routers --json=benchmarks/results/NAME.json

A case is a router with what comes with it, forward and the gradients of tokens and router matrix,
without dispatch and experts: what a config adds to a layer. One process, interleaved: in every
round each case runs once, and `ratio` is the median over rounds of (case / `topk_softmax` without
terms in the same round). `share_of_layer` is what a case takes more (or less) than `topk_softmax`,
over the time of the whole routed layer, experts and all gradients included, in the same round.
Routers for one or two experts a token are timed as such; beside `switch` they are to be compared.

Shape suffixes: B sequences, S their length, T = B*S tokens, D hidden, E routed experts, K activated
(of a token).
"""

import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import harness
from dsmoe_jax.config import Config, replace
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.moe import dropping, kernels, losses, routers
from dsmoe_jax.moe.kernels import RowKernels
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.report import loss_inputs
from dsmoe_jax.moe.routers.policy import PolicySample, policy_loss
from dsmoe_jax.moe.types import MoEInputs, RecordedRouting, RouterInputs, Routing, count_load

B, S, D, VOCAB = 16, 128, 48, 2048  # a layer of the demo scale in configs/base.py
LAYER: dict[str, Any] = {
    "n_routed_experts": 63,
    "n_shared_experts": 0,
    "num_experts_per_tok": 7,
    "moe_intermediate_size": 32,
    "balance.expert": None,
}
BASE, WHOLE = "topk_softmax", "whole layer"
SIGMOID = {"router.scoring_func": "sigmoid", "router.norm_topk_prob": True}
GROUPS = {"router.n_group": 7, "router.topk_group": 3}
DEVICES = {**GROUPS, "expert_groups": 7}

# The keys of `model.moe` in which a case differs from `topk_softmax`, the router "topk".  Each is
# legal in a config as it is.
CASES: dict[str, dict[str, Any]] = {
    BASE: {},
    "norm_topk_prob": {"router.norm_topk_prob": True},
    "sigmoid": SIGMOID,
    "loss-free bias": {"router.bias_update_speed": 1e-3},
    "V2 groups": GROUPS,
    "V3 groups": {
        **SIGMOID,
        **GROUPS,
        "router.bias_update_speed": 1e-3,
        "router.group_score": "top2_sum",
    },
    "router_jitter": {"router.jitter": 0.01},
    "noisy_topk": {"router.name": "noisy_topk"},
    "dynamic_specialised": {"router.name": "dynamic_specialised"},
    "sinkhorn": {"router.name": "sinkhorn"},
    "expert_choice": {"router.name": "expert_choice"},
    "reinforce": {"router.name": "reinforce", "router.options.entropy_factor": 0.01},
    "replay_ids": {"router.name": "replay_ids"},
    "replay": {"router.name": "replay"},
    "uniform": {"router.name": "uniform"},
    "gshard, K = 2": {"router.name": "gshard", "num_experts_per_tok": 2},
    "random_second_expert, K = 2": {
        "router.name": "gshard",
        "num_experts_per_tok": 2,
        "router.options.random_second_expert": True,
    },
    "switch, K = 1": {"router.name": "switch", "num_experts_per_tok": 1},
    "base, K = 1": {"router.name": "base", "num_experts_per_tok": 1},
    "hash, K = 1": {"router.name": "hash", "num_experts_per_tok": 1},
    "hash_table=frequency, K = 1": {
        "router.name": "hash",
        "num_experts_per_tok": 1,
        "router.options.table": "frequency",
    },
    "expert_balance": {"balance.expert.factor": 0.01},
    "expert_balance, global_batch": {
        "balance.expert.factor": 0.01,
        "balance.expert.scope": "global_batch",
    },
    "device_balance": {**DEVICES, "balance.device.factor": 0.05},
    "communication_balance": {**DEVICES, "balance.communication.factor": 0.02},
    "sequence_balance": {"balance.sequence.factor": 1e-4},
    "switch_balance": {"balance.switch.factor": 0.01},
    "router_z": {"balance.router_z.factor": 1e-3},
    "drop by position": {"drop.capacity_factor": 1.0},
    "drop by probability": {"drop.capacity_factor": 1.0, "drop.policy": "probability"},
    "drop by device": {
        "drop.capacity_factor": 1.0,
        "drop.policy": "device",
        "expert_groups": 7,
    },
}


def tokens_BSD() -> jax.Array:
    """Tokens with something in common, so that experts are preferred as by a trained router."""
    rng = np.random.default_rng(0)
    x_BSD = rng.standard_normal((B, S, D)) + 0.5 * rng.standard_normal(D)
    return jnp.asarray(x_BSD, jnp.float32)


def inputs_of(layer: MoELayer) -> RouterInputs:
    """The inputs that the layer would hand to its router in training."""
    rng = np.random.default_rng(1)
    e, k = layer.config.n_routed_experts, layer.config.num_experts_per_tok
    token_ids_T = jnp.asarray(rng.integers(VOCAB, size=B * S), jnp.int32)
    replayed = None
    if routers.get_router(layer.config)[0].needs_recording:
        ids_TK = jnp.asarray(np.argsort(rng.random((B * S, e)), axis=1)[:, :k].astype(np.int32))
        replayed = RecordedRouting(ids_TK, jnp.full((B * S, k), 1 / k), ids_TK, ids_TK)
    return RouterInputs(
        token_ids_T,
        jnp.ones(B * S, bool),
        jax.random.key(0),
        replayed=replayed,
        sequence_ids_B=jnp.arange(B),
    )


def make_layer(settings: dict[str, Any]) -> MoELayer:
    """The layer of a case; a table of tokens, if it has one, goes round the experts."""
    keys = {f"model.moe.{key}": value for key, value in {**LAYER, **settings}.items()}
    moe = replace(Config(), **keys).model.moe
    layer = MoELayer(
        moe,
        hidden_size=D,
        vocab_size=VOCAB,
        initializer_range=D**-0.5,  # logits of deviation 1
        rngs=nnx.Rngs(0),
    )
    table_V = getattr(layer, "table_V", None)
    if table_V is not None:
        table_V[...] = jnp.arange(VOCAB, dtype=jnp.int32) % moe.n_routed_experts
    return layer


def routing_loss(layer: MoELayer, x_BSD, inputs: RouterInputs, dgate_TE, nll_BS):
    """A number to differentiate, made of all that routing makes; load, experts and drop ledger."""
    moe = layer.config
    valid_BS = jnp.ones((B, S), bool)
    row_kernels = kernels.choose_rows(moe.row_kernels, x_BSD.dtype)
    routing, _ = layer.route(x_BSD.reshape(-1, D), inputs, row_kernels)
    load_E = count_load(routing.ids_TK, moe.n_routed_experts)
    terms, sample = loss_inputs(routing, valid_BS, moe)
    whole = losses.whole_batch(valid_BS)
    loss = sum(
        moe.balance[name].factor * losses.value(name, part, whole) for name, part in terms.items()
    )
    if sample is not None:
        sample_LBS = PolicySample(*(x_BS[None] for x_BS in sample))
        entropy_factor = routers.get_router(moe)[1].option("entropy_factor")
        loss += policy_loss(sample_LBS, nll_BS, jnp.ones((B, S)), entropy_factor)
    kept, ledger = dropped(layer, routing, row_kernels)
    used = (kept.gates_TK * dgate_TE[:, : kept.gates_TK.shape[1]]).sum()
    return loss + used, (load_E, kept.ids_TK, ledger)


def dropped(
    layer: MoELayer, routing: Routing, row_kernels: RowKernels
) -> tuple[Routing, dropping.Ledger | None]:
    """The routing after dropping, and its ledger; as it was, and None, without dropping."""
    drop = layer.config.drop
    if drop is None:
        return routing, None
    sizes = dropping.sizes_of(layer.config)
    kept = dropping.drop(routing, jnp.arange(B), drop, sizes)
    computed_E = count_load(kept.ids_TK, sizes.n_experts)  # no expert is here to count it
    ledger = dropping.ledger(
        routing.ids_TK, kept.ids_TK, computed_E, B, drop, sizes, row_kernels.count
    )
    return kept, ledger


def router_case(settings: dict[str, Any]) -> tuple[Callable[[], Any], float]:
    """A call that waits for its results, and max load / mean load of the routing."""
    layer = make_layer(settings)
    x_BSD = tokens_BSD()
    graph, router, rest = nnx.split(layer, nnx.PathContains("router_ED"), ...)
    rng = np.random.default_rng(2)
    dgate_TE = jnp.asarray(rng.standard_normal((B * S, LAYER["n_routed_experts"])), jnp.float32)
    nll_BS = jnp.asarray(rng.gamma(4, 1, (B, S)), jnp.float32)

    def loss(router, x_BSD, rest, *args):
        return routing_loss(nnx.merge(graph, router, rest), x_BSD, *args)

    args = router, x_BSD, rest, inputs_of(layer), dgate_TE, nll_BS
    compiled = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(*args).compile()
    load_E = compiled(*args)[1][0]
    return lambda: jax.block_until_ready(compiled(*args)), float(load_E.max() / load_E.mean())


def whole_layer_case() -> Callable[[], Any]:
    """The routed layer with `topk_softmax`: router, dispatch, experts, and all gradients."""
    layer = make_layer({})
    graph, params = nnx.split(layer)
    x_BSD = tokens_BSD()
    by_token = inputs_of(layer)
    ids_BS = by_token.token_ids_T.reshape(B, S)
    inputs = MoEInputs(ids_BS, jnp.ones((B, S), bool), by_token.rng)

    def loss(params, x_BSD, dy_BSD, inputs: MoEInputs):
        y_BSD, report = nnx.merge(graph, params)(x_BSD, inputs)
        assert report is not None
        return (y_BSD * dy_BSD).sum(), report.logged.load_E

    args = params, x_BSD, jnp.ones_like(x_BSD), inputs
    compiled = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


def rows_of(seconds: dict[str, list[float]], skew: dict[str, float]) -> list[dict[str, Any]]:
    """A row of results for each case."""
    median = statistics.median
    rows = []
    for name, times in seconds.items():
        rounds = list(zip(times, seconds[BASE], seconds[WHOLE], strict=True))
        rows.append(
            {
                "case": name,
                "ms": 1e3 * median(times),
                "ratio": harness.ratio(times, seconds[BASE]),
                "share_of_layer": None
                if name in (WHOLE, BASE)
                else median((t - base) / whole for t, base, whole in rounds),
                "rounds": len(times),
                "max_load_over_mean": skew.get(name),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    kept = keep_freed_memory()  # before the first call into XLA
    flags = harness.flag_parser("benchmarks.routers", __doc__, repeats=51).parse_args(argv)
    runs, skew = {WHOLE: whole_layer_case()}, {}
    for name, settings in CASES.items():
        print(f"compiling {name}", file=sys.stderr)
        runs[name], skew[name] = router_case(settings)
    rows = rows_of(harness.interleaved(runs, flags.repeats), skew)
    report = {
        **harness.device_header(),
        "freed_memory_kept": kept,
        "repeats": flags.repeats,
        "tokens": B * S,
        "hidden_size": D,
        **LAYER,
        "cases": CASES,
        "rows": rows,
    }
    print(harness.table(rows))
    harness.write(report, flags.json)


if __name__ == "__main__":
    main()
