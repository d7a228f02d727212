"""Evidence on the experts besides their weights: a text, and how much each is used.

Shapes: L MoE layers, E routed experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsmoe_jax.config import replace
from dsmoe_jax.config.checks import require
from dsmoe_jax.data.opening import is_there, locate, open_corpus
from dsmoe_jax.data.pipeline import Batch, validation_batches
from dsmoe_jax.model import layout
from dsmoe_jax.runs import loads
from dsmoe_jax.runs import workdir as workdirs
from dsmoe_jax.surgery.types import Option, Subject

BATCH = 16  # sequences

LOADS = (
    "a pass of recorded routing (DIRECTORY/validation-00000400), a metrics.jsonl, or an"
    " evaluation.json."
)


def text_option(ways: str) -> Option:
    """The option that says where the run's text is, for these ways."""
    return Option(
        str, f"With --by={ways}: where the text of the run is now, if it is not where it was."
    )


class Evidence(NamedTuple):
    """Evidence about the experts.

    Attributes:
      text: batches of text; None: none.
      use_LE: of each expert, assignments or the sum of gates; None: not known.
    """

    text: Sequence[Batch] | None = None
    use_LE: np.ndarray | None = None


def text_of_run(subject: Subject, by: str, path: str | None, n_batches: int) -> list[Batch] | None:
    """The beginning of the held-out text of the run, which has all of its domains.

    Args:
      subject: the model.
      by: the way that takes the text, for errors.
      path: where the text of the run is now; None: where it was.
      n_batches: of `BATCH` sequences; 0: the way takes no text, and gets None.

    Raises:
      ValueError: for text that is not there or not needed, and for layers that see none of it.
    """
    if not n_batches:
        require(path is None, "--text", path, f"--by={by} takes no text; must not be given")
        return None
    want = "layers of multi-token prediction see no held-out text; without text it is possible"
    require(subject.config.model.mtp_depth == 0, "--by", by, want)
    config = subject.config
    if path is not None:
        config = replace(config, **{workdirs.MOVED: locate(path, "--text")})
    name = config.data.corpus
    want = "the text of the run is not there; say where it is now: --text=PATH"
    require(name is not None and is_there(name), "data.corpus", name, want)
    corpus = open_corpus(config.data)
    size = min(corpus.num_records("validation"), BATCH)
    return list(validation_batches(corpus.directory, size, n_batches))


def use_of(subject: Subject, path: str | None, kind: str = loads.ASSIGNMENTS) -> np.ndarray | None:
    """The recorded use of each expert in every MoE layer, all samples together, (L, E).

    Args:
      subject: the model.
      path: of the record; None: none, and the use is None.
      kind: a name in `loads.KINDS`.

    Raises:
      ValueError: for loads of another model, or without the layers of multi-token prediction.
    """
    if path is None:
        return None
    use_LE = loads.read(path, subject.config, "--loads", kind).sum(axis=0)
    n_layers = sum(n for _, n in layout.moe_stacks(subject.config.model))
    if len(use_LE) != n_layers:
        raise ValueError(
            f"--loads={path}: has {len(use_LE)} layers, none of multi-token prediction; must have"
            f" all {n_layers}, as the log of a training has"
        )
    return use_LE
