"""One file of text -> its documents: .txt, .jsonl, .parquet, plain or compressed; saved `datasets`.

A reader yields rows: the domain that the row names (or None), and the document.  `rows_of` yields
the rows themselves, for documents that are no single field of text.
"""

import gzip
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from dsmoe_jax.data.documents import Document, cut
from dsmoe_jax.data.hub_datasets import HubPart

T = TypeVar("T")
Rows = Iterator[tuple[str | None, Document]]
TEXT_COLUMN = "text"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def split_name(name: str) -> tuple[str, str, str]:
    """Stem, format and compression of a file name, whose suffixes may be in capitals.

    `a.JSONL.gz` is ('a', '.jsonl', '.gz'); what is not text has the format ''.
    """
    stem, suffix = os.path.splitext(name)
    compression = suffix.lower() if suffix.lower() in COMPRESSIONS else ""
    if compression:
        stem, suffix = os.path.splitext(stem)
    return (stem, suffix.lower(), compression) if suffix.lower() in FORMATS else (name, "", "")


def is_saved_dataset(path: Path) -> bool:
    """Whether `path` is a folder that `save_to_disk` of Hugging Face's `datasets` wrote.

    A `DatasetDict` is a folder that holds such a folder for each of its splits.
    """
    return all(os.path.isfile(path / name) for name in ("state.json", "dataset_info.json"))


def read_file(path: Path | HubPart, text_column: str = TEXT_COLUMN) -> Rows:
    """Rows of a file of text, or of the folder of a saved dataset.

    A .txt file is cut at line ends into documents of about 16 KB; elsewhere a row is a document.

    Args:
      path: of the file or folder; or a part of a dataset that `datasets` reads.
      text_column: field of a row that holds the text; a field `domain` may name its domain.

    Raises:
      ValueError: naming file and row, for what is damaged or not text.
    """
    if isinstance(path, HubPart):
        return _read_hub_part(path, text_column)
    if path.is_dir():
        return _read_saved_dataset(path, text_column)
    return FORMATS[split_name(path.name)[1]](path, text_column)


class NotJSON(NamedTuple):
    """In place of a row: what is wrong with its line."""

    problem: str


def rows_of(path: Path | HubPart) -> Iterator[tuple[str, Any]]:
    """(place, row) of a file of rows, or of the folder of a saved dataset; all of their fields.

    A line that is not JSON is a `NotJSON`, and the rows after it follow.

    Raises:
      ValueError: naming the file, for one that is damaged or has no rows.
    """
    if isinstance(path, HubPart):
        return _numbered(path.rows(), f"{path} row ")
    if path.is_dir():
        return _numbered(_saved_rows(path), f"{path} row ")
    suffix = split_name(path.name)[1]
    if suffix not in _ROWS:
        raise ValueError(f"{path}: has no rows; must be {' or '.join(_ROWS)}")
    return _ROWS[suffix](path)


def domain_of(row: dict[str, Any]) -> str | None:
    """The domain that a row names, if any.

    Raises:
      ValueError: if it is not a string.
    """
    domain = row.get("domain")
    if not isinstance(domain, str | None):
        raise ValueError(f"'domain' must be a string, not {domain!r}")
    check_unicode("'domain'", domain or "")
    return domain


def check_unicode(name: str, text: str) -> None:
    """Refuses text that is not Unicode, which JSON can spell.

    Raises:
      ValueError: naming it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} has a lone surrogate, which is not Unicode") from None


def one_line(error: BaseException) -> str:
    """The message of an error, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _read_txt(path: Path, text_column: str) -> Rows:
    text = "".join(line for _, line in _lines(path))
    for piece in cut(text):
        yield None, Document(piece, place=str(path))


def _read_jsonl(path: Path, text_column: str) -> Rows:
    for place, row in _jsonl_rows(path):
        if isinstance(row, NotJSON):
            raise ValueError(f"{place}: {row.problem}")
        yield _row(row, text_column, path, place)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for place, line in _lines(path):
        if line.strip():
            yield place, _parsed(line)


def _parsed(line: str) -> Any:
    """The row of a line, or a `NotJSON`."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return NotJSON(f"not JSON ({error.msg})")
    except RecursionError:
        return NotJSON("not JSON that can be read (nested too deep)")
    except ValueError as error:  # a number of too many digits
        return NotJSON(f"not JSON that can be read ({error})")


def _read_parquet(path: Path, text_column: str) -> Rows:
    for place, row in _numbered(_parquet_rows(path, text_column), f"{path} row "):
        yield _row(row, text_column, path, place)


def _all_of_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    return _numbered(_parquet_rows(path), f"{path} row ")


def _parquet_rows(path: Path, text_column: str | None = None) -> Iterator[dict[str, Any]]:
    """Rows with the columns of text and domain; without a column of text, with all columns."""
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("this takes pyarrow: pip install pyarrow") from None
    with _open(path) as source, parquet.ParquetFile(
        source, page_checksum_verification=True
    ) as file:  # fmt: skip
        names = file.schema_arrow.names
        if text_column is not None and text_column not in names:
            raise ValueError(_lacks_column(text_column, names))
        wanted = names if text_column is None else (text_column, "domain")
        columns = [name for name in wanted if name in names]
        # Small batches, since an error is known to be in one of its rows only.
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            # One by one: a value that is not UTF-8 is an error in its own row.
            for values in zip(*(batch[name] for name in columns), strict=True):
                yield dict(zip(columns, (value.as_py() for value in values), strict=True))


def _read_saved_dataset(path: Path, text_column: str) -> Rows:
    for place, row in _numbered(_saved_rows(path), f"{path} row "):
        yield _row(row, text_column, path, place)


def _read_hub_part(path: HubPart, text_column: str) -> Rows:
    for place, row in _numbered(path.rows(), f"{path} row "):
        yield _row(row, text_column, path, place)


def _saved_rows(path: Path) -> Iterator[Any]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("this takes Hugging Face's datasets: pip install datasets") from None
    yield from datasets.load_from_disk(str(path))


def _row(
    row: object, text_column: str, path: Path | HubPart, place: str
) -> tuple[str | None, Document]:
    """Domain (or None) and document of one row; `place` is for the message of a ValueError."""
    fields = row if isinstance(row, dict) else {}
    text = fields.get(text_column)
    if not isinstance(text, str):
        raise ValueError(f"{place}: {_lacks_column(text_column, list(fields))}")
    try:
        check_unicode(repr(text_column), text)
        domain = domain_of(fields)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return domain, Document(text, place=str(path))


def _lacks_column(text_column: str, names: list[Any]) -> str:
    """The error for a row or table of these columns whose text is not in `text_column`."""
    wanted = f"needs a field {text_column!r} with a string"
    if not names or text_column in names:
        return wanted
    return f"{wanted} (it has {', '.join(map(str, names[:6]))}); text_column=NAME takes another one"


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(`path:line`, the line) of a text file, without a byte-order mark."""
    offset = 0
    for place, line in _numbered(_raw_lines(path), f"{path}:"):
        if offset == 0 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(
                f"{place}: UTF-16, as its byte-order mark says; convert it, e.g. with"
                " iconv -f UTF-16 -t UTF-8"
            )
        start = len(BYTE_ORDER_MARK) if offset == 0 and line.startswith(BYTE_ORDER_MARK) else 0
        yield place, _decode_utf8(line[start:], place, offset + start)
        offset += len(line)


def _raw_lines(path: Path) -> Iterator[bytes]:
    with _open(path) as file:
        yield from file


def _decode_utf8(content: bytes, place: str, offset: int) -> str:
    """Text of `content`, which begins at byte `offset` of its file."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: not UTF-8 at byte {offset + error.start} "
            f"(0x{content[error.start]:02x}); convert it, e.g. with iconv -t UTF-8"
        ) from None


def _numbered(items: Iterable[T], prefix: str) -> Iterator[tuple[str, T]]:
    """(place, item), the place being `prefix` and the item's number from 1.

    Raises:
      ValueError: naming the place, for whatever error the items raise.
    """
    iterator = iter(items)
    number = 0
    while True:
        number += 1
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # gzip, zstandard, pyarrow and datasets raise many types
            raise ValueError(f"{prefix}{number}: cannot be read: {one_line(error)}") from error
        yield f"{prefix}{number}", item


def _open(path: Path) -> BinaryIO:
    """Opens a file for reading its content, decompressed."""
    return COMPRESSIONS[split_name(path.name)[2]](path)


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb")


def _open_gzip(path: Path) -> Any:
    return gzip.open(path)


def _open_zstandard(path: Path) -> BinaryIO:
    """The content of a .zst file, of one frame or several.

    Raises:
      EOFError: if the file is cut; `zstandard.open` would read what is there without a word.
    """
    try:
        import zstandard  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("this takes zstandard: pip install zstandard") from None
    content = io.BytesIO()
    rest = path.read_bytes()
    while rest:
        frame = zstandard.ZstdDecompressor().decompressobj()
        content.write(frame.decompress(rest))
        if not frame.eof:
            raise EOFError("the file ends within its last frame")
        rest = frame.unused_data
    content.seek(0)
    return content


FORMATS: dict[str, Callable[[Path, str], Rows]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
"""Readers by the suffix of a file."""

_ROWS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl_rows,
    ".parquet": _all_of_parquet,
}

COMPRESSIONS: dict[str, Callable[[Path], BinaryIO]] = {
    "": _open_plain,
    ".gz": _open_gzip,
    ".zst": _open_zstandard,
}
"""Functions that open a file, by the suffix that may follow that of its format."""
