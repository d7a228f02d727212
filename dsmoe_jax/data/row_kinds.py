"""Kinds of rows in the user's text: a document, or a conversation (`data.rows`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsmoe_jax.config.checks import require
from dsmoe_jax.data import chat, packing
from dsmoe_jax.data.chat import Piece
from dsmoe_jax.data.hub_datasets import HubPart
from dsmoe_jax.data.packing import Packed
from dsmoe_jax.data.text_formats import Rows, read_file


class RowKind(NamedTuple):
    """A registry line.

    Attributes:
      read: `(path, text_column)` -> the rows of a file.
      pieces: of a document's text, those that are tokenised.
      pack: `(documents, S, eos_id)` -> records, from the tokens of all documents.
      answers_only: whether only some tokens count as targets.
    """

    read: Callable[[Path | HubPart, str], Rows]
    pieces: Callable[[str], list[Piece]]
    pack: Callable[[Iterable[np.ndarray], int, int], Packed]
    answers_only: bool = False


def _whole(text: str) -> list[Piece]:
    return [Piece(text, True)]


TEXT = "text"
ROW_KINDS: dict[str, RowKind] = {
    TEXT: RowKind(read_file, _whole, packing.pack),
    "chat": RowKind(chat.read_chat, chat.pieces_of_text, packing.pack_whole, answers_only=True),
}


def get_kind(name: str) -> RowKind:
    """The registry line of a name.

    Raises:
      ValueError: if there is none.
    """
    require(name in ROW_KINDS, "rows", name, f"must be one of {', '.join(ROW_KINDS)}")
    return ROW_KINDS[name]
