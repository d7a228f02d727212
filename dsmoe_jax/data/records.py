"""The records of a split, read by their places.

A file is opened when the first of its records is read.  A corpus that was prepared in parts says in
its manifest how many records each file has, so that none is opened to count them.
"""

from __future__ import annotations

import dataclasses
import os
import resource
from collections.abc import Iterator, Sequence
from typing import Any

import grain

from dsmoe_jax.data.corpus import Corpus
from dsmoe_jax.data.packing import damaged, read_records
from dsmoe_jax.data.places import places_by_domain, spread

_OTHER_FILES = 512  # that a process may need besides those of a corpus
_AT_ONCE = 256  # records that are read in one go where the order is known


@dataclasses.dataclass(frozen=True)
class _WholeFile:
    """A file with a known number of records, in the form that ArrayRecord's data source takes."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Records:
    """The records of a split.

    Args:
      corpus: that has them.
      split: "train" or "validation".
    """

    def __init__(self, corpus: Corpus, split: str):
        self._corpus = corpus
        files: list[Any] = [os.fspath(path) for path in corpus.shards(split)]
        _allow_open_files(len(files), corpus)
        counts = corpus.records_by_shard(split)
        if counts is not None:
            pairs = zip(files, counts, strict=True)
            files = [_WholeFile(file, 0, count, count) for file, count in pairs]
        self._source: Any = grain.sources.ArrayRecordDataSource(files)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, places: Sequence[int]) -> list[bytes]:
        """The records at these places; opens their files if they are not open yet.

        Raises:
          ValueError: if one is damaged.
        """
        if not len(places):
            return []
        try:
            return list(self._source.__getitems__(places))
        except RuntimeError as error:
            raise damaged(self._corpus.directory, error) from error


def _allow_open_files(number: int, corpus: Corpus) -> None:
    """Lets this process have so many files open besides what it needs otherwise.

    Raises:
      ValueError: if the system does not allow it; else training would end in the middle.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + _OTHER_FILES
    if wanted <= soft or soft == resource.RLIM_INFINITY:
        return
    if wanted > hard != resource.RLIM_INFINITY:
        raise ValueError(
            f"corpus {corpus.directory}: has {number} files, and this process may open {hard}; must"
            f" be {wanted} (ulimit -n {wanted})"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def records_in_order(corpus: Corpus, split: str) -> Iterator[bytes]:
    """All records of a split, every domain spread evenly over the whole.

    Raises:
      ValueError: if one is damaged.
    """
    if corpus.records_by_shard(split) is None:  # they lie in that order
        yield from read_records(corpus.shards(split))
        return
    places = places_by_domain(corpus, split)
    nexts = [iter(range(len(of_domain))) for of_domain in places]
    order = [places[g][next(nexts[g])] for g in spread([len(p) for p in places]).tolist()]
    records = Records(corpus, split)
    for start in range(0, len(order), _AT_ONCE):
        yield from records.read(order[start : start + _AT_ONCE])
