"""Numbers for logs from counts of the layers: how even the load is, drops, bits per byte.

Shapes: L MoE layers, E routed experts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dsmoe_jax.moe.dropping import Ledger


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


def drop_summary(ledger: Ledger, *, detailed: bool) -> dict[str, Any]:
    """Dropped assignments by layer, after checking that none is missing.

    Args:
      ledger: of the layers, with a leading layer axis.
      detailed: also by expert, device, position and reason.

    Raises:
      RuntimeError: naming layer and expert, if sent is not computed + dropped.
    """
    dropped_LE = np.asarray(ledger.dropped_E)
    missing_LE = np.asarray(ledger.sent_E) - np.asarray(ledger.computed_E) - dropped_LE
    for layer, expert in np.argwhere(missing_LE)[:1]:
        counts = ledger.sent_E, ledger.computed_E, ledger.dropped_E
        sent, computed, dropped = (int(count[layer, expert]) for count in counts)
        raise RuntimeError(
            f"layer {layer}, expert {expert}: {sent} assignments sent, {computed} computed and"
            f" {dropped} dropped: the dispatch lost some or computed too many"
        )
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


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Bits per UTF-8 byte of a text whose negative log-likelihood is `nats`."""
    return nats / math.log(2) / n_bytes


def as_list(array: Any, kind: type = float) -> list[Any]:
    """An array as nested lists of Python numbers, for JSON."""
    return np.asarray(array).astype(kind).tolist()
