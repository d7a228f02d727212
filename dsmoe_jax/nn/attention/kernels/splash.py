"""The kernel for TPUs, JAX's splash attention: scores stay on the chip.

It skips the blocks that the causal mask empties, and has its own backward pass.

Shapes: B sequences, S positions, N query heads, M key/value heads, H size of a query and a key, I
size of a value.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from dsmoe_jax.nn import kept
from dsmoe_jax.nn.attention.kernels.types import Task
from dsmoe_jax.nn.attention.mask import CausalMask

_LANES = 128  # of a TPU's vector unit: every block is a multiple
_LARGEST_BLOCK = 512  # positions; four times the library's default, for fewer, fuller programs


def attend(
    query_BSNH: jax.Array,
    key_BSMH: jax.Array,
    value_BSMI: jax.Array,
    mask: CausalMask,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attention in blocks of positions.

    Args:
      query_BSNH, key_BSMH, value_BSMI: whole sequences, of a multiple of 128 positions.
      mask: without a cache.
      interpret: runs the kernel's program in plain JAX, which needs no TPU.
    """
    _, s, n, h = query_BSNH.shape
    kernel: Any = library.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((s, s))] * n),
        block_sizes=_blocks(s),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name=kept.ATTENDED,
    )
    # The library leaves the scale to the caller.
    query_BSNH = (query_BSNH.astype(jnp.float32) * h**-0.5).astype(query_BSNH.dtype)
    by_head = [x.swapaxes(1, 2) for x in (query_BSNH, key_BSMH, value_BSMI)]
    if mask.segment_ids_BS is None:
        y_BNSI = jax.vmap(kernel)(*by_head)
    else:
        segments = library.SegmentIds(mask.segment_ids_BS, mask.segment_ids_BS)
        y_BNSI = jax.vmap(kernel)(*by_head, segments)
    return y_BNSI.swapaxes(1, 2)


def _blocks(length: int) -> library.BlockSizes:
    """Blocks of the most positions that divide a sequence."""
    sizes = range(_LANES, _LARGEST_BLOCK + 1, _LANES)
    size = max(size for size in sizes if length % size == 0)
    return library.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )


def refuse(task: Task) -> str:
    """Another platform, or a sequence that no block divides."""
    if task.platform != "tpu":
        return f"runs on TPUs; must be 'auto' or 'xla' on a {task.platform}"
    if task.length % _LANES:
        return (
            f"its blocks are of multiples of {_LANES} positions, which do not divide sequences of"
            f" {task.length} (data.sequence_length); must be 'auto' or 'xla'"
        )
    return ""
