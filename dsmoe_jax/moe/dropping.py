"""Dropping of the assignments above a capacity, as pure functions of a routing.

A dropped assignment becomes unassigned (expert E, gate 0): its token keeps the residual stream, the
shared experts and its other experts.  The `Ledger` counts the computed assignments where the
experts compute them, so that sent = computed + dropped is a check and not a definition.  The
balance terms see the routing before dropping.

Shapes: B sequences, S their length, T = B*S tokens, E routed experts, K activated per token,
N = T*K assignments, D devices (`expert_groups`), G experts or devices that have a capacity, P
position buckets, R reasons.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import DropConfig, MoEConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.moe.types import Routing, count_load, unassign

POSITION_BUCKETS = 8  # equal parts of a sequence
REASONS = ("expert_capacity", "device_capacity")  # what was full


class Ledger(NamedTuple):
    """Counts of the assignments to experts, all float32; sent = computed + dropped.

    Attributes:
      sent_E: sent to each expert by the router.
      computed_E: computed by each expert.
      dropped_E: dropped because the expert, or its device, was above its capacity.
      dropped_D: dropped, by device (of `expert_groups`).
      dropped_P: dropped, by position of the token in its sequence.
      dropped_R: dropped, by reason, see `REASONS`.
    """

    sent_E: jax.Array
    computed_E: jax.Array
    dropped_E: jax.Array
    dropped_D: jax.Array
    dropped_P: jax.Array
    dropped_R: jax.Array


class Policy(NamedTuple):
    """A drop policy: what has a capacity, and which assignments are dropped.

    Attributes:
      by_device: each of `expert_groups` devices has a capacity, not each expert.
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


class Sizes(NamedTuple):
    """Sizes of a layer that dropping needs: E, K and D, and the number of identity experts."""

    n_experts: int
    k: int
    n_devices: int
    n_identity: int = 0

    @property
    def computed(self) -> Fraction:
        """Routed experts of a token if all choices are equally likely: the mean load is of them."""
        return Fraction(self.k * self.n_experts, self.n_experts + self.n_identity)

    def capacities(self, drop: DropConfig) -> int:
        """G, the experts or devices that have a capacity."""
        return self.n_devices if POLICIES[drop.policy].by_device else self.n_experts


def sizes_of(moe: MoEConfig) -> Sizes:
    """The sizes of a layer."""
    k = moe.num_experts_per_tok
    return Sizes(moe.n_routed_experts, k, moe.expert_groups, moe.n_identity_experts)


def check_policies(moe: MoEConfig, *, scored: bool) -> None:
    """Refuses impossible drop policies, in training or evaluation.

    Args:
      moe: config of the layer.
      scored: whether its router has affinities.

    Raises:
      ValueError: for an unknown policy, a device capacity without devices, or a policy that drops
        by affinities where there are none.
    """
    for section, drop in (("drop", moe.drop), ("evaluation_drop", moe.evaluation_drop)):
        if drop is None:
            continue
        key = f"model.moe.{section}.policy"
        require(drop.policy in POLICIES, key, drop.policy, f"must be one of {sorted(POLICIES)}")
        policy = POLICIES[drop.policy]
        require(
            moe.expert_groups > 1 or not policy.by_device,
            "model.moe.expert_groups",
            moe.expert_groups,
            f"with {section}.policy={drop.policy!r} it is the number of devices, must be > 1",
        )
        require(
            scored or not policy.by_score,
            key,
            drop.policy,
            f"the {moe.router.name} router has no affinities to drop by; must be 'position'",
        )


def check_capacity(moe: MoEConfig, tokens: int) -> None:
    """Refuses a capacity that is below what a single token may need.

    Args:
      moe: config of the layer.
      tokens: T, of one forward pass.

    Raises:
      ValueError: naming the factor, with the numbers.
    """
    if not moe.n_routed_experts:
        return
    sizes = sizes_of(moe)
    for section, drop in (("drop", moe.drop), ("evaluation_drop", moe.evaluation_drop)):
        if drop is None:
            continue
        groups = sizes.capacities(drop)
        by_device = POLICIES[drop.policy].by_device
        need = min(sizes.k, sizes.n_experts // groups) if by_device else 1
        mean = float(tokens * sizes.computed / groups)
        require(
            drop.capacity_factor * mean >= need,
            f"model.moe.{section}.capacity_factor",
            drop.capacity_factor,
            f"{tokens} tokens are {mean:.4g} assignments for each"
            f" {'device' if by_device else 'expert'}, of which"
            f" {drop.capacity_factor * mean:.4g} would be computed, but one token may need"
            f" {need}; must be at least {need / mean:.4g}, or model.moe.{section}=None to drop"
            " nothing",
        )


def drop(
    routing: Routing,
    sequence_ids_B: jax.Array,
    config: DropConfig,
    sizes: Sizes,
    shards: int = 1,
    valid_T: jax.Array | None = None,
) -> Routing:
    """Drops what is above `capacity_factor` times the mean load of an expert or a device.

    The capacity is `ceil(capacity_factor n K / G)` assignments for n valid tokens: a batch that was
    filled up with padding loses what it would lose without.

    Args:
      routing: of T tokens; padding is unassigned.
      sequence_ids_B: int32, the place of each sequence in the global batch.
      config: factor, policy and protected share.
      sizes: of the layer.
      shards: equal parts of the batch, each with a capacity for its own tokens; 1: all tokens
        compete, so that what is dropped does not depend on the mesh.
      valid_T: bool, False for padding; None: all are valid.

    Raises:
      ValueError: for a batch that does not divide into the shards.
    """
    if len(sequence_ids_B) % shards:
        raise ValueError(
            f"batch of {len(sequence_ids_B)} sequences: must be a multiple of {shards}, the shards"
            " of the mesh that drop tokens each for itself"
        )
    if valid_T is None:
        valid_T = jnp.ones(len(routing.ids_TK), bool)

    def cut(a: jax.Array) -> jax.Array:
        return a.reshape(shards, -1, *a.shape[1:])

    keep = functools.partial(_keep, config=config, sizes=sizes)
    kept_TK = jax.vmap(keep)(
        cut(routing.ids_TK),
        jax.tree.map(cut, routing.affinity_TE),
        cut(sequence_ids_B),
        cut(valid_T),
    ).reshape(routing.ids_TK.shape)
    return unassign(routing, kept_TK, sizes.n_experts)


def max_kept(shape_BS: tuple[int, int], config: DropConfig, sizes: Sizes, n_shards: int) -> int:
    """The most assignments that `drop` leaves a batch on any of the devices that share the experts.

    Args:
      shape_BS: sequences and their length.
      config, sizes: as for `drop`.
      n_shards: devices of the mesh axis `expert`, each of which holds the next E / n experts.
    """
    policy = POLICIES[config.policy]
    b, s = shape_BS
    groups = sizes.capacities(config)
    capacity = _capacity(b * s, config, sizes)  # padding makes it smaller
    size = sizes.n_experts // groups
    held = sizes.n_experts // n_shards
    if policy.protects and config.protected_share:
        # A shard may hold protected sequences only: which ones it holds is not known here.
        capacity = max(capacity, b * s * min(sizes.k, size))
    # A device may hold several groups, or parts of some.
    starts = range(0, sizes.n_experts, held)
    return capacity * max((start + held - 1) // size - start // size + 1 for start in starts)


def _capacity(tokens: Any, config: DropConfig, sizes: Sizes) -> Any:
    """`ceil(capacity_factor n K / G)`: assignments that one expert or device computes at most.

    With identity experts K is `Sizes.computed`.

    Exact for an int and for a traced int32, which has no float of enough digits.
    """
    # The factor as the user wrote it, in decimals: 0.07 of 100 are 7, as a float a bit more.
    share = Fraction(str(config.capacity_factor)) * sizes.computed / sizes.capacities(config)
    whole, part = divmod(min(share, Fraction(sizes.k)), 1)  # a token has no more than K
    if not part:
        return tokens * whole
    # Numerator times denominator stays below 2^31, and so does every product here.
    part = part.limit_denominator(math.isqrt(2**30 * part.denominator // part.numerator))
    up, down = part.numerator, part.denominator
    rest = tokens % down
    return tokens * whole + tokens // down * up - (-rest * up // down)


def _keep(
    ids_TK: jax.Array,
    affinity_TE: jax.Array | None,
    sequence_ids_B: jax.Array,
    valid_T: jax.Array,
    config: DropConfig,
    sizes: Sizes,
) -> jax.Array:
    """Mask of the assignments of one batch that stay, bool (T, K)."""
    policy = POLICIES[config.policy]
    t, k = ids_TK.shape
    groups = sizes.capacities(config)
    group_TK = ids_TK // (sizes.n_experts // groups)  # unassigned ones, id E, are of group G
    # Small keys stay: all first choices in order of position, then all second ones; or by affinity.
    key_TK = jnp.arange(t * k, dtype=jnp.float32).reshape(k, t).T
    if policy.by_score:
        assert affinity_TE is not None, "the router has no affinities"
        key_TK = -jnp.take_along_axis(affinity_TE, ids_TK, axis=1, mode="clip")
    kept_TK = jnp.zeros((t, k), bool)
    if policy.protects:
        protected_B = protected(sequence_ids_B, config.protected_share)
        protected_T = jnp.repeat(protected_B, t // len(sequence_ids_B))
        kept_TK = jnp.broadcast_to(protected_T[:, None], (t, k))
        key_TK = jnp.where(kept_TK, -jnp.inf, key_TK)
    capacity = _capacity(valid_T.sum(), config, sizes)
    return kept_TK | (rank_in_group(group_TK, key_TK, groups) < capacity)


def protected(sequence_ids_B: jax.Array, share: float) -> jax.Array:
    """Mask of the sequences that lose no token, bool (B,): about that share of the global batch."""
    # Multiples of the golden ratio modulo 1 are spread so evenly that every micro-batch has its
    # share, be it a block of the batch or every n-th row.  The text at a place changes every step.
    golden_B = sequence_ids_B.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(0x80000000)
    return (golden_B >> 8).astype(jnp.float32) * 2**-24 < share


def rank_in_group(group_TK: jax.Array, key_TK: jax.Array, n_groups: int) -> jax.Array:
    """Rank of each assignment in its group by key, int32; ties go to the earlier one."""
    group_N = group_TK.reshape(-1)
    key_N = jax.lax.stop_gradient(key_TK).reshape(-1)
    order_N = jnp.lexsort((key_N, group_N))  # by group, then by key; stable
    sizes_G = count_load(group_TK, n_groups).astype(jnp.int32)
    start_G = jnp.cumsum(jnp.append(0, sizes_G))  # the last one is that of the unassigned
    rank_N = jnp.arange(group_N.size) - start_G[group_N[order_N]]
    return jnp.zeros_like(rank_N).at[order_N].set(rank_N).reshape(group_TK.shape)


def ledger(
    sent_TK: jax.Array,
    kept_TK: jax.Array,
    computed_E: jax.Array,
    n_sequences: int,
    drop: DropConfig | None,
    sizes: Sizes,
    count: Callable[[jax.Array, int], jax.Array] = count_load,
) -> Ledger:
    """Counts assignments sent, computed and dropped; unassigned ones (padding) are not sent.

    Args:
      sent_TK, kept_TK: experts before and after dropping.
      computed_E: rows that each expert computed.
      n_sequences: B.
      drop: policy of the dropping; None: nothing was dropped.
      sizes: of the layer.
      count: `(ids_TK, E) -> assignments of each expert`, the kernel in use.
    """
    e = sizes.n_experts
    d = sizes.n_devices
    sent_E = count(sent_TK, e)
    none_P = jnp.zeros(POSITION_BUCKETS)
    none_R = jnp.zeros(len(REASONS))
    if drop is None:
        return Ledger(sent_E, computed_E, jnp.zeros(e), jnp.zeros(d), none_P, none_R)
    s = len(sent_TK) // n_sequences
    lost_TK = sent_TK != kept_TK
    lost_ids_TK = jnp.where(lost_TK, sent_TK, e)
    bucket_S = jnp.arange(s) * POSITION_BUCKETS // s
    lost_S = lost_TK.sum(axis=1).reshape(-1, s).sum(axis=0).astype(jnp.float32)
    reason = int(POLICIES[drop.policy].by_device)
    return Ledger(
        sent_E,
        computed_E,
        dropped_E=count_load(lost_ids_TK, e),
        dropped_D=count_load(lost_ids_TK // (e // d), d),
        dropped_P=none_P.at[bucket_S].add(lost_S),
        dropped_R=none_R.at[reason].set(lost_TK.sum(dtype=jnp.float32)),
    )
