"""Experts to devices: against all packings there are, and what every packing must have."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_jax.surgery import packing

LOADS = st.lists(st.integers(0, 1000), min_size=8, max_size=8).map(np.array)


def largest(load_X, bins):
    return load_X[bins].sum(axis=1).max()


def best_of_all(load_X, n_bins):
    """The smallest largest load over all ways, by trying them."""
    size = len(load_X) // n_bins

    def ways(left):
        if not left:
            yield ()
            return
        for others in itertools.combinations(left[1:], size - 1):
            mine = (left[0], *others)
            for rest in ways([x for x in left if x not in mine]):
                yield (mine, *rest)

    return min(largest(load_X, np.array(way)) for way in ways(list(range(len(load_X)))))


@given(LOADS, st.sampled_from([2, 4]))
@settings(max_examples=60)
def test_packed_is_a_packing_and_close_to_the_best(load_X, n_bins):
    bins = packing.packed(load_X, n_bins)
    assert sorted(bins.ravel()) == list(range(8))
    assert bins.shape == (n_bins, 8 // n_bins)
    assert largest(load_X, bins) <= largest(load_X, np.arange(8).reshape(n_bins, -1))
    # Known of the greedy rule alone is 4/3 (Graham 1969), without equal sizes.
    assert largest(load_X, bins) <= max(4 / 3 * best_of_all(load_X, n_bins), 0)


def test_packed_by_hand():
    """9 + 1, 8 + 2, 7 + 3, 6 + 4: all ten."""
    load_X = np.array([9, 8, 7, 6, 4, 3, 2, 1])
    bins = packing.packed(load_X, 4)
    assert sorted(map(tuple, bins.tolist())) == [(0, 7), (1, 6), (2, 5), (3, 4)]


@given(st.integers(0, 10**6), st.sampled_from([(), (2,), (4,), (2, 4), (8,), (16,)]),
       st.sampled_from([(4,), (2, 4), (2, 8), (8,)]))  # fmt: skip
@settings(max_examples=60)
def test_arranged_keeps_whole_parts_together(seed, whole, levels):
    load_E = np.random.default_rng(seed).gamma(1, 100, 16)
    order = packing.arranged(load_E, levels, whole)
    assert sorted(order) == list(range(16))
    for n in whole:
        parts = order.reshape(n, -1) // (16 // n)
        assert (parts == parts[:, :1]).all()


def test_an_even_order_stays_even():
    """Parts of equal sums, which no greedy rule finds again."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        three_PX = rng.integers(1, 300, (4, 3))
        load_X = np.concatenate([three_PX, 1000 - three_PX.sum(axis=1, keepdims=True)], 1).ravel()
        assert largest(load_X, packing.packed(load_X, 4)) == 1000


def test_items_of_a_kind_are_apart():
    """Both of kind 1 would be even lighter together: 9 + 1 + 1 beside 2 + 2 + 1."""
    load_X = np.array([9.0, 2, 2, 1, 1, 1])
    bins = packing.packed(load_X, 2, np.array([0, 1, 1, 2, 3, 4]))
    assert sorted(len({1, 2} & {*ids}) for ids in bins.tolist()) == [1, 1]


def test_whole_parts_by_hand():
    """Groups of 10, 9, 1 and 2 on two nodes: 10 + 1 and 9 + 2."""
    load_E = np.array([4, 6, 9, 0, 1, 0, 1, 1])
    order = packing.arranged(load_E, (2,), (4,))
    assert load_E[order].reshape(2, 4).sum(axis=1).tolist() == [11, 11]


def test_nodes_come_first():
    """One node cannot hold both heavy experts, though four devices alone would not mind."""
    load_E = np.array([10, 10, 1, 1, 1, 1, 1, 1])
    order = packing.arranged(load_E, (2, 4))
    assert load_E[order].reshape(2, 4).sum(axis=1).tolist() == [13, 13]


@given(st.integers(0, 10**6), st.sampled_from([8, 16, 24]), st.sampled_from([(4,), (2, 4)]))
@settings(max_examples=40)
def test_replicas_even_out(seed, n_places, levels):
    load_E = np.random.default_rng(seed).gamma(0.5, 100, 8)
    experts_PX = packing.replicated(load_E, n_places, levels)
    assert experts_PX.shape == (4, n_places // 4)
    assert set(experts_PX.ravel()) == set(range(8))
    share_PE = packing.shares(experts_PX, 8)
    np.testing.assert_allclose(share_PE.sum(axis=0), 1)
    once = packing.shares(packing.arranged(load_E, levels).reshape(4, -1), 8)
    if n_places == 8:
        found = packing.imbalance(load_E[None], share_PE)
        assert found == pytest.approx(packing.imbalance(load_E[None], once))


def test_replicas_by_hand():
    """Six places: expert 0 is there three times, 2 + 2 + 0.5 beside 2 + 1 + 1."""
    load_E = np.array([6.0, 1.0, 1.0, 0.5])
    experts_PX = packing.replicated(load_E, 6, (2,))
    assert sorted(map(sorted, experts_PX.tolist())) == [[0, 0, 3], [0, 1, 2]]
    found = packing.imbalance(load_E[None], packing.shares(experts_PX, 4))
    assert found == pytest.approx(4.5 / 4.25 - 1)


def test_replicas_are_on_different_devices():
    experts_PX = packing.replicated(np.array([9.0, 9.0, 1.0, 1.0]), 8, (4,))
    assert all(len(set(ids)) == 2 for ids in experts_PX.tolist())


def test_imbalance_by_hand():
    assert packing.imbalance(np.array([[4, 0, 2, 2]]), np.array([[1, 1, 0, 0], [0, 0, 1, 1]])) == 0
    assert packing.imbalance(np.array([[4, 2, 1, 1]]), np.array([[1, 1, 0, 0], [0, 0, 1, 1]])) == (
        pytest.approx(0.5)
    )
    assert packing.imbalance(np.zeros((1, 4)), np.ones((1, 4))) is None
