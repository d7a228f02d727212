"""A batch in the pipeline of parallel/pipeline.py: how it is cut, and how its reports are joined.

The model runs its stacked layers in the pipeline wherever the ambient mesh has stages.  Embedding,
leading dense layers, final norm and head are computed before and after it for the whole batch,
which `stage` then splits as `data` does: no stage has more to do than another.

Shapes: B sequences, n micro-batches of b, S positions, L MoE layers, K activated experts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dsmoe_jax.config import Config, ModelConfig
from dsmoe_jax.config.checks import require
from dsmoe_jax.config.train import TrainConfig
from dsmoe_jax.model import layout
from dsmoe_jax.model.block import EveryLayer, OneLayer
from dsmoe_jax.moe.layer import evaluated_together
from dsmoe_jax.moe.report import LayerReport
from dsmoe_jax.nn.attention import CausalMask
from dsmoe_jax.parallel import pipeline
from dsmoe_jax.parallel.pipeline import Schedule, Tick
from dsmoe_jax.parallel.sharding import batch_shards, constrain


def schedule_of(config: Config) -> Schedule | None:
    """The course of a training batch on the ambient mesh; None without stages.

    It is that of the micro-batches that pass together.
    """
    train = config.train
    if pipeline.stages() == 1:
        return None
    return Schedule(together(train), train.pipeline_repeats)


def together(train: TrainConfig) -> int:
    """Micro-batches that pass through the stages together."""
    n = train.pipeline_micro_batches
    return train.accumulation_steps if n is None else n


def schedule_of_evaluation(config: ModelConfig, sequences: int) -> Schedule:
    """The course of a batch that nothing is learned from: a micro-batch a stage, if that can be.

    Where the tokens of a batch compete they stay together, and one stage works at a time.
    """
    whole = evaluated_together(config.moe) or sequences % batch_shards()
    return Schedule(1 if whole else pipeline.stages())


def check(config: Config, stages: int) -> None:
    """Refuses a number of stages that does not suit a run.

    Raises:
      ValueError: naming the key, with what would be right.
    """
    repeats = config.train.pipeline_repeats
    micro_batches = config.train.accumulation_steps
    n_together = config.train.pipeline_micro_batches
    if stages == 1:
        want = "needs mesh.stage > 1; without it must be"
        require(repeats == 1, "train.pipeline_repeats", repeats, f"{want} 1")
        require(n_together is None, "train.pipeline_micro_batches", n_together, f"{want} None")
        return
    model = config.model
    runs = layout.runs(model)
    require(
        len(runs) == 1,
        "mesh.stage",
        stages,
        "the groups of an MoE layer and the dense ones behind it must all be alike"
        f" (model.mlp_only_layers={model.mlp_only_layers}); must be 1",
    )
    n = runs[0].groups
    can_be = ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)
    require(
        n % (stages * repeats) == 0,
        "mesh.stage",
        stages,
        f"times train.pipeline_repeats={repeats} must divide the {n} MoE layers: be one of"
        f" {can_be}",
    )
    require(
        micro_batches % stages == 0,
        "train.accumulation_steps",
        micro_batches,
        f"these micro-batches go through the stages: must be a multiple of mesh.stage={stages}",
    )
    passing = together(config.train)
    require(
        passing % stages == 0 and micro_batches % passing == 0,
        "train.pipeline_micro_batches",
        n_together,
        f"must be a multiple of mesh.stage={stages} that divides"
        f" train.accumulation_steps={micro_batches}",
    )
    require(
        model.remat != "none",
        "model.remat",
        model.remat,
        f"would keep weights for every micro-batch in mesh.stage={stages}; must be 'dots', 'named'"
        " or 'full'",
    )
    require(
        model.mtp is None,
        "mesh.stage",
        stages,
        "the modules of model.mtp run behind the last layer, in no stage; must be 1",
    )


def repeats(model: ModelConfig, stages: int) -> list[int]:
    """Numbers of repeats that a model can have in so many stages; [] if it has no pipeline."""
    runs = layout.runs(model)
    groups, rest = divmod(runs[0].groups, stages)
    if len(runs) > 1 or rest or model.mtp is not None or model.remat == "none":
        return []
    return [r for r in range(1, groups + 1) if groups % r == 0]


def cut(x_B: jax.Array, n: int, axis: int = 0) -> jax.Array:
    """The micro-batches of a batch along a new axis: (..., B, ...) -> (..., n, b, ...).

    No row leaves its device: those of a stage are whole micro-batches, which its devices share.
    """
    stages = pipeline.stages()
    b = x_B.shape[axis] // n
    around = x_B.shape[:axis], x_B.shape[axis + 1 :]
    if n % stages == 0:
        shards = batch_shards() // stages
        x_B = x_B.reshape(*around[0], stages, shards, n // stages, b // shards, *around[1])
        x_B = x_B.swapaxes(axis + 1, axis + 2)
    return x_B.reshape(*around[0], n, b, *around[1])


def whole(x_nb: jax.Array, axis: int = 0) -> jax.Array:
    """The reverse of `cut`: (..., n, b, ...) -> (..., B, ...)."""
    stages = pipeline.stages()
    n, b = x_nb.shape[axis : axis + 2]
    around = x_nb.shape[:axis], x_nb.shape[axis + 2 :]
    if n % stages == 0:
        shards = batch_shards() // stages
        x_nb = x_nb.reshape(*around[0], stages, n // stages, shards, b // shards, *around[1])
        x_nb = x_nb.swapaxes(axis + 1, axis + 2)
    return x_nb.reshape(*around[0], n * b, *around[1])


def cut_activations(x_BSD: jax.Array, n: int) -> jax.Array:
    """The micro-batches of activations, (n, b, S, D)."""
    return constrain(cut(x_BSD, n), "UBSD")


def whole_activations(x_nbSD: jax.Array) -> jax.Array:
    """The reverse of `cut_activations`."""
    return constrain(whole(constrain(x_nbSD, "UBSD")), "BSD")


def cut_inputs(every: EveryLayer, n: int) -> EveryLayer:
    """The inputs that all layers share, by micro-batch; `of_tick` makes them whole again."""
    b = len(every.token_ids_BS)
    ids_B = every.sequence_ids_B
    every = every._replace(sequence_ids_B=jnp.arange(b) if ids_B is None else ids_B)
    arrays = every._replace(mask=None, cache_length=None)
    return jax.tree.map(lambda x_B: cut(x_B, n), arrays)


def of_tick(every: EveryLayer, tick: Tick) -> EveryLayer:
    """The inputs of a micro-batch; in the bubble no token is valid: none is sent to an expert."""
    mask = CausalMask(every.segment_ids_BS)
    return every._replace(mask=mask, cache_length=0, valid_BS=every.valid_BS & tick.active)


def cut_layers(one: OneLayer, n: int) -> OneLayer:
    """The inputs of single layers, with recorded routing by micro-batch: (L, n, b, S, K)."""
    return one._replace(replayed=jax.tree.map(lambda x: cut(x, n, axis=1), one.replayed))


def layers_of_tick(one: OneLayer, tick: Tick) -> OneLayer:
    """Those inputs for a micro-batch."""

    def of_micro_batch(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, tick.micro_batch, axis=1, keepdims=False)

    return one._replace(replayed=jax.tree.map(of_micro_batch, one.replayed))


def joined(report: LayerReport | None) -> LayerReport | None:
    """The report of a batch from those of its micro-batches, whose arrays are (L, n, ...).

    Sums are added up; what is by token, (L, n, b, S, ...), is put in order.
    """
    if report is None:
        return None

    def added(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.sum(axis=1), tree)

    def by_token(tree: Any) -> Any:
        return jax.tree.map(lambda x: whole(x, axis=1), tree)

    loss_inputs = report.loss_inputs
    return LayerReport(
        loss_inputs._replace(terms=added(loss_inputs.terms), policy=by_token(loss_inputs.policy)),
        added(report.logged),
        by_token(report.recorded),
        by_token(report.inputs_BSD),
    )
