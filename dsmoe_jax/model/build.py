"""A model from its config: drawn at random, or its structure and shapes without any array."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from flax import nnx

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.model import mup
from dsmoe_jax.model.transformer import Transformer


class ModelState(NamedTuple):
    """The arrays of a model, or their shapes; `nnx.merge(graph, params, other)` makes it whole.

    Attributes:
      params: what is trained (`nnx.Param`), float32; int8 where it is quantised.
      other: variables that carry no gradient: the routers' loss-free bias, hash tables, scales of
        quantised matrices.
    """

    params: nnx.State
    other: nnx.State


def build_model(config: ModelConfig, key: jax.Array) -> Transformer:
    """Draws the parameters of a new model; call it under `jax.jit` or `nnx.eval_shape`.

    Raises:
      ValueError: for an impossible model, naming the key of the config.
    """
    model = Transformer(config, rngs=nnx.Rngs(key))
    if (ratio := mup.width_ratio(config)) is not None:
        mup.scale_initial(model, ratio, tied=config.tie_word_embeddings)
    return model


def abstract_model(config: ModelConfig) -> nnx.GraphDef:
    """The structure of a model without its arrays, to merge a `ModelState` into.

    Raises:
      ValueError: as `build_model` does.
    """
    return _split(config)[0]


def model_shapes(config: ModelConfig) -> ModelState:
    """The shapes of a model's arrays; nothing is allocated.

    Raises:
      ValueError: as `build_model` does.
    """
    _, params, other = _split(config)
    return jax.tree.map(lambda x: x, ModelState(params, other))  # the reader's own, to change


@functools.lru_cache(maxsize=64)  # a run asks a dozen times, and each is a trace of the whole model
def _split(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    # The key is made inside: nothing may run, since the devices of the ambient mesh may not exist.
    abstract = nnx.eval_shape(lambda: build_model(config, jax.random.key(0)))
    graph, params, other = nnx.split(abstract, nnx.Param, ...)
    return graph, params, other
