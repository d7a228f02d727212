"""Tables of what each expert serves: domains, token ids, positions, and tokens in context.

Shapes: T tokens, L MoE layers, K columns of a routing, E routed experts, G domains (or other
groups of tokens), V token ids, P ranges of positions.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from dsmoe_jax.config.checks import require


def load_by_group(
    ids_LTK: np.ndarray, group_T: np.ndarray, n_groups: int, n_experts: int
) -> np.ndarray:
    """Assignments that each expert receives from each group of tokens, int64 (G, L, E).

    Args:
      ids_LTK: experts; id E is unassigned and counts nowhere.
      group_T: the group of each token: its domain, its id, a range of positions.
      n_groups: G.
      n_experts: E.
    """
    ones_LTK = np.broadcast_to(1.0, ids_LTK.shape)
    return sums_by_group(ones_LTK, ids_LTK, group_T, n_groups, n_experts).astype(np.int64)


def sums_by_group(
    x_LTK: np.ndarray, ids_LTK: np.ndarray, group_T: np.ndarray, n_groups: int, n_experts: int
) -> np.ndarray:
    """Sums of a number of each assignment by group and expert, float64 (G, L, E).

    Args:
      x_LTK: the numbers, such as gates.
      ids_LTK, group_T, n_groups, n_experts: as for `load_by_group`.
    """
    width = n_experts + 1  # with a column for unassigned ones, cut off below
    sums_LGE = []
    for x_TK, ids_TK in zip(x_LTK, ids_LTK, strict=True):
        places_TK = group_T[:, None].astype(np.int64) * width + ids_TK
        numbers = x_TK.reshape(-1).astype(np.float64)
        sums = np.bincount(places_TK.reshape(-1), numbers, minlength=n_groups * width)
        sums_LGE.append(sums.reshape(n_groups, width)[:, :n_experts])
    return np.stack(sums_LGE, axis=1)


def shares(load_GLE: np.ndarray) -> np.ndarray:
    """Shares of the experts in the load of each group and layer; 0 for a group without load."""
    sums_GL1 = load_GLE.sum(axis=-1, keepdims=True)
    return np.divide(load_GLE, sums_GL1, out=np.zeros(load_GLE.shape), where=sums_GL1 > 0)


def distinct_domains(load_GLE: np.ndarray) -> list[list[int | None]]:
    """The domain that each expert serves above all, (L, E); None for an expert without load.

    It is the domain in whose load its share is the largest: a domain with much text counts no
    more than one with little.
    """
    share_GLE = shares(load_GLE)
    best_LE = share_GLE.argmax(axis=0)
    used_LE = load_GLE.sum(axis=0) > 0
    return [
        [int(g) if used else None for g, used in zip(best_E, used_E, strict=True)]
        for best_E, used_E in zip(best_LE, used_LE, strict=True)
    ]


def position_ranges(position_T: np.ndarray) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Ranges of positions that double, [0, 1), [1, 2), [2, 4), ..., and the range of each token.

    Beginnings differ most from one position to the next, so ranges are fine there.

    Returns:
      The P ranges as (first, behind the last), and their index for each token, int32 (T,).
    """
    last = int(position_T.max(initial=0))
    edges = [0, 1]
    while edges[-1] <= last:
        edges.append(edges[-1] * 2)
    range_T = np.searchsorted(edges, position_T, side="right") - 1
    return list(itertools.pairwise(edges)), range_T.astype(np.int32)


class VocabularyTable(NamedTuple):
    """Token ids by expert; only ids that occur often enough to say anything.

    Attributes:
      token_ids_C: the C ids that occur at least `min_count` times, ascending.
      counts_C: occurrences of each.
      share_LCE: share of the occurrences of an id that an expert is among the chosen for.
    """

    token_ids_C: np.ndarray
    counts_C: np.ndarray
    share_LCE: np.ndarray


def by_vocabulary(
    ids_LTK: np.ndarray, token_ids_T: np.ndarray, n_experts: int, min_count: int
) -> VocabularyTable:
    """Shares of the occurrences of each token id that go to each expert.

    It is the vocabulary specialisation of OLMoE (2409.02060 section 5.4), by id.

    Args:
      ids_LTK: experts; E is unassigned.
      token_ids_T: ids of the tokens.
      n_experts: E.
      min_count: ids that occur less often are left out.
    """
    token_ids_V, place_T, counts_V = np.unique(token_ids_T, return_inverse=True, return_counts=True)
    often_V = counts_V >= min_count
    counts_C = counts_V[often_V]
    often_T = often_V[place_T]
    # Rare ids are left out first: all of a large vocabulary would not fit.
    row_V = np.cumsum(often_V) - 1
    rows_T = row_V[place_T[often_T]]
    load_CLE = load_by_group(ids_LTK[:, often_T], rows_T, len(counts_C), n_experts)
    share_LCE = load_CLE.swapaxes(0, 1) / counts_C[:, None]
    return VocabularyTable(token_ids_V[often_V], counts_C, share_LCE)


def vocabulary_specialisation(table: VocabularyTable) -> list[float | None]:
    """Largest share of any expert in the occurrences of a token id, mean over ids, by layer.

    1: every id always has a same expert among its K; K/E: no expert prefers any id.  None for a
    layer if no id occurs often enough.
    """
    if not len(table.token_ids_C):
        return [None] * len(table.share_LCE)
    return table.share_LCE.max(axis=2).mean(axis=1).tolist()


def favourite_tokens(table: VocabularyTable, layer: int, n: int) -> list[list[tuple[int, float]]]:
    """The `n` token ids of which each expert gets the largest share, with that share.

    Ids with equal shares stand in the order of how often they occur.  An expert that gets none of
    any id has an empty list.

    Raises:
      ValueError: if there is no such layer.
    """
    n_layers = len(table.share_LCE)
    require(0 <= layer < n_layers, "layer", layer, f"must be 0 to {n_layers - 1}")
    share_CE = table.share_LCE[layer]
    found = []
    for share_C in share_CE.T:
        order = np.lexsort((-table.counts_C, -share_C))[:n]
        found.append([(int(table.token_ids_C[c]), float(share_C[c])) for c in order if share_C[c]])
    return found


class Use(NamedTuple):
    """One token that an expert computed: its place in the text, and its gate."""

    place: int
    gate: float


def strongest_uses(
    ids_TK: np.ndarray, gates_TK: np.ndarray, expert: int, n: int, *, apart: int = 1
) -> list[Use]:
    """The `n` tokens with the largest gates of an expert, best first.

    Args:
      ids_TK, gates_TK: of one layer.
      expert: its id.
      n: how many.
      apart: tokens of which two never stand closer together, so that one passage does not fill
        the list.
    """
    place, column = np.nonzero(ids_TK == expert)
    gates = gates_TK[place, column]
    chosen: list[Use] = []
    for i in np.argsort(-gates, kind="stable"):
        if all(abs(int(place[i]) - use.place) >= apart for use in chosen):
            chosen.append(Use(int(place[i]), float(gates[i])))
        if len(chosen) == n:
            break
    return chosen
