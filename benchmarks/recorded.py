"""The routing of a recorded run (dsmoe_jax/runs/routing_records.py) as that of a benchmark.

Shapes: B sequences, S positions, L MoE layers, T tokens, E routed experts, K activated ones.
"""

from pathlib import Path

import numpy as np

from dsmoe_jax.runs.routing_records import load


def offsets_TE(path: Path, layer: int, tokens: int, n_experts: int, k: int) -> np.ndarray:
    """Offsets of the logits with which the first T recorded tokens choose the experts they had.

    Args:
      path: of a step, WORKDIR/routing/train/00000001.npz.
      layer: of the recorded run.
      tokens, n_experts, k: T, E and K of the layer that is measured.

    Raises:
      ValueError: with the numbers, if the recorded routing does not fit.
    """
    ids_BLSK = np.asarray(load(path).ids)
    b, n_layers, s, found = ids_BLSK.shape
    if not 0 <= layer < n_layers:
        raise ValueError(f"--layer={layer}: {path} has layers 0 to {n_layers - 1}")
    if b * s < tokens or found != k:
        raise ValueError(
            f"--routing={path}: {b * s} tokens with {found} experts each; the layer has {tokens}"
            f" with {k}"
        )
    chosen_TK = ids_BLSK[:, layer].reshape(b * s, k)[:tokens].astype(np.int64)
    if (largest := chosen_TK.max()) >= n_experts:
        raise ValueError(
            f"--routing={path}: goes to expert {largest}, the layer has {n_experts} (unassigned,"
            " as after dropping, is the number after the last)"
        )
    offsets_TE = np.zeros((tokens, n_experts), np.float32)
    np.put_along_axis(offsets_TE, chosen_TK, 1e4, axis=1)
    return offsets_TE
