"""The registry of attention kernels: softmax(Q K^T / sqrt(H)) V, and nothing else.

An attention projects, rotates and keeps its cache; `attend` is where it meets a kernel.

    splash   TPUs: scores stay on the chip
    cudnn    NVIDIA GPUs: the same, for single documents
    xla      everywhere, with a cache too: scores and mask are arrays in memory

A new kernel is a file and a line in `KERNELS`.

Shapes: B sequences, S query positions, L key positions, N query heads, M key/value heads, H size of
a query and a key, I size of a value.
"""

from __future__ import annotations

import math

import jax

from dsmoe_jax.config.checks import require
from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.nn.attention.kernels import cudnn, splash, xla
from dsmoe_jax.nn.attention.kernels.types import Attend, Kernel, Task
from dsmoe_jax.nn.attention.mask import CausalMask
from dsmoe_jax.parallel.sharding import on_shards, spec_of

# "auto" is the first that computes the task; the last one computes all of them.
KERNELS: dict[str, Kernel] = {
    "splash": Kernel(splash.attend, splash.refuse, per_shard=True),
    "cudnn": Kernel(cudnn.attend, cudnn.refuse, per_shard=True),
    "xla": Kernel(xla.attend, xla.refuse, keeps_scores=True),
}
_KEY = "model.attention.kernel"


def check_name(name: str) -> None:
    """Refuses an unknown `model.attention.kernel`."""
    names = ["auto", *sorted(KERNELS)]
    require(name in names, _KEY, name, f"must be one of {names}")


def keeps_scores(name: str) -> bool:
    """Whether an accelerator keeps scores in memory with this `model.attention.kernel`.

    "auto" is taken for a kernel that does not, which every accelerator has for one document a
    sequence.
    """
    return name in KERNELS and KERNELS[name].keeps_scores


def choose(name: str, task: Task) -> str:
    """The kernel's name that `model.attention.kernel` means for a task.

    A cache is always attended by XLA, whatever the name: one query against many keys is no work
    for the others.

    Raises:
      ValueError: for an unknown name, or a kernel that cannot compute the task.
    """
    check_name(name)
    if task.cache:
        return "xla"
    if name == "auto":
        return next(known for known, kernel in KERNELS.items() if not kernel.refuse(task))
    reason = KERNELS[name].refuse(task)
    require(not reason, _KEY, name, reason)
    return name


def attend(
    name: str,
    query_BSNH: jax.Array,
    key_BLMH: jax.Array,
    value_BLMI: jax.Array,
    mask: CausalMask,
) -> jax.Array:
    """Attention of queries to keys and values, on the ambient mesh if there is one.

    Args:
      name: `model.attention.kernel`.
      query_BSNH: N a multiple of M: query head n goes with key head n // (N / M).
      key_BLMH, value_BLMI: of the same positions, or of a cache.
      mask: keys that each query may see.

    Returns:
      y_BSNI, in the dtype of the query.

    Raises:
      ValueError: as `choose`.
    """
    task = Task(
        platform(),
        query_BSNH.shape[1],
        query_BSNH.shape[-1],
        value_BLMI.shape[-1],
        query_BSNH.dtype,
        documents=mask.segment_ids_BS is not None,
        cache=mask.n_keys is not None,
    )
    kernel = KERNELS[choose(name, task)]
    if kernel.per_shard and math.prod(jax.sharding.get_abstract_mesh().axis_sizes) > 1:
        return _on_shards(kernel.attend, query_BSNH, key_BLMH, value_BLMI, mask)
    return kernel.attend(query_BSNH, key_BLMH, value_BLMI, mask)


def _on_shards(
    attend: Attend,
    query_BSNH: jax.Array,
    key_BSMH: jax.Array,
    value_BSMI: jax.Array,
    mask: CausalMask,
) -> jax.Array:
    """Calls a kernel on each shard's sequences and heads: nothing is sent."""
    segment_ids_BS = mask.segment_ids_BS
    by_query = spec_of(query_BSNH.shape, "BSNH")
    by_key = spec_of(key_BSMH.shape, "BSMH")
    # Each head must find its key on its own device.
    assert by_query == by_key, "the axis `tensor` divides query heads and key heads, or neither"

    def on_shard(query_BSNH, key_BSMH, value_BSMI, segment_ids_BS):
        return attend(query_BSNH, key_BSMH, value_BSMI, CausalMask(segment_ids_BS))

    by_segment = None if segment_ids_BS is None else spec_of(segment_ids_BS.shape, "BS")
    return on_shards(
        on_shard,
        in_specs=(by_query, by_key, by_key, by_segment),
        out_specs=by_query,
    )(query_BSNH, key_BSMH, value_BSMI, segment_ids_BS)


__all__ = ["KERNELS", "Kernel", "Task", "attend", "check_name", "choose"]
