"""The output head, and the loss of its logits in blocks of tokens.

Logits are the largest array of a step: 8192 tokens and 102,400 words are 3.4 GB in float32, and the
backward pass wants two or three of them.  `nll_in_blocks` never has more than those of a block.  It
costs a fourth product with the head beside the three of a forward and a backward pass.

Shapes: B sequences, S positions, D hidden, V vocabulary; on a shard of the mesh t tokens, v words
of the vocabulary, and b tokens of a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dsmoe_jax.nn.layers import linear_to_float32
from dsmoe_jax.parallel.mesh import BATCH_AXES
from dsmoe_jax.parallel.sharding import constrain, gathered, spec

# Bytes of float32 logits on one device: what has no more is computed whole, and so is each block.
WHOLE_LOGITS = 2**30


def logits(x_BSD: jax.Array, head_VD: nnx.Param[jax.Array]) -> jax.Array:
    """Logits of all tokens, float32 (B, S, V)."""
    return constrain(linear_to_float32(x_BSD, head_VD), "BSV")


def n_blocks(tokens: int, vocab_size: int, block_tokens: int | None) -> int:
    """Number of blocks that the tokens of one device are computed in; 1: the logits are whole.

    Args:
      tokens: of the batch, on all devices of the ambient mesh together.
      vocab_size: V.
      block_tokens: the most in a block; None: as many as have `WHOLE_LOGITS` bytes.
    """
    on_device = -(-tokens // math.prod(_size(axis) for axis in BATCH_AXES))
    return n_blocks_of_one_device(on_device, vocab_size, _size("tensor"), block_tokens)


def n_blocks_of_one_device(
    tokens: int, vocab_size: int, tensor: int, block_tokens: int | None
) -> int:
    """As `n_blocks`, for the tokens of one device; `tensor` devices share the vocabulary."""
    if block_tokens is None:
        block_tokens = max(1, WHOLE_LOGITS // (4 * vocab_size // tensor))
    return -(-tokens // block_tokens)


def nll_in_blocks(
    x_BSD: jax.Array, head_VD: nnx.Param[jax.Array], targets_BS: jax.Array, n_blocks: int
) -> jax.Array:
    """Negative log-likelihood of every target in nats, float32 (B, S), from blocks of logits.

    Args:
      x_BSD: the last layer's output, normed; the products are of its dtype, their sums float32.
      head_VD: a float32 parameter.  Its gradient is summed over the blocks in float32.
      targets_BS: int32.
      n_blocks: into which the tokens of one device are cut; they need not divide them.  The
        sequences must divide over the devices.
    """
    found: Any = _nll(x_BSD, head_VD[...], targets_BS, n_blocks, False)
    return found[0]


def nll_and_best_in_blocks(
    x_BSD: jax.Array, head_VD: nnx.Param[jax.Array], targets_BS: jax.Array, n_blocks: int
) -> tuple[jax.Array, jax.Array]:
    """As `nll_in_blocks`, and the word of the largest logit of every token, int32 (B, S)."""
    found: Any = _nll(x_BSD, head_VD[...], targets_BS, n_blocks, True)
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _nll(x_BSD, head_VD, targets_BS, n_blocks, with_best) -> Any:
    return _nll_fwd(x_BSD, head_VD, targets_BS, n_blocks, with_best)[0]


def _nll_fwd(x_BSD, head_VD, targets_BS, n_blocks, with_best):
    chex.assert_equal_shape_prefix([x_BSD, targets_BS], 2)
    # Collected here, once, and kept until the backward pass, which comes next.
    head_VD = gathered(head_VD.astype(x_BSD.dtype), "VD")
    by_token = spec("BS")
    forward = _on_shards(
        functools.partial(_forward, n_blocks, with_best),
        in_specs=(spec("BSD"), _IN_USE, by_token),
        out_specs=(by_token,) * (3 if with_best else 2),
    )
    nll_BS, log_sum_BS, *best = forward(x_BSD, head_VD, targets_BS)
    return (nll_BS, *best), (x_BSD, head_VD, targets_BS, log_sum_BS)


def _nll_bwd(n_blocks, with_best, saved, gradients):
    dnll_BS = gradients[0]
    by_token = spec("BS")
    by_vector = spec("BSD")
    backward = _on_shards(
        functools.partial(_backward, n_blocks),
        in_specs=(by_vector, _IN_USE, by_token, by_token, by_token),
        out_specs=(by_vector, spec("VD")),
    )
    dx_BSD, dhead_VD = backward(*saved, dnll_BS)
    return dx_BSD, dhead_VD, None


_nll.defvjp(_nll_fwd, _nll_bwd)
_IN_USE = PartitionSpec("tensor", None)  # the head as FSDP has gathered it


def _forward(n_blocks, with_best, x_BSD, head_vD, targets_BS):
    """Negative log-likelihood, log-sum of exponentials and best word of a shard's tokens."""

    def one(_, block):
        x_bD, target_b = block
        logits_bv = _logits(x_bD, head_vD)
        largest_b = _over_vocabulary(jax.lax.pmax, logits_bv.max(axis=1))
        shifted_bv = logits_bv - largest_b[:, None]
        # A sum over one word, not a lookup: it is part of the pass that adds up the exponentials.
        of_target_b = jnp.where(_is_target(target_b, logits_bv), shifted_bv, 0).sum(axis=1)
        sums = (jnp.exp(shifted_bv).sum(axis=1), of_target_b)
        total_b, of_target_b = _over_vocabulary(jax.lax.psum, sums)
        log_b = jnp.log(total_b)
        best = [_best(logits_bv, largest_b)] if with_best else []
        return None, (log_b - of_target_b, largest_b + log_b, *best)

    blocks = _cut(n_blocks, x_BSD, targets_BS)
    each = jax.lax.scan(one, None, blocks)[1]
    return tuple(_joined(x, targets_BS.shape) for x in each)


def _backward(n_blocks, x_BSD, head_vD, targets_BS, log_sum_BS, dnll_BS):
    """Gradients of a shard's tokens, and of its part of the head from all shards' tokens."""

    def one(dhead_vD, block):
        x_bD, target_b, log_sum_b, dnll_b = block
        logits_bv = _logits(x_bD, head_vD)
        share_bv = jnp.exp(logits_bv - log_sum_b[:, None])
        dlogits_bv = (share_bv - _is_target(target_b, logits_bv)) * dnll_b[:, None]
        # As in `linear_to_float32`: products of a float32 gradient would run in float32.
        dlogits_bv = dlogits_bv.astype(x_bD.dtype)
        dx_bD = jnp.einsum("bv,vd->bd", dlogits_bv, head_vD)
        dhead_vD += jnp.einsum("bv,bd->vd", dlogits_bv, x_bD, preferred_element_type=jnp.float32)
        return dhead_vD, dx_bD

    blocks = _cut(n_blocks, x_BSD, targets_BS, log_sum_BS, dnll_BS)
    dhead_vD, dx_bD = jax.lax.scan(one, jnp.zeros(head_vD.shape, jnp.float32), blocks)
    dx_BSD = _over_vocabulary(jax.lax.psum, _joined(dx_bD, x_BSD.shape))
    return dx_BSD, _scattered(dhead_vD)


def _logits(x_bD: jax.Array, head_vD: jax.Array) -> jax.Array:
    return jnp.einsum("bd,vd->bv", x_bD, head_vD, preferred_element_type=jnp.float32)


def _is_target(target_b: jax.Array, logits_bv: jax.Array) -> jax.Array:
    """Whether a word of this shard's vocabulary is the target of a token, bool (b, v)."""
    return _words(logits_bv) == target_b[:, None]


def _best(logits_bv: jax.Array, largest_b: jax.Array) -> jax.Array:
    """The first word, of all shards' vocabulary, with the largest logit, int32 (b,)."""
    last = jnp.iinfo(jnp.int32).max
    word_bv = jnp.where(logits_bv == largest_b[:, None], _words(logits_bv), last)
    return _over_vocabulary(jax.lax.pmin, word_bv.min(axis=1))


def _words(logits_bv: jax.Array) -> jax.Array:
    """The words of this shard's vocabulary, int32 (v,)."""
    v = logits_bv.shape[1]
    first = jax.lax.axis_index("tensor") * v if _size("tensor") > 1 else 0
    return first + jnp.arange(v)


def _cut(n_blocks: int, *arrays_BS: jax.Array) -> tuple[jax.Array, ...]:
    """The tokens in blocks of equal size along a new leading axis, filled up with zeros."""

    def cut(x_BS: jax.Array) -> jax.Array:
        rest = x_BS.shape[2:]
        x_t = x_BS.reshape(-1, *rest)
        missing = -len(x_t) % n_blocks
        filled = jnp.pad(x_t, [(0, missing)] + [(0, 0)] * len(rest)) if missing else x_t
        return filled.reshape(n_blocks, -1, *rest)

    return tuple(cut(x_BS) for x_BS in arrays_BS)


def _joined(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Puts together what `_cut` has cut, without what it has filled up."""
    joined = blocks.reshape(-1, *blocks.shape[2:])
    return joined[: math.prod(shape[:2])].reshape(shape)


def _over_vocabulary(reduce: Callable[..., Any], x: Any) -> Any:
    """A sum or maximum over the parts of the vocabulary."""
    return reduce(x, "tensor") if _size("tensor") > 1 else x


def _scattered(dhead_vD: jax.Array) -> jax.Array:
    """The sum over all shards' tokens, each device with the columns of D that it keeps."""
    # One axis after the other: over both at once a TPU adds the whole up on every device.
    for axis in ("fsdp", "expert"):
        if _size(axis) > 1:
            dhead_vD = jax.lax.psum_scatter(dhead_vD, axis, scatter_dimension=1, tiled=True)
    return jax.lax.psum(dhead_vD, "data") if _size("data") > 1 else dhead_vD


def _size(axis: str) -> int:
    """Devices along an axis of the ambient mesh; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def _on_shards(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The function on every shard of the ambient mesh; itself without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
