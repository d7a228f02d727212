"""Bytes that generation keeps for each token of a text, beside those of a dense model.

Letters: L layers, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.model.block import compute_dtype
from dsmoe_jax.model.size import cache_bytes_per_token, count_parameters


class CacheSize(NamedTuple):
    """Bytes of the cache for each token, all layers together.

    Attributes:
      bytes_per_token: of the model.
      dense_bytes_per_token: of a dense model of equal activated size; see `dense_hidden_size`.
      dense_hidden_size: D of that model, rounded.
    """

    bytes_per_token: int
    dense_bytes_per_token: int
    dense_hidden_size: int


def cache_size(config: ModelConfig) -> CacheSize:
    """The cache of a model beside that of a dense model of equal activated size.

    The dense model has as many layers, and plain multi-head attention: it keeps a key and a value
    of D numbers in each layer, 2 L D in all, of the same dtype.
    """
    d = dense_hidden_size(config)
    dense = 2 * config.num_hidden_layers * d * compute_dtype(config).itemsize
    return CacheSize(cache_bytes_per_token(config), round(dense), round(d))


def dense_hidden_size(config: ModelConfig) -> float:
    """D of the dense model that has the activated parameters of a model, and its L and V.

    Its layers have 4 D^2 parameters of attention and a standard FFN of 8 D^2 (V1 section 4.1);
    embedding and head have V D each, or V D together if the model ties them.  So D solves
    12 L D^2 + 2 V D = activated; norms are left out.
    """
    activated = count_parameters(config).activated
    a = 12 * config.num_hidden_layers
    b = (1 if config.tie_word_embeddings else 2) * config.vocab_size
    return (math.sqrt(b * b + 4 * a * activated) - b) / (2 * a)
