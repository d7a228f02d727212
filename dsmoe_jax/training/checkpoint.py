"""Checkpoints: everything that a run needs to go on as if it had never stopped.

Orbax writes them in the background and makes each one visible in a single rename.  Two checks are
added, because a wrong byte in a weight would otherwise be loaded without a word: the sizes of the
files, and a digest of every array, the same under every sharding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from dsmoe_jax.training.step import TrainState
from dsmoe_jax.training.workdir import write_json

_FILES = "files.json"  # inside a step's directory: the size of every other file


class Restored(NamedTuple):
    """What a checkpoint holds: the state, and what was saved beside it (JSON)."""

    state: TrainState
    extra: dict[str, Any]


class Checkpoints:
    """The `checkpoints/` of a run.

    Args:
      directory: where the step directories are.
      keep: how many of the newest are kept; None opens them for reading only.
    """

    def __init__(self, directory: Path, keep: int | None):
        logging.set_verbosity(logging.FATAL)  # Orbax logs pages of what it then raises anyway
        self.directory = directory
        self._saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            read_only=keep is None,
            create=keep is not None,
            cleanup_tmp_directories=keep is not None,
        )
        self._manager = ocp.CheckpointManager(directory, options=options)

    def steps(self) -> list[int]:
        """The steps that are there, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, extra: dict[str, Any]) -> None:
        """Starts writing; returns once the arrays may be overwritten.

        Raises:
          OSError: if this or the previous checkpoint cannot be written (a full disk).
        """
        self.wait()
        self._saving = step
        meta = {**extra, "step": step, "digests": [int(d) for d in digests(state)]}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
                ),
                force=True,
            )
        except Exception as error:
            raise self._not_written(error) from error

    def check(self) -> None:
        """Raises the OSError of a checkpoint that could not be written in the background."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._not_written(error) from error
        if not self._manager.is_saving_in_progress():
            self._written()

    def wait(self) -> None:
        """Waits until everything is on disk; raises like `check`."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_written(error) from error
        self._written()

    def restore(self, abstract: TrainState, step: int) -> Restored:
        """Loads a step into the shapes (and shardings) of `abstract`.

        Raises:
          ValueError: if the checkpoint is damaged or not of this model.
        """
        directory = self.directory / str(step)
        try:
            _check_files(directory)
            got = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
                ),
            )
            meta = got["meta"]
            if [int(d) for d in digests(got["state"])] != meta.pop("digests"):
                raise ValueError("an array is not what was saved")
        except Exception as error:  # whatever a damaged file led the libraries to
            raise ValueError(self._damaged(step, error)) from error
        return Restored(got["state"], meta)

    def close(self) -> None:
        """Waits for what is being written, and lets go; raises like `check`."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _written(self) -> None:
        """Lists the files of the checkpoint that was being written and now is whole."""
        if self._saving is not None:
            directory, self._saving = self.directory / str(self._saving), None
            write_json(directory / _FILES, _sizes(directory))

    def _not_written(self, error: Exception) -> OSError:
        last = max((s for s in self.steps() if s != self._saving), default=None)
        good = "there is none before it" if last is None else f"the last good one is step {last}"
        return OSError(
            f"{self.directory / str(self._saving)}: the checkpoint could not be written"
            f" ({_reason(error)}); {good}.  Make room, then run the same command again"
        )

    def _damaged(self, step: int, error: Exception) -> str:
        earlier = [s for s in self.steps() if s < step]
        then = f"go on from step {max(earlier)}" if earlier else "start again from step 0"
        directory = self.directory / str(step)
        return (
            f"{directory}: the checkpoint cannot be read ({_reason(error)});"
            f" delete that directory to {then}"
        )


@jax.jit
def digests(tree: Any) -> list[jax.Array]:
    """A uint32 for each array: the sum of its bits, weighted by position, modulo 2^32.

    Integer sums have no rounding, so the order of adding, and with it the sharding, is free.
    """

    def digest(x: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).reshape(-1)
        weight = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1
        return (bits * weight).sum(dtype=jnp.uint32)

    return [digest(x) for x in jax.tree.leaves(tree)]


def _sizes(directory: Path) -> dict[str, int]:
    files = (p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != _FILES)
    return {str(p.relative_to(directory)): p.stat().st_size for p in files}


def _check_files(directory: Path) -> None:
    """Compares sizes; a run killed just after the rename left no list: then only digests speak."""
    if not (directory / _FILES).exists():
        return
    wanted, found = json.loads((directory / _FILES).read_text()), _sizes(directory)
    for name, size in wanted.items():
        if found.get(name) != size:
            raise ValueError(f"{name} has {found.get(name, 0)} bytes, {size} were written")


def _reason(error: BaseException) -> str:
    """The first line of an exception, short enough to be part of a line."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else text[:200] + "..."
