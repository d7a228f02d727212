"""Experts to devices, so that all devices get about the same load: plain functions of loads.

    packed      items into bins of equal size
    arranged    the same at several levels: nodes, then the devices of each node
    replicated  with more places than experts: the busiest experts are there several times
    imbalance   how uneven the devices are

An arrangement is an order of the experts: device p of P gets the p-th of P equal parts.  The idea
of levels and of replicas is DeepSeek-V3's (2412.19437 section 3.4, redundant experts).

Shapes: X items, E experts, P devices, R places for experts, L MoE layers, S samples of a load.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def packed(load_X: np.ndarray, n_bins: int, kind_X: np.ndarray | None = None) -> np.ndarray:
    """Packs items into bins that hold equally many and get about the same load.

    The heaviest item first, each into the lightest bin with room; then items of the heaviest bin
    change places with others as long as that helps.  The largest load is never above that of the
    given order.

    Args:
      load_X: of the items; a multiple of `n_bins` of them.
      n_bins: number of bins.
      kind_X: items of one kind are put into different bins where there are enough; None: all are
        of different kinds.

    Returns:
      Items of each bin, int (bins, X / bins), ascending.
    """
    load_X = np.asarray(load_X, np.float64)
    kind_X = np.arange(len(load_X)) if kind_X is None else kind_X
    given = np.arange(len(load_X)).reshape(n_bins, -1)
    # Where items have kinds, the given order has those of a kind side by side, in one bin.
    starts = [_greedy(load_X, n_bins, kind_X)]
    if len(set(kind_X.tolist())) == len(load_X):
        starts.append(given)
    found = [_improved(start, load_X, kind_X) for start in starts]
    best = min(found, key=lambda bins: load_X[bins].sum(axis=1).max())
    return np.sort(best, axis=1)


def _greedy(load_X: np.ndarray, n_bins: int, kind_X: np.ndarray) -> np.ndarray:
    """The heaviest item first, each into the lightest bin with room that has none of its kind."""
    room = len(load_X) // n_bins
    bins: list[list[int]] = [[] for _ in range(n_bins)]
    total = np.zeros(n_bins)
    for item in np.argsort(-load_X, kind="stable").tolist():
        open_bins = [b for b in range(n_bins) if len(bins[b]) < room]
        apart = [b for b in open_bins if kind_X[item] not in kind_X[bins[b]]]
        lightest = min(apart or open_bins, key=lambda b: total[b])
        bins[lightest].append(item)
        total[lightest] += load_X[item]
    return np.array(bins)


def _improved(bins: np.ndarray, load_X: np.ndarray, kind_X: np.ndarray) -> np.ndarray:
    """Swaps an item of the heaviest bin with one of another bin, as long as that helps."""
    bins = bins.copy()
    while True:
        total = load_X[bins].sum(axis=1)
        top = int(total.argmax())
        difference = load_X[bins[top]][:, None, None] - load_X[bins][None]  # (mine, bin, theirs)
        after = np.maximum(total[top] - difference, total[:, None] + difference)
        after[:, top] = np.inf
        after[~_keeps_kinds_apart(bins, top, kind_X)] = np.inf
        mine, other, theirs = np.unravel_index(after.argmin(), after.shape)
        # The margin keeps roundings from swapping for ever.
        if not after[mine, other, theirs] < total[top] * (1 - 1e-12):
            return bins
        swapped = bins[other, theirs], bins[top, mine]
        bins[top, mine], bins[other, theirs] = swapped


def _keeps_kinds_apart(bins: np.ndarray, top: int, kind_X: np.ndarray) -> np.ndarray:
    """Whether a swap with bin `top` puts no two items of a kind together: (mine, bin, theirs)."""
    kinds = kind_X[bins]
    # Of an item's kind in the other bin, and of the other item's kind in this one.
    there = (kinds[top][:, None, None] == kinds[None]).any(axis=2)[:, :, None]
    here = (kinds[:, :, None] == kinds[top]).any(axis=2)[None]
    same = kinds[top][:, None, None] == kinds[None]
    return same | ~(there | here)


def arranged(load_E: np.ndarray, levels: Sequence[int], whole: Sequence[int] = ()) -> np.ndarray:
    """Order of experts that evens out the load of every level's parts.

    The parts of the first level, nodes, are packed first; then those of the next one inside of
    each part.

    Args:
      load_E: of the experts.
      levels: numbers of equal parts, from few to many, each a multiple of the one before.
      whole: numbers of equal parts of the given order that stay together, in the same form; each
        divides every level or is a multiple of it.

    Returns:
      Experts in their new order, int (E,): the one at place i was `order[i]`.
    """
    if not whole:
        return _nested(load_E, levels)
    n, *finer = whole
    parts = np.arange(len(load_E)).reshape(n, -1)
    order = _nested(load_E[parts].sum(axis=1), [level for level in levels if level <= n])
    inside = [level // n for level in levels if level > n]
    smaller = [other // n for other in finer]
    return np.concatenate([ids[arranged(load_E[ids], inside, smaller)] for ids in parts[order]])


def _nested(load_X: np.ndarray, levels: Sequence[int]) -> np.ndarray:
    if not levels:
        return np.arange(len(load_X))
    n, *finer = levels
    inside = [level // n for level in finer]
    return np.concatenate([ids[_nested(load_X[ids], inside)] for ids in packed(load_X, n)])


def replicated(load_E: np.ndarray, n_places: int, levels: Sequence[int]) -> np.ndarray:
    """Devices with more places than experts: each expert once, the busiest ones several times.

    An expert's tokens are spread evenly over its replicas.  The next replica is always of the
    expert whose replicas have the most to do.  With levels, experts are packed into the parts of
    the first one (nodes), each once, and replicas are of the experts of a part.

    Args:
      load_E: of the experts.
      n_places: R, for all devices together, at least E.
      levels: as for `arranged`; the last one is the devices.

    Returns:
      The expert at every place, int (P, R / P).
    """
    *coarse, devices = levels
    parts = packed(load_E, coarse[0]) if coarse else np.arange(len(load_E))[None]
    n = len(parts)
    found = []
    for ids in parts:
        replica_R = _replicas(load_E[ids], n_places // n)
        count_E = np.bincount(replica_R, minlength=len(ids))
        bins = packed((load_E[ids] / count_E)[replica_R], devices // n, replica_R)
        found.append(ids[replica_R[bins]])
    return np.concatenate(found)


def _replicas(load_E: np.ndarray, n_places: int) -> np.ndarray:
    """The expert of each of so many replicas, ascending."""
    count_E = np.ones(len(load_E), int)
    heap = [(-load, e) for e, load in enumerate(load_E.tolist())]
    heapq.heapify(heap)
    for _ in range(n_places - len(load_E)):
        expert = heap[0][1]
        count_E[expert] += 1
        heapq.heapreplace(heap, (-load_E[expert] / count_E[expert], expert))
    return np.repeat(np.arange(len(load_E)), count_E)


def shares(experts_PX: np.ndarray, n_experts: int) -> np.ndarray:
    """Share of each expert's load that each device gets, (P, E).

    Args:
      experts_PX: experts of each device; one that is there several times is shared evenly.
      n_experts: E.
    """
    count_PE = np.stack([np.bincount(ids, minlength=n_experts) for ids in experts_PX])
    return count_PE / count_PE.sum(axis=0)


def imbalance(load_SE: np.ndarray, share_PE: np.ndarray) -> float | None:
    """MaxVio over devices, (max - mean) / mean of their loads, mean over samples; 0 is even.

    Samples without any load are left out; None without one that has some.
    """
    by_device_SP = load_SE @ share_PE.T
    mean_S = by_device_SP.mean(axis=1)
    some_S = mean_S > 0
    if not some_S.any():
        return None
    return float((by_device_SP.max(axis=1)[some_S] / mean_S[some_S] - 1).mean())
