"""Documents: the unit in which text is read, held out and packed.

A reader yields `Document`s. `choose` then decides, from content alone and so the same way on
every machine, which of them are kept (a cap per domain) and which are held out for validation.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

VALIDATION_FRACTION = 0.05
PIECE_BYTES = 16_384


@dataclass(frozen=True)
class Document:
    """One text that the model sees as a whole.

    Documents with the same `group` are near-duplicates or parts of one work: they land on the
    same side of the train / validation split. Without a group a document stands for itself.
    `place` is the file that it was read from, for errors.
    """

    text: str
    group: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Split:
    """The texts of one domain, in the order in which they are packed, and what was left out.

    `repeats` are exact copies of other documents of the domain, `blank` documents have no text,
    `held_out_too` would be trained on but are in the validation text that the user gave,
    `in_other_domains` are exact copies of documents of domains before this one.
    """

    train: list[str]
    validation: list[str]
    repeats: int = 0
    blank: int = 0
    held_out_too: int = 0
    in_other_domains: int = 0


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
    keep_repeats: bool = False,
) -> Split:
    """Drops empty texts and exact repeats, caps the domain and holds out whole groups.

    Groups are ordered by the sha256 of their text, which is a shuffle that depends on nothing
    but content. Validation takes, in that order, every group that still fits into
    `validation_fraction` of the bytes (the smallest group if none fits); training takes the
    others until `max_bytes` are reached in all.

    Args:
      documents: of the domain.
      domain: its name, for errors.
      max_bytes: cap in UTF-8 bytes; None is no cap.
      validation_fraction: of the bytes.
      keep_repeats: whether copies of a document are kept, on the side of the first one.

    Raises:
      ValueError: if the domain has fewer than two groups: one side would be empty.
    """
    kept = _Kept(documents, keep_repeats)
    ordered = kept.groups()
    if len(ordered) < 2:
        raise ValueError(f"domain {domain!r} is too small: {kept.too_few()}")
    sizes = [sum(map(num_bytes, texts)) for texts in ordered]
    total = min(sum(sizes), max_bytes) if max_bytes else sum(sizes)
    held_out = _first_fit(sizes, total * validation_fraction)
    validation = [text for i in sorted(held_out) for text in ordered[i]]
    rest = [texts for i, texts in enumerate(ordered) if i not in held_out]
    train = _up_to(rest, total - sum(map(num_bytes, validation)))
    return Split(train, validation, kept.repeats, kept.blank)


def choose_with_validation(
    train: Iterable[Document],
    validation: Iterable[Document],
    held_out: Collection[bytes],
    max_bytes: int | None = None,
    keep_repeats: bool = False,
) -> Split:
    """Like `choose`, where the user says which documents are held out.

    Args:
      train: documents of the domain to train on; those in `held_out` are left out.
      validation: its documents to hold out, all of them.
      held_out: the `digest` of every document that is held out, in whichever domain.
      max_bytes: cap on the text to train on, in UTF-8 bytes; None is no cap.
      keep_repeats: whether copies of a document are kept.
    """
    kept = _Kept(train, keep_repeats, held_out)
    kept_validation = _Kept(validation, keep_repeats)
    return Split(
        _up_to(kept.groups(), max_bytes),
        _up_to(kept_validation.groups()),
        kept.repeats + kept_validation.repeats,
        kept.blank + kept_validation.blank,
        kept.held_out_too,
    )


def digest(text: str) -> bytes:
    """sha256 of a text: the same for exact repeats only."""
    return hashlib.sha256(text.encode("utf-8")).digest()


class OtherDomains:
    """Leaves out documents that are exact copies of those of the domains before.

    Args:
      held_out: the `digest` of documents that are left out anyway.
    """

    def __init__(self, held_out: Collection[bytes] = ()):
        self.left_out = 0
        self._domain_of: dict[bytes, str] = {}
        self._held_out = held_out

    def without_copies(self, documents: Iterable[Document], domain: str) -> Iterator[Document]:
        """The documents of the next domain; those that are left out are counted in `left_out`."""
        self.left_out = 0
        for document in documents:
            key = digest(document.text)
            is_read = bool(document.text.strip()) and key not in self._held_out
            if is_read and self._domain_of.setdefault(key, domain) != domain:
                self.left_out += 1
            else:
                yield document


class _Kept:
    """The documents that are kept, by group, and how many were left out."""

    def __init__(
        self, documents: Iterable[Document], keep_repeats: bool, held_out: Collection[bytes] = ()
    ):
        self.repeats = 0
        self.blank = 0
        self.held_out_too = 0
        self._by_group: dict[str | bytes, list[str]] = {}
        self._places: dict[str, None] = {}  # an ordered set
        group_of: dict[bytes, str | bytes] = {}
        for document in documents:
            key = digest(document.text)
            if document.place is not None:
                self._places[document.place] = None
            if not document.text.strip():
                self.blank += 1
            elif key in held_out:
                self.held_out_too += 1
            elif key in group_of and not keep_repeats:
                self.repeats += 1
            else:
                # A copy goes into the group of the first one: to the same side of the split.
                own = key if document.group is None else document.group
                group = group_of.setdefault(key, own)
                self._by_group.setdefault(group, []).append(document.text)

    def groups(self) -> list[list[str]]:
        """Texts by group, ordered by the sha256 of the group's texts."""

        def key(texts: list[str]) -> bytes:
            return digest("\0".join(dict.fromkeys(texts)))  # the same however many copies there are

        return sorted(self._by_group.values(), key=key)

    def too_few(self) -> str:
        """The error for fewer than two groups: what is wrong, and what would be right."""
        found = "one document only" if self._by_group else "no text"
        if self._places:
            found += f", in {', '.join([*self._places][:3])}"
        if self.repeats:
            found += f", and {self.repeats} exact copies of it"
        return (
            f"{found}; it takes at least two different documents, one to train on and one to hold"
            " out, or a validation text of its own (validation=PATH)"
        )


def _up_to(groups: Iterable[list[str]], max_bytes: int | None = None) -> list[str]:
    """The texts of groups until `max_bytes` are reached, of the first one at least."""
    texts: list[str] = []
    used = 0
    for group in groups:
        if max_bytes is None or not texts or used < max_bytes:
            texts += group
            used += sum(map(num_bytes, group))
    return texts


def _first_fit(sizes: list[int], max_bytes: float) -> set[int]:
    """Indices of the groups to hold out: all that fit into `max_bytes`, at least one."""
    chosen: set[int] = set()
    used = 0
    for i, size in enumerate(sizes):
        if used + size <= max_bytes:
            chosen.add(i)
            used += size
    return chosen or {min(range(len(sizes)), key=lambda i: sizes[i])}
