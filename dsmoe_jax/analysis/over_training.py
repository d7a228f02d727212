"""The cheap tables of a run, made while it trains: `train.analyse_every`.

    00000240.json    tables after step 240, see tables.py
    00000240.npz     ids_LTK of the same tokens, which later steps are compared with

They are of the first tokens of the held-out text, the same ones at every step.  No program is
compiled for them: the routing is that of the evaluation.

Shapes: T tokens, L MoE layers, K columns of a routing.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.analysis import tables
from dsmoe_jax.analysis.routed_text import RoutedText
from dsmoe_jax.runs import json_files
from dsmoe_jax.storage import files

TOKENS = 16_384  # at most; a domain with a thirtieth of the text has enough for a committee
PREFIX = "inside_"  # of the numbers in metrics.jsonl


class OverTraining:
    """The folder of the tables.

    Args:
      directory: WORKDIR/analysis; made with the first table.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def go_back(self, step: int) -> None:
        """Removes what is past the step that a run continues from."""
        for path in self.directory.glob("*"):
            if path.stem.isdecimal() and int(path.stem) > step:
                path.unlink()

    def steps(self) -> list[int]:
        """The steps of which there are tables, ascending."""
        return sorted(int(path.stem) for path in self.directory.glob("[0-9]*.json"))

    def compute(self, step: int, text: RoutedText) -> tables.Tables:
        """The tables of a step, compared with the last one before it; keeps its routing.

        Raises:
          ValueError: if the routing of the step before cannot be read.
          OSError: naming the file, if it cannot be written.
        """
        before = [done for done in self.steps() if done < step][-1:]
        others = {f"step {done}": self.ids(done) for done in before}
        found = tables.compute(tables.Subject(text, others=others), only_cheap=True)
        self.directory.mkdir(exist_ok=True)
        _save_ids(self._path(step, "npz"), text.ids_LTK)
        return found

    def finish(self, step: int, found: tables.Tables) -> None:
        """Writes the tables of a step, which is done then.

        Raises:
          OSError: naming the file, if it cannot be written.
        """
        # Without indents, which would put every number on a line.
        json_files.write_text(self._path(step, "json"), json_files.dumps(found) + "\n")

    def ids(self, step: int) -> np.ndarray:
        """The experts of the tokens after a step, int32 (L, T, K).

        Raises:
          ValueError: naming the file, if it holds none.
        """
        path = self._path(step, "npz")
        try:
            with path.open("rb") as file, np.load(file) as arrays:  # else numpy leaves it open
                return arrays["ids_LTK"].astype(np.int32)
        except (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile):
            wrong = "cannot be read; remove it and its .json to go on"
            raise ValueError(f"{path}: {wrong}") from None

    def _path(self, step: int, kind: str) -> Path:
        return self.directory / f"{step:08}.{kind}"


def row(found: tables.Tables) -> dict[str, Any]:
    """Keys of metrics.jsonl, each with a number by layer; none for a number that is missing."""
    by_layer = tables.by_layer(found)
    return {PREFIX + name: numbers for name, numbers in by_layer.items() if None not in numbers}


def _save_ids(path: Path, ids_LTK: np.ndarray) -> None:
    small = np.uint8 if ids_LTK.max() < 2**8 else np.uint16
    with files.replacing(path) as file:
        np.savez(file, ids_LTK=ids_LTK.astype(small))
