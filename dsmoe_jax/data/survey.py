"""The survey of the documents of a corpus in parts: they are read once before they are tokenised.

A survey of a part lists its documents: a hash of each text, and its domain.  From all surveys
follow the domains of the corpus, and which documents are copies of others: bucket by bucket of the
hashes, so that no process needs all of them at once.

Shapes: N documents of a part, M copies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dsmoe_jax.data.directories import whole_file
from dsmoe_jax.data.documents import VALIDATION_FRACTION, Document, digest

BLANK = -1  # in place of a domain: the document has no text
# Why a document is left out.
REPEAT, HELD_OUT_TOO, IN_OTHER_DOMAIN = 1, 2, 3
_HELD_OUT_BELOW = np.uint64(int(VALIDATION_FRACTION * 2**64))


@dataclasses.dataclass(frozen=True)
class Survey:
    """The documents of a part, in their order.

    Attributes:
      names: of the domains.
      domain_N: index into `names`, or BLANK.
      hash_N2: the first 128 bits of the sha256 of each text, as two numbers.
    """

    names: list[str]
    domain_N: np.ndarray
    hash_N2: np.ndarray

    def save(self, path: Path) -> None:
        """Writes it as a whole."""
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file, names=np.array(self.names, str), domain_N=self.domain_N, hash_N2=self.hash_N2
            )

    @classmethod
    def load(cls, path: Path) -> Survey:
        """Reads one that was saved."""
        with np.load(path, allow_pickle=False) as found:
            return cls(found["names"].tolist(), found["domain_N"], found["hash_N2"])


def survey(rows: Iterable[tuple[str, Document]]) -> Survey:
    """The survey of a part.

    Args:
      rows: (domain, document), in their order.
    """
    names: dict[str, int] = {}
    domains = []
    hashes = []
    for domain, document in rows:
        is_blank = not document.text.strip()
        domains.append(BLANK if is_blank else names.setdefault(domain, len(names)))
        hashes.append(digest(document.text)[:16])
    hash_N2 = np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64).reshape(-1, 2)
    return Survey(list(names), np.array(domains, np.int32), hash_N2)


def is_held_out(hash_N2: np.ndarray) -> np.ndarray:
    """Whether documents are held out where the user does not say which ones: 5 % of all hashes."""
    return hash_N2[..., 0] < _HELD_OUT_BELOW


def bucket_of(hash_N2: np.ndarray, n_buckets: int) -> np.ndarray:
    """The bucket of each hash, 0 to `n_buckets` - 1."""
    return ((hash_N2[..., 0] >> np.uint64(32)) * np.uint64(n_buckets)) >> np.uint64(32)


@dataclasses.dataclass(frozen=True)
class Copies:
    """Documents that are left out, sorted by part and place in it.

    Attributes:
      part_M, row_M: which documents.
      why_M: REPEAT, HELD_OUT_TOO or IN_OTHER_DOMAIN.
    """

    part_M: np.ndarray
    row_M: np.ndarray
    why_M: np.ndarray

    def save(self, path: Path) -> None:
        """Writes them as a whole."""
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Copies:
        """Reads what was saved."""
        with np.load(path, allow_pickle=False) as found:
            return cls(found["part_M"], found["row_M"], found["why_M"])

    def of_part(self, part: int) -> dict[int, int]:
        """The reason by place of a document in its part."""
        first, last = np.searchsorted(self.part_M, [part, part + 1])
        pairs = zip(self.row_M[first:last].tolist(), self.why_M[first:last].tolist(), strict=True)
        return dict(pairs)


def find_copies(
    surveys: Iterable[Survey],
    are_held_out: Sequence[bool],
    domains: Sequence[str],
    buckets: Sequence[int],
    n_buckets: int,
    *,
    keep_repeats: bool,
    across_domains: bool,
) -> dict[int, Copies]:
    """The copies among the documents of some buckets.

    Of several copies the one in the first domain stays, there the one in the first part, there the
    first one.

    Args:
      surveys: of all parts, in order; they are read once, one after the other.
      are_held_out: of each part, whether the user says that it is held out.
      domains: of the corpus, in order; documents of others are ignored.
      buckets: to look at.
      n_buckets: in all.
      keep_repeats: leave out only what is held out too.
      across_domains: also copies in other domains count.

    Returns:
      The copies by bucket.
    """
    columns: list[np.ndarray] = []  # hash, hash, held out, domain, part, row, bucket: uint64
    ranks = {name: i for i, name in enumerate(domains)}
    for part, (one, held_out) in enumerate(zip(surveys, are_held_out, strict=True)):
        rank_G = np.array([ranks.get(name, BLANK) for name in [*one.names, ""]], np.int64)
        rank_G[-1] = BLANK  # where the domain is BLANK
        domain_N = rank_G[one.domain_N]
        bucket_N = bucket_of(one.hash_N2, n_buckets)
        row_M = np.flatnonzero((domain_N != BLANK) & np.isin(bucket_N, buckets))
        of_part = np.full(len(row_M), part), np.full(len(row_M), held_out)
        parts = [
            one.hash_N2[row_M],
            of_part[1],
            domain_N[row_M],
            of_part[0],
            row_M,
            bucket_N[row_M],
        ]
        columns.append(np.column_stack(parts).astype(np.uint64))
    table = np.concatenate([np.zeros((0, 7), np.uint64), *columns])
    why_M = _reasons(table, keep_repeats=keep_repeats, across_domains=across_domains)
    found = {}
    for bucket in buckets:
        chosen = np.flatnonzero((table[:, 6] == bucket) & (why_M > 0))
        chosen = chosen[np.lexsort((table[chosen, 5], table[chosen, 4]))]
        part_M, row_M = table[chosen, 4].astype(np.int64), table[chosen, 5].astype(np.int64)
        found[bucket] = Copies(part_M, row_M, why_M[chosen])
    return found


def _reasons(table: np.ndarray, *, keep_repeats: bool, across_domains: bool) -> np.ndarray:
    """Why each document of a table is left out, int8; 0 if it stays.

    Args:
      table: the columns hash, hash, held out, domain, part, row, ...
      keep_repeats, across_domains: see `find_copies`.
    """
    why = np.zeros(len(table), np.int8)
    hashes = table[:, :2]
    held_out = table[:, 2] == 1
    _, same = np.unique(hashes, axis=0, return_inverse=True)
    same = same.reshape(-1)  # a number for each text
    is_held_out = np.zeros(same.max(initial=-1) + 1, bool)
    is_held_out[same[held_out]] = True
    why[~held_out & is_held_out[same]] = HELD_OUT_TOO
    if keep_repeats:
        return why
    left = np.flatnonzero(why == 0)
    order = left[np.lexsort((*table[left].T[[5, 4, 3, 2]], same[left]))]
    text, side, domain = same[order], table[order, 2], table[order, 3]
    follows = np.zeros(len(order), bool)  # of the same text on the same side
    follows[1:] = (text[1:] == text[:-1]) & (side[1:] == side[:-1])
    in_domain = follows.copy()
    in_domain[1:] &= domain[1:] == domain[:-1]
    if not across_domains:
        why[order[in_domain]] = REPEAT
        return why
    # The domain of the first document with the text.
    first = np.maximum.accumulate(np.where(follows, 0, np.arange(len(order))))
    elsewhere = domain != domain[first] if len(order) else in_domain
    why[order[follows]] = np.where(elsewhere, IN_OTHER_DOMAIN, REPEAT)[follows]
    return why
