"""Recorded routing on disk: what a run's routers chose, to be replayed in another run.

    manifest.json                    what the routing belongs to, and its sizes
    train/00000001.npz               step 1: ids_BLSK (integers, E is nobody), gates_BLSK (float32)
    validation-00000010/00000001.npz  the first held-out batch after step 10, the same arrays

The routing is that of the experts' real work: after anything was dropped.

Shapes: B sequences of a batch, L MoE layers, S positions, E routed experts, K columns of a routing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsmoe_jax.config import Config
from dsmoe_jax.data.pipeline import Batch
from dsmoe_jax.moe.types import Choice
from dsmoe_jax.parallel import hosts
from dsmoe_jax.training.workdir import ROUTING, write_json

MANIFEST = "manifest.json"
TRAIN = "train"


def belongs_to(config: Config, fingerprint: str) -> dict[str, Any]:
    """What a recording must have in common with the run that replays it.

    Args:
      config: of the run.
      fingerprint: of the corpus.
    """
    model, moe, stages = config.model, config.model.moe, config.stages()
    columns = [stage.config.model.moe.num_experts_per_tok for stage in stages]
    if moe.router == "expert_choice":
        columns = [moe.n_routed_experts] * len(stages)
    return {
        "layers": model.num_hidden_layers - model.first_k_dense_replace,
        "experts": moe.n_routed_experts,
        "experts_per_token": columns,  # of each stage, and the updates made before it:
        "stages_after": [stage.first for stage in stages],
        "sequence_length": config.data.sequence_length,
        "corpus": fingerprint,
        "seed": config.train.seed,
    }


def validation_name(step: int) -> str:
    """Of the routing of the held-out batches after a step."""
    return f"validation-{step:08}"


class Recorder:
    """Writes a recording; what is written again (by a run that goes on) replaces the old.

    Of several processes, all of which have the routing of the whole batch, the first one writes.

    Args:
      directory: created if missing.
      belongs: from `belongs_to`.
    """

    def __init__(self, directory: Path, belongs: dict[str, Any]):
        self.directory = directory
        if hosts.is_first():
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / MANIFEST, belongs)

    def write(self, name: str, number: int, choice: Choice) -> None:
        """Adds a batch.

        Args:
          name: "train", or from `validation_name`.
          number: of the step or batch, from 1.
          choice: ids_LBSK and gates_LBSK.
        """
        if not hosts.is_first():
            return
        ids, gates = (np.swapaxes(np.asarray(x), 0, 1) for x in choice)
        small = np.int16 if ids.max() < 2**15 else np.int32
        path = _path(self.directory, name, number)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, ids_BLSK=ids.astype(small), gates_BLSK=gates)
        os.replace(temporary, path)


class Recording:
    """Reads a recording.

    Args:
      directory: of a `Recorder`.
      config: of the run that replays it.
      fingerprint: of its corpus.

    Raises:
      ValueError: with the numbers, if it is of other sizes or data, or has too few steps.
    """

    def __init__(self, directory: str, config: Config, fingerprint: str):
        self.directory = Path(directory).expanduser()
        self._key = f"train.replay_routing={directory!r}"
        path = self.directory / MANIFEST
        if not path.is_file():
            raise ValueError(f"{self._key}: no recorded routing there (no {MANIFEST})")
        found, wanted = json.loads(path.read_text()), belongs_to(config, fingerprint)
        wrong = [f"{k}={found.get(k)}, not {v}" for k, v in wanted.items() if found.get(k) != v]
        if wrong:
            raise ValueError(f"{self._key}: recorded with {'; '.join(wrong)}")
        sizes, columns = (wanted["layers"], wanted["sequence_length"]), wanted["experts_per_token"]
        self._shapes_LSK = [(*sizes, k) for k in dict.fromkeys(columns)]
        steps = config.train.steps
        missing = [i for i in range(1, steps + 1) if not _path(self.directory, TRAIN, i).is_file()]
        if missing:
            raise ValueError(
                f"{self._key}: there is no step {missing[0]}, train.steps={steps} must be at most"
                f" {missing[0] - 1}"
            )
        for stage in config.stages():
            self.read(TRAIN, stage.first + 1, stage.config.train.global_batch_size)
        every = config.train.eval_every or steps
        if config.model.moe.router == "replay":  # the other one chooses by itself in evaluation
            for step in {*range(every, steps, every), steps}:
                train = config.stage_of(step).config.train
                micro_batch = train.global_batch_size // train.accumulation_steps
                self.read(validation_name(step), 1, micro_batch)

    def read(
        self, name: str, number: int, batch_size: int, rows: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """What is added to a batch: `replayed_ids_BLSK` (int32) and `replayed_gates_BLSK`.

        Args:
          name, number: as for `Recorder.write`.
          batch_size: sequences that the batch must have.
          rows: the ones to return; None is all.

        Raises:
          ValueError: if there is no such batch, or it is of another shape.
        """
        path = _path(self.directory, name, number)
        if not path.is_file():
            raise ValueError(f"{self._key}: holds no batch {number} of {name}")
        with np.load(path) as arrays:
            ids, gates = arrays["ids_BLSK"].astype(np.int32), arrays["gates_BLSK"]
        if len(ids) != batch_size:
            raise ValueError(
                f"{self._key}: {name} has batches of {len(ids)} sequences, not {batch_size}"
            )
        wanted = [(batch_size, *shape) for shape in self._shapes_LSK]
        if ids.shape not in wanted or gates.shape != ids.shape:
            raise ValueError(
                f"{self._key}: {path.relative_to(self.directory)} has ids of shape {ids.shape} and"
                f" gates of {gates.shape}, not {' or '.join(map(str, wanted))}"
            )
        if rows is not None:
            ids, gates = ids[list(rows)], gates[list(rows)]
        return {"replayed_ids_BLSK": ids, "replayed_gates_BLSK": gates}


def of_run(
    config: Config, workdir: Path, fingerprint: str
) -> tuple[Recorder | None, Recording | None]:
    """Where the routing of a training run goes to, and where it comes from.

    Raises:
      ValueError: for a recording that cannot be replayed.
    """
    recorder = replayed = None
    if config.train.record_routing:
        recorder = Recorder(workdir / ROUTING, belongs_to(config, fingerprint))
    if config.train.replay_routing:
        replayed = Recording(config.train.replay_routing, config, fingerprint)
    return recorder, replayed


def for_held_out(config: Config, fingerprint: str) -> Recording | None:
    """The recording of a run that cannot route held-out text by itself; None if it can."""
    if config.model.moe.router != "replay":
        return None
    return Recording(config.train.replay_routing, config, fingerprint)


def replayed(batch: Batch) -> Choice | None:
    """The recorded routing that a batch brings along."""
    if "replayed_ids_BLSK" not in batch:
        return None
    assert "replayed_gates_BLSK" in batch, "ids and gates come together"
    ids_BLSK, gates_BLSK = batch["replayed_ids_BLSK"], batch["replayed_gates_BLSK"]
    return Choice(jnp.asarray(ids_BLSK), jnp.asarray(gates_BLSK))


def _path(directory: Path, name: str, number: int) -> Path:
    return directory / name / f"{number:08}.npz"
