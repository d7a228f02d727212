"""Upcycling: a mixture from a dense model, every FFN's hidden units in several copies.

    f(x) = sum over hidden units u of  down_u h(gate_u x, up_u x)

A sum over units is a sum over parts of them.  Each FFN is copied C times (Sparse Upcycling,
2212.05055), and each copy is cut into M parts of equal width (fine-grained experts, 2406.06563 and
2410.07524).  S parts of the FFN are shared experts; the other P = M - S of each copy are routed: E
= C P experts.  A token activates Q copies: K = Q P.

The function is the same at step 0 exactly (up to the rounding of sums) with two things:

- All parts of a copy are chosen together: with one part a copy always; with more, if the parts of
  a copy have the same router row (`tied`, the default).  Equal rows have equal logits, so that the
  K best are Q whole copies.  They part in training, since each part has its own gradient.
- Gates are normalised (`norm_topk_prob`, the default): those of K experts sum to 1, so those of
  each part's copies to 1 / P, and the routed outputs are scaled by P.

The factor is in the down matrices (`fold`, the default), or it is `routed_scaling_factor`, which
not every architecture has.

Otherwise it is approximate, and the outputs are scaled so that they are right on average:

- Gates that are not normalised (V1's, and always with K = 1) depend on the token.  With logits near
  0, as fresh rows have, each is about the score s of a logit of 0; the factor is 1 / (Q s).
- With rows of their own (`tied` off) parts of several copies are chosen, and some not at all.
- `drop` draws a share of each routed expert's units anew, with mean and deviation of the FFN's own
  weights (Drop-Upcycling, 2502.19261); `noise` adds noise to all weights of routed experts.  Both
  make copies differ from the start.

Shapes: D hidden, W width of the dense FFN, F = W / M of an expert, E routed experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dsmoe_jax.config import Config, ModelConfig, replace
from dsmoe_jax.config.checks import require
from dsmoe_jax.model import mup
from dsmoe_jax.model.build import ModelState, model_shapes
from dsmoe_jax.moe.routers.scores import SCORING
from dsmoe_jax.surgery import by_layer
from dsmoe_jax.surgery.by_layer import Apart, Arrays
from dsmoe_jax.surgery.types import Option, Outcome, Subject
from dsmoe_jax.training.start import state_shapes

OPTIONS = {
    "copies": Option(int, "Copies of each FFN.", needed=True),
    "parts": Option(int, "Equal parts that each copy is cut into.", 1),
    "shared": Option(int, "Parts of the FFN that are shared experts, the same for all copies.", 0),
    "copies_per_token": Option(int, "Copies that a token activates.", 1),
    "tied": Option(
        bool, "Whether the parts of a copy begin with one router row, to be chosen together.", True
    ),
    "norm_topk_prob": Option(bool, "Whether the gates of a token are normalised.", True),
    "scoring_func": Option(str, f"Of the new router: {', '.join(SCORING)}.", "softmax"),
    "fold": Option(
        bool,
        "Whether the factor of routed outputs is in their down matrices, or it is"
        " model.moe.router.routed_scaling_factor.",
        True,
    ),
    "router_std": Option(
        float, "Deviation of the router's rows; model.initializer_range if not given."
    ),
    "shuffle": Option(bool, "Whether each copy is cut in an order of units of its own.", False),
    "drop": Option(float, "Share of each routed expert's hidden units that is drawn anew.", 0.0),
    "noise": Option(
        float, "Noise on routed experts, relative to the deviation of their weights.", 0.0
    ),
    "seed": Option(int, "Of all that is drawn.", 0),
    "balance": Option(float, "Factor of the new model's expert balance term.", 0.01),
    "first_k_dense_replace": Option(int, "Leading layers that stay dense; as before."),
    "moe_layer_freq": Option(int, "One layer in so many is upcycled; as before."),
}
_DENSE = ("ffn",)
_SHARED = ("moe", "shared")
# Axis of the hidden units in the arrays of a dense FFN; None: it has none.
_UNIT_AXIS = {
    "gate_FD": 0,
    "up_FD": 0,
    "down_DF": 1,
    "gate_bias_F": 0,
    "up_bias_F": 0,
    "down_bias_D": None,
}
_OUTPUTS = ("down_DF", "down_bias_D")


class _Cut(NamedTuple):
    """Numbers of the cut.

    Attributes:
      copies, parts, shared: C, M and S.
      width: F, of a part.
      units_EF: hidden units of each routed expert, copy by copy.
      n_new: units of each that are drawn anew, at places of its own.
      noise: relative deviation.
      scale: of routed outputs.
      fold: whether it is in the weights.
    """

    copies: int
    parts: int
    shared: int
    width: int
    units_EF: np.ndarray
    n_new: int
    noise: float
    scale: float
    fold: bool

    @property
    def routed(self) -> int:
        """P, routed parts of a copy."""
        return self.parts - self.shared


def upcycle(subject: Subject, options: Mapping[str, Any]) -> Outcome:
    """Makes a mixture of a dense model.

    Args:
      subject: the model.
      options: values of `OPTIONS`.

    Raises:
      ValueError: for a model that is no dense one, a width that cannot be cut like this, and
        numbers that do not fit.
    """
    config = subject.config
    width = _width(config.model, options)
    rng = np.random.default_rng(options["seed"])
    cut = _cut(width, options, rng)
    new = _new_config(config, cut, options)
    shapes = model_shapes(new.model)
    found = by_layer.apart(config.model, by_layer.by_path(subject.model.params))
    layers = [
        _layer(layer, is_moe, cut, rng)
        for layer, is_moe in zip(found.layers, _is_moe(new.model), strict=True)
    ]
    for layer, is_moe in zip(layers, _is_moe(new.model), strict=True):
        if is_moe:
            layer["moe", "router_ED"] = _rows(new.model, cut, options, rng)
    params = by_layer.filled(shapes.params, by_layer.joined(new.model, Apart(layers, found.rest)))

    def moments(state: Any) -> Any:
        def change(arrays: Arrays) -> Arrays:
            return _moments(config.model, new.model, cut, arrays)

        return by_layer.filled_moments(state_shapes(new).opt_state, state, change)

    exact = _is_exact(cut, options)
    return Outcome(
        config=new,
        model=ModelState(params, shapes.other),
        report={"experts": len(cut.units_EF), "width": cut.width, "exact": exact},
        text=_text(new.model, cut, exact=exact),
        moments=moments,
    )


def _width(model: ModelConfig, options: Mapping[str, Any]) -> int:
    """The width of all FFNs.

    Raises:
      ValueError: for a mixture, a gated FFN, and layers of different widths.
    """
    moe = model.moe
    e = moe.n_routed_experts
    require(e == 0, "model.moe.n_routed_experts", e, "is a mixture already; must be a dense model")
    gate = moe.shared_expert_gate
    want = "experts have no such gate; must be False"
    require(not gate, "model.moe.shared_expert_gate", gate, want)
    width = moe.shared_width
    moves = any(options[name] is not None for name in ("first_k_dense_replace", "moe_layer_freq"))
    if moves and model.n_dense_layers:
        want = f"other layers are {width} wide: one cannot take the other's place; must be the same"
        require(
            model.intermediate_size == width,
            "model.intermediate_size",
            model.intermediate_size,
            want,
        )
    return width


def _cut(width: int, options: Mapping[str, Any], rng: np.random.Generator) -> _Cut:
    """The cut of every FFN.

    Raises:
      ValueError: with the numbers.
    """
    copies, parts, shared = (options[name] for name in ("copies", "parts", "shared"))
    active = options["copies_per_token"]
    for name, value in (("copies", copies), ("parts", parts)):
        if value < 1:
            raise ValueError(f"--{name}={value}: must be at least 1")
    if width % parts:
        raise ValueError(f"--parts={parts}: must divide the width {width} of the dense FFN")
    if not 0 <= shared < parts:
        raise ValueError(
            f"--shared={shared}: must be 0 to {parts - 1}, below --parts={parts}; a part must be"
            " routed"
        )
    if not 1 <= active <= copies:
        raise ValueError(f"--copies_per_token={active}: must be 1 to the --copies={copies}")
    if not 0 <= options["drop"] <= 1:
        raise ValueError(f"--drop={options['drop']}: must be a share, from 0 to 1")
    for name in ("noise", "balance"):
        if options[name] < 0:
            raise ValueError(f"--{name}={options[name]}: must be 0 or more")
    if options["norm_topk_prob"] and active * (parts - shared) == 1:
        raise ValueError(
            "--norm_topk_prob=True: with one activated expert every gate would be 1 and the router"
            " would learn nothing; must be False (the function is then kept on average alone), or"
            " --copies_per_token 2"
        )
    f = width // parts
    routed = np.arange(shared * f, width)
    order = [rng.permutation(routed) if options["shuffle"] else routed for _ in range(copies)]
    units_EF = np.concatenate(order).reshape(-1, f)
    n_new = round(options["drop"] * f)
    at_zero = _score_at_zero(options["scoring_func"], len(units_EF))
    scale = float(parts - shared) if options["norm_topk_prob"] else 1 / (active * at_zero)
    return _Cut(copies, parts, shared, f, units_EF, n_new, options["noise"], scale, options["fold"])


def _score_at_zero(name: str, n_experts: int) -> float:
    """The score of each expert if all logits are 0."""
    if name not in SCORING:
        raise ValueError(f"--scoring_func={name}: must be one of {', '.join(SCORING)}")
    return float(SCORING[name].scores(jnp.zeros((1, n_experts))).s_TE[0, 0])


def _new_config(config: Config, cut: _Cut, options: Mapping[str, Any]) -> Config:
    """The config of the mixture, which goes on with all other settings.

    Raises:
      ValueError: naming the key, for settings that do not fit it.
    """
    moe = config.model.moe
    nominal = moe.nominal_width * moe.n_shared_experts
    e = len(cut.units_EF)
    active = options["copies_per_token"]
    changed = {
        "model.moe.n_routed_experts": e,
        "model.moe.n_shared_experts": cut.shared,
        "model.moe.num_experts_per_tok": active * cut.routed,
        "model.moe.moe_intermediate_size": cut.width,
        "model.moe.shared_expert_intermediate_size": None,
        "model.moe.nominal_width": nominal / cut.parts,
        "model.moe.router": type(moe.router)(
            scoring_func=options["scoring_func"],
            norm_topk_prob=options["norm_topk_prob"],
            routed_scaling_factor=1.0 if cut.fold else cut.scale,
        ),
        "model.moe.balance": {
            "expert": {"factor": options["balance"], "scope": "sequence", "schedule": None}
        },
    }
    for name in ("first_k_dense_replace", "moe_layer_freq"):
        if options[name] is not None:
            changed[f"model.{name}"] = options[name]
    if not config.model.n_dense_layers:
        width = cut.width * cut.parts
        changed |= {"model.intermediate_size": width, "model.nominal_dense_width": nominal}
    return replace(config, **changed)


def _is_moe(model: ModelConfig) -> list[bool]:
    """Whether each layer has an MoE layer, those of multi-token prediction last."""
    of_layers = [layer in model.moe_layers for layer in range(model.num_hidden_layers)]
    return of_layers + [True] * model.mtp_depth


def _layer(layer: Arrays, is_moe: bool, cut: _Cut, rng: np.random.Generator | None) -> Arrays:
    """The arrays of a layer with its FFN in the new form; without a generator nothing is drawn."""
    found: Arrays = {}
    ffn: dict[str, np.ndarray] = {}
    for keys, x in layer.items():
        if keys[:-1] in (_DENSE, _SHARED):
            ffn[str(keys[-1])] = x
        else:
            found[keys] = x
    if not is_moe:
        for name, x in ffn.items():
            found[*_DENSE, name] = x
        return found
    e = len(cut.units_EF)
    places = None
    if rng is not None:
        places = np.stack([rng.permutation(cut.width)[: cut.n_new] for _ in range(e)])
    for name, x in ffn.items():
        found["moe", _routed_name(name)] = _experts(name, x, cut, places, rng)
        if cut.shared:
            found[*_SHARED, name] = _shared(name, x, cut)
    return found


def _routed_name(name: str) -> str:
    """The name of the same array of routed experts: gate_FD is gate_EFD."""
    first, _, letters = name.rpartition("_")
    return f"{first}_E{letters}"


def _shared(name: str, x: np.ndarray, cut: _Cut) -> np.ndarray:
    """The shared experts' part of an array."""
    axis = _UNIT_AXIS[name]
    if axis is None:  # the bias of the sum over units: every part has its share
        return x * np.float32(cut.shared / cut.parts)
    return x.take(np.arange(cut.shared * cut.width), axis)


def _experts(
    name: str,
    x: np.ndarray,
    cut: _Cut,
    places: np.ndarray | None,
    rng: np.random.Generator | None,
) -> np.ndarray:
    """The routed experts' array, with E in front."""
    axis = _UNIT_AXIS[name]
    if rng is not None and cut.fold and name in _OUTPUTS:
        x = x * np.float32(cut.scale)
    if axis is None:
        return np.tile(x * np.float32(1 / cut.parts), (len(cut.units_EF), 1))
    by_unit = np.moveaxis(x, axis, 0)[cut.units_EF]  # (E, F, ...)
    if rng is not None and places is not None:
        deviation = float(x.std())
        if cut.n_new:
            drawn = rng.normal(float(x.mean()), deviation, (*places.shape, *by_unit.shape[2:]))
            by_unit[np.arange(len(by_unit))[:, None], places] = drawn
        if cut.noise:
            by_unit = by_unit + rng.normal(0, cut.noise * deviation, by_unit.shape)
    return np.moveaxis(by_unit, 1, 1 + axis).astype(x.dtype)


def _rows(
    model: ModelConfig, cut: _Cut, options: Mapping[str, Any], rng: np.random.Generator
) -> np.ndarray:
    """Fresh router rows of a layer, (E, D)."""
    deviation = options["router_std"]
    if deviation is None:
        ratio = mup.width_ratio(model) or 1.0
        deviation = model.initializer_range * ratio ** mup.KINDS["router_ED"].deviation
    n = cut.copies if options["tied"] else len(cut.units_EF)
    rows = rng.normal(0, deviation, (n, model.hidden_size)).astype(np.float32)
    return rows.repeat(len(cut.units_EF) // n, axis=0)


def _moments(before: ModelConfig, after: ModelConfig, cut: _Cut, arrays: Arrays) -> Arrays:
    """Moments of the mixture: experts have those of their units, the router has none yet."""
    found = by_layer.apart(before, arrays)
    layers = []
    for layer, is_moe in zip(found.layers, _is_moe(after), strict=True):
        new = _layer(layer, is_moe, cut, None)
        if is_moe:
            new["moe", "router_ED"] = np.zeros((len(cut.units_EF), after.hidden_size), np.float32)
        layers.append(new)
    return by_layer.joined(after, Apart(layers, found.rest))


def _is_exact(cut: _Cut, options: Mapping[str, Any]) -> bool:
    """Whether the function is the same at step 0, see the head of this file."""
    together = options["tied"] or cut.routed == 1
    return bool(options["norm_topk_prob"] and together and not cut.n_new and not cut.noise)


def _text(model: ModelConfig, cut: _Cut, *, exact: bool) -> str:
    moe = model.moe
    kept = "the same at step 0" if exact else "about the same at step 0: the scale is a mean"
    return (
        f"{moe.n_shared_experts} + {moe.n_routed_experts} experts of width {cut.width} in"
        f" {len(model.moe_layers)} of {model.num_hidden_layers} layers,"
        f" {moe.num_experts_per_tok} of them for a token, routed ones times"
        f" {cut.scale:g}\nthe function is {kept}"
    )
