"""The user's own text: .txt, .jsonl, .parquet, directories of them, saved `datasets`."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from dsmoe_jax.data.documents import Document, cut
from dsmoe_jax.data.fetch import sha256_of

SUFFIXES = (".txt", ".jsonl", ".parquet")
_DATASET_MARKERS = ("dataset_dict.json", "state.json")


def list_files(path: Path) -> list[Path]:
    """The text files at `path` (a file or a directory, searched to any depth), sorted.

    Files with other suffixes in a directory are not text and are left out; a single file must
    have one of SUFFIXES.

    Raises:
      ValueError: if there is nothing to read.
    """
    if not path.exists():
        raise ValueError(f"corpus {path}: no such file or directory")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"corpus {path}: suffix must be one of {', '.join(SUFFIXES)}")
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"corpus {path}: holds no {', '.join(SUFFIXES)} file")
    return files


def is_saved_dataset(path: Path) -> bool:
    """Whether `path` is a directory that Hugging Face's `save_to_disk` wrote."""
    return path.is_dir() and any((path / marker).is_file() for marker in _DATASET_MARKERS)


def fingerprint(path: Path) -> str:
    """Hexadecimal sha256 over the names and contents of all files of a user corpus."""
    if is_saved_dataset(path):
        files = sorted(p for p in path.rglob("*") if p.is_file())
    else:
        files = list_files(path)
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(path.parent)}\0{sha256_of(file)}\n".encode())
    return total.hexdigest()


def read_user_corpus(path: Path) -> dict[str, list[Document]]:
    """Documents by domain.

    A row's `domain` field names its domain; otherwise the first directory below `path` does,
    or, for files that lie directly there, the name of `path` without its suffix.
    A .txt file is cut at line ends into documents of about 16 KB.

    Raises:
      ValueError: naming file and place, for anything that is not text.
    """
    domains: dict[str, list[Document]] = {}
    if is_saved_dataset(path):
        for domain, document in _saved_dataset(path):
            domains.setdefault(domain or path.name, []).append(document)
        return domains
    for file in list_files(path):
        below = file.relative_to(path).parts
        default = below[0] if len(below) > 1 else path.stem
        for domain, document in _READERS[file.suffix](file):
            domains.setdefault(domain or default, []).append(document)
    return domains


def decode_utf8(content: bytes, path: Path, offset: int = 0) -> str:
    """Text of `content`; a ValueError names the file and the byte that is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {offset + error.start} "
            f"(0x{content[error.start]:02x}); convert it, e.g. with iconv -t UTF-8"
        ) from None


def _read_txt(path: Path) -> Iterator[tuple[str | None, Document]]:
    for piece in cut(decode_utf8(path.read_bytes(), path)):
        yield None, Document(piece)


def _read_jsonl(path: Path) -> Iterator[tuple[str | None, Document]]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = decode_utf8(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from None
            yield _row(row, f"{path}:{number}")


def _read_parquet(path: Path) -> Iterator[tuple[str | None, Document]]:
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"{path}: reading .parquet takes pyarrow: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise ValueError(f"{path}: not a Parquet file ({error})") from None
    columns = [name for name in ("text", "domain") if name in file.schema_arrow.names]
    number = 0
    for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield _row(row, f"{path} row {number}")


def _saved_dataset(path: Path) -> Iterator[tuple[str | None, Document]]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"{path}: reading a saved dataset takes Hugging Face's datasets: pip install datasets"
        ) from None
    loaded = datasets.load_from_disk(str(path))
    parts = loaded if isinstance(loaded, dict) else {"rows": loaded}
    for name in sorted(parts):
        for number, row in enumerate(parts[name]):
            yield _row(row, f"{path} {name} row {number}")


def _row(row: object, place: str) -> tuple[str | None, Document]:
    """Domain (or None) and document of one row; `place` is for the message of a ValueError."""
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{place}: needs a field 'text' with a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{place}: 'text' has a lone surrogate, which is not Unicode") from None
    domain = row.get("domain") if isinstance(row, dict) else None
    if not isinstance(domain, str | None):
        raise ValueError(f"{place}: 'domain' must be a string, not {domain!r}")
    return domain, Document(text)


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
