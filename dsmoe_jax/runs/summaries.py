"""Numbers from counts of the layers: how even the load is, how far by domain, drops, bits per byte.

Shapes: G domains, L MoE layers, E routed experts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dsmoe_jax.moe.dropping import Ledger

MIN_DOMAIN_TOKENS = 500  # a domain of fewer is left out of `domain_specialisation`


def load_summary(load_LE: np.ndarray) -> dict[str, Any]:
    """Load of the experts of each layer, how uneven it is, and how many got nothing.

    maxvio = (max load - mean load) / mean load (2408.15664 section 4.1); 0 is perfect balance.
    gini = mean difference of two experts' loads / (2 mean load); 0 is perfect balance, 1 - 1/E one
    expert for everything.
    """
    n = load_LE.shape[1]
    rank_E = 2 * np.arange(1, n + 1) - n - 1
    differences_L = (np.sort(load_LE, axis=1) * rank_E).sum(axis=1)
    return {
        "load": load_LE.astype(np.int64).tolist(),
        "maxvio": maxvio(load_LE),
        "gini": (differences_L / (n * load_LE.sum(axis=1))).tolist(),
        "dead_experts": (load_LE == 0).sum(axis=1).tolist(),
    }


def maxvio(load_LE: np.ndarray) -> list[float]:
    """(max load - mean load) / mean load by layer."""
    mean_L = load_LE.mean(axis=1)
    return ((load_LE.max(axis=1) - mean_L) / mean_L).tolist()


def domain_specialisation(load_GLE: np.ndarray, tokens_G: np.ndarray) -> list[float] | None:
    """Information of a chosen expert about the domain of its token, by layer: 0 nothing, 1 all.

    I / ln G, the mutual information of domain and expert over the entropy of the domain, where
    every domain has the same weight, whatever its size:

        I = mean_g sum_e p_ge ln(p_ge / q_e),   q_e = mean_g p_ge

    p_ge is the share of expert e in the load of domain g.  (I is the Jensen-Shannon divergence of
    the G loads, Lin 1991.)  0: all domains have the same load; 1: every expert serves one domain,
    which takes as many experts as domains; with fewer the highest value is ln E / ln G.

    Few tokens make a domain look special: the sampling error of the shares adds to I.  Its
    first-order expectation for independent assignments is subtracted (Miller 1955), and what is
    below 0 is 0.  Tokens of a text are not independent, so a domain needs `MIN_DOMAIN_TOKENS`.
    Topics of a few long documents count as the domain's all the same.

    Args:
      load_GLE: assignments.
      tokens_G: that the load is of.

    Returns:
      None with fewer than two domains that are large enough.
    """
    enough_G = (tokens_G >= MIN_DOMAIN_TOKENS) & (load_GLE.sum(axis=2) > 0).all(axis=1)
    if enough_G.sum() < 2:
        return None
    load_GLE = np.asarray(load_GLE, np.float64)[enough_G]
    n_domains = len(load_GLE)
    count_GL1 = load_GLE.sum(axis=2, keepdims=True)
    p_GLE = load_GLE / count_GL1
    q_LE = p_GLE.mean(axis=0)
    ratio_GLE = np.divide(p_GLE, q_LE, out=np.ones_like(p_GLE), where=p_GLE > 0)
    information_L = (p_GLE * np.log(ratio_GLE)).sum(axis=2).mean(axis=0)
    # The entropy of g is too small by sum_e (1 - p_ge) / 2n over its experts; that of the mean, by
    # as much times p_ge / (G q_e).
    missing_GLE = np.where(p_GLE > 0, (1 - p_GLE) * (1 - ratio_GLE / n_domains), 0.0)
    bias_L = (missing_GLE / (2 * count_GL1)).sum(axis=2).mean(axis=0)
    return (np.maximum(information_L - bias_L, 0.0) / math.log(n_domains)).tolist()


def drop_summary(ledger: Ledger, *, detailed: bool) -> dict[str, Any]:
    """Dropped assignments by layer, after checking that none is missing.

    Args:
      ledger: of the layers, with a leading layer axis.
      detailed: also by expert, device, position and reason.

    Raises:
      RuntimeError: naming layer and expert, if sent is not computed + dropped.
    """
    if (missing := missing_assignments(ledger)) is not None:
        raise RuntimeError(missing)
    dropped_LE = np.asarray(ledger.dropped_E)
    dropped_L = dropped_LE.sum(axis=-1)
    columns = {
        "expert": ledger.dropped_E,
        "device": ledger.dropped_D,
        "position": ledger.dropped_P,
        "reason": ledger.dropped_R,
    }
    for name, column in columns.items():
        if (np.asarray(column).sum(axis=-1) != dropped_L).any():
            raise RuntimeError(f"dropped by {name}: {column.sum(axis=-1)}, in all {dropped_L}")
    row = {"dropped": as_list(dropped_L, int)}
    if detailed:
        row |= {f"dropped_by_{name}": as_list(column, int) for name, column in columns.items()}
    return row


def missing_assignments(ledger: Ledger) -> str | None:
    """The first layer and expert for which sent is not computed + dropped, in words; None: none is.

    Args:
      ledger: of the layers, with a leading layer axis.
    """
    counts = [np.asarray(count) for count in (ledger.sent_E, ledger.computed_E, ledger.dropped_E)]
    sent_LE, computed_LE, dropped_LE = counts
    for layer, expert in np.argwhere(sent_LE != computed_LE + dropped_LE)[:1]:
        sent, computed, dropped = (int(count[layer, expert]) for count in counts)
        return (
            f"layer {layer}, expert {expert}: {sent} assignments sent, {computed} computed and"
            f" {dropped} dropped: the dispatch lost some or computed too many"
        )
    return None


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Bits per UTF-8 byte of a text whose negative log-likelihood is `nats`."""
    return nats / math.log(2) / n_bytes


def as_list(array: Any, kind: type = float) -> list[Any]:
    """An array as nested lists of Python numbers, for JSON."""
    return np.asarray(array).astype(kind).tolist()
