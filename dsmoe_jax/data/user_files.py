"""The user's own text: which files a folder holds, which of them are held out, what is left out."""

import hashlib
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsmoe_jax.data.chat import BadRows
from dsmoe_jax.data.documents import Document
from dsmoe_jax.data.fetch import sha256_of
from dsmoe_jax.data.hub_datasets import HubPart
from dsmoe_jax.data.split_names import TEST, TRAIN, VALIDATION, splits_by_name
from dsmoe_jax.data.text_formats import (
    BYTE_ORDER_MARK,
    COMPRESSIONS,
    FORMATS,
    TEXT_COLUMN,
    Rows,
    is_saved_dataset,
    read_file,
    split_name,
)

_DATASET_DICT = "dataset_dict.json"  # in the folder of a DatasetDict, which has one for each split
_KINDS = f"{', '.join(FORMATS)} (plain, {' or '.join(filter(None, COMPRESSIONS))})"


@dataclass(frozen=True)
class TextFile:
    """A file of text, the folder of a saved dataset, or a part of a dataset of the hub.

    `domain` is that of rows that do not name one themselves.
    """

    path: Any  # a Path; in text of a dataset a HubPart, which has no place in a file system
    split: str
    domain: str


@dataclass
class UserText:
    """The files to read, and by reason the paths that were left out."""

    root: Path
    files: list[TextFile]
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    def of(self, split: str) -> list[TextFile]:
        """The files of a split."""
        return [file for file in self.files if file.split == split]

    def leave_out(self, why: str, paths: list[Path]) -> None:
        """Notes that these paths are not read."""
        if paths:
            self.left_out.setdefault(why, []).extend(paths)

    def notes(self) -> list[str]:
        """Lines to print: which text is held out, what was left out."""
        notes = []
        if any(self.of(VALIDATION)):
            trained_on, held_out = (
                self._named([file.path for file in self.of(split)]) for split in (TRAIN, VALIDATION)
            )
            notes.append(f"trained on: {trained_on}; held out: {held_out}")
        if self.left_out:
            parts = [f"{why} {self._named(paths)}" for why, paths in self.left_out.items()]
            notes.append(f"left out: {', '.join(parts)}")
        return notes

    def _named(self, paths: list[Path]) -> str:
        """`4 (a.txt, b.txt, c.txt, ...)`: their number, and the first names below the root."""
        if not paths:
            return "nothing"
        is_one_file = any(file.path == self.root for file in self.files)
        base = self.root.parent if is_one_file else self.root
        names = [shown(os.path.relpath(path, base)) for path in paths]
        more = ", ..." if len(names) > 3 else ""
        return f"{len(names)} ({', '.join(names[:3])}{more})"


def find_text(root: Path, validation: Path | None = None, *, to_train: bool = True) -> UserText:
    """The text at `root`: a file, a saved dataset, or a folder, searched to any depth.

    Links are followed, and each real file is taken once. Left out are hidden files and folders,
    what is not text, the folders of runs and of prepared corpora, and text that is for testing. The
    split of a file is said by its name or by the folders that it is in, see `splits_by_name`.

    Args:
      root: an absolute path.
      validation: text to hold out, whatever its name; that of `root` is left out then.
      to_train: whether there must be text to train on.

    Raises:
      ValueError: if there is nothing to train on, or something cannot be read.
    """
    found = _find(root, _domain_of(root))
    if validation is not None:
        _hold_out(found, _find(validation, _domain_of(root)))
    found.leave_out("test text by name", [file.path for file in found.of(TEST)])
    found.files = [file for file in found.files if file.split != TEST]
    if to_train and not found.of(TRAIN):
        notes = "".join(f"; {note}" for note in found.notes())
        raise ValueError(f"{root}: holds no {_KINDS} file to train on{notes}")
    return found


def _hold_out(found: UserText, validation: UserText) -> None:
    """Makes `validation` the validation text of `found`, instead of its own."""
    real = {os.path.realpath(file.path) for file in validation.files}
    others = [file for file in found.files if os.path.realpath(file.path) not in real]
    replaced = [file.path for file in others if file.split == VALIDATION]
    found.leave_out("validation text that the one given replaces", replaced)
    held_out = [replace(file, split=VALIDATION) for file in validation.files]
    found.files = [file for file in others if file.split != VALIDATION] + held_out


def fingerprint(found: UserText) -> str:
    """Hexadecimal sha256 over the names and contents of all files, their splits and domains.

    Raises:
      ValueError: if one cannot be read.
    """
    hashed = set()
    domain = _domain_of(found.root)
    for file in found.files:
        below = Path(os.path.relpath(file.path, found.root)).parts
        usual = (TRAIN, below[0] if len(below) > 1 else domain)
        # Of the usual split and domain only the name and content count, as they always have.
        is_usual = (file.split, file.domain) == usual
        said = "" if is_usual else f"{file.split} {file.domain}\0"
        hashed |= {(path, said) for path in contents(file.path)}
    total = hashlib.sha256()
    for path, said in sorted(hashed):
        name = os.fsencode(os.path.relpath(path, found.root.parent))
        total.update(said.encode() + name + b"\0" + _sha256_of_text(path).encode() + b"\n")
    return total.hexdigest()


def read_documents(
    files: Iterable[TextFile],
    text_column: str = TEXT_COLUMN,
    read: Callable[[Path | HubPart, str], Rows] = read_file,
) -> dict[str, list[Document]]:
    """Documents by domain.

    A row's `domain` field names its domain; otherwise the file does, see `TextFile`.

    Args:
      files: to read.
      text_column: the field of a row that has its text.
      read: `(path, text_column)` -> the rows of a file, see `row_kinds`.

    Raises:
      ValueError: naming file and place, for anything that is not text; of conversations, for all
        that are none.
    """
    domains: dict[str, list[Document]] = {}
    problems: list[str] = []
    for file in files:
        try:
            for domain, document in read(file.path, text_column):
                domains.setdefault(domain or file.domain, []).append(document)
        except BadRows as error:
            problems += error.problems
    if problems:
        raise BadRows(problems)
    return domains


def _find(root: Path, domain: str) -> UserText:
    """All text at `root`, of every split; `domain` is that of text outside of folders."""
    require_unicode(root)
    if not os.path.lexists(root):
        raise ValueError(f"{root}: no such file or directory")
    is_folder = stat.S_ISDIR(_status(root).st_mode)
    if is_folder and not is_saved_dataset(root):
        return _Search(root, domain).run()
    if not is_folder and not split_name(root.name)[1]:
        raise ValueError(f"{root}: must be a folder or a {_KINDS} file")
    return UserText(root, [TextFile(root, TRAIN, domain)])


@dataclass(frozen=True)
class _Folder:
    """A folder to search; `split` and `domain` are said by it and the folders above, if at all."""

    path: Path
    real: str
    split: str | None = None
    domain: str | None = None


class _Search:
    """A search for text in a folder, through links too; each real file is taken once."""

    def __init__(self, root: Path, domain: str):
        self._found = UserText(root, [])
        self._domain = domain
        self._seen: set[str] = set()
        # Links come last: what a link leads to is known by its own name, if that is in the folder.
        self._folders = deque([_Folder(root, os.path.realpath(root))])
        self._linked_files: list[TextFile] = []

    def run(self) -> UserText:
        """Searches to the end."""
        while self._folders:
            folder = self._folders.popleft()
            if self._is_new(folder.path, folder.real):
                self._search(folder)
        for file in self._linked_files:
            if self._is_new(file.path, os.path.realpath(file.path)):
                self._found.files.append(file)
        self._found.files.sort(key=lambda file: file.path)
        return self._found

    def _search(self, folder: _Folder) -> None:
        names = _names(folder.path)
        if folder.path != self._found.root and _is_own(names):
            return self._leave_out("runs and prepared corpora", folder.path)
        visible = [name for name in names if not name.startswith(".")]
        splits = {}
        if folder.split is None:
            splits = splits_by_name(visible, are_splits=_DATASET_DICT in names)
        for name in visible:
            self._take(folder, folder.path / name, splits.get(name))
        for name in names:
            if name.startswith("."):
                self._leave_out("hidden", folder.path / name)

    def _take(self, folder: _Folder, path: Path, split: str | None) -> None:
        """Takes one entry of a folder, whose name says `split`, or leaves it out."""
        mode = _status(path).st_mode
        is_link = os.path.islink(path)
        real = os.path.realpath(path) if is_link else os.path.join(folder.real, path.name)
        domain = folder.domain
        if stat.S_ISDIR(mode) and split is None:
            domain = domain or path.name
        split = folder.split or split
        if stat.S_ISDIR(mode) and not is_saved_dataset(path):
            put = self._folders.append if is_link else self._folders.appendleft
            put(_Folder(path, real, split, domain))
        elif stat.S_ISDIR(mode) or (stat.S_ISREG(mode) and split_name(path.name)[1]):
            require_unicode(path)
            file = TextFile(path, split or TRAIN, domain or self._domain)
            if is_link:
                self._linked_files.append(file)
            elif self._is_new(path, real):
                self._found.files.append(file)
        elif path.name != _DATASET_DICT:
            self._leave_out("not text", path)

    def _is_new(self, path: Path, real: str) -> bool:
        """Whether a real path was not seen yet; if it was, `path` is left out."""
        if real in self._seen:
            self._leave_out("linked a second time", path)
            return False
        self._seen.add(real)
        return True

    def _leave_out(self, why: str, path: Path) -> None:
        self._found.leave_out(why, [path])


# Of a run (runs/workdir.py), of an experiment (study/results.py), of a prepared corpus (corpus.py).
_OWN_FILES = (
    {"config.json", "metrics.jsonl"},
    {"config.json", "checkpoints"},
    {"metrics.jsonl", "checkpoints"},
    {"results.jsonl", "report.md"},
    {"manifest.json", "tokenizer.json"},
)


def _is_own(names: list[str]) -> bool:
    """Whether a folder with these names was written by a command of this project.

    What a run writes must not change the text that it is trained on.
    """
    return any(own <= set(names) for own in _OWN_FILES)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise _unreadable(folder, error) from error


def _status(path: Path) -> os.stat_result:
    """Status of what is at a path, through links."""
    try:
        return path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ValueError:
    where = f", a link to {os.readlink(path)}" if os.path.islink(path) else ""
    return ValueError(f"{shown(path)}{shown(where)}: cannot be read: {error.strerror}")


def require_unicode(path: Path) -> None:
    """Refuses a path whose bytes are no UTF-8: it could not be written down in the manifest."""
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{shown(path)}: its name is not UTF-8; must be renamed") from None


def shown(name: object) -> str:
    """A path or name as text that can be printed on one line, whatever characters it has."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(name))


def _domain_of(root: Path) -> str:
    """The domain of text that lies directly at `root`."""
    if os.path.isfile(root):
        return split_name(root.name)[0]
    is_dataset = is_saved_dataset(root) or os.path.isfile(root / _DATASET_DICT)
    return (root.name if is_dataset else root.stem) or "text"


def contents(path: Path) -> list[Path]:
    """The files that a text file consists of: itself, or those of a saved dataset."""
    if not path.is_dir():
        return [path]
    with_it = path.parent / _DATASET_DICT
    return [p for p in [with_it, *path.rglob("*")] if p.is_file()]


def _sha256_of_text(path: Path) -> str:
    """Hexadecimal sha256 of a file, without a byte-order mark, which is not part of the text."""
    try:
        with path.open("rb") as file:
            if file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
                return hashlib.sha256(file.read()).hexdigest()
        return sha256_of(path)
    except OSError as error:
        raise _unreadable(path, error) from error
