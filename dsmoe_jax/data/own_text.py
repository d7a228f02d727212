"""The user's own text: files and folders (user_files.py), or a dataset (hub_datasets.py)."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from dsmoe_jax.data import hub_datasets, user_files
from dsmoe_jax.data.documents import Document
from dsmoe_jax.data.hub_datasets import is_hub_dataset
from dsmoe_jax.data.local_copies import local_copy
from dsmoe_jax.data.row_kinds import RowKind
from dsmoe_jax.data.split_names import TEST, TRAIN, VALIDATION, splits_by_name
from dsmoe_jax.data.user_files import TextFile, UserText
from dsmoe_jax.storage.places import is_address, place_of


class DatasetText(UserText):
    """The splits of a dataset that are read, and those that were left out."""

    def _named(self, paths: Iterable[object]) -> str:
        names = [user_files.shown(path) for path in paths]
        return f"{len(names)} ({', '.join(names)})" if names else "nothing"


def find(corpus: str, validation: str | None = None, *, to_train: bool = True) -> UserText:
    """The text of a corpus: see `user_files.find_text`, whose rules hold for a dataset too.

    Args:
      corpus: an absolute path, or `hf:...`.
      validation: the same, of the text to hold out.
      to_train: whether there must be text to train on.

    Raises:
      ValueError: if there is nothing to train on, or something cannot be read.
    """
    names = [name for name in (corpus, validation) if name is not None]
    if not any(map(is_hub_dataset, names)):
        held_out = None if validation is None else Path(validation)
        return user_files.find_text(Path(corpus), held_out, to_train=to_train)
    found = _one(corpus)
    if validation is not None:
        replaced = [file for file in found.files if file.split == VALIDATION]
        found.leave_out("validation text that the one given replaces", [f.path for f in replaced])
        held_out = [dataclasses.replace(file, split=VALIDATION) for file in _one(validation).files]
        found.files = [file for file in found.files if file.split == TRAIN] + held_out
    if to_train and not found.of(TRAIN):
        raise ValueError(f"{corpus}: has no split to train on")
    return found


def _one(corpus: str) -> UserText:
    """The text of one path or dataset; all of it, if it names a split."""
    if not is_hub_dataset(corpus):
        found = user_files.find_text(Path(corpus), to_train=False)
        return DatasetText(found.root, found.files, found.left_out)
    dataset = hub_datasets.parse(corpus)
    parts = dataset.parts()
    names = [str(part.dataset.split) for part in parts]
    splits = splits_by_name(names, are_splits=True)
    if dataset.split is not None:
        splits = {dataset.split: TRAIN}
    files = [
        TextFile(part, splits[name], dataset.stem) for part, name in zip(parts, names, strict=True)
    ]
    found = DatasetText(Path(dataset.name), [f for f in files if f.split != TEST])
    found.leave_out("test text by name", [f.path for f in files if f.split == TEST])
    return found


def fingerprint(found: UserText, text_column: str, kind: RowKind) -> str:
    """Hexadecimal sha256 of all text; of files over names and contents.

    A dataset is read for it, row by row.

    Args:
      found: the text.
      text_column: the field of a row that has its text.
      kind: of the rows.
    """
    if not isinstance(found, DatasetText):
        return user_files.fingerprint(found)
    hashes: dict[tuple[str, str], hashlib._Hash] = {}
    for file in found.files:
        for domain, document in kind.read(file.path, text_column):
            _add(hashes, file.split, domain or file.domain, document)
    return _total(hashes)


def fingerprint_of_read(
    found: UserText, by_split: Mapping[str, Mapping[str, list[Document]]]
) -> str:
    """The same of text that has been read: of a dataset it need not be read again.

    Args:
      found: the text.
      by_split: the documents by split and domain.
    """
    if not isinstance(found, DatasetText):
        return user_files.fingerprint(found)
    hashes: dict[tuple[str, str], hashlib._Hash] = {}
    for split, by_domain in by_split.items():
        for domain, documents in by_domain.items():
            for document in documents:
                _add(hashes, split, domain, document)
    return _total(hashes)


def listing(found: UserText) -> str:
    """Hexadecimal sha256 over the names and sizes of all files: nothing is read."""
    total = hashlib.sha256()
    for file in found.files:
        total.update(f"{file.split} {file.domain} {_name_and_size(file)}\n".encode())
    return total.hexdigest()


def _name_and_size(file: TextFile) -> str:
    if isinstance(file.path, hub_datasets.HubPart):
        return str(file.path)
    return f"{file.path} {sum(path.stat().st_size for path in user_files.contents(file.path))}"


def _add(hashes: dict, split: str, domain: str, document: Document) -> None:
    text = document.text.encode("utf-8")
    total = hashes.setdefault((split, domain), hashlib.sha256())
    total.update(len(text).to_bytes(8, "little") + text)


def _total(hashes: dict) -> str:
    total = hashlib.sha256()
    for (split, domain), one in sorted(hashes.items(), key=lambda item: item[0]):
        total.update(f"{split} {domain}\0{one.hexdigest()}\n".encode())
    return total.hexdigest()


def located(corpus: str | os.PathLike[str], key: str) -> str:
    """The absolute path of text, its address in a bucket, or the full name of a dataset.

    Args:
      corpus: as the user wrote it.
      key: what the user calls it, for errors.

    Raises:
      ValueError: if it is neither.
    """
    text = os.fspath(corpus)
    if is_hub_dataset(text):
        return str(hub_datasets.parse(text, key))
    return str(place_of(key, text) if is_address(text) else absolute(text, key))


def readable(corpus: str | os.PathLike[str], key: str) -> str:
    """As `located`; of text in a bucket the path of its copy on this machine."""
    text = os.fspath(corpus)
    return str(hub_datasets.parse(text, key) if is_hub_dataset(text) else absolute(text, key))


def absolute(path: str | os.PathLike, key: str) -> Path:
    """The absolute path of a corpus or of what belongs to it, or of its copy, without "..".

    Args:
      path: as the user wrote it.
      key: what the user calls it, for errors.

    Raises:
      ValueError: if it is no path of a file system or in a bucket, or not UTF-8 as a manifest is.
    """
    found = Path(os.path.abspath(local_copy(key, os.fspath(path))))
    user_files.require_unicode(found)
    return found
