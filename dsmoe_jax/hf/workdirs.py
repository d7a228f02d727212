"""A workdir from a Hugging Face model, and back.

WORKDIR/hf/ keeps the files of the model that are not weights: its config.json, its tokenizer with
the chat template.  They go back with the model, and with those that were trained from it.

Nothing is left half-written: what is made lies beside its place under another name until it is
whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from dsmoe_jax.config import Config, DataConfig, ModelConfig, stage_of, to_config_dict
from dsmoe_jax.config.checks import require
from dsmoe_jax.data.opening import tokenizer_fingerprint
from dsmoe_jax.data.tokenizer import Tokenizer
from dsmoe_jax.hf import loading, names, saving, tokenizers
from dsmoe_jax.hf.loading import CONFIG, Source
from dsmoe_jax.hf.tensors import PIECE_BYTES, Read
from dsmoe_jax.model.build import ModelState, abstract_model, model_shapes
from dsmoe_jax.model.transformer import Transformer
from dsmoe_jax.parallel import sharding
from dsmoe_jax.progress import ProgressLine
from dsmoe_jax.runs import json_files, new_directory
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.runs.checkpoint import CHUNK_BYTES, MODEL, Checkpoints
from dsmoe_jax.runs.loading import SavedModel, load_model_state, saved_model
from dsmoe_jax.runs.saved_arrays import name_of
from dsmoe_jax.storage.places import place_of

KEPT = "hf"  # in a workdir: the files that a model came with
STEP = 0  # of the checkpoint of a converted model, before any step
SCALE = "released"
MOST_POSITIONS = 4096  # of a sequence in evaluation; models say what they were extended to
DATA_FILE_BYTES = 2**28  # of the checkpoint; Orbax collects a file before it writes it
OTHER_BYTES = 16 * 2**20  # what the libraries hold besides, however large the model is


def from_hf(directory: str, workdir: str) -> Path:
    """Makes a workdir of a Hugging Face model: `evaluate`, `generate` and `train` take it.

    Args:
      directory: of the model.
      workdir: must not exist, or be empty.

    Returns:
      The workdir.

    Raises:
      ValueError: for a model that we do not have or that is damaged; for a workdir with something
        in it.
      OSError: if the disk is full.
    """
    place = new_directory.new(workdir, "--to")
    source = loading.open_source(directory, "--from_hf")
    if not (mesh := jax.sharding.get_mesh()).empty:
        sharding.check(source.shapes, mesh.shape)
    found, notes = tokenizers.adopt(source.directory, source.config.vocab_size)
    for note in (*source.notes, *notes, _needs_from(source)):
        print(f"{source.directory}: {note}", file=sys.stderr)
    new_directory.check_space(place, 2 * _bytes(source.shapes))
    with new_directory.beside(place) as made:
        config = _run_config(source, found)
        json_files.write(made / workdirs.CONFIG, to_config_dict(config).to_dict())
        if found is not None:
            json_files.write_text(made / workdirs.TOKENIZER, found.to_json())
        tokenizers.carry(source.directory, made / KEPT)
        fingerprint = None if found is None else tokenizer_fingerprint(found)
        extra = {"corpus": None, "tokenizer": fingerprint, "converted": str(source.directory)}
        _save_checkpoint(source, made, extra)
    return place


def _save_checkpoint(source: Source, made: Path, extra: dict[str, Any]) -> None:
    line = ProgressLine(f"reading {source.directory.name}", len(source.lines))
    with _on_disk(made / ".arrays") as allocate:
        state = loading.load_state(source, line, allocate)
        print(f"{source.directory.name}: writing the checkpoint", file=sys.stderr)
        checkpoints = Checkpoints(
            made / workdirs.CHECKPOINTS, keep=1, data_file_bytes=_data_file(source)
        )
        # An interrupt waits for the arrays on their way, or they would come back after the removal.
        with contextlib.closing(checkpoints):
            checkpoints.save(STEP, {MODEL: state}, extra)


@contextlib.contextmanager
def _on_disk(directory: Path) -> Iterator[loading.Allocate]:
    """Makes arrays in files that are gone afterwards: the system may take their pages back."""
    directory.mkdir()
    n = 0

    def allocate(path: str, shape: tuple[int, ...]) -> np.ndarray:
        nonlocal n
        n += 1
        if not shape or 0 in shape:
            return loading.aligned(path, shape)
        return np.memmap(directory / str(n), np.float32, "w+", shape=shape)

    try:
        yield allocate
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _run_config(source: Source, found: Tokenizer | None) -> Config:
    """The config of the workdir; what a training would need says `train.start_from`'s own."""
    length = source.tree.get("max_position_embeddings") or MOST_POSITIONS
    vocab_size = source.config.vocab_size if found is None else found.vocab_size
    return Config(
        name=source.directory.name,
        scale=SCALE,
        model=source.config,
        data=DataConfig(None, min(int(length), MOST_POSITIONS), vocab_size),
    )


def _needs_from(source: Source) -> str:
    """A sentence on the memory and disk that a conversion takes, said before it starts."""
    model = _bytes(source.shapes)
    # While one data file is written, others are collected; on a slow disk chunks wait beside them.
    held = min(model, 4 * _data_file(source) + 16 * CHUNK_BYTES) + OTHER_BYTES
    return (
        f"{size_text(source.checkpoint.bytes)} in {len(source.checkpoint.files)} files"
        f" ({', '.join(source.checkpoint.dtypes())}), {size_text(model)} as float32 parameters;"
        f" takes twice the latter on disk (half of it until the end), and up to {size_text(held)}"
        " in memory, beside pages of those files that the system may take back"
    )


def _data_file(source: Source) -> int:
    """Bytes of a file of the checkpoint: well below the largest of those that are read."""
    return min(DATA_FILE_BYTES, source.checkpoint.largest_file // 16)


def size_text(n: int) -> str:
    """A number of bytes for the eye."""
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"


def _bytes(shapes: ModelState) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


class Written(NamedTuple):
    """The model of a workdir, as it was written for Hugging Face."""

    place: Path
    architecture: str
    step: int


def to_hf(workdir: str, directory: str, step: int | None, dtype: str, shard_bytes: int) -> Written:
    """Writes the model of a workdir as a Hugging Face one.

    Args:
      workdir: of a run, or converted.
      directory: must not exist, or be empty.
      step: of the checkpoint; None is the newest.
      dtype: "float32" or "bfloat16".
      shard_bytes: the most that a file may have.

    Raises:
      ValueError: naming the keys of a model that no architecture of Hugging Face expresses; if
        there is no run or checkpoint, or it is damaged; for a directory with something in it.
      OSError: if the disk is full.
    """
    place = new_directory.new(directory, "--to_hf")
    config = workdirs.read_config(workdir, f"--from={workdir}")
    model = _model_of(config, step)
    want = "the tensors of Hugging Face are not quantised; must be the run that this was made from"
    require(model.moe.quantised is None, "--from", workdir, want)
    kept = _kept(place_of("--from", workdir), config)
    destination = saving.describe(model, dtype, _about(kept, config))
    shapes = model_shapes(model)
    with saved_model(workdir, shapes, step, key=f"--from={workdir}") as saved:
        held = saved.arrays.held_bytes + 4 * PIECE_BYTES + OTHER_BYTES
        print(f"{workdir}: {_needs_to(destination, held, shard_bytes)}", file=sys.stderr)
        new_directory.check_space(place, destination.bytes)
        with new_directory.beside(place) as made:
            line = ProgressLine(f"writing {place.name}", len(destination.lines))
            saving.save(destination, _read(saved, shapes), made, line, shard_bytes)
            saved.check()
            _carry(kept, place_of("--from", workdir), made)
    return Written(place, destination.tree["architectures"][0], saved.step)


def _read(saved: SavedModel, shapes: ModelState) -> Read:
    """Reads parts of arrays by the paths that the tables of a family have."""
    paths = [path for path, _ in jax.tree.leaves_with_path(shapes)]
    saved_names = {names.path_of(path): name_of(path) for path in paths}
    return lambda path, index: saved.read(saved_names[path], index)


def _carry(kept: Path | None, workdir: Path, made: Path) -> None:
    """The tokenizer: that with which the model came, or that of the run."""
    if kept is not None:
        tokenizers.carry(kept, made, without=(CONFIG,))
    elif (own := workdir / workdirs.TOKENIZER).is_file():
        tokenizers.write(own, made)


def load_with_backend(workdir: str, step: int | None, backend: str | None) -> Transformer:
    """The model of a workdir, with an expert backend by name; None leaves its own.

    Raises:
      ValueError: if there is no run or checkpoint, or it is damaged.
    """
    key = f"--from={workdir}"
    model = _model_of(workdirs.read_config(workdir, key), step)
    loaded = load_model_state(workdir, model_shapes(model), step, key=key)
    if backend is not None:
        moe = dataclasses.replace(model.moe, expert_backend=backend)
        model = dataclasses.replace(model, moe=moe)
    return nnx.merge(abstract_model(model), *loaded.state)


def _model_of(config: Config, step: int | None) -> ModelConfig:
    """The model as it is in the stage of a step."""
    return stage_of(config, config.train.steps if step is None else step).config.model


def _kept(workdir: Path, config: Config) -> Path | None:
    """The files that a model came with, or that the one came with from which it was trained."""
    if (workdir / KEPT).is_dir():
        return workdir / KEPT
    start = config.train.start_from
    if start is None or not place_of("train.start_from", start).is_dir():
        return None
    return _kept(place_of("train.start_from", start), workdirs.read_config(start))


def _about(kept: Path | None, config: Config) -> dict[str, Any]:
    """Keys of a config.json that are not of the model: of the one that it came with, if any."""
    if kept is not None and (kept / CONFIG).is_file():
        return json_files.read(kept / CONFIG)
    scaling = config.model.attention.rope_scaling
    length = config.data.sequence_length
    if scaling is not None:
        first = scaling.original_max_position_embeddings or length
        length = round(first * scaling.factor)
    return {"max_position_embeddings": length}


def _needs_to(destination: saving.Destination, held: int, shard_bytes: int) -> str:
    """A sentence on the memory and disk that a conversion takes, said before it starts."""
    return (
        f"{destination.tree['architectures'][0]}, {size_text(destination.bytes)} of"
        f" {destination.dtype} in files of up to"
        f" {size_text(destination.largest_shard(shard_bytes))}; takes up to {size_text(held)} in"
        " memory"
    )
