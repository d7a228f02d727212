"""Frozen parameters keep every bit, and all others are trained as if they were alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsmoe_jax.config import replace
from dsmoe_jax.model.build import model_shapes
from dsmoe_jax.training import freezing
from dsmoe_jax.training.devices import open_mesh
from dsmoe_jax.training.freezing import Freezing, most_used
from dsmoe_jax.training.optimizer import optimizer_of
from dsmoe_jax.training.start import init_state, state_shapes
from dsmoe_jax.training.step import jit_train_step, make_train_step
from tests.tools.tiny import FOR_EIGHT_DEVICES, batch, tiny
from tests.tools.trees import by_path

CHOSEN = ((0, 3), (2,))
SETTINGS = {
    "model.moe.router.bias_update_speed": 0.01,
    "optimizer.clip_norm": 0.02,
    "optimizer.warmup_steps": 0,
}
ROUTED = ("gate_EFD", "up_EFD", "down_EDF")


def configured(part, **overrides):
    chosen = {"train.trainable.experts": CHOSEN} if part == "chosen_experts" else {}
    return tiny(**SETTINGS, **chosen, **{"train.trainable.part": part}, **overrides)


def arrays(tree):
    return by_path(jax.device_get(tree))


@functools.cache
def fresh():
    """The same for all parts."""
    return init_state(configured("all"))


@functools.cache
def one_step(part):
    """Arrays before and after the first step, its moments, and its metrics."""
    config = configured(part)
    before = fresh()
    trained, _ = Freezing(config).split(before.params)
    before = before._replace(opt_state=optimizer_of(config).init(trained))
    step = jax.jit(make_train_step(config, jnp.ones(512)))
    after, metrics = step(before, batch(config))
    mu = next(s for s in after.opt_state[1] if hasattr(s, "mu")).mu
    names = ("params", "other")
    first, last = ({n: arrays(getattr(s, n)) for n in names} for s in (before, after))
    return first, last, arrays(mu), metrics


def is_trained(part, name):
    """Whether a part of the tiny model trains an array, in words."""
    routed = any(array in name for array in ROUTED)
    if part == "dense_part":
        return not routed and "router" not in name
    return routed


@pytest.mark.parametrize("part", ["dense_part", "chosen_experts"])
def test_what_is_frozen_keeps_its_bits(part):
    """Also under weight decay; there are moments of what is trained, and of nothing else."""
    first, last, mu, _ = one_step(part)
    trained = {name for name in first["params"] if is_trained(part, name)}
    assert 0 < len(trained) < len(first["params"])
    assert set(mu) == trained
    for name, old in first["params"].items():
        new = last["params"][name]
        if name not in trained:
            assert new.tobytes() == old.tobytes(), name
        elif part != "chosen_experts":
            assert (new != old).any(), name
    for name, old in first["other"].items():
        assert last["other"][name].tobytes() == old.tobytes(), f"{name}: the router's bias"
    assert any((old != one_step("all")[1]["other"][n]).any() for n, old in first["other"].items())


def test_experts_are_those_that_others_are_chosen_from():
    split = [
        Freezing(configured(part)).split(fresh().params)[0]
        for part in ("experts", "chosen_experts")
    ]
    assert jax.tree.structure(split[0]) == jax.tree.structure(split[1])


@pytest.mark.parametrize("part", ["dense_part", "chosen_experts"])
def test_dense_layers_between_and_multi_token_prediction(part):
    """By the shapes: all is split and put together again, and each layer has its own ids."""
    layers = {"model.num_hidden_layers": 6, "model.moe_layer_freq": 2}
    mtp = {"model.mtp.num_nextn_predict_layers": 1}
    config = tiny(**layers, **mtp, **{"train.trainable.part": part})
    if part == "chosen_experts":
        config = replace(config, **{"train.trainable.experts": ((0,), (1,), (2,), (0, 3))})
    freezing_of = Freezing(config)
    params = jax.tree.map(lambda x: np.ones(x.shape, bool), model_shapes(config.model).params)
    trained, frozen = freezing_of.split(params)
    assert jax.tree.structure(nnx.merge_state(trained, frozen)) == jax.tree.structure(params)
    assert set(by_path(trained)) == {name for name in by_path(params) if is_trained(part, name)}
    if part == "chosen_experts":
        kept = by_path(freezing_of.updated(trained, jax.tree.map(np.zeros_like, trained)))
        stacks = [x for name, x in kept.items() if "up_EFD" in name]
        layers = sorted(tuple(np.flatnonzero(e)) for x in stacks for e in np.asarray(x)[..., 0, 0])
        assert layers == [(0,), (0, 3), (1,), (2,)]
        assert [len(x) for name, x in kept.items() if "mtp" in name] == [1, 1, 1]


def test_of_chosen_experts_the_others_keep_their_bits():
    first, last, mu, _ = one_step("chosen_experts")
    for name in filter(functools.partial(is_trained, "experts"), first["params"]):
        for layer, ids in enumerate(CHOSEN):
            others = [e for e in range(4) if e not in ids]
            old, new, moment = (
                x[layer] for x in (first["params"][name], last["params"][name], mu[name])
            )
            assert new[others].tobytes() == old[others].tobytes()
            assert not moment[others].any()
            assert all((new[e] != old[e]).any() for e in ids)


@pytest.mark.parametrize("part", ["dense_part", "chosen_experts"])
def test_the_update_is_that_of_the_trained_ones_alone(part):
    """Their gradient is that of training everything; only their norm is clipped, and logged."""
    _, _, every, _ = one_step("all")
    first, last, mu, metrics = one_step(part)
    o = configured(part).optimizer
    norm_of_all = float(one_step("all")[3].grad_norm)
    scale = norm_of_all / o.clip_norm / (1 - o.b1)  # undoes clipping and moment
    grads = {name: every[name] * scale for name in mu}
    if part == "chosen_experts":
        for g in grads.values():
            for layer, ids in enumerate(CHOSEN):
                g[layer, [e for e in range(4) if e not in ids]] = 0
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in grads.values()))
    assert norm < 0.999 * norm_of_all
    np.testing.assert_allclose(float(metrics.grad_norm), norm, rtol=1e-4)
    for name, g in grads.items():
        clipped = g * min(1, o.clip_norm / norm)
        np.testing.assert_allclose(mu[name] / (1 - o.b1), clipped, rtol=1e-3, atol=1e-7)
        old = first["params"][name]
        decay = 0 if "scale" in name else o.weight_decay * old
        move = o.peak_learning_rate * (clipped / (np.abs(clipped) + o.eps) + decay)
        move[clipped == 0] = 0 if part == "chosen_experts" else move[clipped == 0]
        moved = np.abs(clipped) > 1e-6  # where Adam's quotient is well conditioned
        np.testing.assert_allclose(last["params"][name][moved], (old - move)[moved], atol=2e-5)


def test_the_moments_take_no_memory():
    def moments(part):
        tree = state_shapes(configured(part)).opt_state
        return sum(x.size for x in jax.tree.leaves(tree))

    routed = 2 * 2 * 4 * 3 * 16 * 32  # two moments, L, E, three matrices
    router = 2 * 2 * 4 * 32
    assert moments("all") - moments("dense_part") == routed + router
    assert moments("experts") == routed + 2  # and two counts of steps


@pytest.mark.eight_devices
def test_on_a_mesh_the_same_bits_are_kept():
    """Experts over four devices, of which one has no chosen expert."""
    sizes = {**FOR_EIGHT_DEVICES, "mesh.expert": 4, "mesh.fsdp": 2, "mesh.data": 1}
    sizes["train.trainable.experts"] = ((0, 1, 5), (7,))
    config = replace(configured("chosen_experts"), **sizes)
    with jax.set_mesh(open_mesh(config)):
        state = init_state(config)
        old = arrays(state.params)
        state, _ = jit_train_step(config, jnp.ones(512))(state, batch(config))
        new = arrays(state.params)
    assert state.params["layers"]["moe"]["gate_EFD"][...].sharding.mesh.shape["expert"] == 4
    for name, x in old.items():
        if not is_trained("chosen_experts", name):
            assert new[name].tobytes() == x.tobytes(), name
            continue
        changed_LE = (new[name] != x).any(axis=(2, 3))
        assert [tuple(np.flatnonzero(row)) for row in changed_LE] == [(0, 1, 5), (7,)]


def test_the_most_used_experts():
    """The fewest whose share reaches the threshold, of equal ones those of lower id."""
    load = [[10, 50, 30, 10], [0, 100, 0, 0], [25, 25, 25, 25]]
    assert most_used(load, 0.2) == ((1,), (1,), (0,))
    assert most_used(load, 0.5) == ((1,), (1,), (0, 1))
    assert most_used(load, 0.8) == ((1, 2), (1,), (0, 1, 2, 3))
    assert most_used(load, 1.0) == ((0, 1, 2, 3), (1,), (0, 1, 2, 3))
    assert most_used([[1, 1, 1]], 1.0) == ((0, 1, 2),)
    with pytest.raises(ValueError, match="layer 1 has no load"):
        most_used([[1, 0], [0, 0]], 0.5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"part": "router"}, "part='router': must be one of all, dense_part, experts, chosen_ex"),
        ({"part": "chosen_experts"}, "experts=None: must be ids by layer; or name results of eva"),
        (
            {"part": "experts", "experts": ((0,), (1,))},
            r"experts=.*: chooses nothing, for part='ex",
        ),
        ({"part": "chosen_experts", "experts": ((0,),)}, r"experts=.*: must be of 2 MoE layers"),
        (
            {"part": "chosen_experts", "experts": ((4,), (0,))},
            r"e.*: must be different ids from 0 to 3",
        ),
        (
            {"part": "chosen_experts", "experts": ((1, 1), (0,))},
            r".*: must be different ids from 0",
        ),
        ({"part": "chosen_experts", "experts": ((), ())}, r"experts=\(\(\), \(\)\): must name an"),
        ({"share": 1.5}, r"share=1.5: must be at most 1"),
        ({"share": 0.0}, r"share=0.0: must be > 0"),
    ],
)
def test_impossible_parts_are_refused(changes, says):
    with pytest.raises(ValueError, match=rf"^train\.trainable\.{says}"):
        freezing.check(tiny(**{f"train.trainable.{key}": value for key, value in changes.items()}))


def test_a_dense_model_has_no_experts():
    none = {"n_routed_experts": 0, "num_experts_per_tok": 0, "balance.router_z": None}
    dense = {f"model.moe.{key}": value for key, value in none.items()}
    dense |= {"train.trainable.part": "experts"}
    with pytest.raises(ValueError, match=r"part='experts': the model has no routed experts"):
        freezing.check(tiny(**dense))
