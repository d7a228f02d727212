"""Experts that carry most of the routing mass, and whether domains share them.

The routing mass of an expert is the sum of its gates.  A committee is the smallest set of experts
with half of the mass (2601.03425 asks whether one committee serves all domains).

Shapes: T tokens, L MoE layers, K columns of a routing, E routed experts, G domains,
P pairs of sets, I members that two sets may share.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy.special import gammaln

HALF = 0.5


def committee(mass_E: np.ndarray, share: float = HALF) -> list[int]:
    """The fewest experts that have a share of the mass together, the heaviest first.

    Of experts with equal mass the one with the lower id comes first.  Empty without any mass.
    """
    total = mass_E.sum()
    if not total > 0:
        return []
    order_E = np.argsort(-mass_E, kind="stable")
    reached_E = np.cumsum(mass_E[order_E])
    # The sum may be reached but for rounding.
    n = int(np.searchsorted(reached_E, share * total * (1 - 1e-12))) + 1
    return order_E[:n].tolist()


def overlap(a: list[int], b: list[int]) -> float | None:
    """Jaccard index of two sets: shared members over all members; None if both are empty."""
    union = set(a) | set(b)
    return len(set(a) & set(b)) / len(union) if union else None


def mean_overlap(committees: list[list[int]]) -> float | None:
    """Mean of `overlap` over all pairs; None with fewer than two sets that are not empty."""
    some = [members for members in committees if members]
    found = [overlap(a, b) for i, a in enumerate(some) for b in some[:i]]
    return float(np.mean([x for x in found if x is not None])) if found else None


def chance_overlap(sizes: list[int], n_experts: int) -> float | None:
    """Expectation of `mean_overlap` for sets drawn at random with the same sizes.

    Two sets of a and b of E experts share i of them with the hypergeometric probability, and their
    overlap is i / (a + b - i).

    Args:
      sizes: of the sets; empty ones do not count.
      n_experts: E.

    Returns:
      None with fewer than two sets that are not empty.
    """
    pairs = list(itertools.combinations((size for size in sizes if size), 2))
    if not pairs:
        return None
    a_P1, b_P1 = np.array(pairs).T[:, :, None]
    shared_I = np.arange(n_experts + 1)
    possible_PI = (shared_I <= np.minimum(a_P1, b_P1)) & (shared_I >= a_P1 + b_P1 - n_experts)
    shared_PI = np.where(possible_PI, shared_I, np.maximum(a_P1 + b_P1 - n_experts, 0))
    log_chance_PI = (
        _log_choices(a_P1, shared_PI)
        + _log_choices(n_experts - a_P1, b_P1 - shared_PI)
        - _log_choices(n_experts, b_P1)
    )
    chance_PI = np.where(possible_PI, np.exp(log_chance_PI), 0)
    return float((chance_PI * shared_PI / (a_P1 + b_P1 - shared_PI)).sum(axis=1).mean())


def _log_choices(n: np.ndarray | int, k: np.ndarray) -> np.ndarray:
    """Logarithm of the number of sets of k of n, elementwise."""
    return gammaln(np.add(n, 1)) - gammaln(k + 1) - gammaln(n - k + 1)


def overlaps(committees: list[list[int]]) -> list[list[float | None]]:
    """`overlap` of every two sets, as a square table."""
    return [[overlap(a, b) for b in committees] for a in committees]


def in_every(committees: list[list[int]]) -> list[int]:
    """Experts that are in all committees that are not empty, ascending."""
    some = [set(members) for members in committees if members]
    return sorted(set.intersection(*some)) if some else []


def experts_per_token(gates_LTK: np.ndarray) -> np.ndarray:
    """Effective number of experts of each token, float64 (L, T): exp of the entropy of its gates.

    The gates are divided by their sum first.  K: all K weigh the same; 1: one expert has all the
    weight.  0 for a token without an expert.
    """
    gates_LTK = np.asarray(gates_LTK, np.float64)
    sums_LT1 = gates_LTK.sum(axis=2, keepdims=True)
    share_LTK = np.divide(gates_LTK, sums_LT1, out=np.zeros_like(gates_LTK), where=sums_LT1 > 0)
    logs_LTK = np.log(share_LTK, out=np.zeros_like(share_LTK), where=share_LTK > 0)
    number_LT = np.exp(-(share_LTK * logs_LTK).sum(axis=2))
    return np.where(sums_LT1[..., 0] > 0, number_LT, 0.0)
