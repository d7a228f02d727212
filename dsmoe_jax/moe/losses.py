"""Balance terms: pure functions of a routing, unweighted.

A new term is a function and a line in `TERMS`; its weight, scope and schedule are then
`model.moe.balance.NAME.factor`, `.scope` and `.schedule`.

Every term is a sum of products f P over groups of experts.  The loads f are counted, so they have
no gradient; the mean affinities P have one.  Both are means over the valid tokens of a scope: each
sequence by itself (the term is then the mean over the sequences), each document of each sequence
(the mean over the documents), or the global batch.  A sequence is a packed row.  Each balance term
is exactly 1 for a uniform routing.

The batch may be computed in parts (micro-batches), each of whole sequences.  A layer reports the
`TermSums` of its tokens; the values of all parts add up to the term, and so do their gradients,
because P is a sum over tokens.  In scope `global_batch`, f of the whole batch must be known first:
a first pass counts it.

Shapes: B sequences, S their length, T = B*S tokens, E routed experts, K activated per token,
G groups of experts that a term balances (E, or the devices), L MoE layers.  Identity experts
(moe/identity) are among the E, since the router chooses them too.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import BalanceTerm, MoEConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.config.moe import SCOPES
from dsmoe_jax.moe.schedules import Progress, multiple
from dsmoe_jax.moe.types import Routing


class Factors(NamedTuple):
    """The two factors of a term, by token.

    Attributes:
      sent_TG: number of assignments of a token to each group; None for a term in which f is
        always 1.
      affinity_TG: affinity of a token for each group; the mean over tokens is P.
      scale: f is the mean of `sent_TG` over tokens times this, 1 for an even load.
    """

    sent_TG: jax.Array | None
    affinity_TG: jax.Array
    scale: float = 1.0


class TermSums(NamedTuple):
    """Contribution of a part of the batch to a balance term; all are sums.

    Attributes:
      of_sequences, of_documents: f P of each, in the scopes `sequence` and `document`; None in the
        others.
      sent_G, affinity_G: over tokens, in the scope `global_batch`; None in the others, and sent_G
        for a term that counts no load.
    """

    of_sequences: jax.Array | None = None
    of_documents: jax.Array | None = None
    sent_G: jax.Array | None = None
    affinity_G: jax.Array | None = None


class WholeBatch(NamedTuple):
    """Counts over the whole batch that the value of a part depends on.

    Attributes:
      sequences, documents: number of those with a valid token.
      tokens: number of valid ones.  All three are (L,) where layers see different tokens.
      sent_LG: the sum of all parts' `sent_G` by term; None: the part is the whole.
    """

    sequences: jax.Array
    documents: jax.Array
    tokens: jax.Array
    sent_LG: dict[str, jax.Array] | None = None


class Devices(NamedTuple):
    """Placement of the experts on devices: D equal groups, of which a token may use `limit`.

    `n_identity` of the router's last choices are identity experts, which are on no device.
    """

    n: int
    limit: int
    n_identity: int = 0


def expert_balance(routing: Routing, devices: Devices) -> Factors:
    """Expert-level balance loss `sum_i f_i P_i` (V1 eqs. 12-14).

    f_i = E / (K T) * #{tokens that select i}, P_i = mean_t s_it.
    """
    del devices
    return _by_expert(routing.counted_TK, routing)


def sequence_balance(routing: Routing, devices: Devices) -> Factors:
    """V3's complementary sequence-wise balance loss `sum_i f_i P_i` (V3 eqs. 17-20).

    As `expert_balance`, but f_i = E / (K T) * #{tokens whose K largest plain scores include i}:
    what a bias or a limit to groups changes of the choice does not count.
    """
    del devices
    best_TK = routing.counted_TK if routing.best_TK is None else routing.best_TK
    return _by_expert(best_TK, routing)


def switch_balance(routing: Routing, devices: Devices) -> Factors:
    """Switch's load balancing loss `E sum_i f_i P_i` (2101.03961 eqs. 4-6).

    f_i is the share of the tokens whose first choice is i (for K > 1, GShard's l_aux times E).
    """
    del devices
    affinity_TE = _affinity(routing)
    e = affinity_TE.shape[1]
    return Factors(jax.nn.one_hot(routing.counted_TK[:, 0], e), affinity_TE, scale=e)


def device_balance(routing: Routing, devices: Devices) -> Factors:
    """Device-level balance loss `sum_d f'_d P'_d` (V1 eqs. 15-17).

    f'_d is the mean of f_i over the experts of device d, P'_d the sum of their P_i.  With identity
    experts both are relative to the share of the routed ones among all choices, so that uniform
    routing gives 1 all the same.
    """
    ids_TK = routing.counted_TK
    sent_TG = _by_device(_sent(ids_TK, routing), devices).sum(axis=-1)
    affinity_TG = _by_device(_affinity(routing), devices).sum(axis=-1)
    n_choices = _affinity(routing).shape[1]
    routed = (n_choices - devices.n_identity) / n_choices
    return Factors(sent_TG, affinity_TG, scale=devices.n / ids_TK.shape[1] / routed**2)


def communication_balance(routing: Routing, devices: Devices) -> Factors:
    """Communication balance loss `sum_d f''_d P''_d` (V2 eqs. 29-31).

    f''_d = D / (M T) * #{tokens that are sent to device d}: a token with three experts on a device
    travels there once.  A token reaches at most M devices (`topk_group`, or K if that is less).
    """
    ids_TK = routing.counted_TK
    sent_TG = _by_device(_sent(ids_TK, routing), devices).max(axis=-1)
    affinity_TG = _by_device(_affinity(routing), devices).sum(axis=-1)
    return Factors(sent_TG, affinity_TG, scale=devices.n / min(devices.limit, ids_TK.shape[1]))


def router_z(routing: Routing, devices: Devices) -> Factors:
    """Router z-loss `mean_t (log sum_i exp logits_ti)^2`, which keeps logits small (ST-MoE eq. 5).

    It counts no load: it is a mean over tokens, or of the means of sequences or documents.
    """
    del devices
    assert routing.logits_TE is not None, "the router has no logits"
    return Factors(None, jnp.square(jax.nn.logsumexp(routing.logits_TE, axis=-1))[:, None])


def _affinity(routing: Routing) -> jax.Array:
    assert routing.affinity_TE is not None, "the router has no affinities"
    return routing.affinity_TE


def _by_expert(ids_TK: jax.Array, routing: Routing) -> Factors:
    """The factors of a term that counts these experts."""
    sent_TE = _sent(ids_TK, routing)
    return Factors(sent_TE, _affinity(routing), scale=sent_TE.shape[1] / ids_TK.shape[1])


def _sent(ids_TK: jax.Array, routing: Routing) -> jax.Array:
    """1 where an expert is one of these, (T, E)."""
    return jax.nn.one_hot(ids_TK, _affinity(routing).shape[1]).sum(axis=1)


def _by_device(x_TE: jax.Array, devices: Devices) -> jax.Array:
    """The experts in equal groups: (T, D, experts of a device)."""
    t, n_choices = x_TE.shape
    return x_TE[:, : n_choices - devices.n_identity].reshape(t, devices.n, -1)


def _has_devices(term: BalanceTerm, moe: MoEConfig, key: str) -> None:
    """Refuses a device term on one device."""
    want = "there is nothing to balance on one device; model.moe.expert_groups must be > 1"
    require(moe.expert_groups > 1, f"{key}.factor", term.factor, want)


def _devices_are_groups(term: BalanceTerm, moe: MoEConfig, key: str) -> None:
    """Refuses a communication term whose devices are not the groups that limit a token."""
    require(
        moe.expert_groups == moe.router.n_group,
        f"{key}.factor",
        term.factor,
        "counts the devices that a token is sent to, at most topk_group (V2 eq. 29):"
        f" expert_groups={moe.expert_groups} must equal n_group={moe.router.n_group}",
    )


class Term(NamedTuple):
    """A balance term in the registry: its function, and all that others must know of it.

    Attributes:
      factors: `(routing, devices) -> Factors`.
      counts_load: f is counted, so that the scope `global_batch` needs all micro-batches' loads.
      balances: acts on the load, so it is refused for a router whose load is even by construction.
      scopes: those that it can have.
      check: `(term, moe, key)`, refuses configs that the term does not fit; None: it fits all.
    """

    factors: Callable[[Routing, Devices], Factors]
    counts_load: bool = True
    balances: bool = True
    scopes: tuple[str, ...] = SCOPES
    check: Callable[[BalanceTerm, MoEConfig, str], None] | None = None


TERMS: dict[str, Term] = {
    "expert": Term(expert_balance),
    "device": Term(device_balance, check=_has_devices),
    "communication": Term(communication_balance, check=_devices_are_groups),
    "sequence": Term(sequence_balance, scopes=("sequence", "document")),
    "switch": Term(switch_balance),
    "router_z": Term(router_z, counts_load=False, balances=False),
}


def check(moe: MoEConfig, router_name: str, *, learned: bool, balanced: bool) -> None:
    """Refuses unknown balance terms, and those that have nothing to balance in this router.

    Args:
      moe: config of the layer.
      router_name: of its router.
      learned: whether the router has affinities.
      balanced: whether its load is even by construction.

    Raises:
      ValueError: naming the term.
    """
    for name, term in moe.balance.items():
        key = f"model.moe.balance.{name}"
        if name not in TERMS:
            close = difflib.get_close_matches(name, TERMS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the terms are {', '.join(TERMS)}"
            raise ValueError(f"{key}.factor={term.factor!r}: no such balance term; {hint}")
        line = TERMS[name]
        require(
            learned and not (balanced and line.balances),
            f"{key}.factor",
            term.factor,
            f"the {router_name} router has no affinities to balance; must be {key}=None",
        )
        scopes = line.scopes
        require(term.scope in scopes, f"{key}.scope", term.scope, f"must be one of {scopes}")
        if line.check is not None:
            line.check(term, moe, key)


def sums(
    name: str, routing: Routing, segment_ids_BS: jax.Array, scope: str, devices: Devices
) -> TermSums:
    """Contribution of these tokens to a balance term.

    Args:
      name: of the term.
      routing: with affinities, of the T tokens.
      segment_ids_BS: the document of each token, 0 for padding, which counts nowhere; the tokens of
        a document stand together.  A mask of the valid tokens is one document a sequence.
      scope: one of `SCOPES`.
      devices: of the layer.
    """
    b, s = segment_ids_BS.shape
    valid_BS1 = (segment_ids_BS > 0).reshape(b, s, 1).astype(jnp.float32)
    sent_TG, affinity_TG, scale = TERMS[name].factors(routing, devices)
    affinity_BSG = affinity_TG.reshape(b, s, -1) * valid_BS1
    sent_BSG = None
    if sent_TG is not None:
        sent_BSG = jax.lax.stop_gradient(sent_TG.reshape(b, s, -1) * valid_BS1)
    if scope == "document":
        return TermSums(
            of_documents=_document_products(sent_BSG, affinity_BSG, segment_ids_BS, scale)
        )
    sent_BG = None if sent_BSG is None else (sent_BSG * scale).sum(axis=1)
    affinity_BG = affinity_BSG.sum(axis=1)
    if scope == "global_batch":
        sent_G = None if sent_BG is None else sent_BG.sum(axis=0)
        return TermSums(sent_G=sent_G, affinity_G=affinity_BG.sum(axis=0))
    tokens_B1 = jnp.maximum(valid_BS1.sum(axis=1), 1.0)  # a sequence of padding gives 0
    f_BG = 1.0 if sent_BG is None else sent_BG / tokens_B1
    return TermSums(of_sequences=(f_BG * affinity_BG / tokens_B1).sum())


def _document_products(
    sent_BSG: jax.Array | None, affinity_BSG: jax.Array, segment_ids_BS: jax.Array, scale: float
) -> jax.Array:
    """Sum over the documents of f P."""
    # Written as a sum over tokens, sum_t f_d(t) s_t / n_d(t): P, through which the gradient flows,
    # is never summed by document, which would be a scatter.
    within = _documents(segment_ids_BS)
    valid_BS1 = (segment_ids_BS > 0)[:, :, None].astype(jnp.float32)
    tokens_BS1 = jnp.maximum(_over_document(valid_BS1, within), 1.0)
    part_BSG = affinity_BSG / tokens_BS1
    if sent_BSG is not None:
        part_BSG *= _over_document(sent_BSG, within) * scale / tokens_BS1
    return part_BSG.sum(axis=1).sum()  # in two steps: one sum of all the small numbers rounds more


def _begins(segment_ids_BS: jax.Array) -> jax.Array:
    """Mask of the first token of each document, and of the padding."""
    ids_BS = segment_ids_BS.astype(jnp.int32)
    return jnp.diff(ids_BS, axis=1, prepend=-1) != 0


def _documents(segment_ids_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The places where each token's document begins and ends (behind its last token)."""
    s = segment_ids_BS.shape[1]
    begins_BS = _begins(segment_ids_BS)
    place_S = jnp.arange(s)
    first_BS = jax.lax.cummax(jnp.where(begins_BS, place_S, 0), axis=1)
    next_BS = jnp.where(begins_BS, place_S, s)[:, 1:]
    next_BS = jnp.pad(next_BS, ((0, 0), (0, 1)), constant_values=s)
    return first_BS, jax.lax.cummin(next_BS, axis=1, reverse=True)


def _over_document(counts_BSG: jax.Array, within: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Each token's sum over its document, of whole numbers."""
    # Whole numbers: the difference of two running sums is exact, and costs no (S, S) array.
    first_BS, end_BS = within
    before_BSG = jnp.pad(jnp.cumsum(counts_BSG, axis=1), ((0, 0), (1, 0), (0, 0)))

    def at(place_BS: jax.Array) -> jax.Array:
        return jnp.take_along_axis(before_BSG, place_BS[:, :, None], axis=1)

    return at(end_BS) - at(first_BS)


def layer_sums(routing: Routing, segment_ids_BS: jax.Array, moe: MoEConfig) -> dict[str, TermSums]:
    """Contribution of these tokens to each balance term of a layer, by name; see `sums`."""
    devices = Devices(moe.expert_groups, moe.router.topk_group, moe.n_identity_experts)
    return {
        name: sums(name, routing, segment_ids_BS, term.scope, devices)
        for name, term in in_order(moe.balance).items()
    }


def whole_batch(
    segment_ids_BS: jax.Array, sent_LG: dict[str, jax.Array] | None = None
) -> WholeBatch:
    """Counts over a batch; with `sent_LG` if it is computed in parts."""
    valid_BS = segment_ids_BS > 0

    def count(which: jax.Array) -> jax.Array:
        return jnp.maximum(which.sum(dtype=jnp.float32), 1.0)

    return WholeBatch(
        sequences=count(valid_BS.any(axis=1)),
        documents=count(_begins(segment_ids_BS) & valid_BS),
        tokens=count(valid_BS),
        sent_LG=sent_LG,
    )


def value(name: str, part: TermSums, whole: WholeBatch) -> jax.Array:
    """Value of a part of the batch; the values of all parts add up to the term.

    A leading layer axis of the part is kept.
    """
    if part.of_sequences is not None:
        return part.of_sequences / whole.sequences
    if part.of_documents is not None:
        return part.of_documents / whole.documents
    assert part.affinity_G is not None
    sent_G = part.sent_G
    if sent_G is not None and whole.sent_LG is not None:
        sent_G = whole.sent_LG[name]
    tokens = whole.tokens[..., None]
    f_G = 1.0 if sent_G is None else sent_G / tokens
    return (f_G * part.affinity_G / tokens).sum(axis=-1)


def in_order(balance: Mapping[str, BalanceTerm]) -> dict[str, BalanceTerm]:
    """The terms of a config as `TERMS` orders them.

    They are added up in this order, so that the sum does not depend on how a config was written.
    """
    return {name: balance[name] for name in TERMS if name in balance}


def counted_over_batch(balance: Mapping[str, BalanceTerm]) -> list[str]:
    """The terms whose loads are counted over the global batch."""
    return [
        name
        for name, term in in_order(balance).items()
        if term.scope == "global_batch" and TERMS[name].counts_load
    ]


def weights_at(balance: Mapping[str, BalanceTerm], progress: Progress) -> dict[str, jax.Array]:
    """The weights of the terms at a step of the run: factor times schedule."""
    return {
        name: term.factor * multiple(term.schedule, progress)
        for name, term in in_order(balance).items()
    }
