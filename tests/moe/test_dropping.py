"""Drop policies against plain numpy, the ledger, and what evaluation may not see."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import Config, MoEConfig, replace
from dsmoe_jax.moe import dropping
from dsmoe_jax.moe.layer import MoELayer, nobody_computes_padding
from dsmoe_jax.moe.types import RouterInputs, Routing
from dsmoe_jax.training.step import abstract_model

B, S, E, K, D = 4, 16, 8, 2, 2
T = B * S
PROTECTED = 1  # the one sequence of four: protection goes to the middle of every four


def moe_config(policy, **kwargs):
    return MoEConfig(
        n_routed_experts=E, num_experts_per_tok=K, drop_policy=policy, expert_groups=D,
        protected_share=0.25, **kwargs,
    )  # fmt: skip


def skewed_routing(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(T, E)) + np.linspace(3, 0, E)
    s = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    gates, ids = jax.lax.top_k(s, K)
    return Routing(ids, gates / gates.sum(axis=1, keepdims=True), jnp.asarray(s))


@functools.partial(jax.jit, static_argnums=(1, 2))
def run(routing, factor, config, first=0):
    places_B = first + jnp.arange(len(routing.ids_TK) // S)
    return dropping.drop(routing, places_B, factor, config)


def numpy_kept(ids, affinity, valid, factor, policy):
    """Fills experts or devices one assignment at a time, in the order of the policy."""
    by_device = policy == "device"
    size = E // D if by_device else 1
    room = np.full(E // size, int(np.ceil(factor * T * K / (E // size))))
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
    routing = nobody_computes_padding(routing, jnp.asarray(valid).reshape(B, S), E)
    kept, ledger = run(routing, factor, moe_config(policy))
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


@pytest.mark.parametrize("factor", [0.01, 0.5, 1.0])
def test_protected_sequences_lose_nothing_at_any_budget(factor):
    kept, _ = run(skewed_routing(1), factor, moe_config("device"))
    lost_B = np.asarray(kept.ids_TK == E).reshape(B, -1).sum(axis=1)
    assert lost_B[PROTECTED] == 0
    assert np.delete(lost_B, PROTECTED).sum() > 0


def test_a_micro_batch_of_protected_sequences_loses_nothing():
    routing, config = skewed_routing(1), moe_config("device")
    places = jnp.arange(1000)
    places_B = places[dropping.protected(places, config.protected_share)][:B]
    kept, _ = dropping.drop(routing, places_B, 0.01, config)
    np.testing.assert_array_equal(kept.ids_TK, routing.ids_TK)
    for n_devices in (1, 2, 4, 8):
        load = np.bincount(np.asarray(kept.ids_TK).ravel() // (E // n_devices))
        assert load.max() <= dropping.most_kept((B, S), 0.01, config, n_devices)


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
        kept, ledger = run(routing, float(E), moe_config(policy))
        np.testing.assert_array_equal(kept.ids_TK, routing.ids_TK)
        np.testing.assert_array_equal(ledger.dropped_E, np.zeros(E))
        np.testing.assert_array_equal(ledger.sent_E, ledger.computed_E)


def test_evaluation_depends_on_the_other_sequences_only_if_it_drops():
    def layer(**moe):
        overrides = {
            "hidden_size": 8, "initializer_range": 0.5, "moe.n_routed_experts": E,
            "moe.num_experts_per_tok": K, "moe.moe_intermediate_size": 4,
            "moe.expert_backend": "ragged_dot", **moe,
        }  # fmt: skip
        config = replace(Config(), **{f"model.{key}": v for key, v in overrides.items()})
        return MoELayer(config.model, rngs=nnx.Rngs(0))

    x = jax.random.normal(jax.random.key(0), (B, S, 8))
    ids, valid = jnp.zeros((B, S), jnp.int32), jnp.ones((B, S), bool)

    def last_sequence(layer, rng=None):
        together = layer(x, ids, valid, rng)[0][-1]
        alone = layer(x[-1:], ids[-1:], valid[-1:], rng)[0][0]
        return np.abs(together - alone).max()

    training_only = layer(**{"moe.capacity_factor": 0.5})
    assert last_sequence(training_only) < 1e-5
    ledger = training_only(x, ids, valid)[1].ledger
    np.testing.assert_array_equal(ledger.computed_E, ledger.sent_E)
    assert ledger.dropped_E.sum() == 0 < ledger.sent_E.sum()
    assert last_sequence(training_only, jax.random.key(0)) > 1e-3
    assert last_sequence(layer(**{"moe.evaluation_capacity_factor": 0.5})) > 1e-3


@pytest.mark.parametrize("evaluation", ["position", "probability", "device", ""])
@pytest.mark.parametrize("training", ["position", "probability", "device"])
def test_training_and_evaluation_drop_by_policies_of_their_own(training, evaluation):
    """Each loses what `dropping.drop` by its policy and factor takes from the same routing."""
    overrides = {
        "hidden_size": 8, "initializer_range": 0.5, "moe.n_routed_experts": E,
        "moe.num_experts_per_tok": K, "moe.moe_intermediate_size": 4, "moe.expert_groups": D,
        "moe.expert_backend": "ragged_dot", "moe.capacity_factor": 0.5,
        "moe.evaluation_capacity_factor": 0.3, "moe.drop_policy": training,
        "moe.evaluation_drop_policy": evaluation,
    }  # fmt: skip
    config = replace(Config(), **{f"model.{key}": v for key, v in overrides.items()}).model
    layer, x = MoELayer(config, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (B, S, 8))
    ids, valid = jnp.zeros((B, S), jnp.int32), jnp.ones((B, S), bool)
    routing = layer.route(x.reshape(-1, 8), RouterInputs(ids.reshape(-1)))
    for rng, policy, factor in (
        (jax.random.key(0), training, 0.5),
        (None, evaluation or training, 0.3),
    ):
        by_itself = dataclasses.replace(config.moe, drop_policy=policy)
        kept, ledger = dropping.drop(routing, jnp.arange(B), factor, by_itself)
        stats = layer(x, ids, valid, rng)[1]
        assert stats is not None
        assert stats.choice is not None
        np.testing.assert_array_equal(stats.choice.ids.reshape(-1, K), kept.ids_TK)
        jax.tree.map(np.testing.assert_array_equal, stats.ledger, ledger)
        assert ledger.dropped_E.sum() > 0


@pytest.mark.parametrize("key", ["capacity_factor", "evaluation_capacity_factor"])
def test_a_capacity_below_the_need_of_one_token_is_refused(key):
    """16 tokens x 2 choices on 8 experts are 4 for each, on 2 devices 16; one needs 1 or 2."""
    for policy, enough, mean, need in (("position", 0.25, 4, 1), ("device", 0.125, 16, 2)):
        dropping.check_room(moe_config(policy, **{key: enough}), 16)
        with pytest.raises(ValueError, match=rf"{key}=0\.1: 16 tokens are {mean} .* need {need};"):
            dropping.check_room(moe_config(policy, **{key: 0.1}), 16)
    # Of four experts a token at most the two that a device has are there: 32 x 0.0625 are enough.
    small = dataclasses.replace(moe_config("device"), num_experts_per_tok=4, expert_groups=4)
    dropping.check_room(dataclasses.replace(small, **{key: 0.0625}), 32)


def test_a_run_without_room_is_refused_before_it_begins():
    config = replace(
        Config(), **{"model.moe.drop.capacity_factor": 0.001, "train.accumulation_steps": 64}
    )
    # 2048 sequences of 2048 tokens in 64 parts, 7 of 63 experts each: 7,282 for an expert.
    abstract_model(config)
    one = replace(config, **{"data.sequence_length": 1})
    with pytest.raises(ValueError, match=r"capacity_factor=0\.001: 32 tokens are 3\.556"):
        abstract_model(one)


def test_refusals():
    with pytest.raises(ValueError, match=r"drop_policy='nope': must be one of"):
        dropping.get_policy(moe_config("nope"))
    with pytest.raises(ValueError, match=r"expert_groups=1: with drop_policy='device'"):
        dropping.get_policy(MoEConfig(drop_policy="device"))
    hashed = {
        "router": "hash", "num_experts_per_tok": 1, "expert_balance_factor": 0.0,
        "capacity_factor": 1.0, "drop_policy": "probability",
    }  # fmt: skip
    evaluated = hashed | {
        "capacity_factor": 0.0, "evaluation_capacity_factor": 1.0, "drop_policy": "position",
        "evaluation_drop_policy": "probability",
    }  # fmt: skip
    for overrides, key in ((hashed, "moe.drop_policy"), (evaluated, "evaluation_drop_policy")):
        config = replace(Config(), **{f"model.moe.{key}": v for key, v in overrides.items()})
        with pytest.raises(ValueError, match=rf"{key}='probability': the hash router has no"):
            nnx.eval_shape(lambda config=config: MoELayer(config.model, rngs=nnx.Rngs(0)))
    unknown = {"model.moe.evaluation_drop.policy": "nope"}
    with pytest.raises(ValueError, match=r"evaluation_drop_policy='nope': must be one of"):
        dropping.check_policies(replace(Config(), **unknown).model.moe, scored=True)


@pytest.mark.parametrize("policy", list(dropping.POLICIES))
def test_shards_drop_each_for_itself(policy):
    """As if each half of the batch were a batch; and no device gets more than `most_kept`."""
    routing, config = skewed_routing(), moe_config(policy)
    kept, _ = dropping.drop(routing, jnp.arange(B), 0.5, config, shards=2)
    for half in (slice(0, T // 2), slice(T // 2, T)):
        part = jax.tree.map(lambda a, half=half: a[half], routing)
        alone, _ = run(part, 0.5, config, half.start // S)
        np.testing.assert_array_equal(kept.ids_TK[half], alone.ids_TK)
        for n_devices in (1, 2, 4, 8):
            load = np.bincount(np.asarray(alone.ids_TK).ravel() // (E // n_devices))[:n_devices]
            assert load.max() <= dropping.most_kept((2, S), 0.5, config, n_devices)
    with pytest.raises(ValueError, match=r"batch of 4 sequences: must be a multiple of 3"):
        dropping.drop(routing, jnp.arange(B), 0.5, config, shards=3)
