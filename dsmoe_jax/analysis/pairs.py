"""Pairs: experts chosen together, experts that are alike, and two routings of one text.

Shapes: T tokens, L MoE layers, K columns of a routing, E routed experts, F expert width, D hidden.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment


def coactivation(ids_TK: np.ndarray, n_experts: int) -> np.ndarray:
    """Share of the tokens of expert i that expert j computes too, float64 (E, E).

    The diagonal is 1, or 0 for an expert without tokens (OLMoE, 2409.02060 section 5.3).
    """
    chosen_TE = np.zeros((len(ids_TK), n_experts + 1), np.float32)  # the last: unassigned
    np.put_along_axis(chosen_TE, ids_TK.astype(np.int64), 1.0, axis=1)
    chosen_TE = chosen_TE[:, :n_experts]
    together_EE = (chosen_TE.T @ chosen_TE).astype(np.float64)
    tokens_E1 = np.diag(together_EE)[:, None]
    return np.divide(together_EE, tokens_E1, out=np.zeros_like(together_EE), where=tokens_E1 > 0)


def agreement(ids_LTK: np.ndarray, other_LTK: np.ndarray, n_experts: int) -> list[float]:
    """Share of the experts of a token that another routing chose too, mean over tokens, by layer.

    With the other one from an earlier checkpoint it is the router saturation of OLMoE (2409.02060
    section 5.1).  Unassigned columns (id E) count on neither side.

    Raises:
      ValueError: if the routings are not of the same layers and tokens.
    """
    if ids_LTK.shape[:2] != other_LTK.shape[:2]:
        raise ValueError(
            f"routings of {ids_LTK.shape[:2]} and {other_LTK.shape[:2]} layers x tokens: must be"
            " of the same model and text"
        )
    found = []
    for ids_TK, other_TK in zip(ids_LTK, other_LTK, strict=True):
        real_TK = ids_TK < n_experts
        shared_TK = (ids_TK[:, :, None] == other_TK[:, None, :]).any(axis=2) & real_TK
        found.append(float(shared_TK.sum() / max(real_TK.sum(), 1)))
    return found


def weight_similarity(*weights: np.ndarray) -> np.ndarray:
    """Cosine of the weights of each pair of experts, float64 (E, E), all arrays as one vector.

    Hidden units are compared in their order: two experts that compute the same with their units
    in another order are not alike here.  `aligned_similarity` and `output_similarity` do not depend
    on the order.

    Args:
      *weights: of all experts, each with a leading axis E.
    """
    return _cosines(np.concatenate([np.reshape(w, (len(w), -1)) for w in weights], axis=1))


def aligned_similarity(
    gate_EFD: np.ndarray, up_EFD: np.ndarray, down_EDF: np.ndarray
) -> np.ndarray:
    """Likeness of the weights of each pair of experts in the best order of hidden units, (E, E).

    Two units are as alike as the mean of the cosine of their gates, and of that of their ups times
    that of their downs: an expert computes the same after a change of the order of its units, of
    the sign of a unit's up and down together, or of their sizes against each other.  The units of
    one expert are matched with those of the other so that the mean over the F pairs is the largest;
    it is the likeness.  1: the same units; independent weights are above 0, the more units there
    are to choose from, so compare with experts before training.
    """
    units = [_unit(x) for x in (gate_EFD, up_EFD, np.swapaxes(down_EDF, 1, 2))]
    n = len(gate_EFD)
    similarity_EE = np.ones((n, n))
    for i, j in zip(*np.triu_indices(n, k=1), strict=True):
        gate_FF, up_FF, down_FF = (x_EFD[i] @ x_EFD[j].T for x_EFD in units)
        alike_FF = (gate_FF + up_FF * down_FF) / 2
        matched = linear_sum_assignment(alike_FF, maximize=True)
        similarity_EE[i, j] = similarity_EE[j, i] = alike_FF[matched].mean()
    return similarity_EE


def output_similarity(outputs_ETD: np.ndarray) -> np.ndarray:
    """Cosine of the outputs of each pair of experts on the same tokens, mean over tokens, (E, E).

    Args:
      outputs_ETD: every expert's output for every token, whichever was chosen.
    """
    by_token = (_cosines(outputs_ED) for outputs_ED in outputs_ETD.swapaxes(0, 1))
    return np.mean(list(by_token), axis=0)


def centred_kernel_alignment(outputs_ETD: np.ndarray) -> np.ndarray:
    """Linear CKA of the outputs of each pair of experts on the same tokens, float64 (E, E).

    It asks whether the two find the same tokens alike, whatever directions and scale they answer in
    (1905.00414).  Unbiased, by Gram matrices centred without their diagonals (1310.2059): outputs
    that have nothing to do with each other have 0 on average however few the tokens are.  Experts
    before training are well above it, since they see the same inputs.

    Args:
      outputs_ETD: every expert's output for every token, whichever was chosen; 4 tokens or more.
    """
    return _cosines(np.stack([_centred_gram(outputs_TD).ravel() for outputs_TD in outputs_ETD]))


def distinct(similarity_EE: np.ndarray, threshold: float) -> float:
    """Share of the experts that no other one is as alike as a threshold, or more."""
    others_EE = np.where(np.eye(len(similarity_EE), dtype=bool), -np.inf, similarity_EE)
    return float((others_EE.max(axis=1) < threshold).mean())


def alike(similarity_EE: np.ndarray, threshold: float) -> list[tuple[int, int, float]]:
    """Pairs i < j of experts whose similarity exceeds a threshold, the most alike first."""
    rows, columns = np.triu_indices(len(similarity_EE), k=1)
    values = similarity_EE[rows, columns]
    order = np.argsort(-values, kind="stable")
    return [
        (int(rows[p]), int(columns[p]), float(values[p])) for p in order if values[p] > threshold
    ]


def mean_of_pairs(similarity_EE: np.ndarray) -> float | None:
    """Mean over all pairs of different experts; None with one expert."""
    rows, columns = np.triu_indices(len(similarity_EE), k=1)
    return float(similarity_EE[rows, columns].mean()) if len(rows) else None


def _cosines(vectors_EX: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows; 0 with a row of zeros."""
    unit_EX = _unit(vectors_EX)
    return unit_EX @ unit_EX.T


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors on the last axis divided by their length, float64; zeros stay."""
    vectors = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def _centred_gram(x_TD: np.ndarray) -> np.ndarray:
    """Products of each two tokens, (T, T), U-centred: rows sum to 0 without the diagonal."""
    x_TD = np.asarray(x_TD, np.float64)
    n = len(x_TD)
    gram_TT = x_TD @ x_TD.T
    np.fill_diagonal(gram_TT, 0.0)
    sums_T = gram_TT.sum(axis=0)
    gram_TT -= (sums_T[:, None] + sums_T) / (n - 2) - sums_T.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(gram_TT, 0.0)
    return gram_TT
