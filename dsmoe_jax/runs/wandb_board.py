"""The numbers of a run for Weights & Biases, beside TensorBoard: `--wandb=PROJECT`.

WANDB_MODE=offline keeps everything in WORKDIR/wandb, without a network; `wandb sync` sends it
later.  A run that goes on is the same run there: its id is kept in the workdir.  Every number is
logged over `step`, so that steps which are made again replace nothing and hide nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsmoe_jax.runs import json_files
from dsmoe_jax.runs.board import scalars
from dsmoe_jax.runs.workdir import CONFIG

FOLDER = "wandb"
_ID = "run_id.txt"


def check(project: str) -> None:
    """Refuses a project where the package is not installed.

    Raises:
      ValueError: naming the extra.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"--wandb={project}: the package is missing; pip install 'dsmoe_jax[wandb]' brings it"
        )


class WandbBoard:
    """Logs the rows of a run.

    Args:
      workdir: of the run, with its config.
      project: of Weights & Biases.

    Raises:
      OSError: if the service cannot be reached, or the disk is full; `add` and `close` too.
    """

    def __init__(self, workdir: Path, project: str):
        import wandb  # an extra, and seconds to import

        self._project = project
        with self._named():
            folder = workdir / FOLDER
            folder.mkdir(exist_ok=True)
            identity = folder / _ID
            if not identity.exists():
                json_files.write_text(identity, secrets.token_hex(4))
            self._run = wandb.init(
                project=project,
                name=workdir.name,
                id=identity.read_text(),
                resume="allow",
                dir=workdir,
                config=json_files.read(workdir / CONFIG),
                settings=wandb.Settings(console="off", silent=True),
            )
            self._run.define_metric("*", step_metric="step")

    def add(self, row: dict[str, Any]) -> None:
        """Adds the numbers of a row of metrics.jsonl."""
        with self._named():
            self._run.log({"step": row["step"], **dict(scalars(row))})

    def close(self) -> None:
        """Sends or writes what is left."""
        with self._named():
            self._run.finish()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        from wandb import errors

        try:
            yield
        except (errors.Error, OSError) as error:
            said = " ".join(str(error).split())
            raise OSError(
                f"--wandb={self._project}: {said}; WANDB_MODE=offline keeps the numbers in the"
                " workdir"
            ) from error
