"""Costs of a model: to train, to hold and to decode, and where dense and sparse cost the same.

All from the config and a chip's data sheet: lower bounds of time, without the network.  Decoding a
batch reads, once a step, the weights outside of the routed experts and those of every routed expert
that some token of the batch chooses, and the cache of every sequence:

    bytes = weights + touched experts + B x context x cache of a token
    s of one chip = max(bytes / bandwidth, B x FLOPs of a token / peak) for B tokens

On n chips a step takes an n-th of that, so the tokens/s of one chip are the same for every n; a
token waits the less, the more chips there are.  The embedding is looked up and costs nothing.

Shapes: L MoE layers, E routed experts, K activated per token, B sequences decoded together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dsmoe_jax.config import Config, ModelConfig, tokens_after
from dsmoe_jax.hardware.chips import Chip
from dsmoe_jax.model import size
from dsmoe_jax.nn import attention
from dsmoe_jax.planning.planner import USABLE

BFLOAT16 = 2  # bytes of a number
HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Model:
    """Conditions that the cost of decoding depends on.

    Attributes:
      parameters: that are held, without modules of multi-token prediction.
      activated: of those, what a token uses.
      bytes: of all weights.
      always: bytes of the weights that every step reads.
      routed: bytes of all routed experts.
      touch_LE: probability that a token chooses an expert; empty without routed experts.
      cache: bytes of a token in the caches of all layers.
      flops: of one new token.
      context: tokens of each sequence in the cache.
    """

    parameters: int
    activated: int
    bytes: float
    always: float
    routed: float
    touch_LE: np.ndarray
    cache: int
    flops: float
    context: int

    def touched(self, batch: int) -> float:
        """Expected share of the routed experts that a batch touches; 0 without routed experts.

        Tokens choose for themselves: an expert that a token chooses with probability q is touched
        by B of them with 1 - (1 - q)^B.
        """
        if not self.touch_LE.size:
            return 0.0
        return float((1 - (1 - self.touch_LE) ** batch).mean())

    def bytes_read(self, batch: int) -> float:
        """Bytes of a step that decodes a token of each of so many sequences."""
        cache = batch * self.context * self.cache
        return self.always + self.touched(batch) * self.routed + cache

    def chip_seconds(self, batch: int, chip: Chip) -> float:
        """Seconds of one chip for one token, at least."""
        memory = self.bytes_read(batch) / chip.hbm_bandwidth
        compute = batch * self.flops / chip.peak_flops
        return max(memory, compute) / batch

    def chips(self, batch: int, chip: Chip) -> int:
        """Chips that hold the weights and the caches of a batch, at least one."""
        held = self.bytes + batch * self.context * self.cache
        return math.ceil(held / (USABLE * chip.hbm_gb * 1e9))


def of_model(
    model: ModelConfig,
    context: int,
    load_LE: np.ndarray | None = None,
    *,
    weight_bytes: float = BFLOAT16,
    expert_bytes: float = BFLOAT16,
) -> Model:
    """The costs of decoding with a model.

    Args:
      model: its config.
      context: tokens of each sequence in the cache.
      load_LE: recorded loads of its experts; None: all are equally likely.
      weight_bytes: of one weight.
      expert_bytes: of one weight of a routed expert.  What is quantised has its own.
    """
    counted = size.parameters_by_formula(model)
    held = size.weight_bytes(model, weight_bytes, expert_bytes)
    cache = model.num_hidden_layers * attention.cache_bytes(model.attention, jnp.dtype("bfloat16"))
    return Model(
        parameters=counted.total,
        activated=counted.activated,
        bytes=held.total,
        always=held.shared + held.others - counted.embedding * weight_bytes,
        routed=held.routed,
        touch_LE=_probabilities(model, load_LE),
        cache=cache,
        flops=size.decode_flops_per_token(model, context),
        context=context,
    )


def _probabilities(model: ModelConfig, load_LE: np.ndarray | None) -> np.ndarray:
    """Probability that a token chooses an expert, (L, E); one row for all layers if uniform."""
    moe = model.moe
    if not moe.n_routed_experts:
        return np.zeros((0, 0))
    if load_LE is None:
        return np.full((1, moe.n_routed_experts), moe.num_experts_per_tok / moe.n_choices)
    share_LE = load_LE / load_LE.sum(axis=1, keepdims=True)
    # An expert is chosen once by a token, however large its share of the choices is.
    return np.minimum(moe.computed_per_token * share_LE, 1.0)


class Training(NamedTuple):
    """The cost of a training run: its tokens, and its FLOPs."""

    tokens: int
    flops: float

    def chip_hours(self, chip: Chip, mfu: float = 1.0) -> float:
        """Hours of one chip, at a share of its peak that model FLOPs reach."""
        return self.flops / (mfu * chip.peak_flops) / HOUR


def of_training(config: Config) -> Training:
    """The cost of a run from its first to its last step."""
    tokens = tokens_after(config, config.train.steps)
    return Training(tokens, tokens * size.train_flops_per_token(config))


class Deal(NamedTuple):
    """Cost of a model: hours of a chip for its training, and to decode one token.

    Attributes:
      training: chip-hours.
      token: chip-hours of a token.
      chips: the least that serve at all.
    """

    training: float
    token: float
    chips: int


def break_even_tokens(one: Deal, other: Deal) -> float | None:
    """Served tokens at which training and serving cost the same; None: one is always dearer."""
    training = one.training - other.training
    token = other.token - one.token
    if token == 0 or training / token < 0:
        return None
    return training / token


def break_even_rate(one: Deal, other: Deal) -> float | None:
    """Tokens an hour at which serving costs the same; below it, fewer chips are cheaper.

    A model takes its least chips at any traffic, and as many more as tokens take above that.  None:
    the model of fewer chips is never the dearer one.
    """
    few, many = sorted((one, other), key=lambda deal: deal.chips)
    if few.chips == many.chips or few.token <= many.token:
        return None
    # Dearer per token, `few` grows past the chips of `many` while those still have time.
    return many.chips / few.token


def break_even_memory(
    one: Model, other: Model, hours: tuple[float, float], rate: float
) -> float | None:
    """Price of a GB and hour, in prices of a chip-hour, at which serving costs the same.

    The memory of the weights is paid for by the hour, computing by the time that tokens take.
    Below this price the model of more memory is cheaper.

    Args:
      one, other: the models.
      hours: chip-hours of a token, of each.
      rate: tokens an hour.

    Returns:
      None: the model of more memory is not cheaper at any price.
    """
    gb = (one.bytes - other.bytes) / 1e9
    saved = rate * (hours[1] - hours[0])
    if gb == 0 or saved / gb <= 0:
        return None
    return saved / gb


class Interval(NamedTuple):
    """Batches from `first` to `last` at which the model of a number, 0 or 1, is the faster one."""

    first: int
    last: int
    faster: int


def faster_by_batch(one: Model, other: Model, chip: Chip, batches: Sequence[int]) -> list[Interval]:
    """Which of two models decodes more tokens/s on a chip, by batch, as intervals of equal answers.

    Args:
      one, other: the models.
      chip: that they run on.
      batches: ascending.
    """
    found: list[Interval] = []
    for batch in batches:
        faster = int(other.chip_seconds(batch, chip) < one.chip_seconds(batch, chip))
        if found and found[-1].faster == faster:
            found[-1] = found[-1]._replace(last=batch)
        else:
            found.append(Interval(batch, batch, faster))
    return found
