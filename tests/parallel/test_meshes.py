"""Training on every mesh of eight virtual devices is training on one device; so is resuming."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from dsmoe_jax.config import Config
from tests.parallel.on_mesh import OnMesh
from tests.tools.tiny import FOR_EIGHT_DEVICES, tiny
from tests.tools.trees import REORDERED, assert_all_below, by_path, relative_errors

pytestmark = pytest.mark.eight_devices

# Twenty AdamW steps amplify them: where a gradient is almost 0 its sign decides the update.
AFTER_TWENTY_STEPS = 1e-3
MESHES: dict[str, dict[str, int]] = {
    "one device": {},
    "fsdp 8": {"fsdp": 8},
    "data 2 x expert 4": {"data": 2, "expert": 4, "slices": 2},  # four devices each
    "fsdp 2 x expert 2 x tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2},
}
OF_EIGHT = [mesh for mesh, sizes in MESHES.items() if sizes]
RESUMED = [*itertools.pairwise(MESHES), (OF_EIGHT[-1], "one device")]  # saved on, goes on on
# The batch of one mesh is computed in two micro-batches, in which nothing may show either: the load
# of the balance term and of the bias is that of the global batch.
MICRO_BATCHES = {"fsdp 2 x expert 2 x tensor 2": 2}
CONFIG = {
    **FOR_EIGHT_DEVICES,
    "model.attention.num_key_value_heads": 2,
    # A leading dense layer, an MoE layer, and a dense one between it and the next.
    "model.num_hidden_layers": 3,
    "model.moe_layer_freq": 2,
    "model.moe_layer_offset": 1,
    "model.intermediate_size": 32,
    "model.initializer_range": 0.1,
    "model.moe.router.bias_update_speed": 0.001,
    "model.moe.router.bias_update_schedule": ((0.5, 1), (0.5, 0.5)),  # a jump after five steps
    "model.moe.balance.sequence.factor": 0.1,
    "model.moe.balance.sequence.scope": "document",
    "model.moe.balance.expert.factor": 0.1,
    "model.moe.balance.expert.scope": "global_batch",
    "model.moe.balance.router_z.factor": 0.01,
    "data.sequence_length": 32,
    "optimizer.peak_learning_rate": 3e-4,
    "optimizer.warmup_steps": 0,
    "optimizer.clip_norm": 1e9,  # so that a gradient of a wrong scale shows
}


def config_on(mesh: str) -> Config:
    """The config of the run on a mesh."""
    axes = {f"mesh.{axis}": n for axis, n in {"data": 1, **MESHES[mesh]}.items()}
    return tiny(**CONFIG, **axes, **{"train.accumulation_steps": MICRO_BATCHES.get(mesh, 1)})


class Run(OnMesh):
    """The tiny run on a mesh of all devices, or on one device."""

    def __init__(self, name: str):
        super().__init__(config_on(name), 8 if MESHES[name] else 1)

    def train(self, steps: int) -> tuple[dict[str, jax.Array], list[float]]:
        """Goes on for some steps; arrays of the state and of the last metrics, and all losses."""
        losses, metrics = [], None
        for _ in range(steps):
            metrics = self.take_step()
            losses.append(float(metrics.loss))
        arrays = by_path({"state": self.state, "metrics": metrics})
        # But for what is meant to depend on the mesh: rows between devices.
        return {path: x for path, x in arrays.items() if ".dispatch." not in path}, losses


class FirstStep(NamedTuple):
    """State and metrics of the first step on a mesh."""

    run: Run
    arrays: dict[str, np.ndarray]
    shards: dict[str, tuple[int, ...]]  # the shape of a device's part
    checkpoint: Path


@pytest.fixture(scope="module")
def first_step(tmp_path_factory) -> Callable[[str], FirstStep]:
    """`first_step(mesh)`, each computed once."""

    @functools.cache
    def compute(mesh: str) -> FirstStep:
        run = Run(mesh)
        arrays, _ = run.train(1)
        shards = {path: x.sharding.shard_shape(x.shape) for path, x in arrays.items()}
        found = {path: np.asarray(x) for path, x in arrays.items()}
        checkpoint = tmp_path_factory.mktemp("checkpoint") / "run"
        run.save(checkpoint)
        return FirstStep(run, found, shards, checkpoint)

    return compute


@pytest.fixture(scope="module")
def unbroken(first_step) -> tuple[dict[str, np.ndarray], list[float]]:
    """Twenty more steps on one device: arrays at the end, and the losses."""
    first = first_step("one device")
    arrays, losses = first.run.train(20)
    return {path: np.asarray(x) for path, x in arrays.items()}, losses


@pytest.mark.parametrize("mesh", OF_EIGHT)
def test_loss_gradients_and_update_are_those_of_one_device(mesh, first_step):
    """The first moments are the gradients (clipping is off), so their scale is seen too."""
    errors = relative_errors(first_step(mesh).arrays, first_step("one device").arrays)
    assert sum("mu" in path for path in errors) > 15
    assert any("metrics" in path and "load_E" in path for path in errors)
    assert_all_below(errors, REORDERED)


# Whole: layers 1, E 8, F 16, D 32; N 4, H 8; V 512.
SHARDS = {
    "fsdp 8": {
        "['layers']['moe']['gate_EFD']": (1, 8, 16, 4),
        "['layers']['attention']['query_NHD']": (1, 4, 8, 4),
    },
    "data 2 x expert 4": {
        "['layers']['moe']['gate_EFD']": (1, 2, 16, 32),
        "['layers']['attention']['query_NHD']": (1, 4, 8, 8),
    },
    "fsdp 2 x expert 2 x tensor 2": {
        "['layers']['moe']['gate_EFD']": (1, 4, 8, 16),
        "['layers']['moe']['down_EDF']": (1, 4, 16, 8),
        "['layers']['moe']['shared']['gate_FD']": (1, 8, 8),
        "['layers']['moe']['router_ED']": (1, 4, 16),
        "['layers']['attention']['query_NHD']": (1, 2, 8, 8),
        "['leading'][0]['ffn']['down_DF']": (8, 16),
        "['between']['ffn']['down_DF']": (1, 8, 16),
        "['embedding_VD']": (256, 8),
        "['final_norm']['scale_D']": (32,),
    },
}


@pytest.mark.parametrize("mesh", OF_EIGHT)
def test_parameters_and_both_moments_are_in_shards(mesh, first_step):
    shards = first_step(mesh).shards
    for of in ("params", "opt_state[1][0].mu", "opt_state[1][0].nu"):
        for name, shape in SHARDS[mesh].items():
            assert shards[f"['state'].{of}{name}.value"] == shape, (of, name)


@pytest.mark.parametrize(("saved_on", "mesh"), RESUMED)
def test_resuming_on_another_mesh_changes_nothing(saved_on, mesh, first_step, unbroken):
    """The next 20 losses are the unbroken run's.

    So are parameters, both moments and the balance bias at the end.
    """
    wanted, losses = unbroken
    run = first_step(mesh).run
    run.load(first_step(saved_on).checkpoint)
    found, resumed_losses = run.train(20)
    assert losses[-1] < losses[0]
    assert resumed_losses == pytest.approx(losses, rel=1e-5)
    assert any("bias_E" in path for path in found)
    assert_all_below(relative_errors(found, wanted), AFTER_TWENTY_STEPS)
