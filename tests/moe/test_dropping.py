"""Drop policies against plain numpy, the ledger, and what evaluation may not see."""

import functools
import math
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import Config, DropConfig, replace
from dsmoe_jax.moe import dropping
from dsmoe_jax.moe.dropping import Sizes
from dsmoe_jax.moe.layer import MoELayer, check_layer
from dsmoe_jax.moe.types import MoEInputs, RouterInputs, Routing, count_load, unassign
from dsmoe_jax.training.start import state_shapes

B, S, E, K, D = 4, 16, 8, 2, 2
T = B * S
SIZES = Sizes(E, K, D)
PROTECTED = 1  # the one sequence of four: protection goes to the middle of every four


def drop_config(policy, factor=1.0):
    return DropConfig(factor, policy, protected_share=0.25)


def moe_config(**changes):
    """`model.moe` of a config with dotted keys in it changed; D devices, E experts."""
    sizes = {"n_routed_experts": E, "num_experts_per_tok": K, "expert_groups": D}
    dotted = {f"model.moe.{key}": value for key, value in (sizes | changes).items()}
    return replace(Config(), **dotted).model.moe


def skewed_routing(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(T, E)) + np.linspace(3, 0, E)
    s = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    gates, ids = jax.lax.top_k(s, K)
    return Routing(ids, gates / gates.sum(axis=1, keepdims=True), jnp.asarray(s))


@functools.partial(jax.jit, static_argnums=1)
def run(routing, config, first=0, valid_T=None):
    """The routing after dropping, and the ledger of it."""
    n_sequences = len(routing.ids_TK) // S
    places_B = first + jnp.arange(n_sequences)
    kept = dropping.drop(routing, places_B, config, SIZES, valid_T=valid_T)
    computed_E = count_load(kept.ids_TK, E)
    ledger = dropping.ledger(routing.ids_TK, kept.ids_TK, computed_E, n_sequences, config, SIZES)
    return kept, ledger


def numpy_kept(ids, affinity, valid, factor, policy):
    """Fills experts or devices one assignment at a time, in the order of the policy."""
    by_device = policy == "device"
    size = E // D if by_device else 1
    room = np.full(E // size, int(np.ceil(factor * valid.sum() * K / (E // size))))
    slots = [(t, k) for k in range(K) for t in range(T) if valid[t]]
    if policy != "position":
        slots = sorted(sorted(slots), key=lambda a: -affinity[a[0], ids[a]])
    protected = [a for a in slots if by_device and a[0] // S == PROTECTED]
    slots = protected + [a for a in slots if a not in protected]
    kept = np.zeros((T, K), bool)
    for a in slots:
        if room[ids[a] // size] > 0 or a in protected:
            room[ids[a] // size] -= 1
            kept[a] = True
    return kept


@pytest.mark.parametrize("factor", [0.1, 1.0, 1.25])
@pytest.mark.parametrize("policy", list(dropping.POLICIES))
def test_against_numpy(policy, factor):
    routing = skewed_routing()
    valid = np.arange(T) % S < 13
    valid[PROTECTED * S : (PROTECTED + 1) * S] = True
    routing = unassign(routing, jnp.asarray(valid)[:, None], E)
    kept, ledger = run(routing, drop_config(policy, factor), 0, jnp.asarray(valid))
    ids, gates = np.asarray(routing.ids_TK), np.asarray(routing.gates_TK)
    want = numpy_kept(ids, np.asarray(routing.affinity_TE), valid, factor, policy)
    np.testing.assert_array_equal(kept.ids_TK, np.where(want, ids, E))
    np.testing.assert_array_equal(kept.gates_TK, np.where(want, gates, 0))
    lost = ~want & (ids < E)
    np.testing.assert_array_equal(ledger.dropped_E, np.bincount(ids[lost], minlength=E))
    np.testing.assert_array_equal(ledger.sent_E, np.bincount(ids[valid].ravel(), minlength=E))
    np.testing.assert_array_equal(ledger.sent_E, ledger.computed_E + ledger.dropped_E)
    by_bucket = lost.sum(axis=1).reshape(B, 8, S // 8).sum(axis=(0, 2))
    np.testing.assert_array_equal(ledger.dropped_P, by_bucket)
    np.testing.assert_array_equal(ledger.dropped_D, np.bincount(ids[lost] // (E // D), minlength=D))
    by_reason = [0, lost.sum()] if policy == "device" else [lost.sum(), 0]
    np.testing.assert_array_equal(ledger.dropped_R, by_reason)
    assert ledger.dropped_E.sum() > 0


@pytest.mark.parametrize("factor", [0.03, 0.07, 1 / 3, 1.0, 1.1, 1.25, 1.23456, 8.0, 1e6])
def test_a_capacity_is_exact(factor):
    """Against fractions of the decimal number, for batches up to millions of tokens."""
    config = DropConfig(factor)
    n = np.r_[1:60, 2 ** np.arange(6, 22), np.random.default_rng(0).integers(60, 2**22, 40)]
    for sizes in (SIZES, Sizes(63, 7, 9), Sizes(256, 8, 8)):
        share = Fraction(str(factor)) * sizes.k / sizes.n_experts
        want = [min(math.ceil(share * int(i)), int(i) * sizes.k) for i in n]
        found = jax.jit(lambda n, sizes=sizes: dropping._capacity(n, config, sizes))(n)
        np.testing.assert_array_equal(found, want)
        assert [dropping._capacity(int(i), config, sizes) for i in n] == want


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("policy", list(dropping.POLICIES))
def test_padding_takes_no_capacity(policy, shards):
    """Sequences of padding, and padding within, change nothing of what is dropped of the others."""
    routing, config = skewed_routing(3), drop_config(policy, 0.7)
    padded_BS = np.ones((2 * B, S + 5), bool)
    padded_BS[:, S:] = False
    padded_BS.reshape(shards, -1, S + 5)[:, B // shards :] = False
    place_T = np.cumsum(padded_BS.reshape(-1)) - 1  # of a valid token among those without padding
    valid_T = jnp.asarray(padded_BS.reshape(-1))
    padded = unassign(jax.tree.map(lambda a: a[place_T], routing), valid_T[:, None], E)
    # The sequences keep their places in the batch, which decide who is protected.
    ids_B = jnp.arange(2 * B).reshape(2 * shards, -1)
    ids_B = jnp.concatenate([ids_B[:shards], ids_B[shards:]], axis=1).reshape(-1)
    found = dropping.drop(padded, ids_B, config, SIZES, shards, valid_T)
    want = dropping.drop(routing, jnp.arange(B), config, SIZES, shards)
    assert (want.ids_TK == E).any()
    np.testing.assert_array_equal(found.ids_TK[valid_T], want.ids_TK)
    np.testing.assert_array_equal(found.gates_TK[valid_T], want.gates_TK)
    assert (found.ids_TK[~valid_T] == E).all()


@pytest.mark.parametrize("factor", [0.01, 0.5, 1.0])
def test_protected_sequences_lose_nothing_at_any_capacity(factor):
    kept, _ = run(skewed_routing(1), drop_config("device", factor))
    lost_B = np.asarray(kept.ids_TK == E).reshape(B, -1).sum(axis=1)
    assert lost_B[PROTECTED] == 0
    assert np.delete(lost_B, PROTECTED).sum() > 0


def test_a_micro_batch_of_protected_sequences_loses_nothing():
    routing, config = skewed_routing(1), drop_config("device", 0.01)
    places = jnp.arange(1000)
    places_B = places[dropping.protected(places, config.protected_share)][:B]
    kept = dropping.drop(routing, places_B, config, SIZES)
    np.testing.assert_array_equal(kept.ids_TK, routing.ids_TK)
    for n_devices in (1, 2, 4, 8):
        load = np.bincount(np.asarray(kept.ids_TK).ravel() // (E // n_devices))
        assert load.max() <= dropping.max_kept((B, S), config, SIZES, n_devices)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1 / 3, 1.0])
@pytest.mark.parametrize("b", [16, 24, 2048])
def test_the_protected_share_is_that_of_the_global_batch_and_of_its_parts(share, b):
    chosen_B = np.asarray(dropping.protected(jnp.arange(b), share))
    assert abs(chosen_B.sum() - share * b) <= 1
    for n in (2, 4, 8):  # every n-th row, and blocks: neither way has a part without its share
        for parts in (chosen_B.reshape(-1, n).T, chosen_B[: b // n * n].reshape(n, -1)):
            assert np.abs(parts.sum(axis=1) - share * b / n).max() <= 3 + 0.02 * b / n


def test_nothing_is_dropped_when_there_is_room():
    routing = skewed_routing(2)
    for policy in dropping.POLICIES:
        kept, ledger = run(routing, drop_config(policy, float(E)))
        np.testing.assert_array_equal(kept.ids_TK, routing.ids_TK)
        np.testing.assert_array_equal(ledger.dropped_E, np.zeros(E))
        np.testing.assert_array_equal(ledger.sent_E, ledger.computed_E)
    none = dropping.ledger(routing.ids_TK, routing.ids_TK, ledger.sent_E, B, None, SIZES)
    chex.assert_trees_all_equal(none, ledger)


def make_layer(**moe):
    sizes = {"moe_intermediate_size": 4, "expert_backend": "ragged_dot"}
    return MoELayer(
        moe_config(**sizes, **moe),
        hidden_size=8,
        vocab_size=50,
        initializer_range=0.5,
        rngs=nnx.Rngs(0),
    )


def layer_inputs(rng=None, b=B):
    return MoEInputs(jnp.zeros((b, S), jnp.int32), jnp.ones((b, S), bool), rng)


def test_evaluation_depends_on_the_other_sequences_only_if_it_drops():
    x = jax.random.normal(jax.random.key(0), (B, S, 8))

    def last_sequence(layer, rng=None):
        together = layer(x, layer_inputs(rng))[0][-1]
        alone = layer(x[-1:], layer_inputs(rng, b=1))[0][0]
        return np.abs(together - alone).max()

    training_only = make_layer(**{"drop.capacity_factor": 0.5})
    assert last_sequence(training_only) < 1e-5
    ledger = training_only(x, layer_inputs())[1].logged.ledger
    np.testing.assert_array_equal(ledger.computed_E, ledger.sent_E)
    assert ledger.dropped_E.sum() == 0 < ledger.sent_E.sum()
    assert last_sequence(training_only, jax.random.key(0)) > 1e-3
    assert last_sequence(make_layer(**{"evaluation_drop.capacity_factor": 0.5})) > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluation_drop.capacity_factor": 0.7},
        {"evaluation_drop.capacity_factor": 0.7, "evaluation_drop.policy": "device"},
        {"router.name": "expert_choice", "balance.expert": None},
    ],
)
def test_a_batch_that_is_filled_up_is_evaluated_as_without(changes):
    layer = make_layer(**changes)
    x = jax.random.normal(jax.random.key(0), (B, S, 8))
    valid_BS = jnp.arange(B)[:, None] < jnp.full(S, 3)
    full, report = layer(x, layer_inputs()._replace(valid_BS=valid_BS))
    alone, wanted = layer(x[:3], layer_inputs(b=3))
    np.testing.assert_allclose(full[:3], alone, atol=1e-6)
    chex.assert_trees_all_equal(report.logged.ledger, wanted.logged.ledger)
    assert wanted.logged.ledger.sent_E.sum() > 0


@pytest.mark.parametrize("evaluation", ["position", "probability", "device", None])
@pytest.mark.parametrize("training", ["position", "probability", "device", None])
def test_training_and_evaluation_drop_by_sections_of_their_own(training, evaluation):
    """Each loses what `dropping.drop` by its section takes from the same routing; None nothing."""
    drop = None if training is None else drop_config(training, 0.5)
    evaluation_drop = None if evaluation is None else drop_config(evaluation, 0.3)
    layer = make_layer(drop=drop, evaluation_drop=evaluation_drop)
    x = jax.random.normal(jax.random.key(0), (B, S, 8))
    routing, _ = layer.route(x.reshape(-1, 8), RouterInputs(jnp.zeros(T, jnp.int32)))
    for rng, config in ((jax.random.key(0), drop), (None, evaluation_drop)):
        kept, n_lost = routing, 0
        if config is not None:
            kept = dropping.drop(routing, jnp.arange(B), config, SIZES)
            n_lost = (kept.ids_TK == E).sum()
            assert n_lost > 0
        report = layer(x, layer_inputs(rng))[1]
        np.testing.assert_array_equal(report.recorded.ids.reshape(-1, K), kept.ids_TK)
        ledger = dropping.ledger(
            routing.ids_TK, kept.ids_TK, count_load(kept.ids_TK, E), B, config, SIZES
        )
        chex.assert_trees_all_equal(report.logged.ledger, ledger)
        assert ledger.dropped_E.sum() == n_lost


@pytest.mark.parametrize("section", ["drop", "evaluation_drop"])
def test_a_capacity_below_the_need_of_one_token_is_refused(section):
    """16 tokens x 2 choices on 8 experts are 4 for each, on 2 devices 16; one needs 1 or 2."""
    for policy, enough, mean, need in (("position", 0.25, 4, 1), ("device", 0.125, 16, 2)):
        dropping.check_capacity(moe_config(**{section: drop_config(policy, enough)}), 16)
        message = (
            rf"model\.moe\.{section}\.capacity_factor=0\.1: 16 tokens are {mean} .* need {need};"
            rf".* or model\.moe\.{section}=None"
        )
        with pytest.raises(ValueError, match=message):
            dropping.check_capacity(moe_config(**{section: drop_config(policy, 0.1)}), 16)
    # Of four experts a token at most the two that a device has are there: 32 x 0.0625 are enough.
    small = {"num_experts_per_tok": 4, "expert_groups": 4}
    dropping.check_capacity(moe_config(**small, **{section: drop_config("device", 0.0625)}), 32)


def test_a_run_without_room_is_refused_before_it_begins():
    config = replace(
        Config(), **{"model.moe.drop.capacity_factor": 0.001, "train.accumulation_steps": 64}
    )
    # 2048 sequences of 2048 tokens in 64 parts, 7 of 63 experts each: 7,282 for an expert.
    state_shapes(config)
    one = replace(config, **{"data.sequence_length": 1})
    with pytest.raises(ValueError, match=r"capacity_factor=0\.001: 32 tokens are 3\.556"):
        state_shapes(one)


@pytest.mark.parametrize("section", ["drop", "evaluation_drop"])
def test_policies_that_cannot_be_are_refused(section):
    def check(**changes):
        check_layer(moe_config(**changes))

    with pytest.raises(ValueError, match=rf"moe\.{section}\.policy='nope': must be one of .*'pos"):
        check(**{f"{section}.policy": "nope"})
    with pytest.raises(ValueError, match=rf"expert_groups=1: with {section}\.policy='device'"):
        check(**{f"{section}.policy": "device", "expert_groups": 1})
    hashed = {"router.name": "hash", "num_experts_per_tok": 1, "balance.expert": None}
    check(**hashed, **{f"{section}.policy": "position"})
    for policy in ("probability", "device"):
        message = rf"moe\.{section}\.policy='{policy}': the hash router has no"
        with pytest.raises(ValueError, match=message):
            check(**hashed, **{f"{section}.policy": policy})


def test_a_layer_that_drops_by_an_impossible_policy_is_refused_when_it_is_built():
    with pytest.raises(ValueError, match=r"model\.moe\.drop\.policy='nope': must be one of"):
        nnx.eval_shape(lambda: make_layer(**{"drop.policy": "nope"}))


@pytest.mark.parametrize("policy", list(dropping.POLICIES))
def test_shards_drop_each_for_itself(policy):
    """As if each half of the batch were a batch; and no device gets more than `max_kept`."""
    routing, config = skewed_routing(), drop_config(policy, 0.5)
    kept = dropping.drop(routing, jnp.arange(B), config, SIZES, shards=2)
    for half in (slice(0, T // 2), slice(T // 2, T)):
        part = jax.tree.map(lambda a, half=half: a[half], routing)
        alone, _ = run(part, config, half.start // S)
        np.testing.assert_array_equal(kept.ids_TK[half], alone.ids_TK)
        for n_devices in (1, 2, 4, 8):
            load = np.bincount(np.asarray(alone.ids_TK).ravel() // (E // n_devices))[:n_devices]
            assert load.max() <= dropping.max_kept((2, S), config, SIZES, n_devices)
    with pytest.raises(ValueError, match=r"batch of 4 sequences: must be a multiple of 3"):
        dropping.drop(routing, jnp.arange(B), config, SIZES, shards=3)
