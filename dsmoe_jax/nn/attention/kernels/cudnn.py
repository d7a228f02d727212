"""The kernel for NVIDIA GPUs: cuDNN's flash attention, which JAX calls.

JAX offers it the lengths of sequences, not the borders of documents within one; with the mask as an
array it would read scores' worth of memory again.  So it computes single documents only.

Shapes: B sequences, S positions, N query heads, M key/value heads, H size of a query and a key, I
size of a value.
"""

from __future__ import annotations

import jax

from dsmoe_jax.nn.attention.kernels.types import Task
from dsmoe_jax.nn.attention.kernels.xla import widened
from dsmoe_jax.nn.attention.mask import CausalMask

_LARGEST_SIZE = 128  # of a head that every GPU with flash attention computes
_DTYPES = ("bfloat16", "float16")


def attend(
    query_BSNH: jax.Array, key_BSMH: jax.Array, value_BSMI: jax.Array, mask: CausalMask
) -> jax.Array:
    """Attention over whole single documents."""
    assert mask.segment_ids_BS is None, "cuDNN is not told of documents"
    h = query_BSNH.shape[-1]
    i = value_BSMI.shape[-1]
    y_BSNI = jax.nn.dot_product_attention(
        widened(query_BSNH, i),
        widened(key_BSMH, i),
        widened(value_BSMI, h),
        is_causal=True,
        scale=h**-0.5,
        implementation="cudnn",
    )
    return y_BSNI[..., :i]


def refuse(task: Task) -> str:
    """Another platform, several documents, a dtype or a head that it does not know."""
    size = max(task.key_size, task.value_size)
    if task.platform != "gpu" or not _is_nvidia():
        return f"runs on NVIDIA GPUs, not on this {task.platform}; must be 'auto' or 'xla' here"
    if task.documents:
        return (
            "computes single documents, and the batches of training and evaluation pack several in"
            " a sequence; must be 'auto' or 'xla'"
        )
    if task.dtype not in _DTYPES:
        return f"computes in {' or '.join(_DTYPES)}, not {task.dtype}; see model.compute_dtype"
    if size > _LARGEST_SIZE or size % 8:
        return (
            f"its heads are multiples of 8 up to {_LARGEST_SIZE}, not {size}"
            " (model.attention.head_dim, or the sizes in its options); must be 'auto' or 'xla'"
        )
    return ""


def _is_nvidia() -> bool:
    """Whether JAX's GPUs are driven by CUDA: those of AMD have the same platform."""
    return "cuda" in jax.devices()[0].client.platform_version
