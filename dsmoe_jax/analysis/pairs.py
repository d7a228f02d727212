"""Pairs: experts chosen together, experts that are alike, and two routings of one text.

Shapes: T tokens, L MoE layers, K columns of a routing, E routed experts, F expert width, D hidden.
"""

from __future__ import annotations

import numpy as np


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
    in another order are not alike here.  `output_similarity` does not depend on the order.

    Args:
      *weights: of all experts, each with a leading axis E.
    """
    return _cosines(np.concatenate([np.reshape(w, (len(w), -1)) for w in weights], axis=1))


def output_similarity(outputs_ETD: np.ndarray) -> np.ndarray:
    """Cosine of the outputs of each pair of experts on the same tokens, mean over tokens, (E, E).

    Args:
      outputs_ETD: every expert's output for every token, whichever was chosen.
    """
    by_token = (_cosines(outputs_ED) for outputs_ED in outputs_ETD.swapaxes(0, 1))
    return np.mean(list(by_token), axis=0)


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
    vectors_EX = np.asarray(vectors_EX, np.float64)
    norms_E1 = np.linalg.norm(vectors_EX, axis=1, keepdims=True)
    unit_EX = np.divide(vectors_EX, norms_E1, out=np.zeros_like(vectors_EX), where=norms_E1 > 0)
    return unit_EX @ unit_EX.T
