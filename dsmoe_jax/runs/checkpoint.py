"""Checkpoints: trees of arrays in items by name, and beside them what is JSON.

A step holds each item in a directory of its own, so that the model, a third of the bytes of a
training state, is loaded by itself.  Orbax writes in the background and makes a step visible in a
single rename.  Two checks are added, because a wrong byte in a weight would otherwise be loaded
without a word: the sizes of the files, and a digest of every array, the same under every sharding.
In a bucket, which knows no rename, an object that is written last says that a step is whole.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from dsmoe_jax.parallel import hosts, sharding
from dsmoe_jax.runs import json_files
from dsmoe_jax.runs.digests import digests
from dsmoe_jax.runs.saved_arrays import SavedArrays
from dsmoe_jax.storage import files
from dsmoe_jax.storage.away import Away, first_line, is_away, naming
from dsmoe_jax.storage.places import is_address

MODEL = "model"  # the item of every checkpoint that holds a `ModelState`

# What is compressed, and read, at a time.  A leading axis is cut up first (Orbax itself begins with
# the longest one, so that each chunk would have a bit of every layer), unless little is left.
CHUNK_BYTES = 16 * 2**20
_SMALL_CHUNK_BYTES = 2**20

_META = "meta"  # the item that is JSON
_FILES = "files.json"  # inside a step's directory: the size of every other file


class Restored(NamedTuple):
    """Contents of a checkpoint.

    Attributes:
      items: those asked for, by name.
      extra: the JSON that was saved beside them.
    """

    items: dict[str, Any]
    extra: dict[str, Any]


def target(shapes: Any) -> Any:
    """Shapes with the shardings of the ambient mesh, to load an item into.

    Without a mesh the arrays go to the default device.
    """
    shardings = sharding.shardings(shapes)
    if shardings is None:
        default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: default, shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


class _Named(preservation_policy.PreservationPolicy):
    """Preserves the checkpoints of `steps`, which may change (those of Orbax's CustomSteps not)."""

    def __init__(self) -> None:
        self.steps: Collection[int] = ()

    def should_preserve(
        self,
        checkpoints: Sequence[Any],
        *,
        context: preservation_policy.PreservationContext,
    ) -> Sequence[bool]:
        del context
        return [checkpoint.step in self.steps for checkpoint in checkpoints]


class _Manager(ocp.CheckpointManager):
    """Orbax's, which says at once that this process could not write.

    Of several processes one alone may have a full disk.  Orbax keeps its error until all others
    have written too, which they wait for in their turn: 20 minutes.

    Attributes:
      error: of this process, in the checkpoint that is being written.
    """

    error: Exception | None = None

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.error = error
            raise


class Checkpoints:
    """The `checkpoints/` of a run.

    Args:
      directory: where the step directories are.
      keep: how many of the newest are kept; None opens them for reading only.
      keep_every: those of every so many steps are kept too.
      data_file_bytes: of the files that arrays are written to, which are collected in memory; None:
        2 GiB, as Orbax has it.
    """

    def __init__(
        self,
        directory: Path,
        keep: int | None,
        keep_every: int | None = None,
        data_file_bytes: int | None = None,
    ):
        logging.set_verbosity(logging.FATAL)  # Orbax logs pages of what it then raises anyway
        self.directory = directory
        self._saving: int | None = None
        self._data_file_bytes = data_file_bytes
        self._named = _Named()
        kept = [preservation_policy.LatestN(keep), self._named]
        if keep_every is not None:
            kept.append(preservation_policy.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
            read_only=keep is None,
            create=keep is not None,
            cleanup_tmp_directories=keep is not None,
        )
        with contextlib.ExitStack() as reads:
            if is_address(directory):
                reads.enter_context(naming(directory, "cannot be read"))
            self._manager = _Manager(directory, options=options)

    def steps(self) -> list[int]:
        """The steps that are there, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        extra: dict[str, Any],
        also_keep: Collection[int] = (),
    ) -> None:
        """Starts writing, and prunes; returns once the arrays may be overwritten.

        Args:
          step: the number of the checkpoint.
          items: trees of arrays by name.
          extra: JSON.
          also_keep: steps that are not pruned now, the same in all processes.

        Raises:
          OSError: if this or the previous checkpoint cannot be written (a full disk).
        """
        self.wait()
        self._saving = step
        self._named.steps = also_keep
        needed = sum(x.nbytes for x in jax.tree.leaves(dict(items)))
        hosts.on_first(lambda: self._check_space(needed))
        found = {name: digests(tree) for name, tree in items.items()}
        args: dict[str, Any] = {_META: ocp.args.JsonSave({**extra, "step": step, "digests": found})}
        for name, tree in items.items():
            args[name] = self._save_args(tree)
        try:
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except Exception as error:
            raise self._not_written(error) from error

    def check(self) -> None:
        """Raises the OSError of a checkpoint that could not be written in the background."""
        if self._manager.error is not None or not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is on disk; raises like `check`."""
        if self._saving is None:
            return
        try:
            self._wait_for_all()
            directory = self.directory / str(self._saving)
            if hosts.is_first():
                json_files.write(directory / _FILES, _sizes(directory))
        except Exception as error:
            raise self._not_written(error) from error
        self._saving = None

    def _wait_for_all(self) -> None:
        """Waits until all processes have written, or this one cannot."""
        while jax.process_count() > 1 and self._manager.is_saving_in_progress():
            if self._manager.error is not None:
                raise self._manager.error
            time.sleep(0.01)
        self._manager.wait_until_finished()

    def _failed_alone(self) -> bool:
        return jax.process_count() > 1 and self._manager.error is not None

    def restore(self, step: int, targets: Mapping[str, Any]) -> Restored:
        """Loads items of a step; what is not asked for is not read.

        Args:
          step: of the checkpoint.
          targets: shapes and shardings by the name of the item, from `target`.

        Raises:
          ValueError: if the checkpoint is damaged or not of this model.
        """
        args: dict[str, Any] = {_META: ocp.args.JsonRestore()}
        for name, tree in targets.items():
            args[name] = ocp.args.StandardRestore(tree)
        with self.reading(step):
            _check_files(self.directory / str(step), set(args))
            got = self._manager.restore(step, args=ocp.args.Composite(**args))
            extra = got[_META]
            wanted = extra.pop("digests")
            if any(digests(got[name]) != wanted[name] for name in targets):
                raise ValueError("an array is not what was saved")
        return Restored({name: got[name] for name in targets}, extra)

    def arrays(self, step: int, name: str, shapes: Any) -> SavedArrays:
        """Opens an item of a step, to be read part by part.

        Args:
          step: of the checkpoint.
          name: of the item.
          shapes: of its arrays.

        Raises:
          ValueError: if the checkpoint is damaged or not of this model.
        """
        with self.reading(step):
            _check_files(self.directory / str(step), {_META, name})
            args = {_META: ocp.args.JsonRestore()}
            extra = self._manager.restore(step, args=ocp.args.Composite(**args))[_META]
            directory = self.directory / str(step) / name
            return SavedArrays(directory, shapes, extra["digests"][name])

    @contextlib.contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """Says of an error that it comes from the checkpoint of a step.

        Raises:
          ValueError: for whatever a damaged file led the libraries to.
          Away: if it is in a bucket that does not answer: nothing is damaged then.
          hosts.AnotherEnded: if another process ended while all of them read.
        """
        try:
            yield
        except Exception as error:
            if (ended := hosts.another_ended(error)) is not None:
                raise ended from error
            if is_address(self.directory) and is_away(error):
                place = self.directory / str(step)
                raise Away(
                    f"{place}: the bucket does not answer ({first_line(error)}); the same command"
                    " goes on from there"
                ) from error
            raise ValueError(self._damaged(step, error)) from error

    def close(self) -> None:
        """Waits for what is being written, and lets go; raises like `check`."""
        self.wait()
        if self._failed_alone():
            return  # a thread of Orbax's waits for the others
        with contextlib.suppress(Exception):  # an error that `_not_written` has told already
            self._manager.close()

    def _save_args(self, tree: Any) -> Any:
        chunks = jax.tree.map(_chunks, tree)
        if self._data_file_bytes is None:
            return ocp.args.StandardSave(tree, chunks)
        return ocp.args.PyTreeSave(tree, chunks, self._data_file_bytes)  # the same, but for files

    def _check_space(self, needed: int) -> None:
        """Refuses to begin on a disk that is too full."""
        # A disk that fills up while it is written to is noticed too, but after a minute of writing.
        if is_address(self.directory):
            return
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            error = OSError(f"{needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")
            raise self._not_written(error)

    def _not_written(self, error: Exception) -> OSError:
        last = max((s for s in self.steps() if s != self._saving), default=None)
        good = "there is none before it" if last is None else f"the last good one is step {last}"
        step, self._saving = self._saving, None
        in_bucket = is_address(self.directory)
        kind = Away if in_bucket and is_away(error) else OSError
        if self._failed_alone() or hosts.another_ended(error) is not None:
            kind = hosts.OnlyHere
        mend = "See that the bucket can be written" if in_bucket else "Make room"
        return kind(
            f"{self.directory / str(step)}: the checkpoint could not be written"
            f" ({first_line(error)}); {good}.  {mend}, then run the same command again"
        )

    def _damaged(self, step: int, error: Exception) -> str:
        earlier = [s for s in self.steps() if s < step]
        then = f"go on from step {max(earlier)}" if earlier else "start again from step 0"
        directory = self.directory / str(step)
        return (
            f"{directory}: the checkpoint cannot be read ({first_line(error)});"
            f" delete that directory to {then}"
        )


def _chunks(x: jax.Array | jax.ShapeDtypeStruct) -> ocp.SaveArgs:
    """Chunks that a layer, or an expert of it, can be read from without the others."""
    axes = []
    size = x.size * x.dtype.itemsize
    for axis, n in enumerate(x.shape):
        size //= max(1, n)
        if size < _SMALL_CHUNK_BYTES or size * n <= CHUNK_BYTES:
            break
        axes.append(axis)
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(axes))


def _sizes(directory: Path) -> dict[str, int]:
    return {name: n for name, n in files.sizes(directory).items() if Path(name).name != _FILES}


def _check_files(directory: Path, items: set[str]) -> None:
    """Compares the sizes of the files of some items.

    A run that was killed just after the rename left no list; then the digests alone decide.
    """
    if not (directory / _FILES).exists():
        return
    wanted = json_files.read(directory / _FILES)
    found = _sizes(directory)
    for name, size in wanted.items():
        item, _, inside = name.partition("/")
        asked_for = item in items or not inside
        if asked_for and found.get(name) != size:
            raise ValueError(f"{name} has {found.get(name, 0)} bytes, {size} were written")


def find_damage(directory: Path) -> str | None:
    """The damage to the files of a checkpoint, seen by their sizes alone; None if there is none.

    Args:
      directory: of the step.
    """
    try:
        listed = json_files.read(directory / _FILES) if (directory / _FILES).exists() else {}
        _check_files(directory, {name.partition("/")[0] for name in listed})
    except (ValueError, OSError) as error:
        return str(error)
    return None
