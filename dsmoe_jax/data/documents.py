"""Documents: the unit in which text is read, held out and packed.

A reader yields `Document`s. `choose` then decides, from content alone and so the same way on
every machine, which of them are kept (a cap per domain) and which are held out for validation.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

VALIDATION_FRACTION = 0.05
PIECE_BYTES = 16_384


@dataclass(frozen=True)
class Document:
    """One text that the model sees as a whole.

    Documents with the same `group` are near-duplicates or parts of one work: they land on the
    same side of the train / validation split. Without a group a document stands for itself.
    """

    text: str
    group: str | None = None


@dataclass(frozen=True)
class Split:
    """The texts of one domain, in the order in which they are packed."""

    train: list[str]
    validation: list[str]


def num_bytes(text: str) -> int:
    """Number of UTF-8 bytes of `text`."""
    return len(text.encode("utf-8"))


def cut(text: str, piece_bytes: int = PIECE_BYTES) -> Iterator[str]:
    """Cuts one long text at line ends into pieces of about `piece_bytes` UTF-8 bytes.

    The pieces joined give `text` again. A single longer line stays whole. It is for sources that
    are one file without document boundaries.
    """
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if size and size + num_bytes(line) > piece_bytes:
            yield "".join(piece)
            piece = []
            size = 0
        piece.append(line)
        size += num_bytes(line)
    if piece:
        yield "".join(piece)


def choose(
    documents: Iterable[Document],
    domain: str,
    max_bytes: int | None = None,
    validation_fraction: float = VALIDATION_FRACTION,
) -> Split:
    """Drops empty texts and exact repeats, caps the domain and holds out whole groups.

    Groups are ordered by the sha256 of their text, which is a shuffle that depends on nothing
    but content. Validation takes, in that order, every group that still fits into
    `validation_fraction` of the bytes (the smallest group if none fits); training takes the
    others until `max_bytes` are reached in all.

    Raises:
      ValueError: if the domain has fewer than two groups: one side would be empty.
    """
    groups = _group(documents)
    if len(groups) < 2:
        found = "no text" if not groups else "one document only"
        raise ValueError(
            f"domain {domain!r} is too small: {found}; it takes at least two documents, "
            "one to train on and one to hold out"
        )
    ordered = [groups[key] for key in sorted(groups)]
    sizes = [sum(map(num_bytes, texts)) for texts in ordered]
    total = min(sum(sizes), max_bytes) if max_bytes else sum(sizes)
    held_out = _first_fit(sizes, total * validation_fraction)
    validation: list[str] = []
    train: list[str] = []
    used = sum(sizes[i] for i in held_out)
    for i, texts in enumerate(ordered):
        if i in held_out:
            validation += texts
        elif not train or used < total:
            train += texts
            used += sizes[i]
    return Split(train, validation)


def _group(documents: Iterable[Document]) -> dict[str, list[str]]:
    """Texts by group, keyed by the sha256 of the group's texts; repeats and blanks dropped."""
    seen: set[bytes] = set()
    by_group: dict[str | bytes, list[str]] = {}
    for document in documents:
        digest = hashlib.sha256(document.text.encode("utf-8")).digest()
        if digest in seen or not document.text.strip():
            continue
        seen.add(digest)
        key = digest if document.group is None else document.group
        by_group.setdefault(key, []).append(document.text)
    return {
        hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest(): texts
        for texts in by_group.values()
    }


def _first_fit(sizes: list[int], max_bytes: float) -> set[int]:
    """Indices of the groups to hold out: all that fit into `max_bytes`, at least one."""
    chosen: set[int] = set()
    used = 0
    for i, size in enumerate(sizes):
        if used + size <= max_bytes:
            chosen.add(i)
            used += size
    return chosen or {min(range(len(sizes)), key=lambda i: sizes[i])}
