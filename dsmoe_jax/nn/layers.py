"""The small parts that every layer is made of.

Matrices are stored out x in, as torch and Hugging Face do; `x @ w.T` is also the faster layout for
XLA on CPU.

Shapes: B sequences, S positions, D hidden, F feed-forward width, N heads, H head size, V
vocabulary; `...` any leading axes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def init_matrix(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param[jax.Array]:
    """A float32 parameter from N(0, std^2): the paper starts every matrix so (V1 section 4.1.3)."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


def linear(x: jax.Array, weight: nnx.Param[jax.Array]) -> jax.Array:
    """`x @ weight.T` in the dtype of x, for x of (..., in) and weight of (out, in)."""
    return _product(x, weight[...].astype(x.dtype))


def linear_by_head(x_BSD: jax.Array, weight_NHD: nnx.Param[jax.Array]) -> jax.Array:
    """`linear` to the heads of an attention, (B, S, N, H)."""
    return jnp.einsum("bsd,nhd->bsnh", x_BSD, weight_NHD[...].astype(x_BSD.dtype))


def linear_to_float32(x: jax.Array, weight: nnx.Param[jax.Array]) -> jax.Array:
    """`linear` whose float32 sums are handed on as they are, for a float32 value such as a logit.

    The inputs are in the dtype of x all the same.
    """
    return _product_to_float32(x, weight[...].astype(x.dtype))


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("...i,oi->...o", x, w)


@jax.custom_vjp
def _product_to_float32(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("...i,oi->...o", x, w, preferred_element_type=jnp.float32)


def _product_to_float32_fwd(x, w):
    return _product_to_float32(x, w), (x, w)


def _product_to_float32_bwd(saved, dy):
    # As in `linear`: a product of a float32 gradient and bfloat16 inputs would run in float32.
    return jax.vjp(_product, *saved)[1](dy.astype(saved[0].dtype))


_product_to_float32.defvjp(_product_to_float32_fwd, _product_to_float32_bwd)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale (1910.07467), computed in float32."""

    def __init__(self, size: int, eps: float):
        self.eps = eps
        self.scale_D = nnx.Param(jnp.ones((size,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) -> (..., D), same dtype."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        return (y * self.scale_D[...]).astype(x.dtype)
