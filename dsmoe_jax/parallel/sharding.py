"""The sharding of every array, by one table: which dimension is split over which mesh axes.

Every parameter says its logical axes in its name: `down_EDF` has the axes E, D and F.  `LOGICAL`
maps each letter to mesh axes.  An axis of the mesh splits an array once, at the first letter that
has it:

    query_NHD   heads over tensor, D over fsdp and expert
    kv_down_ZD  the latent over fsdp and expert, which are then taken: D is whole
    gate_FD     width over tensor, D over fsdp and expert (dense FFNs and shared experts)
    gate_EFD    experts over expert, width over tensor, D over fsdp alone
    gate_LEFD   stacked layers: these over stage, the rest as above
    x_BSD       sequences over stage, data, fsdp and expert; D is whole
    scale_D     whole: a single vector is not worth a message

Adam's moments have the names of their parameters, and so their shardings.

Inside of a stage of the pipeline (pipeline.py) an array is that of one stage: nothing is split over
`stage` there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsmoe_jax.config.mesh import AXES
from dsmoe_jax.parallel.mesh import BATCH_AXES


class LogicalAxis(NamedTuple):
    """A letter's meaning, and the mesh axes that split it, outermost first."""

    meaning: str
    axes: tuple[str, ...] = ()


LOGICAL: dict[str, LogicalAxis] = {
    "B": LogicalAxis("sequences", BATCH_AXES),
    "T": LogicalAxis("tokens", BATCH_AXES),
    "S": LogicalAxis("positions"),
    "L": LogicalAxis("layers", ("stage",)),
    "U": LogicalAxis("micro-batches in the pipeline", ("stage",)),
    "V": LogicalAxis("vocabulary", ("tensor",)),
    "D": LogicalAxis("hidden size", ("fsdp", "expert")),
    "E": LogicalAxis("routed experts", ("expert",)),
    "K": LogicalAxis("activated experts"),
    "F": LogicalAxis("feed-forward width", ("tensor",)),
    "N": LogicalAxis("attention heads", ("tensor",)),
    "M": LogicalAxis("key/value heads", ("tensor",)),
    "H": LogicalAxis("head size"),
    "R": LogicalAxis("rotated part of a head"),
    "I": LogicalAxis("size of a head's value"),
    "Q": LogicalAxis("latent of the queries", ("fsdp", "expert")),
    "Z": LogicalAxis("latent of keys and values", ("fsdp", "expert")),
    "A": LogicalAxis("tasks"),
    "J": LogicalAxis("two hidden vectors side by side", ("tensor",)),
}


def split(letters: str) -> list[tuple[str, ...]]:
    """The mesh axes that split each dimension of an array with these logical axes.

    Raises:
      ValueError: for a letter that `LOGICAL` does not have.
    """
    taken: set[str] = set()
    parts = []
    for letter in letters:
        if letter not in LOGICAL:
            raise ValueError(f"logical axis {letter!r} of {letters!r}: must be one of {[*LOGICAL]}")
        parts.append(tuple(axis for axis in LOGICAL[letter].axes if axis not in taken))
        taken.update(parts[-1])
    return parts


def spec(letters: str) -> P:
    """The partition of an activation with these logical axes: `spec("BSD")`."""
    return P(*(here(axes) or None for axes in split(letters)))


def here(axes: Sequence[str]) -> tuple[str, ...]:
    """Those of some mesh axes that can split an array of the code being traced.

    They are axes of the ambient mesh that no `jax.shard_map` around it has taken; without a mesh
    all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tuple(axes)
    return tuple(a for a in axes if a in mesh.axis_names and a not in mesh.manual_axes)


def batch_shards() -> int:
    """Parts that the ambient mesh splits a batch into; inside of a stage, that of the stage."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in here(BATCH_AXES))


def on_shards(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` over the axes that are `here`."""
    # Without check_vma: Pallas calls say nothing of how their results vary, and the zeros that the
    # backends' loops start from would be taken for replicated.
    return jax.shard_map(
        function,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(here(AXES)),
        check_vma=False,
    )


def axes_of(path: tuple, shape: tuple[int, ...]) -> str:
    """The logical axes of an array of the state, from its path: ("moe", "gate_EFD") has E, F, D.

    The parameters of stacked layers have a leading layer axis, L, which their names leave out.

    Raises:
      ValueError: if the name does not say them.
    """
    if not shape:
        return ""
    for name in _named(path):
        letters = name.rpartition("_")[2]
        if len(letters) + 1 == len(shape):
            letters = f"L{letters}"
        if len(letters) == len(shape):
            return letters
    raise ValueError(
        f"{jax.tree_util.keystr(path)} of shape {shape}: its name must end in its logical axes, as"
        " gate_FD does"
    )


def parameter_name(path: tuple) -> str | None:
    """The name of an array in its path: of ("moe", "gate_EFD", "value") it is "gate_EFD".

    None if no part of the path ends in logical axes.
    """
    return next(_named(path), None)


def _named(path: tuple) -> Iterator[str]:
    """The parts of a path that end in logical axes, the last one first."""
    for key in reversed(path):
        name = str(getattr(key, "key", getattr(key, "name", key)))
        if re.fullmatch(r"\w+_[A-Z]+", name):
            yield name


def array_spec(path: tuple, shape: tuple[int, ...]) -> P:
    """The partition of one array of a model or of its training state."""
    letters = axes_of(path, shape)
    return P() if _is_vector(letters) else spec(letters)


def _is_vector(letters: str) -> bool:
    return len(letters.removeprefix("L")) < 2


def specs(tree: Any) -> Any:
    """The partition of every array of a state, parameters and moments alike."""
    return jax.tree.map_with_path(lambda path, x: array_spec(path, x.shape), tree)


def shardings(tree: Any) -> Any:
    """The sharding of every array of a state on the ambient mesh; None if there is no mesh."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return None
    return jax.tree.map(lambda partition: NamedSharding(mesh, partition), specs(tree))


def whole() -> NamedSharding | None:
    """The sharding of replicated arrays (metrics); None if there is no mesh."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else NamedSharding(mesh, P())


def check(tree: Any, sizes: Mapping[str, int]) -> None:
    """Refuses a mesh that does not divide every array of a state.

    Args:
      tree: arrays or their shapes.
      sizes: those of the mesh's axes, by name; those that are not named are 1.

    Raises:
      ValueError: naming the axis, and the number that it would have to divide.
    """
    for path, x in jax.tree.leaves_with_path(tree):
        letters = axes_of(path, x.shape)
        if _is_vector(letters):
            continue
        for letter, length, axes in zip(letters, x.shape, split(letters), strict=True):
            used = [axis for axis in axes if sizes.get(axis, 1) > 1]
            n_shards = math.prod(sizes[axis] for axis in used)
            if length % n_shards == 0:
                continue
            together = "" if len(used) == 1 else f" ({' x '.join(used)} = {n_shards})"
            name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
            raise ValueError(
                f"mesh.{used[-1]}={sizes[used[-1]]}: must divide{together} the"
                f" {LOGICAL[letter].meaning} {length} of {name}"
            )


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Asks for an activation to be split by its logical axes, at the borders of the layers.

    Without a mesh nothing happens; a dimension that its axes do not divide (one prompt on eight
    devices) stays whole.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(x.shape, letters))


def spec_of(shape: tuple[int, ...], letters: str) -> P:
    """The partition of an activation on the ambient mesh, as `constrain` asks for it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return P(*[None] * len(shape))
    parts = []
    for axes, length in zip(map(here, split(letters)), shape, strict=True):
        parts.append(_dividing(axes, length, mesh.shape) or None)
    return P(*parts)


def _dividing(axes: tuple[str, ...], length: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes that split a dimension evenly: all of them, or all but `stage`, or none."""
    for some in (axes, tuple(axis for axis in axes if axis != "stage")):
        if length % math.prod(sizes[axis] for axis in some) == 0:
            return some
    return ()


def constrain_repeats(params: Any) -> Any:
    """Asks for stacked parameters, (layers, repeats, ...), in a stage to be split as at rest."""

    def one(path: tuple, x: jax.Array) -> jax.Array:
        of_layer = [*array_spec(path, (x.shape[0], *x.shape[2:]))][1:]
        return jax.lax.with_sharding_constraint(x, P(None, None, *of_layer))

    return jax.tree.map_with_path(one, params)


def gathered(weight: jax.Array, letters: str) -> jax.Array:
    """A weight as FSDP uses it: collected from the batch axes, still split over `tensor`.

    XLA does so by itself in a matrix product of a weight and a batch, but not in a lookup.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return weight
    parts = [
        tuple(axis for axis in here(axes) if axis not in BATCH_AXES) for axes in split(letters)
    ]
    return jax.lax.with_sharding_constraint(weight, P(*(axes or None for axes in parts)))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the sequences of a batch."""
    return NamedSharding(mesh, spec("B"))


def local_rows(batch_size: int) -> list[int]:
    """The sequences of a global batch that this process feeds to its devices, in order.

    Without a mesh these are all rows.  The mesh decides which rows a device gets, but not which
    text a row holds: every mesh sees the same global batches.

    Raises:
      ValueError: if the batch cannot be split evenly.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return list(range(batch_size))
    axes = _dividing(BATCH_AXES, batch_size, mesh.shape)
    if not axes:
        axes = tuple(axis for axis in BATCH_AXES if axis != "stage")
        n_shards = math.prod(mesh.shape[axis] for axis in axes)
        sizes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes)
        raise ValueError(
            f"batch of {batch_size} sequences: must be a multiple of {n_shards}, over which the"
            f" mesh splits it ({sizes})"
        )
    sharding = NamedSharding(mesh, P(axes))
    indices: Any = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (rows,) in indices for row in range(batch_size)[rows]})


def global_batch(batch: Mapping[str, object], rows: Sequence[int], batch_size: int) -> Any:
    """The arrays of this process's rows of a batch (see `local_rows`) as global, sharded arrays."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return dict(batch)
    place = {row: i for i, row in enumerate(rows)}
    sharding = NamedSharding(mesh, P(_dividing(BATCH_AXES, batch_size, mesh.shape)))

    def put(x: Any) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            return x[[place[row] for row in range(batch_size)[index[0]]]]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, shard)

    return {name: put(x) for name, x in batch.items()}
