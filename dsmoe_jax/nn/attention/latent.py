"""Multi-head latent attention, MLA (DeepSeek-V2, 2405.04434, section 2.1 and appendix C).

Generation reads its cache once for each token, so a small cache is fast.  MLA does not cache the
keys and values of N heads, but one latent vector of Z numbers, from which all of them are made.
The equations, of a token t and head i, with the numbers of V2's appendix and our names; RMSNorms
(V2 section 3.1.2; not in the equations) in brackets:

    c^Q_t  = [norm] W^DQ h_t                  (37)  query_down_QD
    q^C_ti = W^UQ_i c^Q_t                     (38)  query_up_NHQ
    q^R_ti = RoPE(W^QR_i c^Q_t)               (39)  query_rope_NRQ
    q_ti   = [q^C_ti; q^R_ti]                 (40)
    c_t    = [norm] W^DKV h_t                 (41)  kv_down_ZD, cached
    k^C_ti = W^UK_i c_t                       (42)  key_up_NHZ
    k^R_t  = RoPE(W^KR h_t)                   (43)  key_rope_RD, cached
    k_ti   = [k^C_ti; k^R_t]                  (44)
    v_ti   = W^UV_i c_t                       (45)  value_up_NIZ
    o_ti   = sum over j <= t of softmax_j(q_ti . k_ji / sqrt(H + R)) v_ji    (46)
    u_t    = sum over i of W^O_i o_ti         (47)  out_DNI

Position is kept apart ("decoupled"): a rotation between W^UQ and W^UK would depend on t - j, and
nothing could be absorbed.  So R numbers of each query are rotated, and one key of R numbers, which
all heads share.

Two ways of computing (46), equal but for rounding:

    expanded   as written: makes the keys and values of every head from the latents.  For training,
               where every latent is new.
    absorbed   q^C_ti . k^C_ji = (W^UK_i^T q^C_ti) . c_j, and sum_j p_j v_ji = W^UV_i sum_j p_j c_j:
               the two matrices move to the side of the query, and attention is that of N queries of
               Z + R numbers to one key [c_j; k^R_j] with the value c_j.  For decoding: nothing of
               the cache's length is made.  A score costs Z + R products, not H + R, which is more
               work for a long prompt.

Without query compression (`q_lora_rank` 0, as in V2-Lite) queries come from h_t: query_NHD and
query_rope_NRD.

Shapes: B sequences, S query positions, L key positions (S, or the cache's length), D hidden, N
heads, H size of a query or key without its rotated part, R of the rotated part, I of a value, Q
latent of queries, Z latent of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config import AttentionConfig
from dsmoe_jax.config.checks import checker, not_negative, positive
from dsmoe_jax.nn.attention import kernels
from dsmoe_jax.nn.attention.mask import CausalMask
from dsmoe_jax.nn.attention.rope import rotate, score_factor
from dsmoe_jax.nn.attention.types import Activations
from dsmoe_jax.nn.layers import RMSNorm, init_matrix, linear, linear_by_head
from dsmoe_jax.parallel.sharding import constrain

# Of the latents' norms.  The released code has it fixed, whatever `rms_norm_eps` the model has.
LATENT_EPS = 1e-6


class Options(NamedTuple):
    """Settings that this attention alone has, with V2-Lite's as defaults."""

    q_lora_rank: int = 0  # Q; 0: queries are not compressed
    kv_lora_rank: int = 512  # Z
    qk_nope_head_dim: int = 128  # H
    qk_rope_head_dim: int = 64  # R
    v_head_dim: int = 128  # I
    decode: str = "absorbed"  # in `FORMS`: how a cache is attended


def options_of(config: AttentionConfig) -> Options:
    """The options of a config, with the defaults of missing ones filled in."""
    given: Any = config.options
    return Options(**given)


class LatentCache(NamedTuple):
    """The positions generated so far, for one layer.

    Attributes:
      latent_BLZ: [c_t; k^R_t] of each, Z + R numbers: one array, so that decoding reads it as it
        lies.  Filled up to the current length; what lies past it is masked.
    """

    latent_BLZ: jax.Array


class _Queries(NamedTuple):
    """Queries of all heads, without and with position."""

    plain_BSNH: jax.Array
    rope_BSNR: jax.Array


class LatentAttention(nnx.Module):
    """Multi-head latent attention (V2 section 2.1).

    Args:
      hidden_size: D.
      initializer_range: standard deviation of every matrix at the start.
      config: heads, rotation, kernel and options.
      rms_norm_eps: not used; see `LATENT_EPS`.
      rngs: for the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        initializer_range: float,
        config: AttentionConfig,
        *,
        rms_norm_eps: float,
        rngs: nnx.Rngs,
    ):
        del rms_norm_eps
        self.config = config
        q, z, h, r, i, self.decode = options_of(config)
        n = config.num_attention_heads
        d = hidden_size
        std = initializer_range
        self.compressed = q > 0
        if self.compressed:
            self.query_down_QD = init_matrix(rngs, (q, d), std)
            self.query_latent_norm = RMSNorm(q, LATENT_EPS)
            self.query_up_NHQ = init_matrix(rngs, (n, h, q), std)
            self.query_rope_NRQ = init_matrix(rngs, (n, r, q), std)
        else:
            self.query_NHD = init_matrix(rngs, (n, h, d), std)
            self.query_rope_NRD = init_matrix(rngs, (n, r, d), std)
        self.kv_down_ZD = init_matrix(rngs, (z, d), std)
        self.kv_latent_norm = RMSNorm(z, LATENT_EPS)
        self.key_rope_RD = init_matrix(rngs, (r, d), std)
        self.key_up_NHZ = init_matrix(rngs, (n, h, z), std)
        self.value_up_NIZ = init_matrix(rngs, (n, i, z), std)
        self.out_DNI = init_matrix(rngs, (d, n, i), std)

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        mask: CausalMask,
        cache: LatentCache | None = None,
        cache_length: jax.Array | int = 0,
    ) -> tuple[jax.Array, LatentCache | None]:
        """Applies attention; see `Attention.module` for arguments and result."""
        queries = self._queries(x_BSD, positions_BS)
        latent_BLZ = self._latents(x_BSD, positions_BS)
        if cache is None:
            y_BSNI = expanded(self, queries, latent_BLZ, mask)
        else:
            at = (0, cache_length, 0)
            latent_BLZ = jax.lax.dynamic_update_slice(cache.latent_BLZ, latent_BLZ, at)
            cache = LatentCache(latent_BLZ)
            y_BSNI = FORMS[self.decode](self, queries, latent_BLZ, mask)
        out_DNI = self.out_DNI[...].astype(x_BSD.dtype)
        return jnp.einsum("bsni,dni->bsd", y_BSNI, out_DNI), cache

    def _queries(self, x_BSD: jax.Array, positions_BS: jax.Array) -> _Queries:
        """Equations 37 to 39."""
        if self.compressed:
            latent_BSQ = self.query_latent_norm(linear(x_BSD, self.query_down_QD))
            plain_BSNH = linear_by_head(latent_BSQ, self.query_up_NHQ)
            rope_BSNR = linear_by_head(latent_BSQ, self.query_rope_NRQ)
        else:
            plain_BSNH = linear_by_head(x_BSD, self.query_NHD)
            rope_BSNR = linear_by_head(x_BSD, self.query_rope_NRD)
        return _Queries(plain_BSNH, rotate(rope_BSNR, positions_BS, self.config))

    def _latents(self, x_BSD: jax.Array, positions_BS: jax.Array) -> jax.Array:
        """Latents and, behind them, rotated keys: equations 41 and 43."""
        latent_BSZ = self.kv_latent_norm(linear(x_BSD, self.kv_down_ZD))
        one_head = linear(x_BSD, self.key_rope_RD)[:, :, None]
        rope_BSR = rotate(one_head, positions_BS, self.config)[:, :, 0]
        return jnp.concatenate([latent_BSZ, rope_BSR], axis=-1)


def expanded(
    layer: LatentAttention, queries: _Queries, latent_BLZ: jax.Array, mask: CausalMask
) -> jax.Array:
    """Attention to the keys and values of every head, (B, S, N, I): equations 42 to 46."""
    rank = layer.key_up_NHZ.shape[-1]
    latent_BLZ, rope_BLR = latent_BLZ[..., :rank], latent_BLZ[..., rank:]
    key_BLNH = linear_by_head(latent_BLZ, layer.key_up_NHZ)
    value_BLNI = linear_by_head(latent_BLZ, layer.value_up_NIZ)
    every_head = (*key_BLNH.shape[:3], rope_BLR.shape[-1])
    rope_BLNR = jnp.broadcast_to(rope_BLR[:, :, None], every_head)
    return _attend(
        layer.config,
        jnp.concatenate(queries, axis=-1),
        jnp.concatenate([key_BLNH, rope_BLNR], axis=-1),
        value_BLNI,
        mask,
    )


def absorbed(
    layer: LatentAttention, queries: _Queries, latent_BLZ: jax.Array, mask: CausalMask
) -> jax.Array:
    """The same from the latents as they are: one key and one value for all heads (V2 2.1.2)."""
    dtype = queries.plain_BSNH.dtype
    key_up_NHZ = layer.key_up_NHZ[...].astype(dtype)
    query_BSNZ = jnp.einsum("bsnh,nhz->bsnz", queries.plain_BSNH, key_up_NHZ)
    query_BSNZ = jnp.concatenate([query_BSNZ, queries.rope_BSNR], axis=-1)
    # The rotated key goes along as a part of the value and is cut off its sum: R more products, but
    # no copy of the cache.
    one_head = latent_BLZ[:, :, None]
    y_BSNZ = _attend(layer.config, query_BSNZ, one_head, one_head, mask)
    y_BSNZ = y_BSNZ[..., : key_up_NHZ.shape[-1]]
    return jnp.einsum("bsnz,niz->bsni", y_BSNZ, layer.value_up_NIZ[...].astype(dtype))


# How a cache is attended, by `model.attention.options.decode`.
FORMS: dict[str, Callable[..., jax.Array]] = {"absorbed": absorbed, "expanded": expanded}


def _attend(
    config: AttentionConfig,
    query_BSNH: jax.Array,
    key_BLMH: jax.Array,
    value_BLMI: jax.Array,
    mask: CausalMask,
) -> jax.Array:
    """Attention whose scores are divided by the root of the heads' own size, whatever their keys.

    A kernel divides by the root of the size that it sees, which is not H + R where the keys are
    latents; and YaRN multiplies all scores.  Both are factors of the query.
    """
    head_size, _ = head_sizes(config)
    factor = score_factor(config.rope_scaling) * (key_BLMH.shape[-1] / head_size) ** 0.5
    if factor != 1.0:
        query_BSNH = (query_BSNH.astype(jnp.float32) * factor).astype(query_BSNH.dtype)
    query_BSNH = constrain(query_BSNH, "BSNH")
    key_BLMH = constrain(key_BLMH, "BSMH")
    value_BLMI = constrain(value_BLMI, "BSMI")
    return kernels.attend(config.kernel, query_BSNH, key_BLMH, value_BLMI, mask)


def empty_cache(
    config: AttentionConfig, batch: int, max_length: int, dtype: jnp.dtype
) -> LatentCache:
    """A cache of one layer with no position filled."""
    _, z, _, r, _, _ = options_of(config)
    return LatentCache(jnp.zeros((batch, max_length, z + r), dtype))


def parameters(hidden_size: int, config: AttentionConfig) -> int:
    """Parameters of one layer: queries; latents and their keys and values; output; two norms."""
    q, z, h, r, i, _ = options_of(config)
    n = config.num_attention_heads
    d = hidden_size
    queries = (d + 1) * q + q * n * (h + r) if q else d * n * (h + r)
    latents = (d + 1) * z + d * r
    return queries + latents + z * n * (h + i) + n * i * d


def head_sizes(config: AttentionConfig) -> tuple[int, int]:
    """Sizes of a query or key, and of a value, as training has them."""
    options = options_of(config)
    return options.qk_nope_head_dim + options.qk_rope_head_dim, options.v_head_dim


def train_flops(config: AttentionConfig, length: int) -> int:
    """Training FLOPs of one token's scores and values, 6 S N ((H + R) + I)."""
    # Products of 2 FLOPs a number; backward costs twice as much as forward.
    return 6 * length * config.num_attention_heads * sum(head_sizes(config))


def decode_flops(config: AttentionConfig, length: int) -> int:
    """FLOPs of one new token's scores and values with a cache of L latents."""
    return _DECODE_FLOPS[options_of(config).decode](config, length)


def _absorbed_flops(config: AttentionConfig, length: int) -> int:
    """2 L N ((Z + R) + Z): what is absorbed costs as many products as the parameters have."""
    options = options_of(config)
    latent = 2 * options.kv_lora_rank + options.qk_rope_head_dim
    return 2 * length * config.num_attention_heads * latent


def _expanded_flops(config: AttentionConfig, length: int) -> int:
    """2 L N ((H + R) + I), and 2 L N Z (H + I) for the keys and values of all latents."""
    options = options_of(config)
    expanded = options.kv_lora_rank * (options.qk_nope_head_dim + options.v_head_dim)
    return 2 * length * config.num_attention_heads * (sum(head_sizes(config)) + expanded)


_DECODE_FLOPS = {"absorbed": _absorbed_flops, "expanded": _expanded_flops}  # by `FORMS`


def activations(config: AttentionConfig, length: int) -> Activations:
    """Numbers that one layer holds for each token: heads and latents; scores; result."""
    q, z, _, r, _, _ = options_of(config)
    n = config.num_attention_heads
    key_size, value_size = head_sizes(config)
    heads = n * (2 * key_size + value_size)
    return Activations(heads + q + z + r, scores=n * length, result=n * value_size)


def check(config: AttentionConfig) -> None:
    """Refuses sizes that cannot be, an unknown form, and key/value heads, which it has none of."""
    options = options_of(config)
    at = "model.attention.options."
    positive(options, at, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    not_negative(options, at, "q_lora_rank")
    right = checker(options, at)
    right("qk_rope_head_dim", options.qk_rope_head_dim % 2 == 0, "must be even for RoPE")
    right("decode", options.decode in FORMS, f"must be one of {sorted(FORMS)}")
    heads = config.num_attention_heads
    checker(config, "model.attention.")(
        "num_key_value_heads",
        config.num_key_value_heads in (None, heads),
        f"latent attention makes keys and values for each of {heads} heads; must be None",
    )
