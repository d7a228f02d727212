"""Compiles the train step for a TPU slice without a TPU; gives memory, traffic and time of a chip.

The program is the one that training runs: forward, backward, optimizer, dispatch.  It is lowered
with shapes in place of arrays, sharded over the described devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import time
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from dsmoe_jax.config import Config
from dsmoe_jax.config.mesh import MeshConfig
from dsmoe_jax.data.pipeline import Batch
from dsmoe_jax.hardware.chips import CHIPS, TPUS
from dsmoe_jax.model import layout, pipelined, size
from dsmoe_jax.model.build import ModelState, model_shapes
from dsmoe_jax.moe.experts import BACKENDS
from dsmoe_jax.parallel import sharding
from dsmoe_jax.parallel.pipeline import Schedule
from dsmoe_jax.planning import collectives, memory_traffic, planner
from dsmoe_jax.planning.collectives import BETWEEN_SLICES, Overlap
from dsmoe_jax.planning.memory_traffic import Move
from dsmoe_jax.planning.roofline import Roofline, roofline
from dsmoe_jax.runs.checkpoint import target
from dsmoe_jax.training.devices import open_mesh
from dsmoe_jax.training.start import TrainState, abstract_state
from dsmoe_jax.training.step import jit_train_step
from dsmoe_jax.training.teacher import teacher_model

# libtpu asks which machine it is on, complains where there is none, and lets only one process use
# its TPUs.
_NO_TPU_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# The compiler's messages: an early one, about temporaries alone, and the one at the end.
_OUT_OF_MEMORY = re.compile(
    r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)|Used ([\d.]+\w) of ([\d.]+\w) hbm"
)


@dataclasses.dataclass(frozen=True)
class Proof:
    """A train step as compiled.

    Attributes:
      config: with the mesh and the number of micro-batches that were used.
      topology: of the slice, CHIP:AxB.
      chip: its first part.
      chips: their number.
      sizes: of the mesh's axes.
      planned: whether the planner chose them.
      memory: GB of one chip by category; they add up to what the program allocates.
      gradients: GB of one chip's part of all gradients in float32.
      flops: of a step, by our accounting.
      collectives: GB that a chip receives in a step, by kind.
      moves: what each instruction of the program moves in one chip's HBM.
      overlap: of exchanges and computation.
      roofline: lower bounds of the time of a step.
      seconds: of lowering and compiling.
    """

    config: Config
    topology: str
    chip: str
    chips: int
    sizes: dict[str, int]
    planned: bool
    memory: dict[str, float]
    gradients: float
    flops: float
    collectives: dict[str, float]
    moves: list[Move]
    overlap: Overlap
    roofline: Roofline
    seconds: float

    @property
    def used(self) -> float:
        """GB of one chip, all categories together."""
        return sum(self.memory.values())

    @property
    def traffic(self) -> dict[str, float]:
        """GB that a step moves in one chip's HBM, by scope."""
        return memory_traffic.by_scope(self.moves)


def parts_of_step(config: Config, moves: list[Move]) -> dict[str, dict[str, float]]:
    """GB of HBM traffic of each part of a step, by scope.

    The parts: "layer", one micro-batch in one scanned layer, forward and backward (where dense
    layers stand between: in one group of layers); "micro-batch", one of them outside of those (in
    a pipeline: a tick); "step", the rest.  With one micro-batch the rest counts as its own.
    """
    model = config.model
    n_micro = config.train.accumulation_steps
    n_layers = max(run.groups for run in layout.runs(model))
    stages = config.mesh.stage
    if stages > 1:
        passing = pipelined.together(config.train)
        schedule = Schedule(passing, config.train.pipeline_repeats)
        rounds = n_micro // passing
        outer = (*([rounds] if rounds > 1 else []), schedule.ticks(stages))
        n_layers //= stages * schedule.repeats
    else:
        outer = (n_micro,) if n_micro > 1 else ()
    layers = (*outer, n_layers)
    parts: dict[str, list[Move]] = {"layer": [], "micro-batch": [], "step": []}
    for move in moves:
        if move.loops[: len(layers)] == layers:
            parts["layer"].append(move._replace(loops=move.loops[len(layers) :]))
        elif move.loops[: len(outer)] == outer:
            parts["micro-batch"].append(move._replace(loops=move.loops[len(outer) :]))
        else:
            parts["step"].append(move)
    return {name: memory_traffic.by_scope(part) for name, part in parts.items()}


def slice_devices(topology: str, slices: int = 1) -> tuple[str, list[Any]]:
    """The chip's name and the devices of a TPU slice, `CHIP:AxB` or `CHIP:AxBxC`, or of several.

    Raises:
      ValueError: for a slice that does not exist, or if libtpu is missing.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", topology)
    if match is None or match[1] not in TPUS:
        raise ValueError(
            f"--topology={topology}: must be one of {', '.join(TPUS)}, a colon, and the shape of"
            " the slice in chips: v5e:4x4, v5p:4x4x4"
        )
    if find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={topology}: libtpu, which compiles for TPUs, is not installed; it needs"
            " no TPU: pip install 'dsmoe_jax[tpu]'"
        )
    os.environ.update(_NO_TPU_MACHINE)
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=topology,
            num_slices=slices,
            **CHIPS[match[1]].description,
        )
    except Exception as error:
        raise ValueError(f"--topology={topology}: no such slice: {_line(error)}") from None
    return match[1], list(found.devices)


def lay_out(config: Config, chip: str, devices: list[Any]) -> tuple[Config, Mesh, bool]:
    """The mesh of a config, or the planner's if the config has the default mesh.

    Returns:
      The config with the mesh and the number of micro-batches that are used; the mesh; whether the
      planner chose both.

    Raises:
      ValueError: if the mesh does not divide devices, model or batch, or if no mesh fits.
    """
    planned = not config.mesh.is_chosen
    if planned:
        plan, _ = planner.propose(config, chip, len(devices), teacher_model(config))
        values: dict[str, Any] = {"accumulation_steps": plan.accumulation_steps}
        if plan.schedule is not None:
            values["pipeline_micro_batches"] = plan.schedule.micro_batches
            values["pipeline_repeats"] = plan.schedule.repeats
        train = dataclasses.replace(config.train, **values)
        mesh = dataclasses.replace(MeshConfig(), **plan.sizes, slices=config.mesh.slices)
        config = dataclasses.replace(config, mesh=mesh, train=train)
    return config, open_mesh(config, devices), planned


def prove(config: Config, topology: str) -> Proof:
    """Compiles the train step of a config for a TPU slice, or `mesh.slices` of them.

    Raises:
      ValueError: for an impossible slice or mesh, or, with the numbers, if the step does not fit.
    """
    chip, devices = slice_devices(topology, max(1, config.mesh.slices))
    config, mesh, planned = lay_out(config, chip, devices)
    with jax.set_mesh(mesh):
        state = abstract_state(config)
        batch = abstract_batch(config, mesh)
        bytes_V = np.ones(config.model.vocab_size, np.int32)
        model = teacher_model(config)
        teacher = None if model is None else target(model_shapes(model))
        step: Any = jit_train_step(config, bytes_V, model)
        start = time.perf_counter()
        kernels = contextlib.nullcontext()
        if _default_device_counts(config.model.moe.expert_backend):
            kernels = jax.default_device(devices[0])
        with kernels:
            lowered = step.trace(state, batch, teacher).lower(lowering_platforms=("tpu",))
        compiled = _compile(lowered, f"{config.name} on {topology}", config, dict(mesh.shape))
        seconds = time.perf_counter() - start
    text = compiled.as_text()
    received = collectives.by_kind(collectives.traffic(text))
    moves = memory_traffic.moves(text)
    flops = size.train_flops_per_token(config) * config.tokens_per_step
    return Proof(
        config=config,
        topology=topology,
        chip=chip,
        chips=len(devices),
        sizes=dict(mesh.shape),
        planned=planned,
        memory=_memory(compiled.memory_analysis(), state, batch, teacher),
        gradients=local_bytes(state.params) / 1e9,
        flops=flops,
        collectives=received,
        moves=moves,
        overlap=collectives.overlap(text),
        roofline=roofline(
            config,
            len(devices),
            CHIPS[chip],
            moved_gb=sum(memory_traffic.by_scope(moves).values()),
            received_gb=sum(gb for kind, gb in received.items() if kind != BETWEEN_SLICES),
            sliced_gb=received.get(BETWEEN_SLICES, 0.0),
        ).with_idle(_bubble(config)),
        seconds=seconds,
    )


def _bubble(config: Config) -> float:
    """Share of the ticks of a pipeline in which a stage has nothing to do; 0 without stages."""
    schedule = Schedule(pipelined.together(config.train), config.train.pipeline_repeats)
    return schedule.bubble(config.mesh.stage)


def _default_device_counts(backend: str) -> bool:
    """Whether an expert backend picks its kernels by JAX's default device."""
    return backend in BACKENDS and BACKENDS[backend].default_device


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """The shapes of a global batch with their shardings."""
    shape = (config.train.global_batch_size, config.data.sequence_length)
    split = sharding.batch_sharding(mesh)
    ids_BS: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split)
    mask_BS: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
    batch = Batch(
        tokens_BS=ids_BS,
        targets_BS=ids_BS,
        segment_ids_BS=ids_BS,
        positions_BS=ids_BS,
        loss_mask_BS=mask_BS,
    )
    if config.model.moe.router.tasks:
        batch["task_ids_BS"] = ids_BS
    return batch


def _compile(lowered: Any, name: str, config: Config, sizes: dict[str, int]) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _OUT_OF_MEMORY.search(str(error))
        if found is None:
            raise
        used, hbm = (group for group in found.groups() if group)
        raise ValueError(
            f"{name}: does not fit: the step needs {used}iB of the {hbm}iB of a chip, on the"
            f" mesh {planner.shape(sizes)} with {config.train.accumulation_steps} micro-batches"
            " (train.accumulation_steps); take more of them, another mesh, or more chips"
        ) from None


def local_bytes(tree: Any) -> int:
    """Bytes of one chip's shards of all arrays of a tree."""
    total = 0
    for x in jax.tree.leaves(tree):
        total += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return total


def _memory(
    allocated: Any, state: TrainState, batch: Batch, teacher: ModelState | None
) -> dict[str, float]:
    """GB of one chip by category: the arguments by their shapes, the rest as compiled."""
    arguments = {
        "parameters": local_bytes(state.params),
        "moments": local_bytes(state.opt_state),
        "batch": local_bytes(batch) + local_bytes((state.step, state.other)),
    }
    if teacher is not None:
        arguments["teacher"] = local_bytes(teacher)
    categories = {
        **arguments,
        "padding of the above": allocated.argument_size_in_bytes - sum(arguments.values()),
        "gradients and temporaries": allocated.temp_size_in_bytes,
        "metrics": allocated.output_size_in_bytes - allocated.alias_size_in_bytes,
        "program": allocated.generated_code_size_in_bytes,
    }
    return {name: n_bytes / 1e9 for name, n_bytes in categories.items()}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
