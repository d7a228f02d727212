"""The registry of attentions.

A new attention is a file beside `grouped` and an entry in `ATTENTION`: the model, generation, the
counts of parameters and FLOPs and the planner read the entry and know no names.  The parameters'
names end in their logical axes (parallel/sharding.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dsmoe_jax.config import AttentionConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.nn.attention import grouped, kernels, latent, rope
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
        options=grouped.Options()._asdict(),
        check=grouped.check,
    ),
    "latent": Attention(
        module=latent.LatentAttention,
        empty_cache=latent.empty_cache,
        parameters=latent.parameters,
        train_flops=latent.train_flops,
        activations=latent.activations,
        decode_flops=latent.decode_flops,
        head_sizes=latent.head_sizes,
        options=latent.Options()._asdict(),
        check=latent.check,
    ),
}


def get(config: AttentionConfig) -> Attention:
    """The attention of a config.

    Raises:
      ValueError: for an unknown name, kernel or rope type, an option that this attention does not
        have, or values that it cannot serve.
    """
    name = config.name
    require(name in ATTENTION, "model.attention.name", name, f"must be one of {sorted(ATTENTION)}")
    entry = ATTENTION[name]
    _check_options(config, entry.options)
    kernels.check_name(config.kernel)
    rope.check(config)
    entry.check(config)
    return entry


def _check_options(config: AttentionConfig, known: Mapping[str, bool | int | float | str]) -> None:
    """Refuses an option that an attention does not have, or of another type than its default."""
    for option, value in config.options.items():
        key = f"model.attention.options.{option}"
        options = f"its options are {sorted(known)}" if known else "it has no options"
        require(option in known, key, value, f"not of the {config.name} attention; {options}")
        kind = type(known[option])
        number = kind is float and type(value) is int
        require(type(value) is kind or number, key, value, f"must be of type {kind.__name__}")


def cache_bytes(config: AttentionConfig, dtype: jnp.dtype) -> int:
    """Bytes that a cache in `dtype` holds for one token of one sequence, in one layer.

    Raises:
      ValueError: as `get` does.
    """
    empty = get(config).empty_cache
    one_position = jax.eval_shape(lambda: empty(config, 1, 1, dtype))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one_position))


def decode_flops(config: AttentionConfig, length: int) -> float:
    """FLOPs of one new token in one layer, besides its parameters'; see `Attention`.

    Args:
      config: section `model.attention`.
      length: tokens in the cache.
    """
    entry = get(config)
    if entry.decode_flops is None:
        return entry.train_flops(config, length) / 3
    return entry.decode_flops(config, length)


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


__all__ = [
    "ATTENTION",
    "Activations",
    "Attention",
    "CausalMask",
    "cache_bytes",
    "decode_flops",
    "get",
    "kernel_of",
]
