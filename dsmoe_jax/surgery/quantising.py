"""Experts of whole numbers: the matrices of routed and shared experts in 8 bits or fewer.

Each output of a matrix has a scale of its own (nn/quantisation).  All else stays float32:
attention, dense layers, embedding, router.  The router may compute in bfloat16: "16-bit gates with
INT8 experts".

A quantised model is measured and used; it is not trained, and no other operation takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsmoe_jax.config import Config, ModelConfig, replace
from dsmoe_jax.config.checks import require
from dsmoe_jax.model import size
from dsmoe_jax.model.build import ModelState, model_shapes
from dsmoe_jax.model.layout import Path, keys_of
from dsmoe_jax.nn.quantisation import Quantised, dequantise, quantise, scale_name
from dsmoe_jax.parallel import sharding
from dsmoe_jax.surgery.types import Option, Outcome, Subject

_DTYPES = ("float32", "bfloat16")
OPTIONS = {
    "bits": Option(
        int, "Of a weight of an expert, 2 to 8; it takes a byte, so that fewer are to compare.", 8
    ),
    "activations": Option(
        bool, "What is multiplied with them in 8 bits too, with a scale for each row.", False
    ),
    "gates": Option(
        str, "The router's logits and gates: float32, or bfloat16 for 16 bits.", "float32"
    ),
}


def quantised(subject: Subject, options: Mapping[str, Any]) -> Outcome:
    """Makes whole numbers of the experts' weights.

    Args:
      subject: the model.
      options: values of `OPTIONS`.

    Raises:
      ValueError: for a number of bits or a dtype that there is not.
    """
    config = quantised_config(subject.config, **options)
    model, error = quantised_state(config.model, subject.model)
    before, after = (size.weight_bytes(c.model) for c in (subject.config, config))
    report = {
        "error": error,
        "expert_bytes": [before.routed + before.shared, after.routed + after.shared],
        "bytes": [before.total, after.total],
    }
    return Outcome(config=config, model=model, report=report, text=_text(report))


def quantised_config(config: Config, *, bits: int, activations: bool, gates: str) -> Config:
    """The config of the model with quantised experts.

    Raises:
      ValueError: for a number of bits or a dtype that there is not, or gates of a dense model.
    """
    require(2 <= bits <= 8, "--bits", bits, "must be 2 to 8")
    require(gates in _DTYPES, "--gates", gates, f"must be one of {_DTYPES}")
    changes: dict[str, Any] = {
        "model.moe.quantised.bits": bits,
        "model.moe.quantised.activations": activations,
    }
    if gates != "float32":
        has_router = config.model.moe.n_routed_experts > 0
        require(has_router, "--gates", gates, "a dense model has no router; must be float32")
        changes["model.moe.router.logits_dtype"] = gates
        changes["model.moe.router.gates_dtype"] = gates
    return replace(config, **changes)


def quantised_state(config: ModelConfig, model: ModelState) -> tuple[ModelState, float]:
    """The arrays of a model with quantised experts, on the ambient mesh if there is one.

    Args:
      config: with `model.moe.quantised`.
      model: the arrays before.

    Returns:
      The arrays, and the error of a quantised weight: root mean square, relative to the weights.
    """
    assert config.moe.quantised is not None
    shapes = model_shapes(config)
    bits = config.moe.quantised.bits
    arrays = {keys_of(path): x for path, x in jax.tree.leaves_with_path(model)}
    scales: dict[Path, jax.Array] = {}
    squares = []

    def one(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        keys = keys_of(path)
        if shape.dtype != jnp.int8:
            return arrays[keys]
        found, of_array = _measured(arrays[keys], bits)
        scales[(*keys[:-1], scale_name(str(keys[-1])))] = found.scale
        squares.append(of_array)
        return found.values

    params = jax.tree.map_with_path(one, shapes.params)
    arrays |= scales
    other = jax.tree.map_with_path(lambda path, _: arrays[keys_of(path)], shapes.other)
    made = jax.device_put(ModelState(params, other), sharding.shardings(shapes))
    off, whole = (sum(map(float, column)) for column in zip(*squares, strict=True))
    return made, (off / whole) ** 0.5 if whole else 0.0


@jax.jit(static_argnums=1)
def _measured(w: jax.Array, bits: int) -> tuple[Quantised, tuple[jax.Array, jax.Array]]:
    """A matrix quantised, and the sums of squares of its errors and of itself."""
    found = quantise(w, bits)
    return found, (jnp.square(dequantise(found) - w).sum(), jnp.square(w).sum())


def _text(report: Mapping[str, Any]) -> str:
    """The bytes before and after, and the error."""
    lines = [
        f"{name}: {before / 1e6:,.2f} MB before, {after / 1e6:,.2f} MB now"
        for name, (before, after) in (
            ("experts", report["expert_bytes"]),
            ("all weights", report["bytes"]),
        )
    ]
    error = f"a weight of an expert is off by {report['error']:.2%} (root mean square)"
    return "\n".join([*lines, error])
