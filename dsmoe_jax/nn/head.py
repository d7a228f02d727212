"""The output head, and the loss of its logits in blocks of tokens.

Logits are the largest array of a step: 8192 tokens and 102,400 words are 3.4 GB in float32, and the
backward pass wants two or three of them.  `nll_in_blocks` never has more than those of a block.  It
costs a fourth product with the head beside the three of a forward and a backward pass.

Shapes: B sequences, S positions, D hidden, V vocabulary; on a shard of the mesh t tokens, v words
of the vocabulary, and b tokens of a block.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from dsmoe_jax.nn.layers import linear_to_float32
from dsmoe_jax.nn.token_blocks import (
    IN_USE,
    axis_size,
    best_words,
    cut,
    joined,
    logits_of_block,
    on_shards,
    over_vocabulary,
    scattered,
    words,
)
from dsmoe_jax.parallel.sharding import batch_shards, constrain, gathered, spec, spec_of

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
    on_device = -(-tokens // batch_shards())
    return n_blocks_of_one_device(on_device, vocab_size, axis_size("tensor"), block_tokens)


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
    by_token = spec_of(targets_BS.shape, "BS")
    forward = on_shards(
        functools.partial(_forward, n_blocks, with_best),
        in_specs=(P(*by_token, None), IN_USE, by_token),
        out_specs=(by_token,) * (3 if with_best else 2),
    )
    nll_BS, log_sum_BS, *best = forward(x_BSD, head_VD, targets_BS)
    return (nll_BS, *best), (x_BSD, head_VD, targets_BS, log_sum_BS)


def _nll_bwd(n_blocks, with_best, saved, gradients):
    dnll_BS = gradients[0]
    by_token = spec("BS")
    by_vector = spec("BSD")
    backward = on_shards(
        functools.partial(_backward, n_blocks),
        in_specs=(by_vector, IN_USE, by_token, by_token, by_token),
        out_specs=(by_vector, spec("VD")),
    )
    dx_BSD, dhead_VD = backward(*saved, dnll_BS)
    return dx_BSD, dhead_VD, None


_nll.defvjp(_nll_fwd, _nll_bwd)


def _forward(n_blocks, with_best, x_BSD, head_vD, targets_BS):
    """Negative log-likelihood, log-sum of exponentials and best word of a shard's tokens."""

    def one(_, block):
        x_bD, target_b = block
        logits_bv = logits_of_block(x_bD, head_vD)
        largest_b = over_vocabulary(jax.lax.pmax, logits_bv.max(axis=1))
        shifted_bv = logits_bv - largest_b[:, None]
        # A sum over one word, not a lookup: it is part of the pass that adds up the exponentials.
        of_target_b = jnp.where(_is_target(target_b, logits_bv), shifted_bv, 0).sum(axis=1)
        sums = (jnp.exp(shifted_bv).sum(axis=1), of_target_b)
        total_b, of_target_b = over_vocabulary(jax.lax.psum, sums)
        log_b = jnp.log(total_b)
        best = [best_words(logits_bv, largest_b)] if with_best else []
        return None, (log_b - of_target_b, largest_b + log_b, *best)

    blocks = cut(n_blocks, x_BSD, targets_BS)
    each = jax.lax.scan(one, None, blocks)[1]
    return tuple(joined(x, targets_BS.shape) for x in each)


def _backward(n_blocks, x_BSD, head_vD, targets_BS, log_sum_BS, dnll_BS):
    """Gradients of a shard's tokens, and of its part of the head from all shards' tokens."""

    def one(dhead_vD, block):
        x_bD, target_b, log_sum_b, dnll_b = block
        logits_bv = logits_of_block(x_bD, head_vD)
        share_bv = jnp.exp(logits_bv - log_sum_b[:, None])
        dlogits_bv = (share_bv - _is_target(target_b, logits_bv)) * dnll_b[:, None]
        # As in `linear_to_float32`: products of a float32 gradient would run in float32.
        dlogits_bv = dlogits_bv.astype(x_bD.dtype)
        dx_bD = jnp.einsum("bv,vd->bd", dlogits_bv, head_vD)
        dhead_vD += jnp.einsum("bv,bd->vd", dlogits_bv, x_bD, preferred_element_type=jnp.float32)
        return dhead_vD, dx_bD

    blocks = cut(n_blocks, x_BSD, targets_BS, log_sum_BS, dnll_BS)
    dhead_vD, dx_bD = jax.lax.scan(one, jnp.zeros(head_vD.shape, jnp.float32), blocks)
    dx_BSD = over_vocabulary(jax.lax.psum, joined(dx_bD, x_BSD.shape))
    return dx_BSD, scattered(dhead_vD)


def _is_target(target_b: jax.Array, logits_bv: jax.Array) -> jax.Array:
    """Whether a word of this shard's vocabulary is the target of a token, bool (b, v)."""
    return words(logits_bv) == target_b[:, None]
