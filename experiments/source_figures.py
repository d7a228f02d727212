"""Numbers of the ledger that need no training: from configs, formulas and pure functions.

Sizes and FLOPs are those of `python -m dsmoe_jax count`.

Shapes: T tokens, D hidden, E routed experts, K activated per token.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.config import (
    Config,
    DropConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    files,
    from_config_dict,
    replace,
)
from dsmoe_jax.config.frozen import FrozenDict
from dsmoe_jax.hardware.chips import CHIPS
from dsmoe_jax.model import size
from dsmoe_jax.moe import dropping
from dsmoe_jax.moe.dispatch.volume import of_fixed_slots
from dsmoe_jax.moe.routers import get_router
from dsmoe_jax.moe.routers.scored import SUB_EXPERTS
from dsmoe_jax.moe.types import RouterInputs, Routing
from dsmoe_jax.planning import economics, papers
from dsmoe_jax.runs import json_files
from dsmoe_jax.study.ledger import Computed

COUNT = "python -m dsmoe_jax count"
ECONOMICS = (
    "python -m dsmoe_jax economics --config=configs/dsmoe_16b.py --config=configs/deepseek_7b.py"
    " --chip={chip} --context={context} --batch={batch}"
)


@functools.cache
def config(name: str) -> Config:
    """A model of the paper, at the paper's size."""
    return from_config_dict(files.load(f"configs/{name}.py"))


def figure(name: str, key: str) -> float:
    """A figure of `papers.TOLERANCE`, of a model that has a config file."""
    model = config(name)
    if key == "flops_per_sequence":
        return size.flops_per_sequence(model)
    return getattr(size.parameters_by_formula(model.model), key)


def flops_percent(name: str, other: str) -> float:
    """FLOPs of a sequence in per cent of those of another model."""
    return 100 * figure(name, "flops_per_sequence") / figure(other, "flops_per_sequence")


def saved_percent(name: str, other: str) -> float:
    """FLOPs of a sequence that a model saves of those of another one, in per cent."""
    return 100 - flops_percent(name, other)


def of_twice_the_capacity(rows: str) -> float:
    """Rows of a layer of `gshard_2b` with fixed slots at capacity 2, times those at capacity 1.

    Args:
      rows: a field of `Volume`.
    """
    tokens = 8192
    chips = 8
    once, twice = (
        of_fixed_slots(
            dataclasses.replace(
                config("gshard_2b").model.moe, drop=DropConfig(capacity_factor=factor)
            ),
            tokens,
            chips,
        )
        for factor in (1.0, 2.0)
    )
    return getattr(twice, rows) / getattr(once, rows)


TITLES = {
    "total": "total parameters",
    "activated": "activated parameters",
    "expert_total": "expert parameters",
    "expert_activated": "activated expert parameters",
    "flops_per_sequence": "FLOPs per sequence",
}


def printed_figures() -> tuple[Computed, ...]:
    """Every size and FLOPs figure that V1 prints, with the tolerance of `count`."""
    return tuple(
        _printed(name, key, digits)
        for name, model in papers.V1.items()
        for key, digits in model.figures.items()
    )


def _printed(name: str, key: str, digits: str) -> Computed:
    reason = papers.MODELS[name].irreproducible.get(key)
    return Computed(
        f"{name}: {TITLES[key]} {digits}",
        TITLES[key],
        functools.partial(figure, name, key),
        papers.accepted(digits, papers.TOLERANCE[key]),
        papers.value(digits),
        COUNT,
        why=f"{name}: {reason}." if reason else "",
    )


def printed_flops_percent(name: str) -> tuple[Computed, ...]:
    """The FLOPs that the paper prints in per cent of those of other models."""
    return tuple(
        Computed(
            f"{name}: {percent} % of the FLOPs of {other}",
            "FLOPs per sequence, % of the other model's",
            functools.partial(flops_percent, name, other),
            papers.accepted(f"{percent}%", 0.003),  # the tolerance of FLOPs
            percent,
            COUNT,
        )
        for other, percent in papers.MODELS[name].flops_percent.items()
    )


# Models of other papers

MIXTRAL = config("mixtral_8x7b").model
DEEPSEEK_V2 = config("deepseek_v2").model
DEEPSEEK_V3 = config("deepseek_v3").model


def parameters(model: ModelConfig, key: str) -> int:
    """Parameters of a model, a field of `size.Parameters`."""
    return getattr(size.parameters_by_formula(model), key)


def share_of_experts(model: ModelConfig) -> float:
    """Routed experts that a token activates, in per cent of all routed ones."""
    return 100 * model.moe.num_experts_per_tok / model.moe.n_routed_experts


def fall_of_shares(models: tuple[ModelConfig, ...]) -> float:
    """The smallest fall of the share of activated experts from a model to the next, in points."""
    return -float(np.diff([share_of_experts(model) for model in models]).max())


def all_experts(model: ModelConfig) -> int:
    """Routed and shared experts of a layer."""
    return model.moe.n_routed_experts + model.moe.n_shared_experts


# Shares of the work


def mixtral_share_of_parameters() -> float:
    """Activated parameters in per cent of the dense model's that activates all experts."""
    return 100 * parameters(MIXTRAL, "activated") / parameters(MIXTRAL, "total")


def mixtral_share_of_flops(sequence_length: int) -> float:
    """The same for training FLOPs of a token, with those of attention scores."""
    sparse = dataclasses.replace(config("dsmoe_2b"), model=MIXTRAL)
    sparse = replace(sparse, **{"data.sequence_length": sequence_length})
    dense = replace(sparse, **{"model.moe.num_experts_per_tok": MIXTRAL.moe.n_routed_experts})
    return 100 * size.train_flops_per_token(sparse) / size.train_flops_per_token(dense)


def two_of_32_of_the_model() -> float:
    """FLOPs of V1's GShard with 32 experts, in per cent of those with all of them activated."""
    wide = {"model.moe.n_routed_experts": 32, "model.moe.router.name": "topk"}
    sparse = replace(config("gshard_2b"), **wide)
    dense = replace(sparse, **{"model.moe.num_experts_per_tok": 32})
    return 100 * size.flops_per_sequence(sparse) / size.flops_per_sequence(dense)


# Decoding


def decoding(model: ModelConfig, context: int = 1) -> economics.Model:
    """The costs of decoding with a model, in bfloat16."""
    return economics.of_model(model, context)


def parameters_read(model: ModelConfig, batch: int) -> float:
    """Parameters that a step of decoding a batch reads, all experts equally likely."""
    costs = decoding(model)
    return (costs.always + costs.touched(batch) * costs.routed) / economics.BFLOAT16


def mixtral_share_of_parameters_read(batch: int) -> float:
    """The same in per cent of those that are read if a token activates all experts."""
    return 100 * parameters_read(MIXTRAL, batch) / parameters_read(MIXTRAL, batch=10**6)


def times_the_memory(name: str, other: str) -> float:
    """Bytes of the weights of a model, times those of another one."""
    return figure(name, "total") / figure(other, "total")


def more_chips(name: str, other: str, chip: str, context: int) -> int:
    """Chips that a model takes for one sequence, less those of another one."""
    one, two = (
        decoding(config(model).model, context).chips(1, CHIPS[chip]) for model in (name, other)
    )
    return one - two


def times_the_speed(name: str, other: str, chip: str, batch: int, context: int) -> float:
    """Tokens/s that a chip decodes with a model, times those with another one."""
    one, two = (
        decoding(config(model).model, context).chip_seconds(batch, CHIPS[chip])
        for model in (name, other)
    )
    return two / one


# Times of a layer's parts

LATENCY = "benchmarks/results/cpu-2core-latency.json"
SHOW_LATENCY = f"python -m benchmarks.latency --read={LATENCY}"
LATENCY_TOKENS = 4096  # the most that are measured: the least of a time is the call itself


@functools.cache
def _latency() -> list[dict[str, Any]]:
    return json_files.read(Path(__file__).parents[1] / LATENCY)["rows"]


def _latency_row(path: str) -> dict[str, Any]:
    """The times of a path of `benchmarks.latency` without a device limit."""
    (row,) = (
        row
        for row in _latency()
        if (row["path"], row["tokens"], row["limit"]) == (path, LATENCY_TOKENS, None)
    )
    return row


def times_as_fast(part: str) -> float:
    """Speed of the compiled path in a part over that of the plain one, on one device."""
    return _latency_row("compiled")[f"{part}_ratio"]


def times_fewer_rows() -> float:
    """Rows that travel if all are collected, over those that a ragged exchange sends."""
    return _latency_row("all_gather")["rows"] / _latency_row("all_to_all")["rows"]


# Functions of routing


def _route(router: str, e: int, k: int, rows: int, seed: int) -> tuple[jax.Array, Routing]:
    """Random logits of 64 tokens, (T, rows * E), and their routing."""
    moe = MoEConfig(
        n_routed_experts=e,
        num_experts_per_tok=k,
        router=RouterConfig(router),
        balance=FrozenDict(),
    )
    tokens = 64
    logits = np.random.default_rng(seed).normal(0, 2, (tokens, rows * e)).astype(np.float32)
    entry, settings = get_router(moe)
    inputs = RouterInputs(jnp.zeros(tokens, jnp.int32))
    return jnp.asarray(logits), entry.route(jnp.asarray(logits), inputs, settings)


def dynamic_router_as_printed() -> float:
    """The largest difference between the scores of two experts for a token, as the blog prints it.

    A softmax over each expert's own sub-expert logits, then their mean.  To six decimals.
    """
    e = 64
    logits, _ = _route("dynamic_specialised", e, 6, SUB_EXPERTS, seed=0)
    scores_TE = jax.nn.softmax(logits.reshape(-1, e, SUB_EXPERTS), axis=-1).mean(axis=-1)
    return round(float(np.ptp(scores_TE, axis=1).max()), 6)


def dynamic_router_as_it_works() -> float:
    """The same of the router `dynamic_specialised`, for the token where it is smallest."""
    _, routing = _route("dynamic_specialised", 64, 6, SUB_EXPERTS, seed=0)
    assert routing.affinity_TE is not None
    return round(float(np.ptp(routing.affinity_TE, axis=1).min()), 6)


def fates_that_depend_on_the_batch() -> int:
    """Assignments of one sequence that are dropped in one batch and kept in another.

    Two batches of four sequences of 16 tokens; the first sequence is the same in both, the others
    are not.  V2's dropping by device at capacity 1.0, without protected sequences.
    """
    sizes = dropping.Sizes(n_experts=16, k=4, n_devices=4)
    drop = DropConfig(policy="device", capacity_factor=1.0, protected_share=0.0)
    first, second = (_route("topk", 16, 4, 1, seed)[1] for seed in (0, 1))
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:16], b[16:]]), first, second)
    kept = [
        dropping.drop(batch, jnp.arange(4), drop, sizes).ids_TK[:16] for batch in (first, mixed)
    ]
    return int((kept[0] != kept[1]).sum())
