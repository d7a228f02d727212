"""Loads of the experts as runs leave them: recorded routing, logs, results of evaluations.

    DIRECTORY/validation-00000400    a pass of recorded routing, see routing_records.py: every batch
    DIRECTORY/train                  the same of the training
    metrics.jsonl                    the step of every row
    evaluation.json                  all held-out text; also what `evaluate --out` writes

Shapes: S samples of a load, L MoE layers, E routed experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.config import Config
from dsmoe_jax.config.paths import local_path
from dsmoe_jax.model import layout
from dsmoe_jax.runs import json_files, metrics_log, routing_records
from dsmoe_jax.runs.routing_records import MANIFEST
from dsmoe_jax.runs.workdir import METRICS


def read(path: str, config: Config, flag: str) -> np.ndarray:
    """Assignments to each expert, one sample for each batch, step or evaluation.

    Args:
      path: of one of the above.
      config: of the run whose model the load must be of.
      flag: that names the path, for errors.

    Returns:
      (S, L, E); layers of multi-token prediction last, if the load is of a training.

    Raises:
      ValueError: if there is no load, or it is of another model.
    """
    place = local_path(flag, path)
    key = f"{flag}={path}"
    if place.is_dir():
        found = _of_pass(place, config, key)
    elif place.name == METRICS:
        rows = metrics_log.read_rows(place.parent) if place.is_file() else []
        found = [row["load"] for row in rows if "load" in row]
    elif place.is_file():
        found = [load] if (load := json_files.read(place).get("load")) is not None else []
    else:
        raise ValueError(f"{key}: no such file or folder")
    if not found:
        raise ValueError(f"{key}: holds no load of experts")
    return _checked(found, config, key)


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


def _of_pass(folder: Path, config: Config, key: str) -> list[np.ndarray]:
    """The load of every batch of a recorded pass, (L, E)."""
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
    return [_count(np.asarray(routing_records.load(file).ids), config) for file in files]


def _count(ids_BLSK: np.ndarray, config: Config) -> np.ndarray:
    """Assignments to each routed expert, (L, E)."""
    e = config.model.moe.n_routed_experts
    by_layer = np.swapaxes(ids_BLSK, 0, 1).reshape(ids_BLSK.shape[1], -1)
    # Identity experts and unassigned ones come behind the routed experts.
    return np.stack([np.bincount(ids[ids < e], minlength=e) for ids in by_layer])
