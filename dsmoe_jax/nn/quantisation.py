"""Matrices of whole numbers with a scale for each output, and products with them.

    scale_O = max_I |w_OI| / m,   values_OI = round(w_OI / scale_O),   m = 2^(bits - 1) - 1

The numbers are symmetric around 0, ties go to even, and an output whose weights are all 0 (or below
1e-36, where float32 ends) has scale 0.  Since a scale is that of a whole sum, it multiplies sums
and no weight:

    y_NO = scale_O  sum_I x_NI values_OI

Numbers of 8 bits are exact in bfloat16, too.  The inputs may be of 8 bits as well, with a scale for
each row, so that the sums are int32 (LLM.int8(), 2208.07339, without its outliers).

Shapes: N rows, I inputs, O outputs; `...` any leading axes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

BITS = 8  # of a byte, and of quantised inputs
Product = Callable[..., jax.Array]  # (x_NI, w_OI, dtype of the sums) -> y_NO


class Scale(nnx.Variable):
    """Scales of a quantised matrix: they are not trained."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("inputs",)
)
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A quantised matrix.

    Attributes:
      values: int8, (..., O, I).
      scale: float32, (..., O).
      inputs: whether what it is multiplied with is quantised too, row by row.
    """

    values: Any
    scale: Any
    inputs: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return self.values.shape


Matrix = jax.Array | Quantised


def quantise(w: jax.Array, bits: int = BITS) -> Quantised:
    """A matrix, or rows of inputs, (..., O, I), as whole numbers with scales.

    Each is off by half a scale at most.
    """
    most = 2 ** (bits - 1) - 1
    w = w.astype(jnp.float32)
    # A product: XLA may make one of a division, and then the number would depend on the program.
    scale = jnp.abs(w).max(axis=-1) * np.float32(1 / most)
    safe = jnp.where(scale > 0, scale, 1.0)
    values = jnp.clip(jnp.round(w / safe[..., None]), -most, most)
    return Quantised(values.astype(jnp.int8), scale)


def dequantise(w: Matrix) -> jax.Array:
    """A matrix as float32; one that is not quantised as it is."""
    if not isinstance(w, Quantised):
        return w
    return w.values.astype(jnp.float32) * w.scale[..., None]


def in_dtype(weights: Any, dtype: jnp.dtype) -> Any:
    """Weights in the dtype of activations; quantised matrices stay as they are."""
    return jax.tree.map(
        lambda w: w if isinstance(w, Quantised) else w.astype(dtype),
        weights,
        is_leaf=lambda w: isinstance(w, Quantised),
    )


def times(x: jax.Array, w: Matrix) -> jax.Array:
    """`x @ w.T` for x of (..., I) and a matrix of (O, I): float32 sums."""
    if not isinstance(w, Quantised):
        return _product(x, w, jnp.float32)
    return unscaled(_product, x, w) * w.scale


def _product(x: jax.Array, w_OI: jax.Array, dtype: Any) -> jax.Array:
    return jnp.einsum("...i,oi->...o", x, w_OI, preferred_element_type=dtype)


def unscaled(product: Product, x: jax.Array, w: Quantised) -> jax.Array:
    """Float32 sums of a product with a quantised matrix, before the scales of its outputs.

    Args:
      product: `(x, w, dtype of the sums)`, of arrays.
      x: inputs, (..., I).
      w: the matrix, or a group of them.
    """
    if not w.inputs:
        return product(x, w.values.astype(x.dtype), jnp.float32)
    rows = quantise(x)
    sums = product(rows.values, w.values, jnp.int32).astype(jnp.float32)
    return sums * rows.scale[..., None]


def scale_name(name: str) -> str:
    """The name of the scales of a matrix: those of gate_EFD are gate_scale_EF."""
    stem, _, letters = name.rpartition("_")
    return f"{stem}_scale_{letters[:-1]}"


def hold(module: nnx.Module, names: tuple[str, ...], bits: int) -> None:
    """Puts whole numbers in the place of matrices of a module, and their scales beside them."""
    for name in names:
        found = quantise(getattr(module, name)[...], bits)
        setattr(module, name, nnx.Param(found.values))
        setattr(module, scale_name(name), Scale(found.scale))


def held(module: nnx.Module, name: str, *, inputs: bool) -> Quantised:
    """A matrix that `hold` has quantised."""
    scale = getattr(module, scale_name(name))
    return Quantised(getattr(module, name)[...], scale[...], inputs)
