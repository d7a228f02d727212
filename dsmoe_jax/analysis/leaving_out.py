"""Losses of a model without some of its routed experts, and the experts that it misses least.

Shapes: L MoE layers, E routed experts, P parts of a layer's experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsmoe_jax.data.pipeline import Batch
from dsmoe_jax.evaluation.cross_entropy import token_sums
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.model.types import ModelInputs
from dsmoe_jax.moe import interventions
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.parallel import sharding


class LossWithout:
    """Loss of a model on a text as a function of the experts that are left out; compiled once.

    Args:
      model: trained, with routed experts.
      intervention: at the same time.
    """

    def __init__(self, model: Transformer, intervention: Intervention = interventions.NONE):
        self._config = model.config
        self._intervention = intervention
        graph, self._state = nnx.split(model)

        def step(state: nnx.State, batch: Batch, left_out_LE: jax.Array):
            inputs = ModelInputs.of_batch(batch)._replace(left_out_LE=left_out_LE)
            targets_BS = jnp.asarray(batch["targets_BS"])
            scored = nnx.merge(graph, state).score(inputs, targets_BS, intervention)
            # The bytes of the tokens are not looked at.
            _, sums = token_sums(scored.nll_BS, batch, jnp.zeros(model.config.vocab_size))
            return sums.nll, sums.tokens

        self._step = jax.jit(step, out_shardings=sharding.whole())

    @property
    def shape(self) -> tuple[int, int]:
        """L and E."""
        return len(self._config.moe_layers), self._config.moe.n_routed_experts

    def __call__(self, batches: Sequence[Batch], left_out_LE: np.ndarray | None = None) -> float:
        """Nats per token.

        Args:
          batches: the text.
          left_out_LE: bool, experts that no token may choose; None: none.

        Raises:
          ValueError: for experts that cannot be left out.
        """
        if left_out_LE is None:
            left_out_LE = np.zeros(self.shape, bool)
        moe = self._config.moe
        interventions.check_left_out(left_out_LE, self.shape[0], moe, self._intervention)
        sums = [jax.device_get(self._step(self._state, batch, left_out_LE)) for batch in batches]
        nll, tokens = np.sum(np.array(sums, np.float64), axis=0)
        return float(nll / tokens)


def parts(load_LE: np.ndarray, n_parts: int) -> list[list[np.ndarray]]:
    """The experts of each layer in P parts, as even as can be, the least loaded ones first."""
    return [np.array_split(np.argsort(load_E, kind="stable"), n_parts) for load_E in load_LE]


def sample(load_LE: np.ndarray, n: int) -> list[list[np.ndarray]]:
    """n single experts of each layer, or all, spread from the least loaded one to the most."""
    n = min(n, load_LE.shape[1])
    places_P1 = np.linspace(0, load_LE.shape[1] - 1, n).round().astype(int)[:, None]
    return [list(np.argsort(load_E, kind="stable")[places_P1]) for load_E in load_LE]


def rises(
    loss: LossWithout, batches: Sequence[Batch], chosen: Sequence[Sequence[np.ndarray]]
) -> np.ndarray:
    """Rise of the loss without each set of experts of a single layer, nats per token, (L, P).

    Args:
      loss: of the model.
      batches: the text.
      chosen: P sets of experts for each layer.
    """
    whole = loss(batches)
    rises_LP = np.zeros((len(chosen), len(chosen[0])))
    for layer, of_layer in enumerate(chosen):
        for part, members in enumerate(of_layer):
            left_out_LE = np.zeros(loss.shape, bool)
            left_out_LE[layer, members] = True
            rises_LP[layer, part] = loss(batches, left_out_LE) - whole
    return rises_LP


def mask(chosen: Sequence[np.ndarray], n_experts: int) -> np.ndarray:
    """Bool (L, E), True for the experts of each layer that are in its set."""
    return np.stack([np.isin(np.arange(n_experts), members) for members in chosen])
