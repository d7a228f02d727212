"""A prepared corpus in one file, for a machine without a network: FILE.tar.xz.

It holds these members, in this order, and nothing else:

    manifest.json, tokenizer.json    as in the directory, see corpus.py
    train.tokens, validation.tokens  the records, domain by domain: number of tokens, domain, tokens

Numbers are little-endian and of 16 bits where that is enough, so that the compressor sees what the
int32 shards hide, each record of which is compressed by itself.

Nothing in the archive becomes a path: members are read in their order, by their names, and written
as any corpus is.  Damage is found by the checksum of xz, other content by the fingerprint.
"""

import lzma
import os
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_jax.data import corpus as corpus_format
from dsmoe_jax.data.corpus import Corpus, load_corpus, parse_manifest, write_corpus
from dsmoe_jax.data.directories import make_whole
from dsmoe_jax.data.packing import decode_record, encode_record, read_records

SUFFIX = ".tar.xz"
# Two-byte numbers: literals and matches at even places.  A dictionary that holds the whole.
_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 64 * 2**20, "lc": 3, "lp": 1, "pb": 1}
]
_LARGEST_JSON = 64 * 2**20  # bytes of a manifest or tokenizer


def pack(corpus: Corpus, file: Path) -> int:
    """Writes a prepared corpus into one file, which appears only when it is whole.

    Args:
      corpus: to pack.
      file: to make; its name ends in .tar.xz.

    Returns:
      Its size in bytes.

    Raises:
      ValueError: if the file exists or its name ends otherwise.
    """
    check_new(file)
    if corpus.records_by_shard("train") is not None:
        raise ValueError(
            f"corpus {corpus.directory}: was prepared in parts; must be prepared without --shards"
            " to be packed into one file"
        )
    partial = file.with_name(f".{file.name}.partial")
    try:
        with lzma.open(partial, "wb", filters=_FILTERS) as stream:
            _write(corpus, stream)
        size = partial.stat().st_size
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return size


def packed_bytes(corpus: Corpus) -> int:
    """Size in bytes of the file that `pack` makes."""
    stream = BytesIO()
    with lzma.open(stream, "wb", filters=_FILTERS) as compressed:
        _write(corpus, compressed)
    return stream.tell()


def check_new(file: Path) -> None:
    """Refuses a name of a packed corpus that ends otherwise or is taken.

    Raises:
      ValueError: naming the file.
    """
    if not file.name.endswith(SUFFIX):
        raise ValueError(f"{file}: the name of a packed corpus must end in {SUFFIX}")
    if file.exists():
        raise ValueError(f"{file}: exists already; name a new file")


def is_packed(path: Path) -> bool:
    """Whether a path is a packed corpus by its name."""
    return path.name.endswith(SUFFIX) and path.is_file()


def unpack(file: Path, directory: Path) -> Corpus:
    """Makes the prepared corpus of a packed one; `directory` appears only when it is whole.

    What is there already is opened.

    Raises:
      ValueError: if the file is damaged or not a packed corpus.
    """
    make_whole(directory, directory.exists, lambda building: _unpack(file, building))
    return load_corpus(directory)


def _write(corpus: Corpus, stream: Any) -> None:
    """Writes the members of the archive, uncompressed."""
    dtype = _dtype(corpus.manifest)
    with tarfile.open(fileobj=stream, mode="w|") as archive:
        for name in (corpus_format.MANIFEST, corpus_format.TOKENIZER):
            _add(archive, name, (corpus.directory / name).read_bytes())
        for split in corpus_format.SPLITS:
            by_domain = _by_domain(read_records(corpus.shards(split)), len(corpus.domains))
            parts = [_encode(record, dtype) for records in by_domain for record in records]
            _add(archive, f"{split}.tokens", b"".join(parts))


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time and no owner: the same corpus gives the same file
    member.size = len(content)
    archive.addfile(member, BytesIO(content))


def _dtype(manifest: dict[str, Any]) -> np.dtype:
    """The type of all numbers of a record: 16 bits if its ids, length and domain fit."""
    largest = max(manifest["vocab_size"], manifest["sequence_length"] + 1, len(manifest["domains"]))
    fits = largest < 2**16 and not manifest.get("answers_only", False)  # whose ids have marks
    return np.dtype("<u2" if fits else "<u4")


def _encode(record: bytes, dtype: np.dtype) -> bytes:
    domain, tokens = decode_record(record)
    return np.concatenate([[len(tokens), domain], tokens]).astype(dtype).tobytes()


def _by_domain(records: Iterator[bytes], n_domains: int) -> list[list[bytes]]:
    found: list[list[bytes]] = [[] for _ in range(n_domains)]
    for record in records:
        found[decode_record(record)[0]].append(record)
    return found


def _unpack(file: Path, directory: Path) -> None:
    try:
        members = _read(file)
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{file}: damaged ({error}); copy it again") from error
    manifest = _manifest(members[corpus_format.MANIFEST], file)
    records = {
        split: _by_domain(
            _decode(members[f"{split}.tokens"], manifest, file), len(manifest["domains"])
        )
        for split in corpus_format.SPLITS
    }
    about = {
        key: value
        for key, value in manifest.items()
        if key not in ("format", "fingerprint", "splits")
    }
    tokenizer_json = members[corpus_format.TOKENIZER].decode("utf-8")
    found = write_corpus(directory, tokenizer_json, records, about)
    if found != manifest["fingerprint"]:
        raise ValueError(
            f"{file}: its records have the fingerprint {found[:12]}, its manifest says"
            f" {str(manifest['fingerprint'])[:12]}; pack the corpus again"
        )
    load_corpus(directory)  # or it would appear and be refused ever after


def _manifest(content: bytes, file: Path) -> dict[str, Any]:
    """The manifest in the archive, of which `_dtype` and `_limit` can make use."""
    manifest = parse_manifest(content, file)
    domains = manifest["domains"]
    splits = manifest["splits"]
    try:
        numbers = [splits[split]["records"] for split in corpus_format.SPLITS]
    except (KeyError, TypeError):
        numbers = [None]
    numbers += [manifest["vocab_size"], manifest["sequence_length"]]
    if not isinstance(domains, list) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{file}: its manifest is none of a packed corpus")
    return manifest


def _limit(manifest: dict[str, Any], split: str) -> int:
    """The most bytes that the records of a split can have."""
    numbers = manifest["sequence_length"] + 3
    return manifest["splits"][split]["records"] * numbers * _dtype(manifest).itemsize


def _read(file: Path) -> dict[str, bytes]:
    """Content of the members by name."""
    members: dict[str, bytes] = {}
    with lzma.open(file) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for name in (corpus_format.MANIFEST, corpus_format.TOKENIZER):
            members[name] = _member(archive, name, _LARGEST_JSON, file)
        manifest = _manifest(members[corpus_format.MANIFEST], file)
        for split in corpus_format.SPLITS:
            name = f"{split}.tokens"
            members[name] = _member(archive, name, _limit(manifest, split), file)
        if (more := archive.next()) is not None:
            raise ValueError(f"{file}: has a member {more.name!r} that no packed corpus has")
        while stream.read(2**20):  # to the end, where xz has its checksum
            pass
    return members


def _member(archive: tarfile.TarFile, name: str, limit: int, file: Path) -> bytes:
    """Content of the next member, which must be a regular file of this name."""
    member = archive.next()
    if member is None or member.name != name or member.type != tarfile.REGTYPE:
        found = "nothing" if member is None else f"the member {member.name!r}"
        raise ValueError(f"{file}: no packed corpus, has {found} in place of the file {name!r}")
    if member.size > limit:
        raise ValueError(f"{file}: {name} has {member.size} bytes, more than it can have ({limit})")
    content = archive.extractfile(member)
    assert content is not None, "a regular file"
    return content.read()


def _decode(content: bytes, manifest: dict[str, Any], file: Path) -> Iterator[bytes]:
    """The records of a split, as shards have them.

    Raises:
      ValueError: if they are none of this manifest's.
    """
    dtype = _dtype(manifest)
    wrong = ValueError(f"{file}: holds records that do not fit its manifest; pack the corpus again")
    if len(content) % dtype.itemsize:
        raise wrong
    numbers = np.frombuffer(content, dtype).astype(np.int32)
    at = 0
    while at < len(numbers):
        end = at + 2 + int(numbers[at])
        if end > len(numbers) or end < at + 4 or numbers[at + 1] >= len(manifest["domains"]):
            raise wrong
        yield encode_record(int(numbers[at + 1]), numbers[at + 2 : end])
        at = end
