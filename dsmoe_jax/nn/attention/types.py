"""Interface of an attention: its module, its cache and its costs.

Shapes: B sequences, S query positions, L key positions (S, or the cache's length), D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from dsmoe_jax.config import AttentionConfig


class Activations(NamedTuple):
    """Numbers that one layer holds for each token during a pass, to estimate its memory.

    Attributes:
      projected: results of the projections: queries, keys, values.
      scores: one for each head and key.
      result: what the last projection takes.
    """

    projected: int
    scores: int
    result: int


def _accept(config: AttentionConfig) -> None:
    """Refuses nothing."""
    del config


class Attention(NamedTuple):
    """An attention in the registry: all that other code must know of it.

    Attributes:
      module: `(hidden_size, initializer_range, config, *, rms_norm_eps, rngs) -> nnx.Module`, a
        layer.  It is called as `(x_BSD, positions_BS, mask, cache, cache_length) -> (y_BSD,
        cache)`: activations; int32, the position of each token in its document; the `CausalMask`
        of the keys that each query may see; the cache of this layer or None, into which the S new
        positions are written at `cache_length`, and which is returned with them.
      empty_cache: `(config, batch, max_length, dtype) -> cache` of one layer: a pytree of arrays
        (at least one) whose shapes all begin with (B, L).
      parameters: `(hidden_size, config) -> int`, the parameters of one layer.
      train_flops: `(config, length) -> int`, the training FLOPs of one token in one layer, in a
        sequence of `length` tokens, besides the 6 for each parameter: scores and values.  Without
        a causal discount, as is usual (PaLM, 2204.02311, appendix B).
      activations: `(config, length) -> Activations` of one layer.
      decode_flops: `(config, length) -> int`, the FLOPs of one new token in one layer with a cache
        of `length` tokens, besides the 2 for each parameter; None: those of a forward pass, a third
        of `train_flops`.
      head_sizes: `(config) -> (size of queries and keys, size of values)` as its kernel gets them;
        None: it calls none of `attention/kernels`.
      options: names and defaults of the settings that only this attention has
        (`model.attention.options`).
      check: `(config)`, refuses values that the module cannot serve with a ValueError.
    """

    module: Callable[..., Any]
    empty_cache: Callable[..., Any]
    parameters: Callable[..., int]
    train_flops: Callable[..., int]
    activations: Callable[..., Activations]
    decode_flops: Callable[..., int] | None = None
    head_sizes: Callable[..., tuple[int, int]] | None = None
    options: Mapping[str, bool | int | float | str] = MappingProxyType({})
    check: Callable[[AttentionConfig], None] = _accept
