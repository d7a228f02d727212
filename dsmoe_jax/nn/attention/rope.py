"""Rotary position embedding (RoPE, 2104.09864), and the registry of its scalings to long contexts.

RoPE turns pair i of a head by the angle position * frequency_i: a score then depends on how far
apart query and key are.  A model that was trained on short documents reads longer ones when its
slow pairs, which made less than one turn there, are slowed further; `model.attention.rope_scaling`
says how.  A new way is a function and a line in `ROPE_TYPES`.

Shapes: B sequences, S positions, N heads, H size of what is rotated, P = H / 2 pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsmoe_jax.config import AttentionConfig, RopeScaling
from dsmoe_jax.config.checks import checker, require


def rotate(x_BSNH: jax.Array, positions_BS: jax.Array, config: AttentionConfig) -> jax.Array:
    """Turns the pairs of queries or keys by their positions.

    Args:
      x_BSNH: H is even.
      positions_BS: int32, of each token in its document.
      config: its `rope_theta`, `rope_scaling` and `rope_interleaved`.

    Returns:
      An array of the dtype of `x_BSNH`, computed in float32.  The two numbers of pair i are at i
      and i + H/2 in either layout: queries and keys are reordered alike, which no score shows.
    """
    frequency_P = frequencies(x_BSNH.shape[-1], config)
    angle = positions_BS[..., None, None].astype(jnp.float32) * frequency_P
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    if (factor := amplitude(config.rope_scaling)) != 1.0:
        sin, cos = factor * sin, factor * cos
    x = x_BSNH.astype(jnp.float32)
    if config.rope_interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BSNH.dtype)


def frequencies(size: int, config: AttentionConfig) -> jax.Array:
    """Radians by which each pair turns from one position to the next, float32 (P,).

    Args:
      size: H.
      config: pair i turns by theta^(-2i/H), scaled as `rope_scaling` says.
    """
    half = size // 2
    frequency_P = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency_P
    return ROPE_TYPES[scaling.rope_type].frequencies(frequency_P, config.rope_theta, scaling)


def amplitude(scaling: RopeScaling | None) -> float:
    """Multiple of the rotated part of queries and of keys."""
    return 1.0 if scaling is None else ROPE_TYPES[scaling.rope_type].amplitude(scaling)


def score_factor(scaling: RopeScaling | None) -> float:
    """Multiple of all scores before the softmax, in DeepSeek's latent attention alone.

    Their released code gives the whole head, not its rotated part alone, YaRN's temperature for
    `mscale_all_dim`: once for queries, once for keys.
    """
    if scaling is None or scaling.mscale_all_dim is None:
        return 1.0
    return _mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def _linear(frequency_P: jax.Array, theta: float, scaling: RopeScaling) -> jax.Array:
    """Position interpolation (2306.15595): every pair is slowed alike."""
    del theta
    return frequency_P / scaling.factor


def _llama3(frequency_P: jax.Array, theta: float, scaling: RopeScaling) -> jax.Array:
    """Llama 3.1's: slowed below some turns in the first context, between them in part."""
    del theta
    length, low, high = (getattr(scaling, name) for name in _LLAMA3)
    turns_P = length * frequency_P / (2 * math.pi)
    kept_P = jnp.clip((turns_P - low) / (high - low), 0, 1)
    return frequency_P * (kept_P + (1 - kept_P) / scaling.factor)


def _yarn(frequency_P: jax.Array, theta: float, scaling: RopeScaling) -> jax.Array:
    """YaRN's "NTK-by-parts" (2309.00071): the limits are pairs, with a straight line between."""
    p = frequency_P.size
    length = scaling.original_max_position_embeddings
    assert length is not None, "`check` asks for it"

    def pair(turns: float) -> float:
        """The pair that makes so many turns in the first context, as a real number."""
        return p * math.log(length / (2 * math.pi * turns)) / math.log(theta)

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first = max(first, 0)
    last = min(last, 2 * p - 1)  # of 2 p numbers, not of p pairs: as released
    if first == last:
        last += 0.001
    slowed_P = jnp.clip((jnp.arange(p, dtype=jnp.float32) - first) / (last - first), 0, 1)
    return frequency_P * (1 - slowed_P) + frequency_P / scaling.factor * slowed_P


def _yarn_amplitude(scaling: RopeScaling) -> float:
    """The root of the temperature of the softmax, in queries and in keys (2309.00071)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale is None or scaling.mscale_all_dim is None:
        return _mscale(scaling.factor, 1.0)
    return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def _one(scaling: RopeScaling) -> float:
    del scaling
    return 1.0


class RopeType(NamedTuple):
    """A scaling of the rotary frequencies in the registry.

    Attributes:
      frequencies: `(frequency_P, theta, scaling) -> frequency_P`.
      needs: fields of `RopeScaling`, besides the factor, that must be given.
      reads: fields that may be given; the others must have their defaults.
      amplitude: `(scaling) -> float`, multiple of the rotated part of queries and of keys.
    """

    frequencies: Callable[[jax.Array, float, RopeScaling], jax.Array]
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    amplitude: Callable[[RopeScaling], float] = _one


_LENGTH = "original_max_position_embeddings"
_LLAMA3 = (_LENGTH, "low_freq_factor", "high_freq_factor")
_YARN = ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor")

ROPE_TYPES: dict[str, RopeType] = {
    "linear": RopeType(_linear),
    "llama3": RopeType(_llama3, needs=_LLAMA3),
    "yarn": RopeType(_yarn, needs=(_LENGTH,), reads=_YARN, amplitude=_yarn_amplitude),
}


def check(config: AttentionConfig) -> None:
    """Refuses a rope type that is not in the registry, or settings that it cannot serve.

    Raises:
      ValueError: naming the key, its value and what would be right.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return
    right = checker(scaling, "model.attention.rope_scaling.")
    name = scaling.rope_type
    right("rope_type", name in ROPE_TYPES, f"must be one of {sorted(ROPE_TYPES)}")
    rope = ROPE_TYPES[name]
    for field in dataclasses.fields(RopeScaling):
        value = getattr(scaling, field.name)
        if field.name in rope.needs:
            right(field.name, value is not None, f"the rope type {name} needs a number")
        elif field.name not in ("rope_type", "factor", *rope.reads):
            want = f"the rope type {name} does not know it; must be {field.default!r}"
            right(field.name, value == field.default, want)
    slow, fast = scaling.beta_slow, scaling.beta_fast
    right("beta_fast", fast > slow, f"must be above beta_slow={slow}")
    low, high = scaling.low_freq_factor or 0, scaling.high_freq_factor or math.inf
    right("high_freq_factor", high > low, f"must be above low_freq_factor={low}")
    require(config.rope_theta > 1, "model.attention.rope_theta", config.rope_theta, "must be > 1")
