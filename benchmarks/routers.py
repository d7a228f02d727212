"""What routing costs: routers, balance terms and drop policies at the demo scale's layer.

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
from dsmoe_jax.config import ModelConfig, MoEConfig
from dsmoe_jax.hardware.host_memory import keep_freed_memory
from dsmoe_jax.moe import dropping, losses
from dsmoe_jax.moe.layer import MoELayer
from dsmoe_jax.moe.routers.policy import policy_loss
from dsmoe_jax.moe.types import Choice, Drawn, RouterInputs, count_load

B, S, D, VOCAB = 16, 128, 48, 2048  # a layer of the demo scale in configs/base.py
LAYER: dict[str, Any] = {
    "n_routed_experts": 63,
    "n_shared_experts": 0,
    "num_experts_per_tok": 7,
    "moe_intermediate_size": 32,
    "expert_balance_factor": 0.0,
}
BASE, WHOLE = "topk_softmax", "whole layer"
SIGMOID = {"router": "topk", "scoring_func": "sigmoid", "norm_topk_prob": True}
GROUPS = {"n_group": 7, "topk_group": 3}
DEVICES = {**GROUPS, "expert_groups": 7}

# What differs from `topk_softmax`; a name says which keys. Each is legal in a config as it is.
CASES: dict[str, dict[str, Any]] = {
    BASE: {},
    "norm_topk_prob": {"norm_topk_prob": True},
    "sigmoid": SIGMOID,
    "loss-free bias": {"bias_update_speed": 1e-3},
    "V2 groups": GROUPS,
    "V3 groups": {**SIGMOID, **GROUPS, "bias_update_speed": 1e-3, "group_score": "top2_sum"},
    "router_jitter": {"router_jitter": 0.01},
    "noisy_topk": {"router": "noisy_topk"},
    "dynamic_specialised": {"router": "dynamic_specialised"},
    "sinkhorn": {"router": "sinkhorn"},
    "expert_choice": {"router": "expert_choice"},
    "reinforce": {"router": "reinforce", "policy_entropy_factor": 0.01},
    "replay_ids": {"router": "replay_ids"},
    "replay": {"router": "replay"},
    "uniform": {"router": "uniform"},
    "gshard, K = 2": {"router": "gshard", "num_experts_per_tok": 2},
    "random_second_expert, K = 2": {
        "router": "gshard",
        "num_experts_per_tok": 2,
        "random_second_expert": True,
    },
    "switch, K = 1": {"router": "switch", "num_experts_per_tok": 1},
    "base, K = 1": {"router": "base", "num_experts_per_tok": 1},
    "hash, K = 1": {"router": "hash", "num_experts_per_tok": 1},
    "hash_table=frequency, K = 1": {
        "router": "hash",
        "num_experts_per_tok": 1,
        "hash_table": "frequency",
    },
    "expert_balance": {"expert_balance_factor": 0.01},
    "expert_balance, global_batch": {
        "expert_balance_factor": 0.01,
        "expert_balance_scope": "global_batch",
    },
    "device_balance": {**DEVICES, "device_balance_factor": 0.05},
    "communication_balance": {**DEVICES, "communication_balance_factor": 0.02},
    "sequence_balance": {"sequence_balance_factor": 1e-4},
    "switch_balance": {"switch_balance_factor": 0.01},
    "router_z": {"router_z_factor": 1e-3},
    "drop by position": {"capacity_factor": 1.0},
    "drop by probability": {"capacity_factor": 1.0, "drop_policy": "probability"},
    "drop by device": {"capacity_factor": 1.0, "drop_policy": "device", "expert_groups": 7},
}


def tokens_BSD() -> jax.Array:
    """Tokens with something in common, so that experts are preferred as by a trained router."""
    rng = np.random.default_rng(0)
    x_BSD = rng.standard_normal((B, S, D)) + 0.5 * rng.standard_normal(D)
    return jnp.asarray(x_BSD, jnp.float32)


def inputs_of(layer: MoELayer) -> RouterInputs:
    """What the layer would hand to its router in training."""
    rng, config = np.random.default_rng(1), layer.config
    e, k = config.n_routed_experts, config.num_experts_per_tok
    token_ids_T = jnp.asarray(rng.integers(VOCAB, size=B * S), jnp.int32)
    replayed = None
    if config.router in ("replay", "replay_ids"):
        ids_TK = np.argsort(rng.random((B * S, e)), axis=1)[:, :k].astype(np.int32)
        replayed = Choice(jnp.asarray(ids_TK), jnp.full((B * S, k), 1 / k))
    return RouterInputs(
        token_ids_T,
        jnp.ones(B * S, bool),
        jax.random.key(0),
        replayed=replayed,
        sequence_B=jnp.arange(B),
    )


def make_layer(settings: dict[str, Any]) -> MoELayer:
    """The layer of a case; with a table of tokens that goes round the experts, if it needs one."""
    config = MoEConfig(**{**LAYER, **settings})
    model = ModelConfig(
        vocab_size=VOCAB, hidden_size=D, initializer_range=D**-0.5, moe=config
    )  # logits of deviation 1
    layer = MoELayer(model, rngs=nnx.Rngs(0))
    if config.hash_table == "frequency":
        layer.table_V[...] = jnp.arange(VOCAB, dtype=jnp.int32) % config.n_routed_experts
    return layer


def routing_loss(layer: MoELayer, x_BSD, inputs: RouterInputs, dgate_TE, nll_BS):
    """A number to differentiate, made of all that routing makes; load, choice and drop ledger."""
    config, valid_BS = layer.config, jnp.ones((B, S), bool)
    routing = layer.route(x_BSD.reshape(-1, D), inputs)
    load_E = count_load(routing.ids_TK, config.n_routed_experts)
    loss = sum(
        weight * losses.term(name, routing, valid_BS, config)
        for name, weight in losses.active_terms(config).items()
    )
    if routing.drawn_T is not None:
        drawn_BS = Drawn(*(x_T.reshape(1, B, S) for x_T in routing.drawn_T))
        loss += policy_loss(drawn_BS, nll_BS, jnp.ones((B, S)), config.policy_entropy_factor)
    kept, ledger = routing, None
    if config.capacity_factor:
        places_B, factor = jnp.arange(B), config.capacity_factor
        kept, ledger = dropping.drop(routing, places_B, factor, config)
    used = (kept.gates_TK * dgate_TE[:, : kept.gates_TK.shape[1]]).sum()
    return loss + used, (load_E, kept.ids_TK, ledger)


def router_case(settings: dict[str, Any]) -> tuple[Callable[[], Any], float]:
    """A call that waits for its results, and max load / mean load of the routing."""
    layer, x_BSD = make_layer(settings), tokens_BSD()
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
    layer, x_BSD = make_layer({}), tokens_BSD()
    graph, params = nnx.split(layer)
    inputs, dy_BSD = inputs_of(layer), jnp.ones_like(x_BSD)

    def loss(params, x_BSD, dy_BSD, inputs: RouterInputs):
        ids_BS, valid_BS = inputs.token_ids_T.reshape(B, S), jnp.ones((B, S), bool)
        y_BSD, stats = nnx.merge(graph, params)(x_BSD, ids_BS, valid_BS, inputs.rng)
        assert stats is not None
        return (y_BSD * dy_BSD).sum(), stats.load_E

    args = params, x_BSD, dy_BSD, inputs
    compiled = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(*args).compile()
    return lambda: jax.block_until_ready(compiled(*args))


def rows_of(seconds: dict[str, list[float]], skew: dict[str, float]) -> list[dict[str, Any]]:
    """A row of results for each case."""
    median, rows = statistics.median, []
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
