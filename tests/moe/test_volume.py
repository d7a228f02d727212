"""Rows of an exchange: against drawing routings, and against the dispatchers' own buffers."""

import dataclasses
import math

import numpy as np
import pytest

from benchmarks import parallel
from dsmoe_jax.config import DispatchConfig, DropConfig, MoEConfig, RouterConfig
from dsmoe_jax.moe.dispatch import volume
from dsmoe_jax.moe.dispatch.volume import chips_of_a_token

PLAIN = MoEConfig(64, 2, 6, 8)


def dispatched(**settings):
    return dataclasses.replace(PLAIN, dispatch=DispatchConfig(**settings))


def limited(moe, groups, m):
    """A token may use m of so many groups of experts."""
    return dataclasses.replace(moe, router=RouterConfig(n_group=groups, topk_group=m))


def drawn(e, k, groups, m, p, best=1, n=20_000):
    """Mean of distinct chips over random scores; groups by the sum of their best ones."""
    score_NE = np.random.default_rng(0).random((n, e), np.float32)
    by_group_NGE = score_NE.reshape(n, groups, -1)
    score_NG = np.sort(by_group_NGE, axis=2)[:, :, -best:].sum(axis=2)
    open_NG = score_NG >= np.sort(score_NG, axis=1)[:, -m, None]
    open_NE = np.where(open_NG[:, :, None], by_group_NGE, -1).reshape(n, e)
    chip_NK = np.argsort(-open_NE, axis=1)[:, :k] // (e // p)
    return np.mean([len(set(chips)) for chips in chip_NK.tolist()])


SHAPES = [(1, 1, 8), (1, 1, 64), (8, 3, 8), (8, 3, 32), (8, 3, 4), (16, 2, 8), (16, 4, 8)]


@pytest.mark.parametrize(("groups", "m", "p"), SHAPES)
def test_a_token_goes_to_each_chip_once(groups, m, p):
    found = chips_of_a_token(limited(PLAIN, groups, m), p)
    assert found == pytest.approx(drawn(64, 6, groups, m, p), rel=0.005)
    assert found <= 6


@pytest.mark.parametrize(("groups", "m", "p"), SHAPES[2:])
def test_groups_by_their_two_best_are_nearly_the_same(groups, m, p):
    found = chips_of_a_token(limited(PLAIN, groups, m), p)
    assert found == pytest.approx(drawn(64, 6, groups, m, p, best=2), rel=0.015)


@pytest.mark.parametrize("z", [0, 16])
def test_without_a_limit_it_is_the_closed_form(z):
    """Every chip but with probability C(E + Z - e, K) / C(E + Z, K)."""
    moe = dataclasses.replace(PLAIN, n_identity_experts=z)
    missed = math.comb(64 + z - 8, 6) / math.comb(64 + z, 6)
    assert chips_of_a_token(moe, 8) == pytest.approx(8 * (1 - missed), rel=1e-12)


def test_what_a_chip_receives_and_makes_room_for():
    """t 100 tokens on 8 chips of 8 experts; at worst all 800 tokens choose 6 of one chip's."""
    everywhere = volume(dispatched(name="all_gather"), 100, 8)
    assert (everywhere.received, everywhere.room) == (700, 800 * 6)
    ragged = volume(PLAIN, 100, 8)
    assert 300 < ragged.received < 100 * 6 * 7 / 8
    assert (ragged.buffered, ragged.room) == (800, 800 * 6)
    chunked = volume(dispatched(chunks=4), 100, 8)
    assert (chunked.buffered, chunked.room) == (200, 200 * 6)
    assert chunked.received == ragged.received
    assert volume(PLAIN, 100, 1) == (100, 0, 0, 0, 600, 600)
    few = volume(PLAIN, 100, 16)  # of 4 experts: a token cannot choose 6 of them
    assert (few.buffered, few.room) == (1600, 1600 * 4)
    slots = dispatched(name="fixed_slots")
    assert volume(slots, 100, 8) == (800, 700, 512, 800, 800, 600)
    fewer = dataclasses.replace(
        slots, drop=DropConfig(capacity_factor=1.0)
    )  # 100 x 6 / 8 for each chip
    assert volume(fewer, 100, 8) == (600, 525, 512, 600, 600, 600)
    # A gate and an expert for each choice, padded to 128 numbers; gathered ones are not.
    assert (ragged.label_bytes, everywhere.label_bytes) == (512, 48)


def test_bytes_saved_are_those_of_the_formula():
    """Routings of benchmarks/parallel.py: 8 groups, of which a token may use 3."""
    routings = {name: ids_TK for name, (ids_TK, _) in parallel.routings(8).items()}
    moe, t = dataclasses.replace(PLAIN, num_experts_per_tok=parallel.K), parallel.T // 8
    at_most_3 = limited(moe, 8, parallel.GROUP_LIMIT)
    assert (moe.n_routed_experts, moe.num_experts_per_tok) == (parallel.E, parallel.K)
    for name, config in (("even", moe), ("at most 3 devices", at_most_3)):
        rows, choices = parallel.least_rows(routings[name], 8)
        assert choices == pytest.approx(parallel.T * parallel.K * 7 / 8, rel=0.01)
        assert rows == pytest.approx(8 * volume(config, t, 8).received, rel=0.01)
    assert rows <= 3 * parallel.T
