"""Places of a domain's records in a split.

A place is the number of a record when all shards of the split are read one after the other.  A
corpus that was prepared as a whole has its domains spread evenly over the split; in one that was
prepared in parts each shard has its records domain by domain.

Shapes: N records, F shards.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from dsmoe_jax.data.corpus import Corpus

Places = Sequence[int] | np.ndarray
"""The place of record i of a domain is `places[i]`, the number of its records `len(places)`."""


def places_by_domain(corpus: Corpus, split: str) -> list[Places]:
    """The places of all records of each domain, in their order."""
    by_shard = corpus.manifest["splits"][split].get("records_by_domain")
    if by_shard is None:
        counts = [domain["records"][split] for domain in corpus.manifest["domains"]]
        order_N = spread(counts)
        return [np.flatnonzero(order_N == domain) for domain in range(len(counts))]
    counts_FG = np.array(by_shard, np.int64).reshape(-1, len(corpus.domains))
    starts_FG = (np.cumsum(counts_FG) - counts_FG.reshape(-1)).reshape(counts_FG.shape)
    return [_Runs(starts_FG[:, g], counts_FG[:, g]) for g in range(len(corpus.domains))]


def spread(counts: Sequence[int]) -> np.ndarray:
    """The domain of each record, int64 (N,), when every domain is spread evenly over the whole.

    As `packing.interleave` does it: record i of a domain of n is at (i + 1/2) / n.

    Args:
      counts: of the records of each domain.
    """
    domain_N = np.repeat(np.arange(len(counts)), counts)
    keys = [(np.arange(count) + 0.5) / count for count in counts if count]
    return domain_N[np.lexsort((domain_N, np.concatenate([np.zeros(0), *keys])))]


class _Runs(Sequence[int]):
    """Places that are runs of neighbours, one in each shard."""

    def __init__(self, starts_F: np.ndarray, counts_F: np.ndarray):
        self._starts: list[int] = starts_F.tolist()
        self._ends: list[int] = np.cumsum(counts_F).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = bisect.bisect_right(self._ends, i)
        before = self._ends[shard - 1] if shard else 0
        return self._starts[shard] + i - before
