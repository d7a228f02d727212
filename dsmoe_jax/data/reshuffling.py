"""Random orders that are pure functions of a seed and a number."""

from __future__ import annotations

import functools
from typing import Any

import grain
import numpy as np

# Below so many grain takes longer than a permutation of all: 25 ms for one of two records.
_FEW = 4096


def shuffled(n: int, seed: int) -> Any:
    """0 to n - 1 in a random order, then in another one, and so on: `shuffled(n, seed)[i]`."""
    # Grain folds the epoch into the seed: every epoch has an order of its own.
    return grain.MapDataset.range(n).seed(seed).shuffle().repeat()


def permutation(n: int, seed: int, number: int) -> np.ndarray:
    """Permutation `number` of 0 to n - 1, int64 [n]."""
    # Raw bits: NumPy keeps them from version to version, unlike `Generator.permutation`.
    bits = np.random.Philox(key=seed, counter=[0, number, 0, 0])
    return np.argsort(bits.random_raw(n), kind="stable")


class Epochs:
    """As `shuffled`, quick for few records too (in other orders).

    Args:
      n: number of records, > 0.
      seed: of 32 bits.
    """

    def __init__(self, n: int, seed: int):
        self._n = n
        self._many = shuffled(n, seed) if n > _FEW else None
        self._permutation = functools.lru_cache(maxsize=2)(
            lambda epoch: permutation(n, seed, epoch)
        )

    def __getitem__(self, i: int) -> int:
        if self._many is not None:
            return int(self._many[i])
        epoch, place = divmod(i, self._n)
        return int(self._permutation(epoch)[place])
