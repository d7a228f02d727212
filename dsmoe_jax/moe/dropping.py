"""Dropping: assignments above a capacity are taken back, as pure functions of a routing.

A dropped assignment goes to nobody (expert E, gate 0): its token keeps the residual stream, the
shared experts and its other experts.  Every assignment is either computed or in the `Ledger`.
What is computed is counted where the experts do it: sent = computed + dropped is no definition.
The balance terms see the routing before anything is dropped.

Shapes: B sequences, S their length, T = B*S tokens, E routed experts, K activated per token,
N = T*K assignments, G experts or devices that have a capacity, P position buckets.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import MoEConfig
from dsmoe_jax.moe.kernels import native
from dsmoe_jax.moe.types import Routing, count_load

POSITION_BUCKETS = 8  # equal parts of a sequence
REASONS = ("expert_capacity", "device_capacity")  # what was full


class Ledger(NamedTuple):
    """What became of the assignments to experts, all float32; sent = computed + dropped.

    Attributes:
      sent_E: to each expert by the router.
      computed_E: that reached the expert.
      dropped_E: taken back because the expert, or its device, was over its capacity.
      dropped_D: the same by device (of `expert_groups`);
      dropped_P: by the position of the token in its sequence;
      dropped_R: by reason, see `REASONS`.
    """

    sent_E: jax.Array
    computed_E: jax.Array
    dropped_E: jax.Array
    dropped_D: jax.Array
    dropped_P: jax.Array
    dropped_R: jax.Array


class Policy(NamedTuple):
    """Who has a capacity, and who goes first.

    Attributes:
      by_device: the capacity is that of each of `expert_groups` devices, not of each expert.
      by_score: the assignments with the largest affinities stay; else the earliest tokens, and all
        tokens' first choices before any second choice.
      protects: the sequences of `protected_share` lose nothing, even above the capacity.
    """

    by_device: bool = False
    by_score: bool = False
    protects: bool = False


POLICIES: dict[str, Policy] = {
    "position": Policy(),  # GShard (2006.16668 algorithm 1), Switch (2101.03961 section 2.2)
    "probability": Policy(by_score=True),
    "device": Policy(by_device=True, by_score=True, protects=True),  # V2 section 2.2.4
}


def get_policy(config: MoEConfig, key: str = "drop_policy") -> Policy:
    """The drop policy of a config; `key` is what the user calls it.

    Raises:
      ValueError: for an unknown name, or a device budget without devices.
    """
    name = config.drop_policy
    if name not in POLICIES:
        raise ValueError(f"model.moe.{key}={name!r}: must be one of {sorted(POLICIES)}")
    if POLICIES[name].by_device and config.expert_groups == 1:
        raise ValueError(
            f"model.moe.expert_groups=1: with {key}={name!r} it is the number of devices,"
            " must be > 1"
        )
    return POLICIES[name]


def in_evaluation(config: MoEConfig) -> MoEConfig:
    """The config with evaluation's capacity factor and policy in the place of training's."""
    return dataclasses.replace(
        config,
        capacity_factor=config.evaluation_capacity_factor,
        drop_policy=config.evaluation_drop_policy or config.drop_policy,
    )


def check_policies(config: MoEConfig, *, scored: bool) -> None:
    """Refuses policies, in training or evaluation, that cannot be.

    Args:
      config: of the layer.
      scored: whether its router has affinities.

    Raises:
      ValueError: as `get_policy` does, and for a policy that drops by affinities without any.
    """
    key = "evaluation_drop_policy" if config.evaluation_drop_policy else "drop_policy"
    for name, used in (("drop_policy", config), (key, in_evaluation(config))):
        if get_policy(used, name).by_score and used.capacity_factor and not scored:
            raise ValueError(
                f"model.moe.{name}={used.drop_policy!r}: the {config.router} router has no"
                " affinities to drop by; must be 'position'"
            )


def check_room(config: MoEConfig, tokens: int) -> None:
    """Refuses a capacity that is below what a single token may need.

    Args:
      config: of the layer.
      tokens: T, of one forward pass.

    Raises:
      ValueError: naming the factor, with the numbers.
    """
    if not config.n_routed_experts:
        return
    e, k, evaluation = config.n_routed_experts, config.num_experts_per_tok, in_evaluation(config)
    for key, used in (("capacity_factor", config), ("evaluation_capacity_factor", evaluation)):
        by_device, factor = get_policy(used).by_device, used.capacity_factor
        n_groups = config.expert_groups if by_device else e
        who, need = ("device", min(k, e // n_groups)) if by_device else ("expert", 1)
        mean = tokens * k / n_groups
        if factor and factor * mean < need:
            raise ValueError(
                f"model.moe.{key}={factor}: {tokens} tokens are {mean:.4g} assignments for each"
                f" {who}, of which {factor * mean:.4g} would be computed, but one token may need"
                f" {need}; must be at least {need / mean:.4g}, or 0 to drop nothing"
            )


def drop(
    routing: Routing,
    sequence_B: jax.Array,
    factor: float,
    config: MoEConfig,
    shards: int = 1,
) -> tuple[Routing, Ledger]:
    """Takes back what is above `factor` times the mean load of an expert or a device.

    Args:
      routing: of T tokens; padding goes to nobody, so it competes for nothing.
      sequence_B: int32, the place of each sequence in the global batch.
      factor: capacity factor, > 0; the capacity is `ceil(factor T K / G)` assignments.
      config: of the layer: its `drop_policy`, `protected_share` and `expert_groups`.
      shards: into so many parts the batch is cut, each of which has a capacity for its own tokens;
        1: all tokens compete, so that what is dropped does not depend on the mesh.

    Raises:
      ValueError: for sequences that cannot be shared out evenly.
    """
    if len(sequence_B) % shards:
        raise ValueError(
            f"batch of {len(sequence_B)} sequences: must be a multiple of {shards}, the shards"
            " of the mesh that drop tokens each for itself"
        )
    cut = lambda a: a.reshape(shards, -1, *a.shape[1:])  # noqa: E731
    keep = functools.partial(_keep, factor=factor, config=config)
    kept_TK = jax.vmap(keep)(
        cut(routing.ids_TK), jax.tree.map(cut, routing.affinity_TE), cut(sequence_B)
    ).reshape(routing.ids_TK.shape)
    kept = routing._replace(
        ids_TK=jnp.where(kept_TK, routing.ids_TK, config.n_routed_experts),
        gates_TK=jnp.where(kept_TK, routing.gates_TK, 0.0),
    )
    return kept, ledger(routing.ids_TK, kept.ids_TK, len(sequence_B), config)


def most_kept(shape_BS: tuple[int, int], factor: float, config: MoEConfig, n_devices: int) -> int:
    """The most assignments that `drop` leaves a batch on any of n devices that share the experts.

    Args:
      shape_BS: sequences and their length.
      factor, config: as for `drop`.
      n_devices: each holds the next E / n experts.
    """
    policy, (b, s), e = get_policy(config), shape_BS, config.n_routed_experts
    n_groups, capacity = _capacity(b * s, factor, config)
    size, held = e // n_groups, e // n_devices
    if policy.protects and config.protected_share:
        # Which sequences of the global batch a shard has is not known here: maybe only protected
        # ones.  A smaller bound would take the protection away from some of them.
        capacity = max(capacity, b * s * min(config.num_experts_per_tok, size))
    # A device may hold several groups, or parts of some.
    return capacity * max(
        (start + held - 1) // size - start // size + 1 for start in range(0, e, held)
    )


def _capacity(tokens: int, factor: float, config: MoEConfig) -> tuple[int, int]:
    """Experts or devices that have a capacity, and how many assignments it is."""
    n_groups = config.expert_groups if get_policy(config).by_device else config.n_routed_experts
    return n_groups, int(-(-factor * tokens * config.num_experts_per_tok // n_groups))


def _keep(
    ids_TK: jax.Array,
    affinity_TE: jax.Array | None,
    sequence_B: jax.Array,
    factor: float,
    config: MoEConfig,
) -> jax.Array:
    """Which assignments of one batch stay, bool (T, K)."""
    policy, (t, k) = get_policy(config), ids_TK.shape
    n_groups, capacity = _capacity(t, factor, config)
    group_TK = ids_TK // (config.n_routed_experts // n_groups)  # nobody, E, is of group G
    # Small keys stay: all first choices in order of position, then all second ones; or by affinity.
    key_TK = jnp.arange(t * k, dtype=jnp.float32).reshape(k, t).T
    if policy.by_score:
        assert affinity_TE is not None, "the router has no affinities"
        key_TK = -jnp.take_along_axis(affinity_TE, ids_TK, axis=1, mode="clip")
    kept_TK = jnp.zeros((t, k), bool)
    if policy.protects:
        protected_B = protected(sequence_B, config.protected_share)
        protected_T = jnp.repeat(protected_B, t // len(sequence_B))
        kept_TK = jnp.broadcast_to(protected_T[:, None], (t, k))
        key_TK = jnp.where(kept_TK, -jnp.inf, key_TK)
    return kept_TK | (rank_in_group(group_TK, key_TK, n_groups) < capacity)


def protected(sequence_B: jax.Array, share: float) -> jax.Array:
    """Which sequences never lose a token: bool, about that share of the global batch.

    Multiples of the golden ratio modulo 1 are spread so evenly that every micro-batch has its
    share, whether it is a block of the batch or every n-th row of it.  What text stands at a place
    is new in every step.
    """
    golden_B = sequence_B.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(0x80000000)
    return (golden_B >> 8).astype(jnp.float32) * 2**-24 < share


def rank_in_group(group_TK: jax.Array, key_TK: jax.Array, n_groups: int) -> jax.Array:
    """How many assignments of the same group have a smaller key (ties: come earlier); int32."""
    group_N, key_N = group_TK.reshape(-1), jax.lax.stop_gradient(key_TK).reshape(-1)
    order_N = jnp.lexsort((key_N, group_N))  # by group, then by key; stable
    sizes_G = count_load(group_TK, n_groups).astype(jnp.int32)
    start_G = jnp.cumsum(jnp.append(0, sizes_G))  # the last one is that of nobody
    rank_N = jnp.arange(group_N.size) - start_G[group_N[order_N]]
    return jnp.zeros_like(rank_N).at[order_N].set(rank_N).reshape(group_TK.shape)


def ledger(sent_TK: jax.Array, kept_TK: jax.Array, n_sequences: int, config: MoEConfig) -> Ledger:
    """Counts what became of the assignments, for now with the kept ones as the computed ones.

    What goes to nobody (padding) is not sent.  No mask says so, so that XLA counts the kept ones
    and the rows of the dispatch's groups once for both.

    Args:
      sent_TK, kept_TK: experts before and after dropping; the same array: nothing is dropped.
      n_sequences: B.
      config: of the layer.
    """
    e, d, s = config.n_routed_experts, config.expert_groups, len(sent_TK) // n_sequences
    sent_E, none = _sent(sent_TK, config), jnp.zeros
    if kept_TK is sent_TK:
        return Ledger(sent_E, sent_E, none(e), none(d), none(POSITION_BUCKETS), none(len(REASONS)))
    lost_TK = sent_TK != kept_TK
    lost_ids_TK = jnp.where(lost_TK, sent_TK, e)
    bucket_S = jnp.arange(s) * POSITION_BUCKETS // s
    lost_S = lost_TK.sum(axis=1).reshape(-1, s).sum(axis=0).astype(jnp.float32)
    reason = int(get_policy(config).by_device)
    return Ledger(
        sent_E,
        count_load(kept_TK, e),
        dropped_E=count_load(lost_ids_TK, e),
        dropped_D=count_load(lost_ids_TK // (e // d), d),
        dropped_P=none(POSITION_BUCKETS).at[bucket_S].add(lost_S),
        dropped_R=none(len(REASONS)).at[reason].set(lost_TK.sum(dtype=jnp.float32)),
    )


def _sent(ids_TK: jax.Array, config: MoEConfig) -> jax.Array:
    """Assignments to each expert, float32 (E,), by the kernel where one groups the rows anyway."""
    e = config.n_routed_experts
    if native.serves_alone(config.expert_backend):
        return native.rows.group(ids_TK, e)[2].astype(jnp.float32)
    return count_load(ids_TK, e)
