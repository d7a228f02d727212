"""The gated feed-forward network, in the forms that open models have: routed experts, shared
experts and dense layers alike.

    y = down(h(gate x, up x))

A new form is a line in `FORMS`; one with another `h` has a class beside `Activation` with the same
two methods.

Shapes: D hidden, F feed-forward width; `...` any leading axes.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config import ExpertConfig, QuantisedConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.nn import quantisation
from dsmoe_jax.nn.layers import init_matrix, linear


@dataclasses.dataclass(frozen=True)
class Activation:
    """`h(g, u) = g sigmoid(alpha g) (u + offset)`, of g <= limit and -limit <= u <= limit.

    The defaults are SwiGLU (2002.05202); limit None limits nothing.
    """

    alpha: float = 1.0
    offset: float = 0.0
    limit: float | None = None

    def hidden(self, g: jax.Array, u: jax.Array) -> jax.Array:
        """h of two arrays of one shape, in their dtype."""
        g, u = self._limited(g, u)
        return self._swish(g) * u

    def gradient(
        self, g: jax.Array, u: jax.Array, dhidden: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The gradients to g and u; written out, so that it says what is computed twice."""
        within_g = within_u = True
        if self.limit is not None:
            within_g = g <= self.limit
            within_u = jnp.abs(u) <= self.limit
        g, u = self._limited(g, u)
        share = jax.nn.sigmoid(g * self.alpha)
        dg = dhidden * u * share * (1 + self.alpha * g * (1 - share))
        du = dhidden * self._swish(g)
        return jnp.where(within_g, dg, 0.0), jnp.where(within_u, du, 0.0)

    def _limited(self, g: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """g limited; u limited, plus the offset."""
        if self.limit is not None:
            g = jnp.minimum(g, self.limit)
            u = jnp.clip(u, -self.limit, self.limit)
        return g, u + self.offset if self.offset else u

    def _swish(self, g: jax.Array) -> jax.Array:
        return jax.nn.silu(g) if self.alpha == 1 else g * jax.nn.sigmoid(g * self.alpha)


class Form(NamedTuple):
    """A form of the network in the registry.

    Attributes:
      activation: h, with the numbers of the family.
      biases: gate, up and down have one each.
      reads: the numbers of `activation` that a config may change.
    """

    activation: Activation = Activation()
    biases: bool = False
    reads: frozenset[str] = frozenset()


SWIGLU = Form()
FORMS: dict[str, Form] = {
    "swiglu": SWIGLU,
    "clamped_swiglu": Form(Activation(limit=10.0), reads=frozenset({"limit"})),  # V4
    "gpt_oss": Form(
        Activation(alpha=1.702, offset=1.0, limit=7.0),
        biases=True,
        reads=frozenset({"alpha", "limit"}),
    ),
}


def form_of(expert: ExpertConfig) -> Form:
    """The form that the section `model.moe.expert` means.

    Raises:
      ValueError: for an unknown name, or a number that the form does not have.
    """
    at = "model.moe.expert"
    name = expert.name
    require(name in FORMS, f"{at}.name", name, f"must be one of {sorted(FORMS)}")
    form = FORMS[name]
    given = {n: x for n in ("alpha", "limit") if (x := getattr(expert, n)) is not None}
    for number, value in given.items():
        readers = sorted(n for n, other in FORMS.items() if number in other.reads)
        require(
            number in form.reads,
            f"{at}.{number}",
            value,
            f"the {name} experts do not have it; must be None, or the name one of {readers}",
        )
    return form._replace(activation=dataclasses.replace(form.activation, **given))


class FeedForward(nnx.Module):
    """A feed-forward network that every token visits.

    Args:
      hidden, width: D and F.
      std: deviation of the matrices at the start; biases start at 0.
      form: of the network.
      quantised: its matrices are whole numbers; None: they are float32.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        std: float,
        form: Form,
        quantised: QuantisedConfig | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.form = form
        self.quantised = quantised
        self.gate_FD = init_matrix(rngs, (width, hidden), std)
        self.up_FD = init_matrix(rngs, (width, hidden), std)
        self.down_DF = init_matrix(rngs, (hidden, width), std)
        if quantised is not None:
            quantisation.hold(self, ("gate_FD", "up_FD", "down_DF"), quantised.bits)
        if form.biases:
            self.gate_bias_F = init_bias(width)
            self.up_bias_F = init_bias(width)
            self.down_bias_D = init_bias(hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) -> (..., D), same dtype."""
        gate, up = self._times(x, "gate_FD"), self._times(x, "up_FD")
        if self.form.biases:
            gate += self.gate_bias_F[...].astype(x.dtype)
            up += self.up_bias_F[...].astype(x.dtype)
        y = self._times(self.form.activation.hidden(gate, up), "down_DF")
        return y + self.down_bias_D[...].astype(x.dtype) if self.form.biases else y

    def _times(self, x: jax.Array, name: str) -> jax.Array:
        """The product with a matrix by its name, in the dtype of x."""
        if self.quantised is None:
            return linear(x, getattr(self, name))
        matrix = quantisation.held(self, name, inputs=self.quantised.activations)
        return quantisation.times(x, matrix).astype(x.dtype)


def init_bias(*shape: int) -> nnx.Param[jax.Array]:
    """A float32 parameter of zeros."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))
