"""The cap of a domain with which a corpus is as large as a byte budget allows."""

import tempfile
from collections.abc import Callable
from typing import Any

from dsmoe_jax.data import packed
from dsmoe_jax.data.prepare import prepare
from dsmoe_jax.data.selection import say

UNIT = 100_000
_NO_CAP = 2**62  # more than any text; None would be the cap of a built-in corpus


def largest_cap(size_of: Callable[[int], int], budget: int, longest: int, unit: int = UNIT) -> int:
    """The largest cap of a domain, in bytes of text, with which the corpus fits the budget.

    A domain shorter than the cap is whole, so a cap of `longest` is the corpus without a cap.
    The size must not fall with the cap.  It is nearly linear in between, so each next cap is
    interpolated, which takes a few builds where halving takes many.

    Args:
      size_of: the corpus's size in bytes, with a cap; builds it.
      budget: the most that it may be, bytes.
      longest: text of the longest domain, bytes.
      unit: caps below `longest` are multiples of this many bytes.

    Raises:
      ValueError: if it does not fit with the smallest cap.
    """
    above_size = size_of(longest)
    if above_size <= budget:
        return longest
    low, high = 1, -(-longest // unit)  # in units: `high` does not fit
    low_size = size_of(unit) if high > 1 else above_size
    if low_size > budget:
        raise ValueError(
            f"budget {budget:,} bytes: too small, with {unit:,} bytes of text a domain the corpus"
            f" has {low_size:,}; take fewer domains or a smaller vocabulary"
        )
    interpolates = True
    while high - low > 1:
        share = (budget - low_size) / (above_size - low_size) if interpolates else 0.5
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        size = size_of(middle * unit)
        before = high - low
        if size <= budget:
            low, low_size = middle, size
        else:
            high, above_size = middle, size
        # Interpolation alone can creep along a bent curve: halve where it hardly helped.
        interpolates = not interpolates or high - low < before / 2
    return low * unit


def fit(corpus: str, budget: int, unit: int = UNIT, **sizes: Any) -> int:
    """The largest cap of a domain with which the packed corpus has at most `budget` bytes.

    Prepares the corpus in a temporary directory for each cap that is tried, and says its size.

    Args:
      corpus: as for `prepare`.
      budget: of the packed file, bytes.
      unit: see `largest_cap`.
      **sizes: the other keywords of `prepare`, without `max_bytes_per_domain`.

    Raises:
      ValueError: as `prepare` and `largest_cap`.
    """
    size, longest = _measure(corpus, _NO_CAP, sizes)
    measured = {longest: size}

    def size_of(cap: int) -> int:
        if cap not in measured:
            measured[cap], _ = _measure(corpus, cap, sizes)
        say(f"at most {cap:,} bytes of text a domain: {measured[cap] / 1e6:.2f} MB packed")
        return measured[cap]

    return largest_cap(size_of, budget, longest, unit)


def _measure(corpus: str, cap: int, sizes: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the packed corpus, and of the text of its longest domain."""
    with tempfile.TemporaryDirectory(prefix="dsmoe_jax-fitting-") as directory:
        made = prepare(corpus, f"{directory}/corpus", max_bytes_per_domain=cap, **sizes)
        longest = max(sum(domain["bytes"].values()) for domain in made.manifest["domains"])
        return packed.packed_bytes(made), longest
