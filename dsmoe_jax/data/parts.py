"""The parts of a corpus that is being prepared: input files, and what is known of them so far.

The layout of OUT/parts is told in in_parts.py.

Shapes: N documents of a part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsmoe_jax.data import own_text, survey
from dsmoe_jax.data.directories import whole_file
from dsmoe_jax.data.documents import Document
from dsmoe_jax.data.hub_datasets import HubPart
from dsmoe_jax.data.request import Request, check_domains, kind_of
from dsmoe_jax.data.split_names import VALIDATION
from dsmoe_jax.data.survey import Copies, Survey
from dsmoe_jax.data.text_formats import TEXT_COLUMN
from dsmoe_jax.data.user_files import TextFile

PARTS = "parts"
_MOST_BUCKETS = 256


class Parts:
    """The parts of a corpus on the disk, which all processes see.

    Args:
      request: for the corpus.
      out: its directory.

    Attributes:
      directory: OUT/parts.
      kind: of the rows of the input files.
      found: the input files as the user named them.
      files: of each part its input file, in order.
      says_split: whether some of them are what is held out.
      n_buckets: parts of all hashes, in which copies are looked for.

    Raises:
      ValueError: if the input files are others than those of the request.
    """

    def __init__(self, request: Request, out: Path):
        self.request = request
        self.out = out
        self.directory = out / PARTS
        self.kind = kind_of(request)
        self.found = own_text.find(request["corpus"], request.get("validation"))
        if own_text.listing(self.found) != request["files"]:
            raise ValueError(f"corpus {request['corpus']}: other files than when it was begun")
        self.files = [part for file in self.found.files for part in _divided(file)]
        self.says_split = any(part.split == VALIDATION for part in self.files)
        self.n_buckets = min(len(self.files), _MOST_BUCKETS)

    @functools.cached_property
    def domains(self) -> list[str]:
        """The domains of the corpus, in order; all parts must have been surveyed."""
        known: dict[str, None] = {}
        for i in range(len(self.files)):
            known |= dict.fromkeys(self.load_survey(i).names)
        return check_domains(self.request["domains"], known) or sorted(known)

    def path(self, kind: str, number: int, suffix: str) -> Path:
        """The file of a part or a bucket: its kind, its number, and how its name ends."""
        return self.directory / f"{kind}-{number:05}.{suffix}"

    def write(self, name: str, text: str) -> None:
        """Writes a file of OUT/parts as a whole."""
        with whole_file(self.directory / name) as temporary:
            temporary.write_text(text, "utf-8")

    def load_survey(self, part: int) -> Survey:
        """The survey of a part, which must have been made."""
        return Survey.load(self.path("survey", part, "npz"))

    def missing(self) -> list[int]:
        """The parts that are not done."""
        return [i for i in range(len(self.files)) if not self.path("part", i, "json").exists()]

    def rows(self, part: int) -> Iterator[tuple[str, Document]]:
        """(domain, document) of a part, in order."""
        file = self.files[part]
        column = self.request.get("text_column", TEXT_COLUMN)
        for domain, document in self.kind.read(file.path, column):
            yield domain or file.domain, document

    def held_out(self, part: int, found: Survey) -> np.ndarray:
        """Whether each document of a part is held out, bool (N,)."""
        if self.says_split:
            return np.full(len(found.domain_N), self.files[part].split == VALIDATION)
        return survey.is_held_out(found.hash_N2)

    def copies(self, part: int) -> dict[int, int]:
        """Why documents of a part are left out, by their place in it."""
        found: dict[int, int] = {}
        for bucket in range(self.n_buckets):
            found |= Copies.load(self.path("copies", bucket, "npz")).of_part(part)
        return found

    def stays(self, part: int) -> np.ndarray:
        """Whether each document of a part is read, bool (N,)."""
        found = self.load_survey(part)
        names = [*found.names, None]
        stays_N = np.array([names[domain] in self.domains for domain in found.domain_N], bool)
        stays_N[list(self.copies(part))] = False
        return stays_N


def _divided(file: TextFile) -> list[TextFile]:
    """A file as the parts that one process prepares: itself, or the files of a dataset."""
    if not isinstance(file.path, HubPart):
        return [file]
    return [dataclasses.replace(file, path=part) for part in file.path.divided()]
