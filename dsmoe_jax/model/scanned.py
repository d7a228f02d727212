"""The layers of a run (`layout.Run`): one scan over their groups, or the stages of a pipeline.

On a CPU a few layers are unrolled: see `_groups_at_once`.

Shapes: B sequences, S positions, D hidden; n micro-batches of b sequences in the pipeline.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.hardware.platform import platform
from dsmoe_jax.model import pipelined, remat
from dsmoe_jax.model.block import Block, EveryLayer, OneLayer
from dsmoe_jax.model.layout import Run
from dsmoe_jax.model.types import RunCache
from dsmoe_jax.moe.interventions import Intervention
from dsmoe_jax.moe.report import LayerReport
from dsmoe_jax.parallel import pipeline
from dsmoe_jax.parallel.pipeline import Schedule, Tick
from dsmoe_jax.parallel.sharding import constrain, constrain_repeats

UNROLLED_LAYERS = 8  # at most, on a CPU


class Layers:
    """The layers of a run with the parameters that they have in a forward pass.

    Args:
      config: of the model.
      layers, between: its MoE layers and its dense ones, with a leading layer axis.
      run: says how many there are.
      intervention: see `Transformer.forward`.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Block,
        between: Block | None,
        run: Run,
        intervention: Intervention,
    ):
        self._run = run
        self._policy = remat.get(config.remat).policy
        self._intervention = intervention
        self._moe_graph, self._moe_params = nnx.split(layers)
        self._dense_graph = self._dense_params = None
        if between is not None:
            self._dense_graph, self._dense_params = nnx.split(between)

    def in_order(
        self, x_BSD: jax.Array, every: EveryLayer, moe: OneLayer, dense: OneLayer
    ) -> tuple[jax.Array, LayerReport | None, RunCache]:
        """Runs the layers as one scan over their groups.

        Args:
          x_BSD: activations.
          every: inputs of all layers.
          moe, dense: inputs of the MoE layers and of the dense ones, with a leading layer axis.
        """
        run = self._run
        moe_layer = self._layer(self._moe_graph, every)
        following = None
        if self._dense_graph is not None:
            dense_layer = self._layer(self._dense_graph, every)
            following = _in_groups((self._dense_params, dense), run)

        def group(x_BSD, scanned):
            first, following = scanned
            x_BSD, report, cache = moe_layer(x_BSD, *first)
            behind = []
            for i in range(run.dense):
                x_BSD, _, dense_cache = dense_layer(
                    x_BSD, *jax.tree.map(operator.itemgetter(i), following)
                )
                behind.append(dense_cache)
            together = (
                jax.tree.map(lambda *of_each: jnp.stack(of_each), *behind) if behind else None
            )
            return x_BSD, (report, RunCache(cache, together))

        xs = (self._moe_params, moe), following
        x_BSD, (report, cache) = jax.lax.scan(group, x_BSD, xs, unroll=_groups_at_once(run))
        return x_BSD, report, RunCache(cache.layers, _in_order(cache.between))

    def in_pipeline(
        self, x_BSD: jax.Array, every: EveryLayer, moe: OneLayer, schedule: Schedule
    ) -> tuple[jax.Array, LayerReport | None]:
        """Runs the layers in the stages of the ambient mesh; arguments of `in_order`.

        Args:
          schedule: of the micro-batches.
        """
        run = self._run
        n = schedule.micro_batches
        dense_params = _in_groups(self._dense_params, run)
        following = [jax.tree.map(lambda x, i=i: x[:, i], dense_params) for i in range(run.dense)]

        def body(x_bSD, cut_every, params, tick, cut_moe):
            # XLA would lose how they are split on the way into the loop.
            x_bSD = constrain(x_bSD, "BSD")
            params = constrain_repeats(params)
            of_tick = pipelined.of_tick(cut_every, tick)
            moe_layer = self._layer(self._moe_graph, of_tick, tick)
            dense_layer = self._layer(self._dense_graph, of_tick, tick)

            def group(x_bSD, scanned):
                (params, following), one = scanned
                x_bSD, report, _ = moe_layer(x_bSD, params, one)
                for of_dense in following:
                    x_bSD, _, _ = dense_layer(x_bSD, of_dense, OneLayer())
                return x_bSD, report

            ones = pipelined.layers_of_tick(cut_moe, tick)
            return jax.lax.scan(group, x_bSD, (params, ones))

        x_nbSD, report = pipeline.run(
            body,
            schedule,
            pipelined.cut_activations(x_BSD, n),
            pipelined.cut_inputs(every, n),
            (self._moe_params, following),
            pipelined.cut_layers(moe, n),
            "BSD",
        )
        return pipelined.whole_activations(x_nbSD), pipelined.joined(report)

    def _layer(self, graph: Any, every: EveryLayer, tick: Tick | None = None) -> Callable[..., Any]:
        """A layer, `(x_BSD, params, one) -> (x_BSD, report, cache)`.

        In a tick of the pipeline its parameters are those of all repeats.
        """

        def layer(x_BSD, params, one):
            if tick is not None:
                params = pipeline.pick(params, tick)
            return nnx.merge(graph, params)(x_BSD, every, one, self._intervention)

        return layer if self._policy is None else jax.checkpoint(layer, policy=self._policy)


def _in_groups(tree: Any, run: Run) -> Any:
    """Arrays of dense layers with the axes groups and layers of a group instead of layers."""
    return jax.tree.map(lambda x: x.reshape(run.groups, run.dense, *x.shape[1:]), tree)


def _in_order(tree: Any) -> Any:
    """The reverse of `_in_groups`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _groups_at_once(run: Run) -> int:
    """Groups in one iteration of the scan: all of a shallow model on a CPU, else one.

    A scan keeps what the backward pass needs in stacked arrays, which XLA's CPU backend zeroes,
    fills and copies out again: a sixth of the demo's step.  Unrolled, the numbers are the same to
    the bit, and a shallow model compiles no slower.
    """
    shallow = run.groups * (1 + run.dense) <= UNROLLED_LAYERS
    return run.groups if platform() == "cpu" and shallow else 1
