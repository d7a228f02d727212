"""Runs without a loop around them: steps on a mesh, and checkpoints between meshes."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from dsmoe_jax.config import Config
from dsmoe_jax.parallel import sharding
from dsmoe_jax.runs.checkpoint import Checkpoints
from dsmoe_jax.training.devices import open_mesh
from dsmoe_jax.training.start import abstract_state, from_items, init_state, to_items
from dsmoe_jax.training.step import StepMetrics, jit_train_step
from tests.tools.tiny import batch


class OnMesh:
    """A run on the mesh of its config.

    Args:
      config: of the run.
      n_devices: of the mesh.
    """

    def __init__(self, config: Config, n_devices: int):
        self.config = config
        self.mesh = open_mesh(config, jax.devices()[:n_devices])
        with jax.set_mesh(self.mesh):
            self.rows = sharding.local_rows(config.train.global_batch_size)
            self.step = jit_train_step(config, np.ones(config.model.vocab_size, np.int32))
            self.state = init_state(config)

    def take_step(self) -> StepMetrics:
        """Goes on by one step."""
        with jax.set_mesh(self.mesh):
            host = batch(self.config, int(self.state.step))
            arrays = sharding.global_batch(host, self.rows, len(host["tokens_BS"]))
            self.state, metrics = self.step(self.state, arrays)
        return metrics

    def save(self, directory: Path) -> None:
        """Writes a checkpoint."""
        checkpoints = Checkpoints(directory, keep=1)
        with jax.set_mesh(self.mesh):
            checkpoints.save(int(self.state.step), to_items(self.state), {})
        checkpoints.close()

    def load(self, directory: Path) -> None:
        """Goes on from a checkpoint, whatever mesh it was saved on."""
        checkpoints = Checkpoints(directory, keep=None)
        with jax.set_mesh(self.mesh):
            (step,) = checkpoints.steps()
            target = to_items(abstract_state(self.config))
            self.state = from_items(checkpoints.restore(step, target).items)
        checkpoints.close()
