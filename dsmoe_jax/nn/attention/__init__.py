"""The registry of attentions.

A new attention is a file beside `grouped` and an entry in `ATTENTION`: the model, generation, the
counts of parameters and FLOPs and the planner read the entry and know no names.  The parameters'
names end in their logical axes (parallel/sharding.py).
"""

from __future__ import annotations

import jax.numpy as jnp

from dsmoe_jax.config import AttentionConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.nn.attention import grouped, kernels
from dsmoe_jax.nn.attention.mask import CausalMask
from dsmoe_jax.nn.attention.types import Activations, Attention

ATTENTION: dict[str, Attention] = {
    "grouped": Attention(
        module=grouped.GroupedAttention,
        empty_cache=grouped.empty_cache,
        parameters=grouped.parameters,
        train_flops=grouped.train_flops,
        activations=grouped.activations,
        head_sizes=grouped.head_sizes,
    ),
}


def get(config: AttentionConfig) -> Attention:
    """The attention of a config.

    Raises:
      ValueError: for an unknown name or kernel, or an option that this attention does not have.
    """
    name = config.name
    require(name in ATTENTION, "model.attention.name", name, f"must be one of {sorted(ATTENTION)}")
    known = ATTENTION[name].options
    for option, value in config.options.items():
        key = f"model.attention.options.{option}"
        options = f"its options are {sorted(known)}" if known else "it has no options"
        require(option in known, key, value, f"not of the {name} attention; {options}")
    kernels.check_name(config.kernel)
    return ATTENTION[name]


def kernel_of(config: AttentionConfig, length: int, dtype: jnp.dtype) -> str | None:
    """The kernel of training and evaluation on the ambient mesh; None if the attention calls none.

    Args:
      config: section `model.attention`.
      length: of a sequence, which may hold several documents.
      dtype: of activations.

    Raises:
      ValueError: for a kernel that cannot compute it, saying which one can.
    """
    head_sizes = get(config).head_sizes
    if head_sizes is None:
        return None
    key_size, value_size = head_sizes(config)
    task = kernels.Task(platform(), length, key_size, value_size, dtype, documents=True)
    return kernels.choose(config.kernel, task)


__all__ = ["ATTENTION", "Activations", "Attention", "CausalMask", "get", "kernel_of"]
