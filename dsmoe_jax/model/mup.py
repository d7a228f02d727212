"""Maximal update parametrisation (muP): a learning rate that is right at one width is at others.

A model of hidden size D with `model.mup_base_width` D0 has the width ratio m = D / D0.  Each
parameter belongs to a kind, by which sides of its matrix grow with the width; the kind says by
which powers of m its initial deviation and its rate under Adam are multiplied:

    kind     grows            parameters                               deviation   rate
    input    the output       embedding                                1           1
    hidden   both             attention, experts, FFNs, projection     m^-1/2      m^-1
    output   the input        head, router, latent attention's key     m^-1        m^-1
    vector   its length       scales of the norms, biases              1           1
    fixed    nothing          router by task                           1           1

Weight decay pulls no vector to zero.

A tied embedding (`model.tie_word_embeddings`) is an input.  As a head it should be m times smaller,
and so should its updates; the scale of the norm before it is, which comes to the same: it begins at
m^-1 and has the rate of an output.

These are the powers of Tensor Programs V (2203.03466, table 3, Adam).  By the same rule the
matrices of each expert are hidden, and the router's, whose output is as wide as there are experts,
is an output (muP for mixtures: 2508.09752); so is the gate of the shared experts, whose output is
one number.  In this form no activation is multiplied by anything: checkpoints, evaluation and
generation know nothing of it, and at m = 1 it is the standard parametrisation.

It holds for models whose widths (heads, latents of attention, FFNs, experts) are all m times those
of the base; the head size, and so the scale of the attention scores, and the numbers of experts and
layers are the same.  The one key that latent attention rotates for all heads is of a head's size,
so that its matrix is an output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.nn.quantisation import Scale
from dsmoe_jax.parallel.sharding import parameter_name


class Kind(NamedTuple):
    """Powers of the width ratio m that multiply what belongs to a parameter.

    Attributes:
      deviation: of its initial deviation.
      rate: of its learning rate, for Adam and what divides a gradient by its size as Adam does.
      decayed: whether weight decay pulls it to zero.
    """

    deviation: float
    rate: float
    decayed: bool = True


INPUT = Kind(deviation=0, rate=0)
HIDDEN = Kind(deviation=-0.5, rate=-1)
OUTPUT = Kind(deviation=-1, rate=-1)
VECTOR = Kind(deviation=0, rate=0, decayed=False)
FIXED = Kind(deviation=0, rate=0)

# By name of the parameter.  A name that is not here is refused: its kind is no matter of its shape
# alone (embedding and head have the same).
KINDS: dict[str, Kind] = {
    "embedding_VD": INPUT,
    "query_NHD": HIDDEN,
    "key_MHD": HIDDEN,
    "value_MHD": HIDDEN,
    "out_DNH": HIDDEN,
    "query_bias_NH": VECTOR,
    "key_bias_MH": VECTOR,
    "value_bias_MH": VECTOR,
    "query_rope_NRD": HIDDEN,
    "query_down_QD": HIDDEN,
    "query_up_NHQ": HIDDEN,
    "query_rope_NRQ": HIDDEN,
    "kv_down_ZD": HIDDEN,
    "key_rope_RD": OUTPUT,
    "key_up_NHZ": HIDDEN,
    "value_up_NIZ": HIDDEN,
    "out_DNI": HIDDEN,
    "gate_FD": HIDDEN,
    "up_FD": HIDDEN,
    "down_DF": HIDDEN,
    "gate_EFD": HIDDEN,
    "up_EFD": HIDDEN,
    "down_EDF": HIDDEN,
    "router_ED": OUTPUT,
    "router_EA": FIXED,
    "router_bias_E": VECTOR,
    "shared_gate_D": OUTPUT,
    "gate_bias_F": VECTOR,
    "up_bias_F": VECTOR,
    "down_bias_D": VECTOR,
    "gate_bias_EF": VECTOR,
    "up_bias_EF": VECTOR,
    "down_bias_ED": VECTOR,
    "head_VD": OUTPUT,
    "projection_DJ": HIDDEN,
    "scale_D": VECTOR,
}


def width_ratio(config: ModelConfig) -> float | None:
    """The m of a model; None without muP."""
    if config.mup_base_width is None:
        return None
    return config.hidden_size / config.mup_base_width


def kind(path: tuple, *, tied: bool = False) -> Kind:
    """The kind of a parameter, from its path.

    Args:
      path: in the tree of the parameters.
      tied: whether embedding and head are one matrix.

    Raises:
      ValueError: for a name that `KINDS` does not have.
    """
    name = parameter_name(path)
    if tied and "final_norm" in jax.tree_util.keystr(path):
        return OUTPUT
    if name not in KINDS:
        where = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        raise ValueError(
            f"model.mup_base_width: {where} has no kind; KINDS in dsmoe_jax/model/mup.py must say"
            " whether it is input, hidden, output, vector or fixed; without muP it must be None"
        )
    return KINDS[name]


def decayed(path: tuple) -> bool:
    """Whether weight decay pulls a parameter to zero: all but vectors, with or without muP."""
    return KINDS.get(parameter_name(path) or "", HIDDEN).decayed


def scale_rates(updates: Any, ratio: float, *, tied: bool = False) -> Any:
    """The updates of all parameters, each times the power of m of its kind.

    Args:
      updates: as Adam makes them, in the tree of the parameters.
      ratio: m.
      tied: see `kind`.

    Raises:
      ValueError: as `kind` does.
    """

    def scaled(path: tuple, x: jax.Array) -> jax.Array:
        return x * ratio ** kind(path, tied=tied).rate

    return jax.tree.map_with_path(scaled, updates)


def scale_initial(model: nnx.Module, ratio: float, *, tied: bool = False) -> None:
    """Multiplies freshly drawn parameters in place, each by the power of m of its kind.

    Raises:
      ValueError: as `kind` does.
    """

    def scaled(path: tuple, x: jax.Array) -> jax.Array:
        power = ratio ** kind(path, tied=tied).deviation
        return x * power if jnp.issubdtype(x.dtype, jnp.floating) else x

    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map_with_path(scaled, params))
    # Quantised are experts alone: their whole numbers stay what they are.
    scales = nnx.state(model, Scale)
    nnx.update(model, jax.tree.map(lambda x: x * ratio**HIDDEN.deviation, scales))
