"""Use of the experts as runs leave it: recorded routing, logs, results of evaluations.

    DIRECTORY/validation-00000400    a pass of recorded routing, see routing_records.py: every batch
    DIRECTORY/train                  the same of the training
    metrics.jsonl                    the step of every row
    evaluation.json                  all held-out text; also what `evaluate --out` writes

Use is counted in assignments, the load, or in gates; a metrics.jsonl has the load alone.

Shapes: S samples of a use, L MoE layers, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsmoe_jax.config import Config
from dsmoe_jax.model import layout
from dsmoe_jax.moe.types import RecordedRouting
from dsmoe_jax.runs import json_files, metrics_log, routing_records
from dsmoe_jax.runs.routing_records import MANIFEST
from dsmoe_jax.runs.workdir import METRICS
from dsmoe_jax.storage.places import place_of

ASSIGNMENTS, GATES = "assignments", "gates"


class Kind(NamedTuple):
    """A way to count the use of experts in the registry.

    Attributes:
      key: in logs and results.
      weigh: what an assignment counts, from a batch's recorded routing, (B, L, S, K).
    """

    key: str
    weigh: Callable[[RecordedRouting], np.ndarray]


KINDS: dict[str, Kind] = {
    ASSIGNMENTS: Kind("load", lambda routing: np.ones(np.shape(routing.ids))),
    GATES: Kind("gate_mass", lambda routing: np.asarray(routing.gates, np.float64)),
}


def read(path: str, config: Config, flag: str, kind: str = ASSIGNMENTS) -> np.ndarray:
    """Use of each expert, one sample for each batch, step or evaluation.

    Args:
      path: of one of the above.
      config: of the run whose model the use must be of.
      flag: that names the path, for errors.
      kind: a name in `KINDS`.

    Returns:
      (S, L, E); layers of multi-token prediction last, if the load is of a training.

    Raises:
      ValueError: if there is no such use, or it is of another model.
    """
    place = place_of(flag, path)
    name = f"{flag}={path}"
    key = KINDS[kind].key
    if place.is_dir():
        found = _of_pass(place, config, name, KINDS[kind])
    elif place.name == METRICS:
        rows = metrics_log.read_rows(place.parent) if place.is_file() else []
        found = [row[key] for row in rows if key in row]
    elif place.is_file():
        found = [use] if (use := json_files.read(place).get(key)) is not None else []
    else:
        raise ValueError(f"{name}: no such file or folder")
    if not found:
        raise ValueError(f"{name}: holds no {key.replace('_', ' ')} of experts")
    return _checked(found, config, name)


def _checked(found: list[Any], config: Config, key: str) -> np.ndarray:
    """The samples as an array, if they are of this model's layers and experts."""
    moe = config.model.moe
    depth = config.model.mtp_depth
    layers = sum(n for _, n in layout.moe_stacks(config.model)) - depth
    shapes = list(dict.fromkeys(np.shape(load) for load in found))
    fits = [(layers, moe.n_routed_experts), (layers + depth, moe.n_routed_experts)]
    for shape in shapes:
        if shape not in fits or len(shapes) > 1:
            there = " and ".join(" x ".join(map(str, shape)) for shape in shapes)
            raise ValueError(
                f"{key}: has loads of {there} (layers x experts), the model"
                f" {layers} x {moe.n_routed_experts}; must be of this model"
            )
    return np.array(found, np.float64)


def _of_pass(folder: Path, config: Config, key: str, kind: Kind) -> list[np.ndarray]:
    """The use in every batch of a recorded pass, (L, E)."""
    manifest = folder.parent / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{key}: no pass of recorded routing (no {MANIFEST} beside it)")
    recorded = json_files.read(manifest)
    # The text may be another: that which the placed model will serve.
    belongs = routing_records.belongs_to(config, fingerprint="")
    wanted = {k: belongs[k] for k in ("layers", "experts", "experts_per_token", "seed")}
    wrong = [f"{k}={recorded.get(k)}, not {v}" for k, v in wanted.items() if recorded.get(k) != v]
    if wrong:
        raise ValueError(f"{key}: recorded with {'; '.join(wrong)}; must be of this model")
    files = sorted(folder.glob("[0-9]*.npz"))
    return [_count(routing_records.load(file), config, kind) for file in files]


def _count(routing: RecordedRouting, config: Config, kind: Kind) -> np.ndarray:
    """Use of each routed expert, (L, E)."""
    e = config.model.moe.n_routed_experts
    ids_BLSK = np.asarray(routing.ids)
    found = []
    for ids, weights in zip(
        np.swapaxes(ids_BLSK, 0, 1), np.swapaxes(kind.weigh(routing), 0, 1), strict=True
    ):
        real = ids < e  # identity experts and unassigned ones come behind the routed experts
        found.append(np.bincount(ids[real], weights[real], minlength=e))
    return np.stack(found)
