"""Likeness of the experts of a layer, and the order of hidden units in which two are most alike.

    weights   cosine of all weights, hidden units in their order
    aligned   the same, each pair in the order of hidden units that makes it most alike
    outputs   cosine of what they make of the same held-out tokens, mean over tokens

A new measure is a function and a line in `LIKENESS`.

Shapes: L MoE layers, E routed experts, F expert width, X numbers of one hidden unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from scipy.optimize import linear_sum_assignment

from dsmoe_jax.analysis import pairs, routed_text
from dsmoe_jax.data.pipeline import Batch
from dsmoe_jax.model import layout
from dsmoe_jax.model.build import abstract_model
from dsmoe_jax.surgery.types import Subject

# By name of an array of the experts its axis of hidden units; None: it has none.
UNIT_AXES = {
    "gate_EFD": 1,
    "up_EFD": 1,
    "down_EDF": 2,
    "gate_bias_EF": 1,
    "up_bias_EF": 1,
    "down_bias_ED": None,
}
Weights = dict[str, np.ndarray]  # the arrays of the experts of a layer, by name
Text = Sequence[Batch] | None


def of_layers(subject: Subject) -> list[Weights]:
    """The experts of every MoE layer, those of multi-token prediction last."""
    found = []
    for stack, n in layout.moe_stacks(subject.config.model):
        node: Any = subject.model.params
        for key in (*stack, "moe"):
            node = node[key]
        arrays = {name: np.asarray(node[name][...]) for name in UNIT_AXES if name in node}
        found += [{name: x[i] for name, x in arrays.items()} for i in range(n)]
    return found


def units(weights: Weights) -> np.ndarray:
    """The numbers of each hidden unit: its rows of gate and up, its column of down, (E, F, X)."""
    found = []
    for name, x in weights.items():
        axis = UNIT_AXES[name]
        if axis is not None:
            moved = np.moveaxis(x, axis, 1)
            found.append(moved.reshape(*moved.shape[:2], -1))
    return np.concatenate(found, axis=2)


def alignment(units_FX: np.ndarray, to_FX: np.ndarray) -> np.ndarray:
    """The order of one expert's hidden units that makes it most like another one, int (F,).

    An expert computes the same with its hidden units in any order.  The order has the largest sum
    of products of all weights, a linear assignment (Git Re-Basin, 2209.04836 section 3.2).
    """
    return linear_sum_assignment(to_FX @ units_FX.T, maximize=True)[1]


def by_weights(subject: Subject, text: Text = None) -> list[np.ndarray]:
    """Cosine of the weights of each pair of experts in every MoE layer, (E, E); takes no text."""
    del text
    return [pairs.weight_similarity(*weights.values()) for weights in of_layers(subject)]


def _by_aligned_weights(subject: Subject, text: Text) -> list[np.ndarray]:
    del text
    return [aligned(weights) for weights in of_layers(subject)]


def aligned(weights: Weights) -> np.ndarray:
    """Cosine of each pair of experts in the order of hidden units that makes it largest, (E, E)."""
    units_EFX = units(weights).astype(np.float64)
    outside = weights.get("down_bias_ED", np.zeros((len(units_EFX), 1))).astype(np.float64)
    products_EE = outside @ outside.T
    for i, to_FX in enumerate(units_EFX):
        for j, units_FX in enumerate(units_EFX[: i + 1]):
            order_F = alignment(units_FX, to_FX)
            products_EE[i, j] += (to_FX * units_FX[order_F]).sum()
            products_EE[j, i] = products_EE[i, j]
    norms_E = np.sqrt(np.diag(products_EE))
    norms_EE = norms_E[:, None] * norms_E
    return np.divide(products_EE, norms_EE, out=np.zeros_like(products_EE), where=norms_EE > 0)


def _by_outputs(subject: Subject, text: Text) -> list[np.ndarray]:
    assert text is not None, "see `Measure.batches`"
    model = nnx.merge(abstract_model(subject.config.model), *subject.model)
    layers = routed_text.layer_weights_on(model, text[0])
    return [pairs.output_similarity(layer.outputs_ETD) for layer in layers]


class Measure(NamedTuple):
    """A measure of likeness in the registry.

    Attributes:
      run: `(subject, text) -> [likeness_EE of every MoE layer]`, 1 for experts that are equal.
      batches: of text that it takes; 0: none, and it is None.
    """

    run: Callable[[Subject, Text], list[np.ndarray]]
    batches: int = 0


LIKENESS: dict[str, Measure] = {
    "weights": Measure(by_weights),
    "aligned": Measure(_by_aligned_weights),
    "outputs": Measure(_by_outputs, batches=1),
}
TEXTUAL = ", ".join(name for name, measure in LIKENESS.items() if measure.batches)
